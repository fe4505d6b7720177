package raftstore

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/hashicorp/raft"

	"github.com/meshd/meshd/server/fault"
	"github.com/meshd/meshd/server/store"
)

// enqueueTimeout bounds how long a write waits before Raft takes it. A write
// that was not taken was not applied.
const enqueueTimeout = 10 * time.Second

// List implements store.Engine.
func (e *Engine) List(ctx context.Context, prefix string) (store.Snapshot, error) {
	if err := e.enter(ctx); err != nil {
		return store.Snapshot{}, err
	}
	return e.space.List(prefix)
}

// State returns this member's state as it is now. Members at one position of one
// history have equal hashes.
func (e *Engine) State() store.Saved { return e.space.Save() }

// Watch implements store.Engine.
func (e *Engine) Watch(ctx context.Context, prefix string, after store.Position) store.Watcher {
	return &watcher{engine: e, inner: e.space.Watch(ctx, e.closing, prefix, after), life: ctx}
}

// watcher holds batches back until the engine serves: before, the state may be
// an old snapshot whose log was not read yet.
type watcher struct {
	engine *Engine
	inner  store.Watcher
	life   context.Context //nolint:containedctx // the lifetime of the watcher, as in Engine.Watch
}

// Next implements store.Watcher.
func (w *watcher) Next(ctx context.Context) (store.Batch, error) {
	select {
	case <-w.engine.ready:
	case <-w.engine.closing:
	case <-w.life.Done():
	case <-ctx.Done():
	}
	// The inner watcher tells which of the ends it was; it does not wait then.
	return w.inner.Next(ctx)
}

// Commit implements store.Engine. A leader-only transaction does not travel: it
// belongs to the member that leads.
func (e *Engine) Commit(ctx context.Context, txn store.Txn) (store.Position, error) {
	if err := txn.Validate(); err != nil {
		return store.Position{}, err
	}
	if err := e.enter(ctx); err != nil {
		return store.Position{}, err
	}
	c := command{Kind: commandCommit, Txn: txn}
	if !txn.Leader {
		o, err := e.change(ctx, c)
		return o.position, err
	}
	_, leads, _ := e.current()
	if c.Epoch = e.epoch.Load(); c.Epoch == 0 || leads == nil {
		return store.Position{}, store.ErrNotLeader
	}
	o, err := e.apply(ctx, c.encode())
	return o.position, err
}

// Barrier implements store.Engine.
func (e *Engine) Barrier(ctx context.Context) (store.Position, error) {
	if err := e.enter(ctx); err != nil {
		return store.Position{}, err
	}
	if fault.Bug(fault.StaleAsLinearizable) {
		return e.space.Position(), nil
	}
	shared := e.reads.join(e.spawn, func() (store.Position, error) { //nolint:contextcheck // a round belongs to all who share it
		ctx, stop := context.WithTimeout(e.life, e.patience())
		defer stop()
		return e.barrier(ctx)
	})
	select {
	case <-shared.done:
		if shared.err != nil {
			return store.Position{}, fmt.Errorf("barrier: %w", shared.err)
		}
		return shared.position, e.await(ctx, shared.position.Revision)
	case <-e.closing:
		return store.Position{}, store.ErrClosed
	case <-ctx.Done():
		return store.Position{}, ctx.Err()
	}
}

// noLeader tells where to go instead.
func (e *Engine) noLeader(r *raft.Raft) error {
	select {
	case <-e.closing:
		return store.ErrClosed
	default:
	}
	if _, id := r.LeaderWithID(); id != "" && id != raft.ServerID(e.cfg.ID) {
		return fmt.Errorf("%w on this server: %q leads", store.ErrNoLeader, id)
	}
	return store.ErrNoLeader
}

// reply is what Raft says to a command.
type reply struct {
	outcome outcome
	err     error
}

// apply brings one encoded command through the log of this member, which leads.
// The error is that of the command, or one of those that store.Engine.Commit
// lists. Data is kept.
func (e *Engine) apply(ctx context.Context, data []byte) (outcome, error) {
	r, leads, _ := e.current()
	if leads == nil {
		return outcome{}, e.noLeader(r)
	}
	if err := e.writes.stalled(); err != nil {
		return outcome{}, fmt.Errorf("%w on this server: %w", store.ErrNoLeader, err)
	}
	if err := e.room(data); err != nil {
		return outcome{}, err
	}
	done := make(chan reply, 1)
	if !e.spawn(func() { done <- submit(r, data) }) {
		return outcome{}, store.ErrClosed
	}
	if fault.Bug(fault.AnswerBeforeCommit) {
		if o, ok := e.foresee(data); ok {
			return o, nil
		}
	}
	select {
	case got := <-done:
		if got.err != nil {
			return outcome{}, e.translate(r, got.err)
		}
		return got.outcome, got.outcome.err
	case <-e.closing:
		return outcome{}, fmt.Errorf("%w: %w", store.ErrUnknownOutcome, store.ErrClosed)
	case <-ctx.Done():
		return outcome{}, fmt.Errorf("%w: %w", store.ErrUnknownOutcome, ctx.Err())
	}
}

// room returns store.ErrDiskFull when the disk has no room for a command. What
// changes who leads needs little and is always taken.
func (e *Engine) room(data []byte) error {
	switch commandKind(data[0]) {
	case commandBegin, commandClaim, commandResign, commandMark:
		return nil
	case commandCommit, commandOpenStage, commandWriteStage, commandActivate, commandDropStage:
	}
	e.mu.Lock()
	files := e.files
	e.mu.Unlock()
	return files.room()
}

func submit(r *raft.Raft, data []byte) reply {
	f := r.Apply(data, enqueueTimeout)
	if err := f.Error(); err != nil {
		return reply{err: err}
	}
	o, ok := f.Response().(outcome)
	if !ok {
		return reply{err: fmt.Errorf("the log answered with a %T", f.Response())}
	}
	return reply{outcome: o}
}

// foresee is the planted bug AnswerBeforeCommit: what a transaction would lead to
// if it were applied now.
func (e *Engine) foresee(data []byte) (outcome, bool) {
	c, err := decodeCommand(data)
	at := e.space.Position()
	if err != nil || c.Kind != commandCommit || len(c.Txn.Ops) == 0 || c.Txn.Leader {
		return outcome{}, false
	}
	if _, err := e.space.Commit(store.Txn{Generation: c.Txn.Generation, Checks: c.Txn.Checks}, 0); err != nil {
		return outcome{}, false
	}
	at.Revision++
	return outcome{position: at}, true
}

// translate turns an error of raft.Apply into one of the contract. All that Raft
// does not promise to be without effect has an unknown outcome: an entry whose
// write failed may be on the disk, and one without a majority may get it later.
func (e *Engine) translate(r *raft.Raft, err error) error {
	switch {
	case errors.Is(err, raft.ErrNotLeader), errors.Is(err, raft.ErrLeadershipTransferInProgress):
		return e.noLeader(r)
	case errors.Is(err, store.ErrDiskFull):
		return err // refused before anything was written
	case errors.Is(err, raft.ErrEnqueueTimeout):
		return fmt.Errorf("%w that takes writes: none was taken for %v", store.ErrNoLeader, enqueueTimeout)
	case errors.Is(err, raft.ErrRaftShutdown):
		return fmt.Errorf("%w: %w", store.ErrUnknownOutcome, store.ErrClosed)
	default:
		return fmt.Errorf("%w: %w", store.ErrUnknownOutcome, err)
	}
}

// Stage implements store.Engine.
func (e *Engine) Stage(ctx context.Context) (store.Stage, error) {
	s := &stage{engine: e, generation: store.NewGeneration()}
	if _, err := e.change(ctx, command{Kind: commandOpenStage, Generation: s.generation}); err != nil {
		return nil, err
	}
	return s, nil
}

type stage struct {
	engine     *Engine
	generation string
}

// Generation implements store.Stage.
func (s *stage) Generation() string { return s.generation }

// Write implements store.Stage.
func (s *stage) Write(ctx context.Context, ops []store.Op) error {
	txn := store.Txn{Ops: ops}
	if err := txn.Validate(); err != nil {
		return err
	}
	_, err := s.engine.change(ctx, command{Kind: commandWriteStage, Generation: s.generation, Txn: txn})
	return err
}

// Activate implements store.Stage.
func (s *stage) Activate(ctx context.Context, from store.Position) (store.Position, error) {
	o, err := s.engine.change(ctx, command{Kind: commandActivate, Generation: s.generation, From: from})
	return o.position, err
}

// Discard implements store.Stage.
func (s *stage) Discard(ctx context.Context) error {
	_, err := s.engine.change(ctx, command{Kind: commandDropStage, Generation: s.generation})
	return err
}
