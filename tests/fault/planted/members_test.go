// Package planted_test proves that the checkers of the fault suite notice bugs. For
// each bug that can be planted there is a scenario; a store without the bug passes
// it, and one with it must be told from a correct one by what its clients saw.
package planted_test

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

	"github.com/hashicorp/raft"

	"github.com/meshd/meshd/server/store"
	"github.com/meshd/meshd/server/store/raftstore"
	"github.com/meshd/meshd/tests/fault/history"
)

// patience bounds whatever is waited for.
const patience = 15 * time.Second

// member is one of a cluster, in this process.
type member struct {
	*raftstore.Engine

	cfg   raftstore.Config
	inner *raft.InmemTransport
	done  chan error
}

// members are a cluster on a network that exists in memory.
type members struct {
	t   *testing.T
	mu  sync.Mutex // of all, which is read by what they forward
	all []*member
}

// config is one whose log rotates and whose state is saved often.
func config(dir, id string) raftstore.Config {
	return raftstore.Config{
		Dir: dir, ID: id, SegmentBytes: 1 << 20, SnapshotEntries: 40, SnapshotInterval: 10 * time.Millisecond, TrailingEntries: 5,
		HeartbeatTimeout: 150 * time.Millisecond, ElectionTimeout: 150 * time.Millisecond, LeaderLease: 75 * time.Millisecond,
		CommitInterval: time.Millisecond,
	}
}

// newMembers founds a cluster; edit may change the configurations.
func newMembers(t *testing.T, n int, edit func(*raftstore.Config)) *members {
	t.Helper()
	c := &members{t: t}
	var list []raftstore.Member
	for i := range n {
		cfg := config(filepath.Join(t.TempDir(), "state"), fmt.Sprintf("server-%d", i))
		edit(&cfg)
		m := &member{cfg: cfg}
		c.all = append(c.all, m)
		c.start(m)
		list = append(list, raftstore.Member{ID: cfg.ID, Address: string(m.inner.LocalAddr())})
	}
	if err := c.all[0].Found(t.Context(), list); err != nil {
		t.Fatal(err)
	}
	for _, m := range c.all {
		c.serves(m)
	}
	return c
}

// start runs a member, at the address that it had.
func (c *members) start(m *member) {
	c.t.Helper()
	address := raft.ServerAddress("")
	if m.inner != nil {
		address = m.inner.LocalAddr()
	}
	_, m.inner = raft.NewInmemTransport(address)
	m.cfg.Transport, m.cfg.Forward = m.inner, c.forward
	e, err := raftstore.New(m.cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		c.t.Fatal(err)
	}
	done := make(chan error, 1)
	c.mu.Lock()
	m.Engine, m.done = e, done
	c.mu.Unlock()
	c.join(m)
	go func() {
		done <- e.Run(context.WithoutCancel(c.t.Context()))
		close(done)
	}()
	c.t.Cleanup(func() {
		_ = e.Close()
		for range done { // until Run has returned
		}
	})
}

// stop ends a member in order.
func (c *members) stop(m *member) {
	c.t.Helper()
	if err := errors.Join(m.Close(), <-m.done); err != nil {
		c.t.Fatal(err)
	}
}

// cut parts a member from the others, but for what is forwarded.
func (c *members) cut(m *member) {
	m.inner.DisconnectAll()
	for _, other := range c.all {
		other.inner.Disconnect(m.inner.LocalAddr())
	}
}

// join connects a member with the others.
func (c *members) join(m *member) {
	for _, other := range c.all {
		if other.inner != nil {
			m.inner.Connect(other.inner.LocalAddr(), other.inner)
			other.inner.Connect(m.inner.LocalAddr(), m.inner)
		}
	}
}

func (c *members) forward(ctx context.Context, id, address string, request []byte) ([]byte, error) {
	c.mu.Lock()
	var to *raftstore.Engine
	for _, m := range c.all {
		if m.cfg.ID == id {
			to = m.Engine
		}
	}
	c.mu.Unlock()
	if to == nil {
		return nil, fmt.Errorf("dial %s: %w", address, store.ErrNoLeader)
	}
	return to.Serve(ctx, slices.Clone(request))
}

// serves waits until a member answers.
func (c *members) serves(m *member) {
	c.t.Helper()
	ctx, stop := context.WithTimeout(c.t.Context(), patience)
	defer stop()
	for {
		if _, err := m.Barrier(ctx); err == nil {
			return
		} else if ctx.Err() != nil {
			c.t.Fatalf("%s does not serve: %v", m.cfg.ID, err)
		}
	}
}

// leader waits for one among some members.
func (c *members) leader(among ...*member) *member {
	c.t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(patience); time.Now().Before(end); <-tick.C {
		for _, m := range among {
			if m.Leading() {
				return m
			}
		}
	}
	c.t.Fatal("nobody leads")
	return nil
}

// but returns all members except one.
func (c *members) but(m *member) []*member {
	return slices.DeleteFunc(slices.Clone(c.all), func(o *member) bool { return o == m })
}

// client does operations one after the other and writes down what it saw.
type client struct {
	t       *testing.T
	log     *history.History
	id      int
	wrote   int
	version map[string]store.Pair
}

func newClient(t *testing.T, log *history.History, id int) *client {
	t.Helper()
	return &client{t: t, log: log, id: id, version: map[string]store.Pair{}}
}

// read reads a key. With a barrier it is linearizable; without one it must show
// what this client has written through the same member.
func (c *client) read(m *member, key string, barrier bool) {
	op := history.Op{Client: c.id, Key: key, Kind: history.Read, Outcome: history.OK, Invoked: c.log.Now()}
	ctx, stop := context.WithTimeout(c.t.Context(), time.Second)
	defer stop()
	if barrier {
		if _, err := m.Barrier(ctx); err != nil {
			return // no answer
		}
	}
	all, err := m.List(ctx, key)
	if err != nil {
		return
	}
	op.Returned = c.log.Now()
	c.version[key] = store.Pair{}
	for _, p := range all.Pairs {
		if p.Key == key {
			c.version[key] = p
			op.Value, op.Revision = string(p.Value), p.ModRevision
		}
	}
	c.log.Add(op)
}

// write replaces what this client last saw of a key.
func (c *client) write(m *member, key string) {
	c.wrote++
	value := fmt.Sprintf("c%d-%d", c.id, c.wrote)
	c.commit(m, history.Op{Key: key, Kind: history.Write, Value: value}, store.Op{Key: key, Value: []byte(value)})
}

// remove deletes what this client last saw of a key.
func (c *client) remove(m *member, key string) {
	c.commit(m, history.Op{Key: key, Kind: history.Delete}, store.Op{Key: key, Delete: true})
}

func (c *client) commit(m *member, op history.Op, do store.Op) {
	seen := c.version[op.Key]
	op.Client, op.Expect, op.Invoked = c.id, string(seen.Value), c.log.Now()
	ctx, stop := context.WithTimeout(c.t.Context(), 2*time.Second)
	defer stop()
	at, err := m.Commit(ctx, store.Txn{Checks: []store.Check{{Key: op.Key, ModRevision: seen.ModRevision}}, Ops: []store.Op{do}})
	op.Returned = c.log.Now()
	switch {
	case err == nil:
		op.Outcome, op.Revision = history.OK, at.Revision
		c.version[op.Key] = store.Pair{Value: []byte(op.Value), ModRevision: at.Revision}
		if op.Kind == history.Delete {
			c.version[op.Key] = store.Pair{}
		}
	case errors.Is(err, store.ErrUnknownOutcome):
		op.Outcome = history.Unknown
	case errors.Is(err, store.ErrConflict):
		op.Outcome = history.Conflict
	default:
		return // it was not done
	}
	c.log.Add(op)
}

// watch collects the batches of a watch from the first on until it has come to
// where the last write was.
func watch(t *testing.T, w store.Watcher, until uint64) history.Trace {
	t.Helper()
	trace := history.Trace{Name: "watch"}
	ctx, stop := context.WithTimeout(t.Context(), patience)
	defer stop()
	for {
		b, err := w.Next(ctx)
		if err != nil {
			t.Fatal(err)
		}
		batch := history.Batch{Reset: b.Reset, Again: len(trace.Batches) == 0, Position: b.To.Revision, Deletes: b.Deletes, Puts: map[string]history.Version{}}
		for _, p := range b.Puts {
			batch.Puts[p.Key] = history.Version{Value: string(p.Value), Revision: p.ModRevision}
		}
		trace.Batches = append(trace.Batches, batch)
		if b.To.Revision >= until {
			return trace
		}
	}
}

func stateOf(t *testing.T, m *member) (map[string]history.Version, uint64) {
	t.Helper()
	all, err := m.List(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	state := map[string]history.Version{}
	for _, p := range all.Pairs {
		state[p.Key] = history.Version{Value: string(p.Value), Revision: p.ModRevision}
	}
	return state, all.Position.Revision
}
