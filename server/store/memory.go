package store

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
)

// Memory is an Engine whose state lives in this process and dies with it. It is
// for tests and for programs that keep nothing. Several members of one store are
// made with Peer.
type Memory struct {
	cluster *memoryCluster
	name    string
	epoch   atomic.Uint64 // of the claim under which fn runs now; 0: does not lead
	leading atomic.Bool   // a call of Lead is at work
	once    sync.Once
	closed  chan struct{}
}

type memoryCluster struct {
	space   *Space
	seat    chan struct{} // holds one token while somebody leads
	members atomic.Int64
}

var _ Engine = (*Memory)(nil)

// NewMemory returns the first member of a new, empty store. It has no
// goroutines.
func NewMemory() *Memory {
	c := &memoryCluster{space: NewSpace(), seat: make(chan struct{}, 1)}
	c.space.Begin(NewGeneration())
	return c.join()
}

// Peer returns another member of the same store. It may be used, and is closed,
// independently of m; the state lives as long as any member.
func (m *Memory) Peer() *Memory { return m.cluster.join() }

func (c *memoryCluster) join() *Memory {
	return &Memory{
		cluster: c,
		name:    fmt.Sprintf("member-%d", c.members.Add(1)),
		closed:  make(chan struct{}),
	}
}

// alive returns why a call can't be served.
func (m *Memory) alive(ctx context.Context) error {
	select {
	case <-m.closed:
		return ErrClosed
	default:
		return ctx.Err()
	}
}

// List implements Engine.
func (m *Memory) List(ctx context.Context, prefix string) (Snapshot, error) {
	if err := m.alive(ctx); err != nil {
		return Snapshot{}, err
	}
	return m.cluster.space.List(prefix)
}

// Commit implements Engine.
func (m *Memory) Commit(ctx context.Context, txn Txn) (Position, error) {
	if err := txn.Validate(); err != nil {
		return Position{}, err
	}
	if err := m.alive(ctx); err != nil {
		return Position{}, err
	}
	return m.cluster.space.Commit(txn, m.epoch.Load())
}

// Watch implements Engine.
func (m *Memory) Watch(ctx context.Context, prefix string, after Position) Watcher {
	return m.cluster.space.Watch(ctx, m.closed, prefix, after)
}

// Barrier implements Engine.
func (m *Memory) Barrier(ctx context.Context) (Position, error) {
	if err := m.alive(ctx); err != nil {
		return Position{}, err
	}
	return m.cluster.space.Position(), nil
}

// Lead implements Engine. Leadership is lost only by Close.
func (m *Memory) Lead(ctx context.Context, fn func(context.Context) error) error {
	if !m.leading.CompareAndSwap(false, true) {
		return ErrLeading
	}
	defer m.leading.Store(false)
	if err := m.alive(ctx); err != nil {
		return quiet(ctx, err)
	}
	select {
	case m.cluster.seat <- struct{}{}:
	case <-m.closed:
		return ErrClosed
	case <-ctx.Done():
		return nil
	}
	defer func() { <-m.cluster.seat }()

	term, stop := context.WithCancel(ctx)
	defer stop()
	watch := make(chan struct{})
	go func() {
		defer close(watch)
		select {
		case <-m.closed:
			stop()
		case <-term.Done():
		}
	}()
	defer func() { stop(); <-watch }()

	epoch := m.cluster.space.Claim(m.name)
	m.epoch.Store(epoch)
	err := fn(term)
	m.epoch.Store(0)
	m.cluster.space.Resign(epoch)
	if end := m.alive(ctx); end != nil {
		return quiet(ctx, end)
	}
	return err
}

// quiet turns the end of the caller's own context into nil.
func quiet(ctx context.Context, err error) error {
	if ctx.Err() != nil && errors.Is(err, ctx.Err()) {
		return nil
	}
	return err
}

// Stage implements Engine.
func (m *Memory) Stage(ctx context.Context) (Stage, error) {
	if err := m.alive(ctx); err != nil {
		return nil, err
	}
	s := &memoryStage{memory: m, generation: NewGeneration()}
	m.cluster.space.OpenStage(s.generation)
	return s, nil
}

type memoryStage struct {
	memory     *Memory
	generation string
}

// Generation implements Stage.
func (s *memoryStage) Generation() string { return s.generation }

// Write implements Stage.
func (s *memoryStage) Write(ctx context.Context, ops []Op) error {
	if err := (Txn{Ops: ops}).Validate(); err != nil {
		return err
	}
	if err := s.memory.alive(ctx); err != nil {
		return err
	}
	return s.memory.cluster.space.WriteStage(s.generation, ops)
}

// Activate implements Stage.
func (s *memoryStage) Activate(ctx context.Context, from Position) (Position, error) {
	if err := s.memory.alive(ctx); err != nil {
		return Position{}, err
	}
	return s.memory.cluster.space.Activate(s.generation, from)
}

// Discard implements Stage.
func (s *memoryStage) Discard(ctx context.Context) error {
	if err := s.memory.alive(ctx); err != nil {
		return err
	}
	s.memory.cluster.space.DropStage(s.generation)
	return nil
}

// Close implements Engine. The other members stay open.
func (m *Memory) Close() error {
	m.once.Do(func() { close(m.closed) })
	return nil
}
