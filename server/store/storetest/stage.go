package storetest

import (
	"bytes"
	"errors"
	"fmt"
	"iter"
	"strconv"
	"strings"
	"testing"

	"github.com/meshd/meshd/server/store"
)

func open(t *testing.T, e store.Engine) store.Stage {
	t.Helper()
	stage, err := e.Stage(short(t))
	if err != nil {
		t.Fatalf("stage: %v", err)
	}
	return stage
}

func (s suite) stage(t *testing.T) {
	e := s.Open(t)
	old := commit(t, e, put("a", "old"), put("b", "old"))
	r := newReader(t.Context(), e, "", old, contents{"a": "old", "b": "old"})
	narrow := newReader(t.Context(), e, "c", old, nil)

	stage := open(t, e)
	if err := stage.Write(short(t), []store.Op{put("a", "new"), put("c", "new"), put("d", "new")}); err != nil {
		t.Fatal(err)
	}
	if err := stage.Write(short(t), []store.Op{put("c", "newer"), del("d")}); err != nil {
		t.Fatal(err)
	}
	if err := stage.Write(short(t), []store.Op{put("", "")}); !errors.Is(err, store.ErrInvalid) {
		t.Fatalf("write of an empty key: %v", err)
	}
	got, at := list(t, e, "")
	expect(t, "while staged", got, contents{"a": "old", "b": "old"})
	if at != old || barrier(t, e) != old {
		t.Fatalf("staging moved the store from %v to %v", old, at)
	}

	p, err := stage.Activate(short(t), store.Position{})
	if err != nil {
		t.Fatal(err)
	}
	if p.Generation != stage.Generation() || p.Generation == old.Generation || p.Revision == 0 {
		t.Fatalf("activating generation %s over %v led to %v", stage.Generation(), old, p)
	}
	want := contents{"a": "new", "c": "newer"}
	got, at = list(t, e, "")
	expect(t, "activated", got, want)
	if at != p {
		t.Fatalf("activated at %v, list is at %v", p, at)
	}
	r.until(t, p)
	expect(t, "watch", r.state, want)
	narrow.until(t, p)
	expect(t, "watch of a prefix", narrow.state, contents{"c": "newer"})
	if r.resets != 1 || narrow.resets != 1 {
		t.Fatalf("a new generation reset the watchers %d and %d times", r.resets, narrow.resets)
	}
	late := newReader(t.Context(), e, "", old, contents{"b": "old"})
	late.until(t, p)
	expect(t, "watch from the old generation", late.state, want)

	// Nothing computed from the old generation gets in.
	_, err = e.Commit(short(t), store.Txn{Generation: old.Generation, Checks: []store.Check{{Key: "b"}}, Ops: []store.Op{put("b", "1")}})
	if !errors.Is(err, store.ErrConflict) {
		t.Fatalf("commit computed from the old generation: %v", err)
	}
	p = commit(t, e, put("a", "3"), del("c"))
	r.until(t, p)
	expect(t, "after the next commit", r.state, contents{"a": "3"})
	if r.resets != 1 {
		t.Fatalf("%d resets", r.resets)
	}
}

func (s suite) stageLost(t *testing.T) {
	e := s.Open(t)
	want := contents{"a": "1"}
	commit(t, e, put("a", "1"))
	displaced, discarded := open(t, e), open(t, e)
	if err := displaced.Write(short(t), []store.Op{put("x", "1")}); !errors.Is(err, store.ErrStageLost) {
		t.Fatalf("write to a displaced stage: %v", err)
	}
	if err := displaced.Discard(short(t)); err != nil {
		t.Fatalf("discard a displaced stage: %v", err)
	}
	if err := discarded.Write(short(t), []store.Op{put("y", "1")}); err != nil {
		t.Fatalf("write after another stage was discarded: %v", err)
	}
	for range 2 {
		if err := discarded.Discard(short(t)); err != nil {
			t.Fatalf("discard: %v", err)
		}
	}
	for name, stage := range map[string]store.Stage{"displaced": displaced, "discarded": discarded} {
		if _, err := stage.Activate(short(t), store.Position{}); !errors.Is(err, store.ErrStageLost) {
			t.Fatalf("activate a %s stage: %v", name, err)
		}
	}
	got, _ := list(t, e, "")
	expect(t, "after lost stages", got, want)

	fresh := open(t, e)
	if _, err := fresh.Activate(short(t), store.Position{}); err != nil {
		t.Fatalf("activate an empty stage: %v", err)
	}
	got, _ = list(t, e, "")
	expect(t, "after an empty stage", got, contents{})
	if err := fresh.Write(short(t), []store.Op{put("x", "1")}); !errors.Is(err, store.ErrStageLost) {
		t.Fatalf("write to an activated stage: %v", err)
	}
	if err := fresh.Discard(short(t)); err != nil {
		t.Fatalf("discard an activated stage: %v", err)
	}
	commit(t, e, put("b", "1"))
	got, _ = list(t, e, "")
	expect(t, "after the discard of the active generation's stage", got, contents{"b": "1"})
}

func (s suite) activateConflict(t *testing.T) {
	e := s.Open(t)
	computed := commit(t, e, put("a", "1"))
	stage := open(t, e)
	if err := stage.Write(short(t), []store.Op{put("a", "2")}); err != nil {
		t.Fatal(err)
	}
	now := commit(t, e, put("between", "1"))
	for _, from := range []store.Position{computed, {Generation: store.NewGeneration()}} {
		_, err := stage.Activate(short(t), from)
		var conflict *store.ConflictError
		if !errors.As(err, &conflict) || conflict.Key != "" || conflict.Position != now {
			t.Fatalf("activate from %v at %v: %v", from, now, err)
		}
	}
	got, _ := list(t, e, "")
	expect(t, "after the conflict", got, contents{"a": "1", "between": "1"})
	// The stage is still open: it can catch up.
	if err := stage.Write(short(t), []store.Op{put("between", "1")}); err != nil {
		t.Fatal(err)
	}
	p, err := stage.Activate(short(t), now)
	if err != nil {
		t.Fatal(err)
	}
	got, at := list(t, e, "")
	expect(t, "after the activation", got, contents{"a": "2", "between": "1"})
	if at != p {
		t.Fatalf("activated at %v, list is at %v", p, at)
	}
	only := open(t, e)
	if p, err = only.Activate(short(t), store.Position{Generation: p.Generation}); err != nil {
		t.Fatalf("activate over a generation, at any revision (%v): %v", p, err)
	}
}

func (s suite) dump(t *testing.T) {
	e := s.Open(t)
	many := func(n int, value string) iter.Seq2[store.Pair, error] {
		return func(yield func(store.Pair, error) bool) {
			for i := range n {
				if !yield(store.Pair{Key: fmt.Sprintf("key/%05d", i), Value: []byte(value + strconv.Itoa(i))}, nil) {
					return
				}
			}
		}
	}
	start := commit(t, e, put("before", "1"))
	r := newReader(t.Context(), e, "", start, contents{"before": "1"})
	p, err := store.Replace(short(t), e, start, many(500, "v"))
	if err != nil {
		t.Fatalf("replace: %v", err)
	}
	if err := r.next(short(t)); err != nil || len(r.state) != 500 || r.at != p {
		t.Fatalf("one replace at %v came as a batch to %v with %d keys, %v", p, r.at, len(r.state), err)
	}
	full, _ := list(t, e, "")
	var dump bytes.Buffer
	if at, err := store.Export(short(t), e, &dump); err != nil || at != p {
		t.Fatalf("export: %v, %v", at, err)
	}
	p = commit(t, e, put("after", "1"), del("key/00000"), put("key/00001", "changed"))
	changed, _ := list(t, e, "")

	for name, damaged := range map[string][]byte{
		"cut":     dump.Bytes()[:dump.Len()-1],
		"longer":  append(bytes.Clone(dump.Bytes()), 0),
		"flipped": flip(dump.Bytes(), dump.Len()-200),
		"empty":   nil,
	} {
		if _, err := store.Import(short(t), e, bytes.NewReader(damaged)); !errors.Is(err, store.ErrCorrupt) {
			t.Fatalf("import of a %s dump: %v", name, err)
		}
	}
	failing := errors.New("source broke")
	_, err = store.Replace(short(t), e, store.Position{}, func(yield func(store.Pair, error) bool) {
		for pair := range many(100, "w") { //nolint:errcheck // many yields no errors
			if !yield(pair, nil) {
				return
			}
		}
		yield(store.Pair{}, failing)
	})
	if !errors.Is(err, failing) {
		t.Fatalf("replace from a source that breaks: %v", err)
	}
	if _, err := store.Replace(short(t), e, start, many(1, "w")); !errors.Is(err, store.ErrConflict) {
		t.Fatalf("replace of an older position: %v", err)
	}
	got, at := list(t, e, "")
	expect(t, "after refused imports", got, changed)
	if at != p {
		t.Fatalf("refused imports moved the store from %v to %v", p, at)
	}

	p, err = store.Import(short(t), e, bytes.NewReader(dump.Bytes()))
	if err != nil {
		t.Fatalf("import: %v", err)
	}
	got, _ = list(t, e, "")
	expect(t, "after the import", got, full)
	r.until(t, p)
	expect(t, "watch after the import", r.state, full)

	// The dump fits any engine.
	other := store.NewMemory()
	if _, err := store.Import(short(t), other, bytes.NewReader(dump.Bytes())); err != nil {
		t.Fatalf("import into another engine: %v", err)
	}
	got, _ = list(t, other, "")
	expect(t, "in another engine", got, full)
	if strings.Contains(p.Generation, start.Generation) {
		t.Fatalf("generation %s is used again", start.Generation)
	}
}

func flip(b []byte, at int) []byte {
	b = bytes.Clone(b)
	b[at] ^= 0x10
	return b
}
