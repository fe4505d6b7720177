package storetest

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"

	"github.com/meshd/meshd/server/store"
)

// calls are all methods of an engine, for what holds of each.
func calls(e store.Engine, stage store.Stage) map[string]func(context.Context) error {
	return map[string]func(context.Context) error{
		"list": func(ctx context.Context) error { _, err := e.List(ctx, ""); return err },
		"commit": func(ctx context.Context) error {
			_, err := e.Commit(ctx, store.Txn{Ops: []store.Op{put("x", "1")}})
			return err
		},
		"watch": func(ctx context.Context) error {
			_, err := e.Watch(ctx, "", store.Position{}).Next(context.WithoutCancel(ctx))
			return err
		},
		"barrier":  func(ctx context.Context) error { _, err := e.Barrier(ctx); return err },
		"stage":    func(ctx context.Context) error { _, err := e.Stage(ctx); return err },
		"write":    func(ctx context.Context) error { return stage.Write(ctx, []store.Op{put("x", "1")}) },
		"activate": func(ctx context.Context) error { _, err := stage.Activate(ctx, store.Position{}); return err },
		"discard":  func(ctx context.Context) error { return stage.Discard(ctx) },
	}
}

func (s suite) cancelled(t *testing.T) {
	e := s.Open(t)
	stage := open(t, e)
	at := commit(t, e, put("a", "1"))
	ended, stop := context.WithCancel(t.Context())
	stop()
	for name, call := range calls(e, stage) {
		if err := call(ended); !errors.Is(err, context.Canceled) || errors.Is(err, store.ErrUnknownOutcome) {
			t.Errorf("%s under an ended context: %v", name, err)
		}
	}
	if err := e.Lead(ended, func(context.Context) error { t.Error("it ran"); return nil }); err != nil {
		t.Errorf("lead under an ended context: %v", err)
	}
	if p := barrier(t, e); p != at {
		t.Fatalf("calls under an ended context moved the store from %v to %v", at, p)
	}
}

func (s suite) closing(t *testing.T) {
	e := s.Open(t)
	at := commit(t, e, put("a", "1"))
	stage := open(t, e)
	waiting, led := make(chan error, 1), make(chan error, 1)
	leads := make(chan struct{})
	s.elect(t, e)
	go func() {
		_, err := e.Watch(t.Context(), "", at).Next(t.Context())
		waiting <- err
	}()
	go func() {
		led <- e.Lead(t.Context(), func(ctx context.Context) error {
			close(leads)
			<-ctx.Done()
			return ctx.Err()
		})
	}()
	<-leads
	for range 2 {
		if err := e.Close(); err != nil {
			t.Fatalf("close: %v", err)
		}
	}
	if err := <-waiting; !errors.Is(err, store.ErrClosed) {
		t.Errorf("a waiting watcher: %v", err)
	}
	if err := <-led; !errors.Is(err, store.ErrClosed) {
		t.Errorf("a leader: %v", err)
	}
	for name, call := range calls(e, stage) {
		if err := call(t.Context()); !errors.Is(err, store.ErrClosed) {
			t.Errorf("%s after close: %v", name, err)
		}
	}
	if err := e.Lead(t.Context(), func(context.Context) error { t.Error("it ran"); return nil }); !errors.Is(err, store.ErrClosed) {
		t.Errorf("lead after close: %v", err)
	}
}

func (s suite) lead(t *testing.T) {
	e := s.Open(t)
	write := store.Txn{Leader: true, Ops: []store.Op{put("led", "1")}}
	if _, err := e.Commit(short(t), write); !errors.Is(err, store.ErrNotLeader) {
		t.Fatalf("a leader-only write outside of Lead: %v", err)
	}
	s.elect(t, e)
	want := errors.New("fn's own")
	for _, result := range []error{nil, want} {
		err := e.Lead(short(t), func(ctx context.Context) error {
			if err := e.Lead(ctx, func(context.Context) error { return nil }); !errors.Is(err, store.ErrLeading) {
				t.Errorf("a second Lead: %v", err)
			}
			if _, err := e.Commit(ctx, write); err != nil {
				t.Errorf("a leader-only write: %v", err)
			}
			return result
		})
		if !errors.Is(err, result) {
			t.Fatalf("fn returned %v, Lead %v", result, err)
		}
		if _, err := e.Commit(short(t), write); !errors.Is(err, store.ErrNotLeader) {
			t.Fatalf("a leader-only write after Lead: %v", err)
		}
	}
	ctx, stop := context.WithCancel(short(t))
	err := e.Lead(ctx, func(ctx context.Context) error {
		stop()
		<-ctx.Done()
		return ctx.Err()
	})
	if err != nil {
		t.Fatalf("Lead when its context ended: %v", err)
	}
	got, _ := list(t, e, "")
	expect(t, "after leader-only writes", got, contents{"led": "1"})
}

// fencing has two members campaign: they never lead at once, only the one that
// leads can write, and when it goes the other follows.
func (s suite) fencing(t *testing.T) {
	if s.Peer == nil {
		return // one member can't be displaced
	}
	a := s.Open(t)
	b := s.Peer(t, a)
	write := store.Txn{Leader: true, Ops: []store.Op{put("led", "1")}}
	var leaders atomic.Int32
	campaign := func(ctx context.Context, e store.Engine, started chan<- struct{}) chan error {
		done := make(chan error, 1)
		go func() {
			done <- e.Lead(ctx, func(ctx context.Context) error {
				if n := leaders.Add(1); n != 1 {
					t.Errorf("%d leaders at once", n)
				}
				defer leaders.Add(-1)
				close(started)
				<-ctx.Done()
				return nil
			})
		}()
		return done
	}
	ctx, stop := context.WithCancel(short(t))
	aLeads, bLeads := make(chan struct{}), make(chan struct{})
	s.elect(t, a)
	aDone := campaign(ctx, a, aLeads)
	bDone := campaign(ctx, b, bLeads)
	first, second, secondLeads, firstDone, secondDone := a, b, bLeads, aDone, bDone
	select {
	case <-aLeads:
	case <-bLeads:
		first, second, secondLeads, firstDone, secondDone = b, a, aLeads, bDone, aDone
	}
	if _, err := first.Commit(ctx, write); err != nil {
		t.Fatalf("the leader's write: %v", err)
	}
	if _, err := second.Commit(ctx, write); !errors.Is(err, store.ErrNotLeader) {
		t.Fatalf("the other member's leader-only write: %v", err)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-firstDone; !errors.Is(err, store.ErrClosed) {
		t.Fatalf("the closed leader's Lead: %v", err)
	}
	s.elect(t, second)
	<-secondLeads
	if _, err := second.Commit(ctx, write); err != nil {
		t.Fatalf("the next leader's write: %v", err)
	}
	stop()
	if err := <-secondDone; err != nil {
		t.Fatalf("the next leader's Lead: %v", err)
	}
}

func (s suite) restart(t *testing.T) {
	if s.Reopen == nil {
		return // the engine keeps nothing
	}
	e := s.Open(t)
	commit(t, e, put("a", "1"), put("b", "1"))
	before := commit(t, e, put("a", "2"))
	var last store.Position
	for range 3 {
		last = commit(t, e, del("b"), put("c", "1"))
		e = s.Reopen(t, e)
		if p := barrier(t, e); p != last {
			t.Fatalf("reopened at %v, closed at %v", p, last)
		}
		got, at := list(t, e, "")
		expect(t, "reopened", got, contents{"a": "2", "c": "1"})
		if at != last {
			t.Fatalf("reopened at %v, closed at %v", at, last)
		}
		r := newReader(t.Context(), e, "", before, contents{"a": "2", "b": "1"})
		r.until(t, last)
		expect(t, "watch over the restart", r.state, got)
	}
	stage := open(t, e)
	if err := stage.Write(short(t), []store.Op{put("z", "1")}); err != nil {
		t.Fatal(err)
	}
	p, err := stage.Activate(short(t), last)
	if err != nil {
		t.Fatal(err)
	}
	e = s.Reopen(t, e)
	if at := barrier(t, e); at != p {
		t.Fatalf("reopened at %v after the activation at %v", at, p)
	}
	got, _ := list(t, e, "")
	expect(t, "reopened in the next generation", got, contents{"z": "1"})
	if q := commit(t, e, put("y", "1")); q.Generation != p.Generation || q.Revision <= p.Revision {
		t.Fatalf("a commit after %v is at %v", p, q)
	}
}

// members writes through one and reads through the other.
func (s suite) members(t *testing.T) {
	if s.Peer == nil {
		return // there is one member only
	}
	a := s.Open(t)
	b := s.Peer(t, a)
	for i, pair := range [][2]store.Engine{{a, b}, {b, a}} {
		p := commit(t, pair[0], put("k", string(rune('a'+i))))
		if q := barrier(t, pair[1]); !q.Covers(p) {
			t.Fatalf("a barrier of the other member is at %v after a commit at %v", q, p)
		}
		got, at := list(t, pair[1], "")
		expect(t, "the other member", got, contents{"k": string(rune('a' + i))})
		if !at.Covers(p) {
			t.Fatalf("list is at %v after a barrier that covers %v", at, p)
		}
		r := newReader(t.Context(), pair[1], "", store.Position{}, nil)
		r.until(t, p)
		expect(t, "the other member's watcher", r.state, got)
	}
}
