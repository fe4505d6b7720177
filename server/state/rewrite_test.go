package state_test

import (
	"errors"
	"fmt"
	"testing"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/state"
	"github.com/meshd/meshd/server/store"
)

func TestUpdateAtAnySize(t *testing.T) {
	t.Parallel()
	s, engine := start(t)
	if _, err := engine.Commit(t.Context(), store.Txn{Ops: []store.Op{{Key: "future/x", Value: []byte("1")}}}); err != nil {
		t.Fatal(err)
	}
	before := update(t, s, func(tx *state.Tx) error {
		for _, n := range []string{"a", "m", "z"} {
			if err := state.Nodes.Put(tx, n, catalog.Node{Name: n}); err != nil {
				return err
			}
		}
		return nil
	})
	runs := 0
	after, err := s.UpdateAtAnySize(t.Context(), func(tx *state.Tx) error {
		// Somebody else writes while the first attempt stages.
		if runs++; runs == 2 {
			update(t, s, func(tx *state.Tx) error { return state.Namespaces.Put(tx, "late", catalog.Namespace{Name: "late"}) })
		}
		state.Nodes.Delete(tx, "a")
		state.Nodes.Delete(tx, "never")
		for n := range 200 {
			if err := state.Nodes.Put(tx, fmt.Sprintf("n%03d", n), catalog.Node{Name: "n"}); err != nil {
				return err
			}
		}
		return state.Nodes.Put(tx, "z", catalog.Node{Name: "zz"})
	})
	if err != nil || after.Generation == before.Generation || runs != 3 {
		t.Fatalf("%v after %v, %d runs: %v", after, before, runs, err)
	}
	snapshot := s.Snapshot()
	if z, _ := state.Nodes.Get(snapshot, "z"); state.Nodes.Len(snapshot) != 202 || z.Value.Name != "zz" {
		t.Errorf("%d nodes, z %+v", state.Nodes.Len(snapshot), z.Value)
	}
	if _, ok := state.Namespaces.Get(snapshot, "late"); !ok {
		t.Error("what was written meanwhile is lost")
	}
	all, err := engine.List(t.Context(), "future/")
	if err != nil || len(all.Pairs) != 1 {
		t.Errorf("of a newer version: %v, %v", all.Pairs, err)
	}
	// An error of fn changes nothing, in either way of writing.
	refused := errors.New("refused")
	attempts := 0
	_, err = s.UpdateAtAnySize(t.Context(), func(tx *state.Tx) error {
		if attempts++; attempts == 2 {
			return refused
		}
		for n := range 200 {
			state.Nodes.Delete(tx, fmt.Sprintf("n%03d", n))
		}
		return nil
	})
	if !errors.Is(err, refused) || s.Snapshot().Position() != after {
		t.Errorf("%v at %v, want %v at %v", err, s.Snapshot().Position(), refused, after)
	}
}
