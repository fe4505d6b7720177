package storetest

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"testing"

	"github.com/meshd/meshd/server/store"
)

// atomicBatches writes one number to several keys per transaction: in no batch,
// and at no list, do they differ.
func (s suite) atomicBatches(t *testing.T) {
	const rounds = 60
	e := s.Open(t)
	reading := e
	if s.Peer != nil {
		reading = s.Peer(t, e)
	}
	r := newReader(t.Context(), reading, "", store.Position{}, nil)
	last := make(chan store.Position, 1)
	go func() {
		defer close(last)
		var p store.Position
		for i := range rounds {
			var ops []store.Op
			for k := range 8 {
				ops = append(ops, put(fmt.Sprintf("k%d", k), strconv.Itoa(i)))
			}
			var err error
			if p, err = e.Commit(short(t), store.Txn{Ops: ops}); err != nil {
				t.Errorf("commit: %v", err)
				return
			}
		}
		last <- p
	}()
	whole := func(what string, state contents) {
		for key, value := range state {
			if len(state) != 8 || value != state["k0"] {
				t.Fatalf("%s: half a transaction: %s in %v", what, key, state)
			}
		}
	}
	for r.state["k0"] != strconv.Itoa(rounds-1) {
		if err := r.next(short(t)); err != nil {
			t.Fatalf("watch: %v", err)
		}
		whole("watch", r.state)
		state, _ := list(t, reading, "")
		whole("list", state)
	}
	if p := <-last; p != r.at {
		t.Fatalf("the watcher ended at %v, the last commit at %v", r.at, p)
	}
}

func (s suite) coalescing(t *testing.T) {
	const rounds = 150
	e := s.Open(t)
	p := commit(t, e, put("stays", "0"), put("goes", "0"))
	r := newReader(t.Context(), e, "", p, contents{"stays": "0", "goes": "0"})
	for i := range rounds {
		commit(t, e, put("stays", strconv.Itoa(i)), put("flips", "here"))
		p = commit(t, e, del("flips"), del("goes"))
	}
	r.until(t, p)
	expect(t, "the slow watcher", r.state, contents{"stays": strconv.Itoa(rounds - 1)})
	if r.resets > 0 || r.batches > rounds/4 || r.changes > 3*rounds/4 {
		t.Fatalf("%d commits to 3 keys reached a slow watcher as %d batches with %d changes and %d resets",
			2*rounds, r.batches, r.changes, r.resets)
	}
}

// deletions has a watcher that knows the key and one that does not, over
// create, delete, create, delete.
func (s suite) deletions(t *testing.T) {
	e := s.Open(t)
	start := commit(t, e, put("other", "0"))
	fast := newReader(t.Context(), e, "k", start, nil)
	p := commit(t, e, put("k", "1"))
	fast.until(t, p)
	expect(t, "created", fast.state, contents{"k": "1"})
	slow := newReader(t.Context(), e, "k", p, contents{"k": "1"})
	behind := newReader(t.Context(), e, "k", start, nil)

	p = commit(t, e, del("k"))
	fast.until(t, p)
	expect(t, "deleted", fast.state, contents{})
	p = commit(t, e, put("k", "2"))
	fast.until(t, p)
	expect(t, "created again", fast.state, contents{"k": "2"})
	p = commit(t, e, del("k"))
	for name, r := range map[string]*reader{"fast": fast, "slow": slow, "behind": behind} {
		r.until(t, p)
		expect(t, name, r.state, contents{})
		if r.resets > 0 {
			t.Errorf("%s: %d resets", name, r.resets)
		}
	}
}

func (s suite) resumption(t *testing.T) {
	e := s.Open(t)
	ctx, leave := context.WithCancel(t.Context())
	first := newReader(ctx, e, "", store.Position{}, nil)
	p := commit(t, e, put("a", "1"), put("b", "1"))
	first.until(t, p)
	if first.resets != 1 {
		t.Fatalf("a watcher from zero began with %d resets", first.resets)
	}
	leave()
	if _, err := first.watcher.Next(t.Context()); !errors.Is(err, context.Canceled) {
		t.Fatalf("next after the watcher's context ended: %v", err)
	}
	commit(t, e, put("a", "2"), del("b"))
	p = commit(t, e, put("c", "1"))
	again := newReader(t.Context(), e, "", first.at, first.state)
	again.until(t, p)
	expect(t, "resumed", again.state, contents{"a": "2", "c": "1"})
	if again.resets != 0 {
		t.Errorf("a watcher from %v was reset %d times", first.at, again.resets)
	}

	// From where the store is: nothing to say until something changes.
	idle := newReader(t.Context(), e, "", p, again.state)
	p = commit(t, e, put("d", "1"))
	idle.until(t, p)
	expect(t, "from the newest position", idle.state, contents{"a": "2", "c": "1", "d": "1"})
	if idle.changes != 1 || idle.resets != 0 {
		t.Errorf("one change was told as %d changes, %d resets", idle.changes, idle.resets)
	}
}

func (s suite) resets(t *testing.T) {
	e := s.Open(t)
	p := commit(t, e, put("a/1", "1"), put("b/1", "1"))
	for name, after := range map[string]store.Position{
		"zero":               {},
		"another generation": {Generation: store.NewGeneration(), Revision: p.Revision},
		"the future":         {Generation: p.Generation, Revision: p.Revision + 1_000_000},
	} {
		r := newReader(t.Context(), e, "a/", after, contents{"a/ghost": "1"})
		if err := r.next(short(t)); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		expect(t, name, r.state, contents{"a/1": "1"})
		if r.resets != 1 || !r.at.Covers(p) {
			t.Errorf("%s: %d resets, at %v", name, r.resets, r.at)
		}
	}
	// An empty prefix of the store is told too: the reader learns that it is
	// in step.
	empty := newReader(t.Context(), e, "nothing/", store.Position{}, nil)
	if err := empty.next(short(t)); err != nil || empty.resets != 1 || len(empty.state) != 0 {
		t.Fatalf("first batch of an empty prefix: %v, %d resets, %v", err, empty.resets, empty.state)
	}
}

// waiting holds that an ended context of Next loses nothing.
func (s suite) waiting(t *testing.T) {
	e := s.Open(t)
	p := commit(t, e, put("a", "1"))
	r := newReader(t.Context(), e, "", p, contents{"a": "1"})
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- r.next(ctx) }()
	stop()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Fatalf("next with nothing to tell: %v", err)
	}
	p = commit(t, e, put("a", "2"))
	if err := r.next(ctx); !errors.Is(err, context.Canceled) {
		t.Fatalf("next under an ended context: %v", err)
	}
	r.until(t, p)
	expect(t, "after the pause", r.state, contents{"a": "2"})

	// A waiting watcher is woken by a commit.
	go func() { done <- r.next(short(t)) }()
	commit(t, e, put("b", "1"))
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	expect(t, "woken", r.state, contents{"a": "2", "b": "1"})
}
