// Package storetest is the suite that every store.Engine passes. It tests only
// what store.Engine promises, so that it holds for an engine on a foreign store
// as well.
package storetest

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/meshd/meshd/server/store"
)

// patience bounds every wait of the suite. It is never reached by an engine that
// works.
const patience = 60 * time.Second

// Factory makes the engines that are tested.
type Factory struct {
	// Open returns a member of a new, empty store that serves. It registers its
	// own clean-up.
	Open func(t *testing.T) store.Engine
	// Peer returns another member of the store of e. Nil for engines that have
	// one member only; what needs two is not run then.
	Peer func(t *testing.T, e store.Engine) store.Engine
	// Elect makes e the member that leads once it campaigns, which it need not do
	// yet. Nil when whoever campaigns first gets to lead.
	Elect func(t *testing.T, e store.Engine)
	// Reopen closes e and opens the same data again, as after a restart. Nil for
	// engines that keep nothing.
	Reopen func(t *testing.T, e store.Engine) store.Engine
}

// Run tests the engines that f makes.
func Run(t *testing.T, f Factory) {
	t.Helper()
	s := suite{Factory: f}
	t.Run("transactions are all or nothing", s.transactions)
	t.Run("conflicts tell the key", s.conflicts)
	t.Run("limits", s.limits)
	t.Run("keys", s.keys)
	t.Run("caller keeps its slices", s.ownership)
	t.Run("prefixes are isolated", s.prefixes)
	t.Run("compare-and-set under concurrency", s.counter)
	t.Run("batches are atomic", s.atomicBatches)
	t.Run("batches coalesce and lose no deletion", s.coalescing)
	t.Run("a deletion reaches a watcher that has the key", s.deletions)
	t.Run("watch resumes", s.resumption)
	t.Run("watch resets", s.resets)
	t.Run("watch waits", s.waiting)
	t.Run("stage", s.stage)
	t.Run("stage is exclusive", s.stageLost)
	t.Run("activate misses no write", s.activateConflict)
	t.Run("replace, export, import", s.dump)
	t.Run("cancelled contexts", s.cancelled)
	t.Run("close wakes waiters", s.closing)
	t.Run("lead", s.lead)
	t.Run("lead is fenced", s.fencing)
	t.Run("restart keeps everything", s.restart)
	t.Run("members agree", s.members)
	t.Run("random histories equal a map", s.model)
}

type suite struct{ Factory }

func (s suite) elect(t *testing.T, e store.Engine) {
	t.Helper()
	if s.Elect != nil {
		s.Elect(t, e)
	}
}

// short returns a context that bounds one test.
func short(t *testing.T) context.Context {
	t.Helper()
	ctx, stop := context.WithTimeout(t.Context(), patience)
	t.Cleanup(stop)
	return ctx
}

func put(key, value string) store.Op { return store.Op{Key: key, Value: []byte(value)} }
func del(key string) store.Op        { return store.Op{Key: key, Delete: true} }

func commit(t *testing.T, e store.Engine, ops ...store.Op) store.Position {
	t.Helper()
	return commitTxn(t, e, store.Txn{Ops: ops})
}

// commitTxn commits txn. It rides out moments without a leader, in which nothing
// was applied.
func commitTxn(t *testing.T, e store.Engine, txn store.Txn) store.Position {
	t.Helper()
	ctx := short(t)
	for {
		p, err := e.Commit(ctx, txn)
		if errors.Is(err, store.ErrNoLeader) && ctx.Err() == nil {
			continue
		}
		if err != nil {
			t.Fatalf("commit %v: %v", txn, err)
		}
		return p
	}
}

// contents is a state as text, easy to compare.
type contents map[string]string

func list(t *testing.T, e store.Engine, prefix string) (contents, store.Position) {
	t.Helper()
	snapshot, err := e.List(short(t), prefix)
	if err != nil {
		t.Fatalf("list %q: %v", prefix, err)
	}
	got := contents{}
	last := ""
	for _, p := range snapshot.Pairs {
		if p.Key <= last {
			t.Fatalf("list %q: key %q follows %q", prefix, p.Key, last)
		}
		if p.ModRevision == 0 || p.ModRevision > snapshot.Position.Revision {
			t.Fatalf("list %q: key %q has revision %d at %v", prefix, p.Key, p.ModRevision, snapshot.Position)
		}
		last = p.Key
		got[p.Key] = string(p.Value)
	}
	return got, snapshot.Position
}

func expect(t *testing.T, what string, got, want contents) {
	t.Helper()
	if diff := cmp.Diff(want, got); diff != "" {
		t.Fatalf("%s (-want +got):\n%s", what, diff)
	}
}

// barrier returns the position of a barrier, after which List on e is
// linearizable.
func barrier(t *testing.T, e store.Engine) store.Position {
	t.Helper()
	p, err := e.Barrier(short(t))
	if err != nil {
		t.Fatalf("barrier: %v", err)
	}
	return p
}

// reader applies the batches of a Watcher to a state and checks what Batch
// promises.
type reader struct {
	watcher store.Watcher
	prefix  string
	at      store.Position
	state   contents
	batches int
	resets  int
	changes int
}

func newReader(ctx context.Context, e store.Engine, prefix string, after store.Position, state contents) *reader {
	if state == nil {
		state = contents{}
	}
	return &reader{watcher: e.Watch(ctx, prefix, after), prefix: prefix, at: after, state: state}
}

// next reads one batch.
func (r *reader) next(ctx context.Context) error {
	b, err := r.watcher.Next(ctx)
	if err != nil {
		return err
	}
	if err := r.apply(b); err != nil {
		return fmt.Errorf("batch %v to %v (reset %v): %w", b.From, b.To, b.Reset, err)
	}
	return nil
}

func (r *reader) apply(b store.Batch) error {
	if b.From != r.at {
		return fmt.Errorf("it follows one that ended at %v", r.at)
	}
	if !b.Reset && (b.From.Generation != b.To.Generation || b.To.Revision <= b.From.Revision) {
		return errors.New("it does not go forward")
	}
	if b.Reset {
		r.resets++
		r.state = contents{}
		if len(b.Deletes) > 0 {
			return fmt.Errorf("a reset deletes %q", b.Deletes)
		}
	}
	last := ""
	for _, p := range b.Puts {
		if p.Key <= last || len(p.Key) < len(r.prefix) || p.Key[:len(r.prefix)] != r.prefix {
			return fmt.Errorf("key %q after %q under prefix %q", p.Key, last, r.prefix)
		}
		if p.ModRevision == 0 || p.ModRevision > b.To.Revision || !b.Reset && p.ModRevision <= b.From.Revision {
			return fmt.Errorf("key %q has revision %d", p.Key, p.ModRevision)
		}
		last = p.Key
		r.state[p.Key] = string(p.Value)
	}
	last = ""
	for _, key := range b.Deletes {
		if key <= last || len(key) < len(r.prefix) || key[:len(r.prefix)] != r.prefix {
			return fmt.Errorf("deletion of %q after %q under prefix %q", key, last, r.prefix)
		}
		last = key
		delete(r.state, key)
	}
	r.at = b.To
	r.batches++
	r.changes += len(b.Puts) + len(b.Deletes)
	return nil
}

// until reads batches until the reader has reached p.
func (r *reader) until(t *testing.T, p store.Position) {
	t.Helper()
	ctx := short(t)
	for !r.at.Covers(p) {
		if err := r.next(ctx); err != nil {
			t.Fatalf("watch %q at %v, waiting for %v: %v", r.prefix, r.at, p, err)
		}
	}
}
