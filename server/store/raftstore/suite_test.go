package raftstore_test

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/meshd/meshd/server/store"
	"github.com/meshd/meshd/server/store/raftstore"
	"github.com/meshd/meshd/server/store/storetest"
)

// TestSuiteOfThree runs the suite on the leader and on a follower of three
// members.
func TestSuiteOfThree(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name    string
		leading bool
	}{{"through the leader", true}, {"through a follower", false}} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			var clusters sync.Map // by engine
			find := func(t *testing.T, e store.Engine) (*cluster, *member) {
				t.Helper()
				found, _ := clusters.Load(e)
				c, ok := found.(*cluster)
				if !ok {
					t.Fatalf("%T is not of this test", e)
				}
				for _, m := range c.members {
					if store.Engine(m.Engine) == e {
						return c, m
					}
				}
				t.Fatal("the engine is not in its cluster")
				return nil, nil
			}
			storetest.Run(t, storetest.Factory{
				Open: func(t *testing.T) store.Engine {
					t.Helper()
					c := newClusterOf(t, 3, calm)
					for _, m := range c.members {
						clusters.Store(store.Engine(m.Engine), c)
					}
					return c.pick(t, row.leading).Engine
				},
				Peer: func(t *testing.T, e store.Engine) store.Engine {
					t.Helper()
					c, _ := find(t, e)
					for _, m := range c.members {
						if store.Engine(m.Engine) != e {
							return m.Engine
						}
					}
					t.Fatal("no other member")
					return nil
				},
				Elect: func(t *testing.T, e store.Engine) {
					t.Helper()
					c, m := find(t, e)
					c.elect(t, m)
				},
			})
		})
	}
}

// calm makes elections by time-out unlikely on a busy machine.
func calm(cfg *raftstore.Config) {
	cfg.HeartbeatTimeout, cfg.ElectionTimeout, cfg.LeaderLease = time.Second, time.Second, time.Second
}

// pick returns the member that leads, or one that does not.
func (c *cluster) pick(t *testing.T, leading bool) *member {
	t.Helper()
	ctx, stop := context.WithTimeout(t.Context(), time.Minute)
	defer stop()
	for {
		var leader, follower *member
		for _, m := range c.members {
			switch {
			case m.closed():
			case m.Leading():
				leader = m
			default:
				follower = m
			}
		}
		if leader != nil && leading {
			return leader
		}
		if leader != nil && follower != nil {
			return follower
		}
		select {
		case <-c.members[0].Changed():
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
			t.Fatal("nobody leads")
		}
	}
}

func (m *member) closed() bool {
	select {
	case err := <-m.done:
		m.done <- err
		return true
	default:
		return false
	}
}

// elect hands the leadership to m.
func (c *cluster) elect(t *testing.T, m *member) {
	t.Helper()
	ctx, stop := context.WithTimeout(t.Context(), time.Minute)
	defer stop()
	for !m.Leading() {
		if now := c.pick(t, true); now != m {
			if err := now.Transfer(ctx, m.cfg.ID); err != nil && !errors.Is(err, store.ErrNoLeader) {
				t.Logf("transfer to %s: %v", m.cfg.ID, err)
			}
		}
		select {
		case <-m.Changed():
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			t.Fatalf("%s does not lead", m.cfg.ID)
		}
	}
}

// eventually polls for what has no signal.
func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	ctx, stop := context.WithTimeout(t.Context(), time.Minute)
	defer stop()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !holds() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("it never happens that %s", what)
		}
	}
}

// index returns which member m is.
func (c *cluster) index(m *member) int { return slices.Index(c.members, m) }
