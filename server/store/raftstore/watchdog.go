package raftstore

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

// ErrDiskHung says that a write to the disk of this server does not end.
var ErrDiskHung = errors.New("the disk hangs")

// Limits of one write to the disk. A server whose disk hangs for stallLimit stops
// sending, so that the others elect a leader that can write: Raft itself would
// keep it in office for ever, because its heartbeats do not wait for the disk
// (hashicorp/raft issues 503, 612). After hangLimit the process ends: what waits
// for it is better off with an error.
const (
	stallLimit = 1500 * time.Millisecond
	hangLimit  = 5 * time.Second
)

// watchdog knows since when the oldest of the writes that are under way is.
// Its zero value is ready.
type watchdog struct {
	mu    sync.Mutex
	count uint64
	begun map[uint64]time.Time
}

// begin notes the begin of a write and returns what notes its end.
func (w *watchdog) begin() func() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.begun == nil {
		w.begun = map[uint64]time.Time{}
	}
	w.count++
	id := w.count
	w.begun[id] = time.Now()
	return func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		delete(w.begun, id)
	}
}

// age is how long the oldest write has been under way, 0 if there is none.
func (w *watchdog) age() time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	oldest := time.Duration(0)
	for _, at := range w.begun {
		oldest = max(oldest, time.Since(at))
	}
	return oldest
}

// stalled returns an error while a write takes longer than stallLimit.
func (w *watchdog) stalled() error {
	if age := w.age(); age >= stallLimit {
		return fmt.Errorf("%w: a write has been under way for %v", ErrDiskHung, age.Round(100*time.Millisecond))
	}
	return nil
}

// watch calls fail when a write takes longer than hangLimit. It ends when ctx
// does, or by what it returns.
func (w *watchdog) watch(ctx context.Context, fail func(error)) (stop func()) {
	over := make(chan struct{})
	go func() {
		tick := time.NewTicker(stallLimit / 15)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
			case <-over:
				return
			case <-ctx.Done():
				return
			}
			if age := w.age(); age >= hangLimit {
				fail(fmt.Errorf("%w: a write has been under way for %v", ErrDiskHung, age.Round(100*time.Millisecond)))
				return
			}
		}
	}()
	return func() { close(over) }
}

// checkDisk gives the leadership up while the disk hangs, and takes it up again
// if Raft has left it with this member.
func (e *Engine) checkDisk(r *raft.Raft) {
	_, leads, _ := e.current()
	stalled := e.writes.stalled()
	switch {
	case stalled != nil && leads != nil:
		e.log.Error("the disk hangs: leave the leadership to others", slog.Any("error", stalled))
		e.setTerm(nil)
		e.spawn(func() { e.appoint(r) })
	case stalled == nil && leads == nil && r.State() == raft.Leader:
		e.establish(r)
	}
}

// appoint asks another member, that with the longest log, to stand for election at
// once. Raft's own transfer waits for the loop that waits for the disk; and without
// either the followers wait for their time-outs, and refuse each other until both
// have seen the silence, as they do now if the one who was asked does not win.
func (e *Engine) appoint(r *raft.Raft) {
	voters := slices.DeleteFunc(servers(r), func(s raft.Server) bool {
		return s.Suffrage != raft.Voter || s.ID == raft.ServerID(e.cfg.ID)
	})
	last := func(s raft.Server) uint64 { return e.wire.of(string(s.ID)).last }
	slices.SortStableFunc(voters, func(a, b raft.Server) int { return cmp.Compare(last(b), last(a)) })
	for _, s := range voters {
		request := raft.TimeoutNowRequest{RPCHeader: e.header(e.wire)}
		var reply raft.TimeoutNowResponse
		err := e.wire.TimeoutNow(s.ID, s.Address, &request, &reply)
		if err == nil {
			return
		}
		e.log.Warn("a member could not be asked to lead", slog.String("server", string(s.ID)), slog.Any("error", err))
	}
}

// shunned remembers when a leader whose disk is full has tried to hand over.
type shunned struct {
	next time.Time     // not before
	wait time.Duration // after the next one
}

// A leader whose disk is full hands the leadership over, in case that another
// member has room. If it gets it back, none has, or the others are gone; so it
// waits longer and longer before it does so again.
const (
	shunFirst = 10 * time.Second
	shunLast  = 5 * time.Minute
)

// checkRoom hands the leadership over while there is no room for writes. Only
// serve calls it.
func (e *Engine) checkRoom() {
	err := e.files.room()
	if err == nil {
		if e.shunned.wait != 0 {
			e.log.Info("there is room for writes again")
		}
		e.shunned = shunned{}
		return
	}
	if e.shunned.wait == 0 {
		e.log.Error("the disk is full: writes are refused", slog.Any("error", err))
		e.shunned.wait = shunFirst
	}
	if !e.Leading() || time.Now().Before(e.shunned.next) {
		return
	}
	e.shunned.next = time.Now().Add(e.shunned.wait)
	e.shunned.wait = min(2*e.shunned.wait, shunLast)
	e.spawn(func() {
		ctx, stop := context.WithTimeout(e.life, e.patience())
		defer stop()
		if err := e.Transfer(ctx, ""); err != nil && !errors.Is(err, ErrAlone) {
			e.log.Warn("leadership of a server without room not handed over", slog.Any("error", err))
		}
	})
}
