package state_test

import (
	"encoding/json"
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/meshd/meshd/intentions"
	"github.com/meshd/meshd/server/state"
	"github.com/meshd/meshd/server/store"
)

func allow(source, destination string) intentions.Intention {
	return intentions.Intention{Source: source, Destination: destination, Action: intentions.Allow}
}

// write puts intentions through Table.Put, which anybody may.
func write(t *testing.T, tx *state.Tx, all ...intentions.Intention) error {
	t.Helper()
	for _, i := range all {
		key, err := i.Key()
		if err != nil {
			t.Fatal(err)
		}
		if err := state.Intentions.Put(tx, key, i); err != nil {
			return err
		}
	}
	return nil
}

// told is the history as lines: who, note, and what became of which intention.
func told(s *state.Snapshot) []string {
	var lines []string
	for key, rec := range s.NewestEdits() {
		for _, e := range rec.Value.Intentions {
			lines = append(lines, fmt.Sprintf("%d.%d %s %q %s: %t → %t", key.Number, key.Part, rec.Value.By, rec.Value.Note, e.Key, e.Before != nil, e.After != nil))
		}
	}
	return lines
}

func TestEditsAreRecordedWithTheChange(t *testing.T) {
	t.Parallel()
	s, _ := start(t)
	noon := time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)
	at := update(t, s, func(tx *state.Tx) error {
		tx.Sign(state.Author{ID: "token:1", Name: "ci"}, noon, "set shop")
		return write(t, tx, allow("web", "api"), allow("cron", "api"))
	})
	update(t, s, func(tx *state.Tx) error { return write(t, tx, allow("web", "api")) }) // as it is
	web, err := allow("web", "api").Key()
	if err != nil {
		t.Fatal(err)
	}
	update(t, s, func(tx *state.Tx) error {
		state.Intentions.Delete(tx, web)
		return nil
	})
	want := []string{
		`2.0 server "" default/api/_/default/web: true → false`,
		`1.0 ci "set shop" default/api/_/default/web: false → true`,
		`1.0 ci "set shop" default/api/_/default/cron: false → true`,
	}
	if d := cmp.Diff(want, told(s.Snapshot())); d != "" {
		t.Error(d)
	}
	rec, ok := state.IntentionEdits.Get(s.Snapshot(), state.EditsKey{Number: 1})
	if !ok || state.RevisionOf(rec) != at.Revision || !rec.Value.At.Equal(noon) {
		t.Errorf("%+v at %d, want %d", rec.Value, state.RevisionOf(rec), at.Revision)
	}
}

func TestEditsOfManyResourcesFitBesideThem(t *testing.T) {
	t.Parallel()
	s, _ := start(t)
	update(t, s, func(tx *state.Tx) error {
		for n := range store.MaxKeys - 1 {
			if err := write(t, tx, allow(fmt.Sprintf("s%d", n), "api")); err != nil {
				return err
			}
		}
		return nil
	})
	if got := len(told(s.Snapshot())); got != store.MaxKeys-1 {
		t.Errorf("%d edits", got)
	}
}

func TestEditsOutliveGenerations(t *testing.T) {
	t.Parallel()
	s, engine := start(t)
	first := update(t, s, func(tx *state.Tx) error { return write(t, tx, allow("web", "api")) })
	after, err := s.UpdateAtAnySize(t.Context(), func(tx *state.Tx) error {
		for n := range 2000 {
			i := allow(fmt.Sprintf("s%d", n), "big")
			i.Reason = "so that one record is not enough for all of them"
			if err := write(t, tx, i); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil || after.Generation == first.Generation {
		t.Fatalf("%v: %v", after, err)
	}
	var parts, edits int
	for key, rec := range s.Snapshot().NewestEdits() {
		if key.Number == 2 {
			parts, edits = parts+1, edits+len(rec.Value.Intentions)
			continue
		}
		if rec.Revision == first.Revision || state.RevisionOf(rec) != first.Revision {
			t.Errorf("revision %d, was %d, is stored at %d", state.RevisionOf(rec), first.Revision, rec.Revision)
		}
	}
	if parts < 2 || edits != 2000 {
		t.Errorf("%d edits in %d parts", edits, parts)
	}
	all, err := engine.List(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	for pair, err := range state.Carry(func(yield func(store.Pair, error) bool) {
		for _, p := range append(all.Pairs, store.Pair{Key: "intention-edits/x", Value: []byte("{")}) {
			if !yield(p, nil) {
				return
			}
		}
	}) {
		if err != nil {
			t.Fatal(err)
		}
		if pair.Key == "intention-edits/x" && string(pair.Value) != "{" {
			t.Errorf("%s became %q", pair.Key, pair.Value)
		}
	}
}

func TestOldEditsAreForgotten(t *testing.T) {
	t.Parallel()
	s, engine := start(t)
	// Three old records, of which the last KeptEdits edits cover one.
	for n, total := range []uint64{5, 10, 15} {
		raw, err := json.Marshal(state.Edits{Total: total, Intentions: []state.Edit{{Key: "default/api/_/default/web"}}})
		if err != nil {
			t.Fatal(err)
		}
		if n == 2 {
			raw, err = json.Marshal(state.Edits{Total: state.KeptEdits + 10, Intentions: []state.Edit{{Key: "default/api/_/default/web"}}})
		}
		if _, cerr := engine.Commit(t.Context(), store.Txn{Ops: []store.Op{{Key: state.IntentionEdits.Path(state.EditsKey{Number: uint64(n + 1)}), Value: raw}}}); err != nil || cerr != nil {
			t.Fatal(err, cerr)
		}
	}
	if _, err := s.Fresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	update(t, s, func(tx *state.Tx) error { return write(t, tx, allow("web", "api")) })
	var numbers []uint64
	for key := range state.IntentionEdits.All(s.Snapshot()) {
		numbers = append(numbers, key.Number)
	}
	if d := cmp.Diff([]uint64{3, 4}, numbers); d != "" {
		t.Error(d)
	}
}

// Writers of different intentions exclude each other in the history only: none of
// many gives up.
func TestEditsOfManyWriters(t *testing.T) {
	t.Parallel()
	s, _ := start(t)
	const writers, each = 100, 5
	failed := make(chan error, writers)
	for w := range writers {
		go func() {
			for n := range each {
				_, err := s.Update(t.Context(), func(tx *state.Tx) error { return write(t, tx, allow(fmt.Sprintf("s%d-%d", w, n), "api")) })
				if err != nil {
					failed <- err
					return
				}
			}
			failed <- nil
		}()
	}
	for range writers {
		if err := <-failed; err != nil {
			t.Error(err)
		}
	}
	numbers := map[uint64]bool{}
	for key := range s.Snapshot().NewestEdits() {
		numbers[key.Number] = true
	}
	if len(numbers) != writers*each || !numbers[1] || !numbers[writers*each] {
		t.Errorf("%d changes are known, of %d", len(numbers), writers*each)
	}
}
