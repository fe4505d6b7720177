package state

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/store"
)

var (
	// ErrFeatureLevel is wrapped when a write says what some member of the
	// cluster might not know.
	ErrFeatureLevel = errors.New("feature level of the cluster is too low")
	// ErrRevision is wrapped when a record is not at the revision that its writer
	// expected (Table.Expect).
	ErrRevision = errors.New("record has changed")
	// ErrContention is wrapped when a transaction met another writer in every
	// one of its attempts. Repeating it is safe.
	ErrContention = errors.New("too many concurrent writers")
)

// Retries of Update: waits are random in [0, firstBackoff·2ⁿ), at most maxBackoff
// (exponential backoff with full jitter).
const (
	maxAttempts  = 24
	firstBackoff = time.Millisecond
	maxBackoff   = 100 * time.Millisecond
	// unknownWait bounds the look at what became of a commit whose outcome the
	// engine could not tell.
	unknownWait = 2 * time.Second
)

// State follows a store and writes to it. It is safe for concurrent use. Nothing
// is read before Run.
type State struct {
	engine  store.Engine
	log     *slog.Logger
	current atomic.Pointer[Snapshot]
	ready   chan struct{}
	editing chan struct{} // held by the one whose change of intentions met another's

	mu      sync.Mutex // guards history, past; held while a snapshot is published
	history history
	past    map[string]bool // generations that were replaced
}

// New returns the state kept in engine, which stays the caller's to close.
func New(engine store.Engine, log *slog.Logger) *State {
	s := &State{engine: engine, log: log, ready: make(chan struct{}), editing: make(chan struct{}, 1), past: make(map[string]bool)}
	s.current.Store(newSnapshot(store.Position{}))
	return s
}

// Run follows the store until ctx ends (then it returns nil) or the engine fails.
// It must run once, beside everything else that State does.
func (s *State) Run(ctx context.Context) error {
	watcher := s.engine.Watch(ctx, "", store.Position{})
	for {
		batch, err := watcher.Next(ctx)
		if ctx.Err() != nil {
			return nil //nolint:nilerr // being told to stop is no failure
		}
		if err != nil {
			return fmt.Errorf("follow the store: %w", err)
		}
		s.publish(batch)
	}
}

func (s *State) publish(batch store.Batch) {
	old := s.Snapshot()
	next, changes, problems := old.apply(batch)
	s.mu.Lock()
	if batch.Reset && old.position.Generation != "" && old.position.Generation != next.position.Generation {
		s.past[old.position.Generation] = true
	}
	delete(s.past, next.position.Generation)
	s.history.add(step{from: old.position, to: next.position, changes: changes, reset: batch.Reset})
	s.current.Store(next)
	s.mu.Unlock()
	close(old.superseded)
	if old.position.IsZero() {
		close(s.ready)
	}
	for _, p := range problems {
		s.log.Error("stored record can't be read; what depends on it is denied",
			slog.String("key", p.Key), slog.Uint64("revision", p.Revision), slog.Any("error", p.Err))
	}
}

// Ready returns a channel that is closed when the first snapshot is there.
func (s *State) Ready() <-chan struct{} { return s.ready }

// Snapshot returns the newest snapshot; an empty one until Ready. It lags the
// store by the time that a watch takes. To read what is surely newest, use Fresh.
func (s *State) Snapshot() *Snapshot { return s.current.Load() }

// Changed returns a channel that is closed as soon as there is a newer snapshot
// than after, which must come from this State. There is no backlog: the reader
// takes Snapshot then, which may be several commits later.
func (s *State) Changed(after *Snapshot) <-chan struct{} { return after.superseded }

// Changes returns the newest snapshot and what differs in it from after. It is
// false when that can't be told: after is too old, or of another generation;
// then anything may differ.
func (s *State) Changes(after *Snapshot) (*Snapshot, []Change, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	newest := s.current.Load()
	changes, ok := s.history.between(after.position, newest.position)
	return newest, changes, ok
}

// Fresh returns a snapshot that holds every write that was acknowledged anywhere
// in the cluster before the call (a linearizable read). It needs a majority of
// servers; errors are the engine's and ctx's.
func (s *State) Fresh(ctx context.Context) (*Snapshot, error) {
	position, err := s.engine.Barrier(ctx)
	if err != nil {
		return nil, fmt.Errorf("confirm that reads are fresh: %w", err)
	}
	return s.Await(ctx, catalog.Position(position))
}

// Await returns a snapshot that covers position: as new, or of a generation that
// has replaced the position's. It waits until there is one or ctx ends.
func (s *State) Await(ctx context.Context, position catalog.Position) (*Snapshot, error) {
	for {
		snapshot := s.Snapshot()
		if s.covers(snapshot, position) {
			return snapshot, nil
		}
		select {
		case <-snapshot.superseded:
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for position %s, being at %s: %w", position, snapshot.position, ctx.Err())
		}
	}
}

func (s *State) covers(snapshot *Snapshot, position catalog.Position) bool {
	if store.Position(snapshot.position).Covers(store.Position(position)) {
		return true
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.past[position.Generation]
}

// Update runs fn on a transaction and commits what it wrote, all or nothing. It
// returns the position of the commit once Snapshot contains it, or, if fn wrote
// nothing, the position that fn read.
//
// What becomes of intentions is recorded in the same commit: see IntentionEdits.
//
// When something that fn had read through Table.Get, or has written, was changed
// in between, fn is run again on a newer snapshot: it must have no effects of its
// own. An error of fn ends the update and is returned as it is; neither that nor a
// success without a commit rests on a snapshot that lags behind what another server
// has acknowledged. Other errors wrap
// those of store.Engine.Commit (store.ErrUnknownOutcome: the write may still
// happen; repeating the update is safe as far as fn tests what it finds),
// ErrContention, or ctx's.
func (s *State) Update(ctx context.Context, fn func(*Tx) error) (catalog.Position, error) {
	select {
	case <-s.ready:
	case <-ctx.Done():
		return catalog.Position{}, fmt.Errorf("wait for the first snapshot: %w", ctx.Err())
	}
	backoff, queued, fresh := firstBackoff, false, false
	for range maxAttempts {
		tx := newTx(s.Snapshot())
		txn, err := tx.run(fn)
		if err != nil || len(txn.Ops) == 0 {
			if fresh {
				return tx.base.position, err
			}
			// No commit is going to compare what was read with what is stored.
			if _, err := s.Fresh(ctx); err != nil {
				return catalog.Position{}, err
			}
			fresh = true
			continue
		}
		position, err := s.commit(ctx, tx, txn)
		var conflict *store.ConflictError
		if !errors.As(err, &conflict) {
			return position, err
		}
		// Until the snapshot shows the conflict, another attempt would meet it again.
		if _, err := s.Await(ctx, catalog.Position(conflict.Position)); err != nil {
			return catalog.Position{}, err
		}
		fresh = true
		if !queued && strings.HasPrefix(conflict.Key, IntentionEdits.prefix()) {
			// All writers of intentions meet in their history. Here they queue, rather
			// than find out again and again who is first.
			select {
			case s.editing <- struct{}{}:
				defer func() { <-s.editing }()
			case <-ctx.Done():
				return catalog.Position{}, fmt.Errorf("wait for others who change intentions: %w", ctx.Err())
			}
			queued = true
			continue
		}
		if err := pause(ctx, rand.N(backoff)); err != nil { //nolint:gosec // jitter needs no secrecy
			return catalog.Position{}, err
		}
		backoff = min(2*backoff, maxBackoff)
	}
	return catalog.Position{}, fmt.Errorf("update after %d attempts: %w", maxAttempts, ErrContention)
}

func (s *State) commit(ctx context.Context, tx *Tx, txn store.Txn) (catalog.Position, error) {
	position, err := s.engine.Commit(ctx, txn)
	if errors.Is(err, store.ErrUnknownOutcome) {
		return s.resolve(ctx, tx, err)
	}
	if err != nil {
		return catalog.Position{}, fmt.Errorf("write %s: %w", tx.describe(), err)
	}
	if _, err := s.Await(ctx, catalog.Position(position)); err != nil {
		return catalog.Position{}, fmt.Errorf("write %s: %w: it is stored, but not seen here yet: %w", tx.describe(), store.ErrUnknownOutcome, err)
	}
	return catalog.Position(position), nil
}

// resolve looks at the content after a commit of unknown outcome. Only "it is
// there" can be learnt: what is not there yet may still come.
func (s *State) resolve(ctx context.Context, tx *Tx, cause error) (catalog.Position, error) {
	unknown := fmt.Errorf("write %s: %w", tx.describe(), cause)
	ctx, cancel := context.WithTimeout(ctx, unknownWait)
	defer cancel()
	snapshot, err := s.Fresh(ctx)
	if err != nil || snapshot.position.Generation != tx.base.position.Generation || !tx.holds(snapshot) {
		return catalog.Position{}, unknown
	}
	return snapshot.position, nil
}

func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait to retry a conflicting write: %w", ctx.Err())
	}
}
