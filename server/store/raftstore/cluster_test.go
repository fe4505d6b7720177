package raftstore_test

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"github.com/meshd/meshd/server/store"
	"github.com/meshd/meshd/server/store/raftstore"
)

// cluster is some members on one in-process network.
type cluster struct {
	mu         sync.Mutex
	members    []*member
	transports []*raft.InmemTransport
	cut        map[string]bool // addresses that can't forward or be forwarded to
}

// forward hands requests to a member's Engine without a network.
func (c *cluster) forward(from string) func(context.Context, string, string, []byte) ([]byte, error) {
	return func(ctx context.Context, id, address string, request []byte) ([]byte, error) {
		c.mu.Lock()
		var to *member
		for _, m := range c.members {
			if m != nil && m.cfg.ID == id {
				to = m
			}
		}
		cut := c.cut[from] || c.cut[address]
		c.mu.Unlock()
		if to == nil || cut {
			return nil, fmt.Errorf("dial %s: %w", address, store.ErrNoLeader)
		}
		return to.Serve(ctx, slices.Clone(request))
	}
}

// newCluster founds a cluster of n members.
func newCluster(t *testing.T, n int) *cluster {
	t.Helper()
	return newClusterOf(t, n, func(*raftstore.Config) {})
}

func newClusterOf(t *testing.T, n int, edit func(*raftstore.Config)) *cluster {
	t.Helper()
	c := &cluster{cut: map[string]bool{}}
	var all []raftstore.Member
	for i := range n {
		cfg := small(filepath.Join(t.TempDir(), "state"))
		cfg.CommitInterval = time.Millisecond
		edit(&cfg)
		m := c.start(t, cfg, fmt.Sprintf("server-%d", i))
		all = append(all, raftstore.Member{ID: m.cfg.ID, Address: string(m.cfg.Transport.LocalAddr())})
	}
	if err := c.members[n-1].Found(t.Context(), all); err != nil {
		t.Fatal(err)
	}
	for _, m := range c.members {
		serving(t, m)
	}
	return c
}

// start runs one more member, which belongs to no cluster yet.
func (c *cluster) start(t *testing.T, cfg raftstore.Config, id string) *member {
	t.Helper()
	address, transport := raft.NewInmemTransport("")
	cfg.ID, cfg.Transport, cfg.Forward = id, transport, c.forward(string(address))
	c.mu.Lock()
	c.transports = append(c.transports, transport)
	c.mu.Unlock()
	c.connect(len(c.transports) - 1)
	m := run(t, cfg)
	c.mu.Lock()
	c.members = append(c.members, m)
	c.mu.Unlock()
	return m
}

func (c *cluster) connect(i int) {
	for _, other := range c.transports {
		c.transports[i].Connect(other.LocalAddr(), other)
		other.Connect(c.transports[i].LocalAddr(), c.transports[i])
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.cut, string(c.transports[i].LocalAddr()))
}

func (c *cluster) isolate(i int) {
	c.transports[i].DisconnectAll()
	for _, other := range c.transports {
		other.Disconnect(c.transports[i].LocalAddr())
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.cut[string(c.transports[i].LocalAddr())] = true
}

// reign is a run of Lead's function on one member.
type reign struct {
	member int
	ctx    context.Context //nolint:containedctx // what is tested
}

// campaign has every member campaign until the test ends.
func (c *cluster) campaign(t *testing.T) <-chan reign {
	t.Helper()
	reigns := make(chan reign, 64)
	for i, m := range c.members {
		go func() {
			_ = m.Lead(t.Context(), func(ctx context.Context) error {
				reigns <- reign{member: i, ctx: ctx}
				<-ctx.Done()
				return nil
			})
		}()
	}
	return reigns
}

func leaderWrite(ctx context.Context, m *member, key string) (store.Position, error) {
	ctx, stop := context.WithTimeout(ctx, 10*time.Second)
	defer stop()
	return m.Commit(ctx, store.Txn{Leader: true, Ops: []store.Op{{Key: key, Value: []byte(m.cfg.ID)}}})
}

// next waits for a reign in which a write succeeds.
func (c *cluster) next(t *testing.T, reigns <-chan reign, key string) (reign, store.Position) {
	t.Helper()
	for {
		select {
		case r := <-reigns:
			p, err := leaderWrite(t.Context(), c.members[r.member], key)
			if err == nil {
				return r, p
			}
			t.Logf("reign of %d ended before its write: %v", r.member, err)
		case <-time.After(time.Minute):
			t.Fatal("nobody leads")
		}
	}
}

// A leader that is cut off stops leading, another one takes over, nothing that
// was acknowledged is lost, and the old leader's writes do not get in.
func TestFailover(t *testing.T) {
	c := newCluster(t, 3)
	reigns := c.campaign(t)
	first, p1 := c.next(t, reigns, "first")
	old := c.members[first.member]
	for i, m := range c.members {
		if i == first.member {
			continue
		}
		if _, err := leaderWrite(t.Context(), m, "x"); !errors.Is(err, store.ErrNotLeader) {
			t.Errorf("a leader-only commit on a follower: %v", err)
		}
		if p, err := m.Barrier(t.Context()); err != nil || !p.Covers(p1) {
			t.Errorf("barrier on a follower: %v, %v", p, err)
		}
		follow(t, m, p1)
	}

	c.isolate(first.member)
	cut := time.Now()
	if p, err := leaderWrite(t.Context(), old, "lost"); err == nil {
		t.Errorf("a leader without a majority acknowledged a write at %v", p)
	}
	select {
	case <-first.ctx.Done():
	case <-time.After(time.Minute):
		t.Fatal("the isolated leader still leads")
	}
	second, p2 := c.next(t, reigns, "second")
	t.Logf("the next leader wrote %v after the cut", time.Since(cut))
	if second.member == first.member || !p2.Covers(p1) || p2 == p1 {
		t.Fatalf("member %d led to %v, then %d to %v", first.member, p1, second.member, p2)
	}

	c.connect(first.member)
	p3, err := leaderWrite(t.Context(), c.members[second.member], "third")
	for errors.Is(err, store.ErrNotLeader) || errors.Is(err, store.ErrNoLeader) {
		// The member that returns may have caused another election.
		second, p3 = c.next(t, reigns, "third")
		err = nil
	}
	if err != nil {
		t.Fatal(err)
	}
	for i, m := range c.members {
		follow(t, m, p3)
		snapshot, err := m.List(t.Context(), "")
		if err != nil {
			t.Fatal(err)
		}
		keys := ""
		for _, p := range snapshot.Pairs {
			keys += p.Key + " "
		}
		if keys != "first second third " {
			t.Errorf("member %d has %s", i, keys)
		}
	}
	c.agree(t)
}

// agree waits until all members have the same state. A claim to the leadership
// may still be on its way to some.
func (c *cluster) agree(t *testing.T) {
	t.Helper()
	ctx, stop := context.WithTimeout(t.Context(), time.Minute)
	defer stop()
	for {
		hashes := map[[32]byte]bool{}
		for _, m := range c.members {
			hashes[m.State().Hash()] = true
		}
		if len(hashes) == 1 {
			return
		}
		if ctx.Err() != nil {
			t.Fatalf("the members have %d different states", len(hashes))
		}
		runtime.Gosched()
	}
}

// follow waits until m has p.
func follow(t *testing.T, m *member, p store.Position) {
	t.Helper()
	ctx, stop := context.WithTimeout(t.Context(), time.Minute)
	defer stop()
	w := m.Watch(ctx, "", store.Position{})
	for {
		b, err := w.Next(ctx)
		if err != nil {
			t.Fatalf("%s does not reach %v: %v", m.cfg.ID, p, err)
		}
		if b.To.Covers(p) {
			return
		}
	}
}
