package peer_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/server/peer"
	"github.com/meshd/meshd/server/store"
	"github.com/meshd/meshd/server/store/raftstore"
)

var _ peer.Cluster = (*raftstore.Engine)(nil)

// node is a server with the real store.
type node struct {
	*peer.Peer
	engine  *raftstore.Engine
	id, dir string
	logs    *logs
	over    chan error // how the store ended
	stop    func()
}

// boot runs a server on a state directory until the test ends or stop is called.
func boot(t *testing.T, key ca.ClusterKey, name, dir, address string, expect int, join []string, local peer.Local) *node {
	t.Helper()
	n := &node{dir: dir, logs: &logs{}, over: make(chan error, 1)}
	log := slog.New(slog.NewTextHandler(n.logs, nil))
	var err error
	if n.id, err = raftstore.Identify(dir, name); err != nil {
		t.Fatal(err)
	}
	listener := listenAt(t, address)
	admission, err := ca.NewAdmission(key, trustDomain, name)
	if err != nil {
		t.Fatal(err)
	}
	n.Peer, err = peer.New(peer.Config{
		Admission: admission, ID: n.id, Listener: listener, Advertise: listener.Addr().String(), Dir: dir, Expect: expect, Join: join,
	}, log)
	if err != nil {
		t.Fatal(err)
	}
	n.engine, err = raftstore.New(raftstore.Config{
		Dir: dir, ID: n.id, Transport: n.Transport(), Forward: n.Forward, SegmentBytes: 1 << 20,
		HeartbeatTimeout: 200 * time.Millisecond, ElectionTimeout: 200 * time.Millisecond, LeaderLease: 100 * time.Millisecond,
	}, log)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var group sync.WaitGroup
	group.Go(func() {
		err := n.engine.Run(ctx)
		if err != nil && !errors.Is(err, raftstore.ErrRemoved) {
			t.Errorf("the store of %s: %v", n.id, err)
		}
		n.over <- err
	})
	group.Go(func() {
		if err := n.Run(ctx, n.engine, local); err != nil {
			t.Errorf("%s: %v", n.id, err)
		}
	})
	n.stop = sync.OnceFunc(func() {
		cancel()
		group.Wait()
	})
	t.Cleanup(n.stop)
	return n
}

func (n *node) write(t *testing.T, key string) store.Position {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for {
		at, err := n.engine.Commit(ctx, store.Txn{Ops: []store.Op{{Key: key, Value: []byte(n.id)}}})
		if err == nil {
			return at
		}
		if ctx.Err() != nil || !errors.Is(err, store.ErrNoLeader) && !errors.Is(err, store.ErrUnknownOutcome) {
			t.Fatalf("write %s through %s: %v\n%s", key, n.id, err, n.logs)
		}
	}
}

func (n *node) keys(t *testing.T) int {
	t.Helper()
	snapshot, err := n.engine.List(t.Context(), "key-")
	if err != nil {
		t.Fatal(err)
	}
	return len(snapshot.Pairs)
}

// TestThreeRealServers has three servers with real stores and sockets: they found
// a cluster, take writes through any of them, lose the leader, get it back, lose
// the state of one, and take a fourth.
func TestThreeRealServers(t *testing.T) {
	key := ca.GenerateClusterKey()
	all, addresses := listeners(t, 4)
	for _, l := range all {
		_ = l.Close() // only to have four free ports
	}
	root := t.TempDir()
	nodes := make([]*node, 4)
	run := func(i int, dir string) {
		nodes[i] = boot(t, key, fmt.Sprintf("srv-%d", i+1), filepath.Join(root, dir), addresses[i], 3, addresses, peer.Local{})
	}
	for i := range 3 {
		run(i, fmt.Sprint("first-", i))
	}
	written := 0
	writeAll := func(skip int) {
		for i, n := range nodes {
			if n != nil && i != skip {
				n.write(t, fmt.Sprintf("key-%d", written))
				written++
				if got := n.keys(t); got != written {
					t.Fatalf("%s has %d keys right after its write, want %d", n.id, got, written)
				}
			}
		}
	}
	writeAll(-1)
	leader := func() int {
		for i, n := range nodes {
			if n != nil && n.engine.Leading() {
				return i
			}
		}
		return -1
	}
	until(t, "somebody leads", func() bool { return leader() >= 0 })

	old := leader()
	nodes[old].stop()
	writeAll(old)
	run(old, fmt.Sprint("first-", old))
	writeAll(-1)

	lost := (leader() + 1) % 3
	nodes[lost].stop()
	before := nodes[lost].id
	run(lost, fmt.Sprint("second-", lost)) // an empty directory
	until(t, "the server without a state is taken: it waits for "+nodes[lost].Waiting(), func() bool { return nodes[lost].engine.Member() })
	if nodes[lost].id == before {
		t.Fatal("a server that lost its state has the same ID")
	}
	writeAll(-1)

	run(3, "first-3")
	until(t, "the fourth is taken: it waits for "+nodes[3].Waiting(), func() bool { return nodes[3].engine.Member() })
	writeAll(-1)
	servers := nodes[3].engine.Servers()
	if len(servers) != 4 {
		t.Errorf("the cluster has %v", servers)
	}
	for _, s := range servers {
		if s.ID == before {
			t.Errorf("%s is still there", before)
		}
	}
}

// TestRemovedWhileAway has two servers that are removed while they are down. One
// may come back, as after a long repair; the other one was removed on purpose.
func TestRemovedWhileAway(t *testing.T) {
	key := ca.GenerateClusterKey()
	all, addresses := listeners(t, 5)
	for _, l := range all {
		_ = l.Close() // only to have free ports
	}
	root := t.TempDir()
	local := peer.Local{Refuse: func(name, _ string) error {
		if name == "srv-5" {
			return errors.New("an operator has removed it")
		}
		return nil
	}}
	nodes := make([]*node, 5)
	run := func(i int) {
		name := fmt.Sprintf("srv-%d", i+1)
		nodes[i] = boot(t, key, name, filepath.Join(root, name), addresses[i], 5, addresses, local)
	}
	for i := range nodes {
		run(i)
	}
	at := nodes[0].write(t, "key-0")
	for _, n := range nodes {
		until(t, n.id+" has the first key", func() bool {
			p, err := n.engine.Barrier(t.Context())
			return err == nil && p.Revision >= at.Revision
		})
	}
	for _, n := range nodes[3:] {
		n.stop()
		if err := <-n.over; err != nil {
			t.Fatal(err)
		}
	}
	removed := map[string]bool{}
	until(t, "both are removed", func() bool {
		for _, n := range nodes[:3] {
			for _, gone := range nodes[3:] {
				if n.engine.Leading() && n.engine.Remove(t.Context(), gone.id) == nil {
					removed[gone.id] = true
				}
			}
		}
		return len(removed) == 2
	})
	run(3)
	run(4)
	select {
	case err := <-nodes[4].over:
		if !errors.Is(err, raftstore.ErrRemoved) {
			t.Errorf("the server that is not wanted ends with %v", err)
		}
	case <-time.After(time.Minute):
		t.Errorf("the server that is not wanted waits for %q", nodes[4].Waiting())
	}
	// It learns from the log that it was removed, and then that it was taken again. A
	// store may end at the first of the two, and does as often as it is started before
	// the second has reached its log; a supervisor starts it again.
	at = nodes[0].write(t, "key-1")
	boots := 0
	until(t, "the other one is back", func() bool {
		select {
		case err := <-nodes[3].over:
			t.Logf("its store has ended: %v", err)
			nodes[3].stop()
			boots++
			run(3)
		default:
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		p, err := nodes[3].engine.Barrier(ctx)
		return err == nil && p.Revision >= at.Revision
	})
	t.Logf("it took %d more starts", boots)
}

// TestMovedServers has one server that comes back at another address, and then all
// of them at once.
func TestMovedServers(t *testing.T) {
	key := ca.GenerateClusterKey()
	all, addresses := listeners(t, 7)
	for _, l := range all {
		_ = l.Close() // only to have free ports
	}
	root := t.TempDir()
	nodes := make([]*node, 3)
	run := func(i int, at []string) {
		name := fmt.Sprintf("srv-%d", i+1)
		nodes[i] = boot(t, key, name, filepath.Join(root, name), at[i], 3, at, peer.Local{})
	}
	settled := func(at []string) func() bool {
		return func() bool {
			for _, n := range nodes {
				for _, s := range n.engine.Servers() {
					if leader, _ := n.engine.Leader(); leader == "" || !slices.Contains(at, s.Address) {
						return false
					}
				}
			}
			return true
		}
	}
	for i := range nodes {
		run(i, addresses[:3])
	}
	nodes[0].write(t, "key-0")
	until(t, "all know the servers", settled(addresses[:3]))

	nodes[2].stop()
	now := []string{addresses[0], addresses[1], addresses[3]}
	run(2, now)
	until(t, "the others know where the third is", settled(now))
	nodes[2].write(t, "key-1")

	for _, n := range nodes {
		n.stop()
	}
	for i := range nodes {
		run(i, addresses[4:])
	}
	nodes[0].write(t, "key-2")
	until(t, "all know where all are", settled(addresses[4:]))
}
