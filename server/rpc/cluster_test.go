package rpc_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/rpc"
	"github.com/meshd/meshd/server/state"
	"github.com/meshd/meshd/server/store"
)

// several is a cluster of servers on one store, without a network.
type several struct {
	t       *testing.T
	servers map[string]*cluster

	mu     sync.Mutex
	leader string
	cut    map[string]time.Time // servers without a majority, since when
	dead   map[string]bool      // servers that the others can't reach
	mute   map[string]bool      // servers that are alive and give no answers
}

var errCut = errors.New("the server can't be reached")

// cluster3 runs fn with three servers, of which s1 leads, under a fake clock.
func cluster3(t *testing.T, fn func(t *testing.T, c *several)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		c := &several{t: t, servers: map[string]*cluster{}, leader: "s1", cut: map[string]time.Time{}, dead: map[string]bool{}, mute: map[string]bool{}}
		first, a := store.NewMemory(), newAuthority(t)
		log := slog.New(slog.DiscardHandler)
		done := make(chan error)
		for i, name := range []string{"s1", "s2", "s3"} {
			engine := first
			if i > 0 {
				engine = first.Peer()
			}
			st := state.New(engine, log)
			one := &cluster{tb: t, engine: engine, state: st, authority: a, rpc: rpc.New(c.config(name), st, a, log)}
			c.servers[name] = one
			go func() { done <- st.Run(ctx) }()
			go func() { done <- one.rpc.Run(ctx) }()
			<-st.Ready()
		}
		c.servers["s1"].update(func(tx *state.Tx) error {
			return state.Namespaces.Put(tx, catalog.DefaultNamespace, catalog.Namespace{Name: catalog.DefaultNamespace})
		})
		wait(time.Second)
		fn(t, c)
		cancel()
		for range 6 {
			if err := <-done; err != nil {
				t.Errorf("Run: %v", err)
			}
		}
	})
}

func (c *several) config(name string) rpc.Config {
	return rpc.Config{
		Server: name, TrustDomain: trustDomain, JoinRate: 1e6,
		Leads: func() bool { return c.leads(name) },
		Alive: func(server string) bool { return !c.unreachable(server) },
		Quorum: func() time.Duration {
			c.mu.Lock()
			defer c.mu.Unlock()
			if since, ok := c.cut[name]; ok {
				return time.Since(since)
			}
			return 0
		},
		Peers: func() []rpc.Peer {
			var out []rpc.Peer
			for other := range c.servers {
				if other != name {
					out = append(out, c.peer(name, other))
				}
			}
			return out
		},
	}
}

func (c *several) peer(from, to string) rpc.Peer {
	gone := func() bool { return c.unreachable(to) || c.unreachable(from) || c.silenced(to) }
	return rpc.Peer{
		Name: to,
		Fleet: func(_ context.Context, request []byte) ([]byte, error) {
			if gone() {
				return nil, errCut
			}
			return c.servers[to].rpc.ServeFleet(request)
		},
		Ask: func(ctx context.Context, query []byte, emit func([]byte) error) error {
			if gone() {
				return errCut
			}
			return c.servers[to].rpc.ServeAsk(ctx, query, emit)
		},
	}
}

func (c *several) leads(name string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.leader == name
}

func (c *several) lead(name string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.leader = name
}

func (c *several) unreachable(name string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.dead[name]
}

func (c *several) silenced(name string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.mute[name]
}

// deaf makes a server answer none of the others, although it is alive.
func (c *several) deaf(name string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.mute[name] = true
}

// partition cuts servers off from the others, or brings them back.
func (c *several) partition(away bool, names ...string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, name := range names {
		if c.dead[name] = away; away {
			c.cut[name] = time.Now()
		} else {
			delete(c.cut, name)
		}
	}
}

func (c *several) lease(node string) catalog.Lease {
	rec, _ := state.Leases.Get(c.servers["s1"].state.Snapshot(), node)
	return rec.Value
}

func (c *several) held() (n int) {
	for _, one := range c.servers {
		n += len(one.rpc.HeldNodes())
	}
	return n
}

// nodes joins vm-0 to vm-n.
func (c *several) nodes(n int) []*ca.Leaf {
	c.t.Helper()
	leaves := make([]*ca.Leaf, n)
	for i := range leaves {
		leaves[i] = c.servers["s1"].join(fmt.Sprintf("vm-%d", i), "*")
	}
	return leaves
}
