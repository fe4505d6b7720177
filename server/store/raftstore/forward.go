package raftstore

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"github.com/meshd/meshd/server/fault"
	"github.com/meshd/meshd/server/store"
)

// Requests from a follower to the leader, by their first byte. Numbers are never
// used again.
const (
	askBarrier byte = 1 // nothing follows
	askCommand byte = 2 // a command follows
	askRemove  byte = 3 // the ID of a member follows
)

// Replies of the leader, by their first byte.
const (
	replyDone       byte = 1 // a position follows
	replyConflict   byte = 2 // key, want, have, position
	replyNoLeader   byte = 3 // a text; nothing was applied
	replyNotLeader  byte = 4
	replyStageLost  byte = 5
	replyUnknown    byte = 6 // a text
	replyDiskFull   byte = 7 // a text; nothing was applied
	replyRefused    byte = 8 // a text: the request itself is at fault
	replyNotWritten byte = 9 // a text; nothing was applied
)

// retryPause is the time between two attempts at one leader, grace how long a
// write that is on its way to a leader is waited for when there is another: an old
// leader that lives answers at once when it is told so, one whose disk hangs never.
const (
	retryPause = 50 * time.Millisecond
	grace      = 300 * time.Millisecond
)

// maxText bounds a text in a reply.
const maxText = 1024

var errReply = errors.New("not a reply of this version")

// change brings a command through the log, from any member, and waits until this
// member's own state has its result.
func (e *Engine) change(ctx context.Context, c command) (outcome, error) {
	if err := e.enter(ctx); err != nil {
		return outcome{}, err
	}
	data := append(make([]byte, 0, c.size()+1), askCommand)
	data = c.appendTo(data)
	var o outcome
	err := e.lead(ctx, func() (err error) {
		o, err = e.apply(ctx, data[1:])
		return err
	}, func(id, address string) (err error) {
		o, err = e.send(ctx, id, address, data)
		return err
	})
	return o, err
}

// barrier returns the position of a barrier from wherever the leader is, when the
// own state has reached it.
func (e *Engine) barrier(ctx context.Context) (store.Position, error) {
	var at store.Position
	err := e.lead(ctx, func() (err error) {
		at, err = e.confirm(ctx)
		return err
	}, func(id, address string) error {
		o, err := e.send(ctx, id, address, []byte{askBarrier})
		if errors.Is(err, store.ErrUnknownOutcome) {
			err = fmt.Errorf("%w that answers: %v", store.ErrNoLeader, err) //nolint:errorlint // a read has no outcome
		}
		at = o.position
		return err
	})
	return at, err
}

// lead calls here if this member leads, else there with the one that does, and
// again while they return store.ErrNoLeader and time is left.
func (e *Engine) lead(ctx context.Context, here func() error, there func(id, address string) error) error {
	var patience <-chan time.Time
	for {
		news := e.Changed()
		err := store.ErrNoLeader
		var pause <-chan time.Time
		r, leads, _ := e.current()
		address, id := r.LeaderWithID()
		switch {
		case leads != nil:
			err = here()
			pause = time.After(retryPause)
		case id != "" && id != raft.ServerID(e.cfg.ID) && e.cfg.Forward != nil:
			err = there(string(id), string(address))
			pause = time.After(retryPause)
		case id != "":
			err = e.noLeader(r)
		}
		if err == nil || !errors.Is(err, store.ErrNoLeader) || errors.Is(err, store.ErrUnknownOutcome) || errors.Is(err, store.ErrClosed) {
			return err
		}
		if patience == nil {
			patience = time.After(e.patience())
		}
		select {
		case <-news:
		case <-pause:
		case <-patience:
			return err
		case <-e.closing:
			return store.ErrClosed
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", ctx.Err(), err)
		}
	}
}

// send hands a request to the leader and waits until this member's own state has
// what the reply is about.
func (e *Engine) send(ctx context.Context, id, address string, request []byte) (outcome, error) {
	sent, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	defer context.AfterFunc(e.life, func() { stop(store.ErrClosed) })() //nolint:contextcheck // the engine's life ends it too
	over := make(chan struct{})
	defer close(over)
	wait := grace
	if request[0] == askBarrier {
		wait = 0 // the new leader is asked just as well
	}
	go e.watchLeader(id, wait, over, stop)
	reply, err := e.cfg.Forward(sent, id, address, request)
	switch {
	case err == nil:
	case errors.Is(err, store.ErrNoLeader):
		return outcome{}, fmt.Errorf("%w that can be reached: forward to %q at %s: %w", store.ErrNoLeader, id, address, err)
	case sent.Err() != nil:
		return outcome{}, fmt.Errorf("%w: forward to %q at %s: %w", store.ErrUnknownOutcome, id, address, context.Cause(sent))
	default:
		return outcome{}, fmt.Errorf("%w: forward to %q at %s: %w", store.ErrUnknownOutcome, id, address, err)
	}
	o, err := decodeReply(reply)
	at := o.position
	if conflict, ok := errors.AsType[*store.ConflictError](err); ok {
		at = conflict.Position // a retry before is in vain
	}
	if fault.Bug(fault.SkipCatchUp) {
		return o, err
	}
	if late := e.await(ctx, at.Revision); late != nil && err == nil {
		return outcome{}, fmt.Errorf("%w: this server has not caught up: %w", store.ErrUnknownOutcome, late)
	}
	return o, err
}

// watchLeader gives up on a request to a leader some time after there is another.
func (e *Engine) watchLeader(id string, wait time.Duration, over <-chan struct{}, giveUp context.CancelCauseFunc) {
	for {
		news := e.Changed()
		if now, _ := e.Leader(); now != id && now != "" {
			break
		}
		select {
		case <-news:
		case <-over:
			return
		}
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
		giveUp(fmt.Errorf("%q does not lead any more", id))
	case <-over:
	}
}

// Serve answers a request that another member's Engine gave to its Forward. The
// request is kept: its bytes must not change any more. An error, which wraps
// store.ErrInvalid, store.ErrClosed or is ctx's, says that nothing was applied.
func (e *Engine) Serve(ctx context.Context, request []byte) ([]byte, error) {
	if err := e.enter(ctx); err != nil {
		return nil, err
	}
	if len(request) == 0 {
		return nil, fmt.Errorf("%w: an empty request from another server", store.ErrInvalid)
	}
	e.settle(ctx)
	body := request[1:]
	switch request[0] {
	case askBarrier:
		at, err := e.confirm(ctx)
		return encodeReply(outcome{position: at}, err), nil
	case askCommand:
		c, err := decodeCommand(body)
		if err != nil || !c.travels() {
			return nil, fmt.Errorf("%w: a command from another server: %w", store.ErrInvalid, errors.Join(err, errCommand))
		}
		o, err := e.apply(ctx, body)
		e.spread(o.index)
		return encodeReply(o, err), nil
	case askRemove:
		return encodeReply(outcome{}, e.Remove(ctx, string(body))), nil
	default:
		return nil, fmt.Errorf("%w: a request of kind %d from another server", store.ErrInvalid, request[0])
	}
}

// settle waits for a member that Raft has just elected to take up its office.
func (e *Engine) settle(ctx context.Context) {
	patience := time.NewTimer(e.patience())
	defer patience.Stop()
	for {
		r, leads, turn := e.current()
		if leads != nil || r.State() != raft.Leader || e.writes.stalled() != nil {
			return
		}
		select {
		case <-turn:
		case <-patience.C:
			return
		case <-e.closing:
			return
		case <-ctx.Done():
			return
		}
	}
}

func encodeReply(o outcome, err error) []byte {
	text := func(kind byte) []byte {
		said := err.Error()
		return appendText([]byte{kind}, said[:min(len(said), maxText)])
	}
	var conflict *store.ConflictError
	switch {
	case err == nil:
		return appendPosition([]byte{replyDone}, o.position)
	case errors.As(err, &conflict):
		b := appendText([]byte{replyConflict}, conflict.Key)
		b = binary.AppendUvarint(b, conflict.Want)
		b = binary.AppendUvarint(b, conflict.Have)
		return appendPosition(b, conflict.Position)
	case errors.Is(err, store.ErrUnknownOutcome):
		return text(replyUnknown)
	case errors.Is(err, store.ErrNoLeader), errors.Is(err, store.ErrClosed):
		return text(replyNoLeader)
	case errors.Is(err, store.ErrNotLeader):
		return []byte{replyNotLeader}
	case errors.Is(err, store.ErrStageLost):
		return []byte{replyStageLost}
	case errors.Is(err, store.ErrDiskFull):
		return text(replyDiskFull)
	case errors.Is(err, store.ErrInvalid):
		return text(replyRefused)
	default:
		return text(replyNotWritten)
	}
}

func appendPosition(b []byte, p store.Position) []byte {
	return binary.AppendUvarint(appendText(b, p.Generation), p.Revision)
}

// decodeReply reads what encodeReply wrote. Bytes that it can't read are an
// unknown outcome.
func decodeReply(b []byte) (outcome, error) {
	d := decoder{b: b}
	kind := d.byte()
	var (
		o      outcome
		result error
	)
	said := func(sentinel error) {
		result = fmt.Errorf("%w: the leader: %s", sentinel, d.blob(maxText))
	}
	switch kind {
	case replyDone:
		o.position = d.position()
	case replyConflict:
		c := &store.ConflictError{Key: string(d.blob(store.MaxKey)), Want: d.number(), Have: d.number()}
		c.Position = d.position()
		result = c
	case replyNoLeader:
		said(store.ErrNoLeader)
	case replyNotLeader:
		result = store.ErrNotLeader
	case replyStageLost:
		result = store.ErrStageLost
	case replyUnknown:
		said(store.ErrUnknownOutcome)
	case replyDiskFull:
		said(store.ErrDiskFull)
	case replyRefused:
		said(store.ErrInvalid)
	case replyNotWritten:
		said(errReply)
	default:
		d.demand(false, "unknown kind")
	}
	d.demand(len(d.b) == 0, "bytes follow it")
	if d.err != nil {
		return outcome{}, fmt.Errorf("%w: %w: %w", store.ErrUnknownOutcome, errReply, d.err)
	}
	return o, result
}

// reach lets calls wait until the state has reached a revision.
type reach struct {
	mu      sync.Mutex
	waiting []arrival
}

type arrival struct {
	revision uint64
	done     chan struct{}
}

// await waits until this member's state covers a revision. Revisions only grow
// within one log, over all its generations.
func (e *Engine) await(ctx context.Context, revision uint64) error {
	if e.space.Position().Revision >= revision {
		return nil
	}
	mine := arrival{revision: revision, done: make(chan struct{})}
	e.reach.mu.Lock()
	e.reach.waiting = append(e.reach.waiting, mine)
	e.reach.mu.Unlock()
	e.arrived() // it may have, before mine was there
	select {
	case <-mine.done:
		return nil
	case <-e.closing:
		return store.ErrClosed
	case <-ctx.Done():
		return ctx.Err()
	}
}

// arrived wakes who waits for what the state has reached. It is called by the
// machine after changes.
func (e *Engine) arrived() {
	e.reach.mu.Lock()
	defer e.reach.mu.Unlock()
	at := e.space.Position().Revision
	kept := e.reach.waiting[:0]
	for _, a := range e.reach.waiting {
		if a.revision <= at {
			close(a.done)
			continue
		}
		kept = append(kept, a)
	}
	clear(e.reach.waiting[len(kept):])
	e.reach.waiting = kept
}
