package rpc_test

import (
	"context"
	"testing"
	"time"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/meshpb"
	"github.com/meshd/meshd/server/rpc"
	"github.com/meshd/meshd/server/store"
)

func reasonOf(err error) meshpb.Reason {
	reason, _ := meshpb.ReasonOf(err)
	return reason
}

// A node that connects to another server is that one's: the first one ends its stream
// and never declares the node lost, although it hears nothing of it.
func TestLeaseMoves(t *testing.T) {
	t.Parallel()
	cluster3(t, func(t *testing.T, c *several) { //nolint:thelper // the body of the test
		leaf := c.nodes(1)[0]
		old := c.servers["s1"].dialPipe(leaf, "a")
		silent, hush := context.WithCancel(t.Context())
		old.beat(silent)
		wait(time.Minute)
		hush() // half open: the server does not learn of the end
		moved := c.servers["s2"].dialPipe(leaf, "a")
		moved.beat(t.Context())
		if reason := reasonOf(<-old.done); reason != meshpb.ReasonSuperseded {
			t.Errorf("the older stream ended by %q", reason)
		}
		lease := c.lease("vm-0")
		if lease.Server != "s2" || lease.Epoch != 2 {
			t.Fatalf("moved: %+v", lease)
		}
		wait(10 * rpc.DefaultLease)
		if now := c.lease("vm-0"); now != lease {
			t.Errorf("heard at s2, and then: %+v", now)
		}
		c.lead("s3") // and a new leader has no clock of its own for it
		wait(10 * rpc.DefaultLease)
		if now := c.lease("vm-0"); now != lease {
			t.Errorf("under a new leader: %+v", now)
		}
		moved.hangUp()
		wait(rpc.DefaultLease + 2*time.Second)
		if now := c.lease("vm-0"); !now.Lost || now.Server != "s2" || now.Epoch != 2 {
			t.Errorf("silent at s2: %+v", now)
		}
	})
}

// The nodes of a server that is gone are watched by the leader, from then on, and by a
// new leader from its beginning.
func TestLeaderWatchesTheNodesOfADeadServer(t *testing.T) {
	t.Parallel()
	cluster3(t, func(t *testing.T, c *several) { //nolint:thelper // the body of the test
		leaves := c.nodes(2)
		s := c.servers["s3"].dialPipe(leaves[0], "a")
		s.beat(t.Context())
		other := c.servers["s2"].dialPipe(leaves[1], "b")
		other.beat(t.Context())
		wait(time.Minute)
		c.partition(true, "s3")
		wait(rpc.DefaultLease - 3*time.Second)
		if reason := reasonOf(<-s.done); reason != meshpb.ReasonNoQuorum {
			t.Errorf("a server without a majority says %q", reason)
		}
		if c.lease("vm-0").Lost {
			t.Error("lost within a lease of the end of its server")
		}
		c.lead("s2")
		wait(rpc.DefaultLease - time.Second)
		if c.lease("vm-0").Lost {
			t.Error("lost within a lease of the beginning of the leader")
		}
		wait(3 * time.Second)
		if lease := c.lease("vm-0"); !lease.Lost || lease.Server != "s3" {
			t.Errorf("nobody has heard of it: %+v", lease)
		}
		if c.lease("vm-1").Lost {
			t.Error("a node of a living server is lost")
		}
		back := c.servers["s1"].dialPipe(leaves[0], "a")
		back.beat(t.Context())
		wait(time.Minute)
		if lease := c.lease("vm-0"); lease.Lost || lease.Server != "s1" || lease.Epoch != 2 {
			t.Errorf("back: %+v", lease)
		}
		back.hangUp()
		other.hangUp()
		wait(0)
	})
}

// A server without a majority refuses agents until it has one.
func TestQuorumLost(t *testing.T) {
	t.Parallel()
	cluster3(t, func(t *testing.T, c *several) { //nolint:thelper // the body of the test
		leaf := c.nodes(1)[0]
		s := c.servers["s1"].dialPipe(leaf, "a")
		s.beat(t.Context())
		c.partition(true, "s1", "s2", "s3")
		wait(1900 * time.Millisecond)
		select {
		case err := <-s.done:
			t.Fatalf("ended within two seconds: %v", err)
		default:
		}
		wait(300 * time.Millisecond)
		if reason := reasonOf(<-s.done); reason != meshpb.ReasonNoQuorum {
			t.Errorf("the stream ended by %q", reason)
		}
		for _, one := range c.servers {
			_, err := one.rpc.Register(as(t.Context(), leaf), &meshpb.RegisterRequest{})
			if reason := reasonOf(err); reason != meshpb.ReasonNoQuorum {
				t.Errorf("a call was refused by %q", reason)
			}
		}
		wait(time.Hour)
		if c.lease("vm-0").Lost {
			t.Error("lost while no server had a majority")
		}
		c.partition(false, "s1", "s2", "s3")
		wait(rpc.DefaultLease - time.Second)
		if c.lease("vm-0").Lost {
			t.Error("lost within a lease of the servers' return")
		}
		again := c.servers["s2"].dialPipe(leaf, "a")
		again.beat(t.Context())
		wait(time.Minute)
		if lease := c.lease("vm-0"); lease.Lost || lease.Server != "s2" {
			t.Errorf("back: %+v", lease)
		}
		again.hangUp()
		wait(0)
	})
}

// Six of nine, two at each of three servers, are more than half, although no server
// sees more than two. While a server that should be alive can't be asked, its nodes
// count as silent.
func TestMassLossOverSeveralServers(t *testing.T) {
	t.Parallel()
	for name, row := range map[string]struct {
		silent  int // of nine, one server after the other
		unasked bool
		held    bool
	}{
		"six of nine": {6, false, true}, "four of nine": {4, false, false},
		"two of nine": {2, false, false}, "two of nine and a server can't be asked": {2, true, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cluster3(t, func(t *testing.T, c *several) { //nolint:thelper // the body of the test
				alive, stop := context.WithCancel(t.Context())
				silent, hush := context.WithCancel(t.Context())
				var sessions []*session
				for i, leaf := range c.nodes(9) {
					s := c.servers[[]string{"s1", "s2", "s3"}[i%3]].dialPipe(leaf, "a")
					ctx := alive
					if i < row.silent {
						ctx = silent
					}
					s.beat(ctx)
					sessions = append(sessions, s)
					wait(rpc.DefaultHeartbeat / 7)
				}
				wait(time.Minute)
				if row.unasked {
					c.deaf("s3")
				}
				hush()
				wait(2 * rpc.DefaultLease)
				lost, held := c.servers["s1"].lost(), c.held()
				if row.held && (lost != 0 || held < row.silent-1) || !row.held && (lost != row.silent || held != 0) {
					t.Errorf("%d lost, %d held", lost, held)
				}
				if fleet := c.servers["s1"].rpc.AskFleet(t.Context(), rpc.FleetRequest{Held: true, Release: true}); row.held && !row.unasked {
					if len(fleet.Held()) != row.silent {
						t.Errorf("held: %v", fleet.Held())
					}
					wait(rpc.DefaultLease)
					if c.servers["s1"].lost() != row.silent || c.held() != 0 {
						t.Errorf("released: %d lost, %d held", c.servers["s1"].lost(), c.held())
					}
				}
				stop()
				for _, s := range sessions {
					s.hangUp()
				}
				wait(0)
			})
		})
	}
}

// A restored state has the leases of another day: those who are connected hold theirs
// all the same, and nobody is lost.
func TestLeasesAfterARestore(t *testing.T) {
	t.Parallel()
	cluster3(t, func(t *testing.T, c *several) { //nolint:thelper // the body of the test
		leaves := c.nodes(2)
		first := c.servers["s1"].dialPipe(leaves[0], "a")
		first.beat(t.Context())
		wait(time.Minute)
		saved, err := c.servers["s1"].engine.List(t.Context(), "")
		if err != nil {
			t.Fatal(err)
		}
		second := c.servers["s2"].dialPipe(leaves[0], "b")
		second.beat(t.Context())
		third := c.servers["s3"].dialPipe(leaves[1], "c") // unknown to what was saved
		third.beat(t.Context())
		wait(time.Minute)
		at, err := store.Replace(t.Context(), c.servers["s1"].engine, store.Position{}, func(yield func(store.Pair, error) bool) {
			for _, p := range saved.Pairs {
				if !yield(p, nil) {
					return
				}
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.servers["s1"].state.Await(t.Context(), catalog.Position(at)); err != nil {
			t.Fatal(err)
		}
		wait(10 * rpc.DefaultLease)
		if lease := c.lease("vm-0"); lease.Lost || lease.Server != "s2" || lease.Session != "b" {
			t.Errorf("after the restore: %+v", lease)
		}
		if lease := c.lease("vm-1"); lease.Lost || lease.Server != "s3" {
			t.Errorf("after the restore: %+v", lease)
		}
		second.hangUp()
		third.hangUp()
		wait(0)
	})
}
