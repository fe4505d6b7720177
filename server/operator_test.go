package server_test

import (
	"fmt"
	"net/http"
	"testing"

	"github.com/meshd/meshd/server/client"
)

// members asks one server about all.
func (c *trio) members(t *testing.T, through int) map[string]client.Member {
	t.Helper()
	var got client.Members
	if code := call(t, c.running[through].local(), http.MethodGet, "http://x/v1/members", "", "", &got); code != http.StatusOK {
		t.Fatalf("members through server %d: %d", through+1, code)
	}
	byName := map[string]client.Member{}
	for _, m := range got.Members {
		byName[m.Name] = m
	}
	return byName
}

// leader is the number of the server that all running ones follow; -1: they do not
// agree yet.
func (c *trio) leader(t *testing.T, through ...int) int {
	t.Helper()
	found := -1
	for n, i := range through {
		now := -1
		for j := range c.dirs {
			if c.members(t, i)[fmt.Sprintf("server-%d", j+1)].Leader {
				now = j
			}
		}
		if n > 0 && now != found {
			return -1
		}
		found = now
	}
	return found
}

// TestOperators sees three servers, moves the leadership, and removes one, through
// any of them.
func TestOperators(t *testing.T) {
	t.Parallel()
	c := newTrio(t)
	for i := range c.dirs {
		c.start(t, i)
	}
	for i := range c.dirs {
		c.await(t, i)
	}
	for i := range c.dirs {
		for name, m := range c.members(t, i) {
			if !m.Voter || m.Problem != "" || m.Address == "" || m.FeatureLevel == 0 || m.Started.IsZero() || m.Position.Revision == 0 || m.Applied == 0 {
				t.Errorf("through server %d, %s: %+v", i+1, name, m)
			}
		}
	}
	leader := -1
	until(t, "all agree who leads", func() bool { leader = c.leader(t, 0, 1, 2); return leader >= 0 })
	next, third := (leader+1)%3, (leader+2)%3

	name := func(i int) string { return fmt.Sprintf("server-%d", i+1) }
	transfer := func(through int, to string) (int, string) {
		var done client.Transferred
		code := call(t, c.running[through].local(), http.MethodPost, "http://x/v1/operator/raft/transfer", "", fmt.Sprintf(`{"to":%q}`, to), &done)
		return code, done.Leader
	}
	if code, who := transfer(third, name(next)); code != http.StatusOK || who != name(next) {
		t.Fatalf("transfer to %s: %d, %s leads", name(next), code, who)
	}
	until(t, "all follow it", func() bool { return c.leader(t, 0, 1, 2) == next })
	if code, who := transfer(third, name(next)); code != http.StatusOK || who != name(next) {
		t.Errorf("transfer to the leader: %d, %s leads", code, who)
	}
	if code, _ := transfer(leader, "server-9"); code != http.StatusNotFound {
		t.Errorf("transfer to a server that there is not: %d", code)
	}

	c.running[leader].stop()
	until(t, "it is known that the server is gone", func() bool { return c.members(t, third)[name(leader)].Problem != "" })
	remove := func(through, which int) int {
		return call(t, c.running[through].local(), http.MethodDelete, "http://x/v1/operator/raft/servers/"+name(which), "", "", nil)
	}
	if code := remove(third, third); code != http.StatusConflict {
		t.Fatalf("a removal that would leave no majority: %d", code)
	}
	if code, _ := transfer(third, name(leader)); code != http.StatusConflict {
		t.Errorf("transfer to a server that is gone: %d", code)
	}
	until(t, "the server that is gone is removed", func() bool { return remove(third, leader) == http.StatusOK })
	until(t, "two servers are left", func() bool { return len(c.members(t, third)) == 2 && len(c.members(t, next)) == 2 })
	if code := remove(third, leader); code != http.StatusNotFound {
		t.Errorf("remove it twice: %d", code)
	}
}
