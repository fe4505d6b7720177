package raftstore

import (
	"context"
	"time"

	"github.com/meshd/meshd/server/store"
)

// resignTimeout bounds the attempt to give up the leadership in order.
const resignTimeout = 2 * time.Second

// claimPause is the time between two claims of one term.
const claimPause = time.Second

// tenure is one run of Lead's function.
type tenure struct {
	epoch uint64
	lost  context.CancelFunc
}

// Lead implements store.Engine. Who leads Raft leads the cluster: its first act
// is to claim the leadership in the state itself, and leader-only transactions
// carry the number of the claim. So a transaction of an earlier leader that is
// still on its way is refused by every member.
func (e *Engine) Lead(ctx context.Context, fn func(context.Context) error) error {
	if !e.leading.CompareAndSwap(false, true) {
		return store.ErrLeading
	}
	defer e.leading.Store(false)
	for {
		if err := e.enter(ctx); err != nil {
			return e.end(ctx)
		}
		_, now, turn := e.current()
		if now != nil {
			o, err := e.apply(ctx, command{Kind: commandClaim, Holder: e.cfg.ID}.encode())
			if err == nil {
				if over, err := e.rule(ctx, now, o.epoch, fn); over {
					return err
				}
				continue
			}
		}
		// Without a term, wait for one. A claim that failed usually did with its
		// term; if not, it is tried again.
		var again <-chan time.Time
		if now != nil {
			again = time.After(claimPause)
		}
		select {
		case <-turn:
		case <-again:
		case <-ctx.Done():
		case <-e.closing:
		}
	}
}

// end returns what Lead returns when it did not end by itself.
func (e *Engine) end(ctx context.Context) error {
	if ctx.Err() == nil {
		return store.ErrClosed
	}
	return nil
}

// rule runs fn under the claim of epoch until it returns. It reports whether
// Lead is over, with its result.
func (e *Engine) rule(ctx context.Context, now *term, epoch uint64, fn func(context.Context) error) (bool, error) {
	reign, lost := context.WithCancel(ctx)
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		select {
		case <-now.over:
		case <-e.closing:
		case <-reign.Done():
		}
		lost()
	}()
	e.mu.Lock()
	e.hold = &tenure{epoch: epoch, lost: lost}
	e.mu.Unlock()
	e.claimMoved() // it may have, before hold was set
	e.epoch.Store(epoch)

	err := fn(reign)

	e.epoch.Store(0)
	kept := reign.Err() == nil
	e.mu.Lock()
	e.hold = nil
	e.mu.Unlock()
	lost()
	<-watched
	if kept || ctx.Err() != nil {
		resign, stop := context.WithTimeout(context.WithoutCancel(ctx), resignTimeout)
		defer stop()
		// If it fails, the next claim does the same.
		_, _ = e.apply(resign, command{Kind: commandResign, Epoch: epoch}.encode())
	}
	switch {
	case kept:
		return true, err
	case ctx.Err() != nil:
		return true, nil
	default:
		return false, nil // the leadership was lost, or the engine closed
	}
}

// claimMoved ends the tenure that another claim has displaced. It is called by
// the machine whenever the claim may have changed.
func (e *Engine) claimMoved() {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.hold != nil && e.space.Leader().Epoch != e.hold.epoch {
		e.hold.lost()
	}
}
