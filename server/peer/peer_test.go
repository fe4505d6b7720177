package peer_test

import (
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"testing"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/server/peer"
)

// listeners returns n of them, with their addresses.
func listeners(t *testing.T, n int) (all []net.Listener, addresses []string) {
	t.Helper()
	for range n {
		l := listen(t)
		all = append(all, l)
		addresses = append(addresses, l.Addr().String())
	}
	return all, addresses
}

// TestFounding starts 3 and 5 servers in random orders, one of them late: it is one
// cluster of all, and the last one that is started is what the others wait for.
func TestFounding(t *testing.T) {
	for _, n := range []int{1, 3, 5} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			w, key := newWorld(), ca.GenerateClusterKey()
			all, addresses := listeners(t, n)
			for _, l := range all {
				_ = l.Close() // it is refused there until the server is started
			}
			order := rand.Perm(n)
			hosts := make([]*host, n)
			for i, at := range order {
				if i == n-1 && n > 1 {
					last := hosts[order[0]]
					until(t, "the others wait for "+addresses[at], func() bool {
						return strings.HasPrefix(last.Waiting(), fmt.Sprintf("%d servers: have", n)) && strings.Count(last.Waiting(), "srv-") == n-1 &&
							strings.HasSuffix(last.Waiting(), addresses[at]+": connect: connection refused")
					})
					if w.founded() != 0 {
						t.Fatal("a cluster was founded before all were there")
					}
				}
				hosts[at] = start(t, w, setup{name: fmt.Sprintf("srv-%d", at+1), key: key, expect: n, join: addresses, listener: listenAt(t, addresses[at])})
			}
			for _, h := range hosts {
				h.awaitMember(t)
			}
			if got := w.founded(); got != 1 {
				t.Fatalf("%d clusters were founded", got)
			}
			var have []string
			for _, s := range hosts[0].cluster.Servers() {
				have = append(have, s.ID)
			}
			if len(have) != n || !slices.IsSorted(have) {
				t.Errorf("the cluster has %v", have)
			}
			if leader, _ := hosts[n-1].cluster.Leader(); leader != "srv-1.00000001" {
				t.Errorf("%s has founded it", leader)
			}
		})
	}
}

// TestFoundingWithOneAddress has servers that know only the first one; they learn
// of each other from it.
func TestFoundingWithOneAddress(t *testing.T) {
	w, key := newWorld(), ca.GenerateClusterKey()
	first := start(t, w, setup{name: "srv-1", key: key, expect: 3})
	for _, name := range []string{"srv-2", "srv-3"} {
		start(t, w, setup{name: name, key: key, expect: 3, join: []string{first.address}})
	}
	first.awaitMember(t)
	if got := len(first.cluster.Servers()); got != 3 {
		t.Errorf("the cluster has %d servers", got)
	}
}

// TestJoin has a fourth server, with the configuration of the first three, one that
// comes back without its state, and one that comes back at another address.
func TestJoin(t *testing.T) {
	w, key := newWorld(), ca.GenerateClusterKey()
	all, addresses := listeners(t, 4)
	hosts := make([]*host, 4)
	for i := range 3 {
		hosts[i] = start(t, w, setup{name: fmt.Sprintf("srv-%d", i+1), key: key, expect: 3, join: addresses, listener: all[i]})
	}
	for _, h := range hosts[:3] {
		h.awaitMember(t)
	}
	hosts[3] = start(t, w, setup{name: "srv-4", key: key, expect: 3, join: addresses, listener: all[3]})
	hosts[3].awaitMember(t)
	find := func(name string) peer.Server {
		for _, s := range hosts[0].cluster.Servers() {
			if peer.Name(s.ID) == name {
				return s
			}
		}
		return peer.Server{}
	}
	if s := find("srv-4"); s.Voter || s.Address != hosts[3].address {
		t.Errorf("the fourth server is %+v: it has no vote before it has caught up", s)
	}

	hosts[2].stop()
	hosts[2] = start(t, w, setup{name: "srv-3", instance: "00000002", key: key, expect: 3, join: addresses})
	hosts[2].awaitMember(t)
	if s := find("srv-3"); s.ID != "srv-3.00000002" || s.Voter {
		t.Errorf("the server that lost its state is %+v", s)
	}

	hosts[1].stop()
	moved := start(t, w, setup{name: "srv-2", key: key, expect: 3, join: addresses})
	moved.cluster.restore(hosts[0].cluster) // it has kept its state
	until(t, "srv-2 has its new address", func() bool { return find("srv-2").Address == moved.address })
	if s := find("srv-2"); !s.Voter {
		t.Errorf("it has lost its vote by moving: %+v", s)
	}
	if got := w.founded(); got != 1 {
		t.Errorf("%d clusters", got)
	}
}
