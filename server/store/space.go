package store

import (
	"cmp"
	"context"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/meshd/meshd/server/fault"
)

// keepDeletions is how many deletions a Space remembers. A watcher that is
// further behind than that restarts with a Reset. The number is part of the
// replicated state: members that differ in it would differ in their Hash.
const keepDeletions = 8192

// Space is the state of a store as a deterministic machine without I/O: the
// current generation, the stage, and who leads. Engines that keep their own
// state (Memory, raftstore) feed it the same changes in the same order and get
// the same results, errors and Hash on every member.
//
// Changes are serialized by a lock. Readers take the newest version without
// one and never block a change. All methods are safe for concurrent use.
type Space struct {
	mu  sync.Mutex // held by changes
	now atomic.Pointer[version]
}

// version is one immutable state of a Space.
type version struct {
	generation string // "" before Begin
	head       uint64 // revision of the last change of the current generation
	revision   uint64 // last revision given out, at least head: staging uses them too
	floor      uint64 // deletions up to here are forgotten

	keys tree[string, *entry] // of the current generation, with remembered deletions
	log  tree[change, *entry] // the newest change of each key, if after floor
	gone int                  // remembered deletions
	next chan struct{}        // closed when a newer version exists
	lead Leader               // who leads
	open string               // name of the stage, "" for none
	tent tree[string, *entry] // its keys
}

type entry struct {
	pair    Pair
	deleted bool
}

// change orders the log. Within one revision the keys are in order.
type change struct {
	revision uint64
	key      string
}

func (a change) compare(b change) int {
	return cmp.Or(cmp.Compare(a.revision, b.revision), strings.Compare(a.key, b.key))
}

// Leader is who leads, as the store sees it. Epoch grows with every claim and is
// 0 when nobody has led yet or the last leader gave up.
type Leader struct {
	Holder string
	Epoch  uint64
}

// NewSpace returns a Space without a generation: reads wait or fail until Begin.
func NewSpace() *Space {
	s := &Space{}
	s.now.Store(&version{
		keys: newTree[string, *entry](strings.Compare),
		log:  newTree[change, *entry](change.compare),
		tent: newTree[string, *entry](strings.Compare),
		next: make(chan struct{}),
	})
	return s
}

// publish makes v, a changed copy of the newest version, the newest one. The
// caller holds mu.
func (s *Space) publish(v version) {
	old := s.now.Load()
	v.next = make(chan struct{})
	s.now.Store(&v)
	close(old.next)
}

// Position returns where the current generation is; zero before Begin.
func (s *Space) Position() Position { return s.now.Load().position() }

func (v *version) position() Position {
	return Position{Generation: v.generation, Revision: v.head}
}

// Changed returns a channel that is closed once there is a newer version than
// the one that the caller saw last, if it takes the channel first and looks
// then.
func (s *Space) Changed() <-chan struct{} { return s.now.Load().next }

// Begin names the first generation. It does nothing when there is one: the first
// of several members that propose a name wins.
func (s *Space) Begin(generation string) Position {
	s.mu.Lock()
	defer s.mu.Unlock()
	v := *s.now.Load()
	if v.generation == "" {
		v.generation = generation
		v.revision++
		v.head, v.floor = v.revision, v.revision
		s.publish(v)
	}
	return v.position()
}

// Claim makes holder the leader and returns the new epoch, which its leader-only
// transactions have to carry.
func (s *Space) Claim(holder string) uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	v := *s.now.Load()
	v.lead = Leader{Holder: holder, Epoch: v.lead.Epoch + 1}
	s.publish(v)
	return v.lead.Epoch
}

// Resign takes the leadership from the holder of epoch, unless another one has
// claimed it already.
func (s *Space) Resign(epoch uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	v := *s.now.Load()
	if v.lead.Epoch == epoch {
		v.lead = Leader{Epoch: epoch + 1}
		s.publish(v)
	}
}

// Leader returns who leads. Holder is empty when nobody does.
func (s *Space) Leader() Leader { return s.now.Load().lead }

// Commit applies a valid txn. Epoch is the claim of the sender; it matters only
// when txn.Leader is set. The errors are *ConflictError, ErrNotLeader and, before
// Begin, ErrNoLeader. Values are copied.
func (s *Space) Commit(txn Txn, epoch uint64) (Position, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	v := *s.now.Load()
	if v.generation == "" {
		return Position{}, ErrNoLeader
	}
	if txn.Leader && (v.lead.Holder == "" || v.lead.Epoch != epoch) {
		return Position{}, ErrNotLeader
	}
	if txn.Generation != "" && txn.Generation != v.generation {
		return Position{}, &ConflictError{Position: v.position()}
	}
	for _, c := range txn.Checks {
		if fault.Bug(fault.IgnoreChecks) {
			break
		}
		if have := v.modRevision(c.Key); have != c.ModRevision {
			return Position{}, &ConflictError{Key: c.Key, Want: c.ModRevision, Have: have, Position: v.position()}
		}
	}
	if len(txn.Ops) == 0 {
		return v.position(), nil
	}
	if !fault.Bug(fault.ReuseRevision) || v.modRevision(txn.Ops[0].Key) != v.head {
		v.revision++
	}
	v.head = v.revision
	for _, op := range txn.Ops {
		v.apply(op)
	}
	v.forget()
	s.publish(v)
	return v.position(), nil
}

func (v *version) modRevision(key string) uint64 {
	if e, ok := v.keys.get(key); ok && !e.deleted {
		return e.pair.ModRevision
	}
	return 0
}

// apply writes op to the current generation at revision head.
func (v *version) apply(op Op) {
	old, known := v.keys.get(op.Key)
	if op.Delete && !known {
		return
	}
	if known {
		v.log = v.log.remove(change{revision: old.pair.ModRevision, key: op.Key})
		if old.deleted {
			v.gone--
		}
	}
	e := newEntry(op, v.head)
	if op.Delete {
		v.gone++
	}
	v.keys = v.keys.put(op.Key, e)
	v.log = v.log.put(change{revision: v.head, key: op.Key}, e)
}

func newEntry(op Op, revision uint64) *entry {
	e := &entry{pair: Pair{Key: op.Key, ModRevision: revision}, deleted: op.Delete}
	if !op.Delete {
		e.pair.Value = append(make([]byte, 0, len(op.Value)), op.Value...)
	}
	return e
}

// forget drops the oldest deletions beyond keepDeletions, and with them the part
// of the log that no watcher can continue from any more.
func (v *version) forget() {
	if v.gone <= keepDeletions {
		return
	}
	for c, e := range v.log.from(change{}) {
		if c.revision > v.floor && v.gone <= keepDeletions {
			break
		}
		v.log = v.log.remove(c)
		if e.deleted {
			v.keys = v.keys.remove(c.key)
			v.gone--
			v.floor = c.revision
		}
	}
}

// OpenStage opens an empty stage and drops the one that was open before.
func (s *Space) OpenStage(generation string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	v := *s.now.Load()
	v.open, v.tent = generation, v.tent.cleared()
	s.publish(v)
}

// WriteStage applies ops to the stage, if it is the open one; else ErrStageLost.
func (s *Space) WriteStage(generation string, ops []Op) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	v := *s.now.Load()
	if v.open != generation || generation == "" {
		return ErrStageLost
	}
	v.revision++
	for _, op := range ops {
		if op.Delete {
			v.tent = v.tent.remove(op.Key)
			continue
		}
		v.tent = v.tent.put(op.Key, newEntry(op, v.revision))
	}
	s.publish(v)
	return nil
}

// Activate makes the open stage current, on the terms of Stage.Activate.
func (s *Space) Activate(generation string, from Position) (Position, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	v := *s.now.Load()
	switch {
	case v.open != generation || generation == "":
		return Position{}, ErrStageLost
	case from.Generation != "" && from.Generation != v.generation,
		from.Revision != 0 && from.Revision != v.head:
		return Position{}, &ConflictError{Want: from.Revision, Have: v.head, Position: v.position()}
	}
	v.revision++
	v.generation, v.open = generation, ""
	v.head, v.floor = v.revision, v.revision
	v.keys, v.tent = v.tent, v.tent.cleared()
	v.log, v.gone = v.log.cleared(), 0
	s.publish(v)
	return v.position(), nil
}

// DropStage removes the stage if it is the open one.
func (s *Space) DropStage(generation string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	v := *s.now.Load()
	if v.open == generation && generation != "" {
		v.open, v.tent = "", v.tent.cleared()
		s.publish(v)
	}
}

// List returns the pairs under prefix at the newest position. Before Begin it
// returns ErrNoLeader.
func (s *Space) List(prefix string) (Snapshot, error) {
	v := s.now.Load()
	if v.generation == "" {
		return Snapshot{}, ErrNoLeader
	}
	return Snapshot{Position: v.position(), Pairs: v.list(prefix)}, nil
}

func (v *version) list(prefix string) []Pair {
	var pairs []Pair
	for key, e := range v.keys.from(prefix) {
		if !strings.HasPrefix(key, prefix) {
			break
		}
		if !e.deleted {
			pairs = append(pairs, e.pair)
		}
	}
	return pairs
}

// Watch returns a Watcher with the guarantees of Engine.Watch. Its Next returns
// ErrClosed once closed is closed. It holds no queue: a batch is computed from
// the state at the time of Next.
func (s *Space) Watch(ctx context.Context, closed <-chan struct{}, prefix string, after Position) Watcher {
	return &spaceWatcher{space: s, life: ctx, closed: closed, prefix: prefix, at: after, seen: after}
}

type spaceWatcher struct {
	space  *Space
	life   context.Context //nolint:containedctx // the lifetime of the watcher, as in Engine.Watch
	closed <-chan struct{}
	prefix string
	at     Position // To of the last batch
	seen   Position // like at, but moved over what did not concern the prefix
}

// Next implements Watcher.
func (w *spaceWatcher) Next(ctx context.Context) (Batch, error) {
	for {
		select {
		case <-w.closed:
			return Batch{}, ErrClosed
		default:
		}
		if err := cmp.Or(w.life.Err(), ctx.Err()); err != nil {
			return Batch{}, err
		}
		v := w.space.now.Load()
		if batch, ok := w.advance(v); ok {
			return batch, nil
		}
		select {
		case <-v.next:
		case <-w.closed:
		case <-w.life.Done():
		case <-ctx.Done():
		}
	}
}

// advance returns what v has beyond the last batch.
func (w *spaceWatcher) advance(v *version) (Batch, bool) {
	to := v.position()
	if v.generation == "" || w.seen == to {
		return Batch{}, false
	}
	batch := Batch{From: w.at, To: to}
	if w.seen.Generation != v.generation || w.seen.Revision < v.floor || w.seen.Revision > v.head {
		batch.Reset = true
		batch.Puts = v.list(w.prefix)
	} else {
		batch.Puts, batch.Deletes = v.since(w.seen.Revision, w.prefix)
		if w.prefix != "" && len(batch.Puts)+len(batch.Deletes) == 0 {
			w.seen = to
			return Batch{}, false
		}
	}
	w.at, w.seen = to, to
	return batch, true
}

// since returns the newest changes after revision, which is not below the floor.
func (v *version) since(revision uint64, prefix string) (puts []Pair, deletes []string) {
	for c, e := range v.log.from(change{revision: revision + 1}) {
		switch {
		case !strings.HasPrefix(c.key, prefix):
		case e.deleted && len(puts) > 0 && fault.Bug(fault.DropDeletion):
		case e.deleted:
			deletes = append(deletes, c.key)
		default:
			puts = append(puts, e.pair)
		}
	}
	slices.SortFunc(puts, func(a, b Pair) int { return strings.Compare(a.Key, b.Key) })
	slices.Sort(deletes)
	return puts, deletes
}
