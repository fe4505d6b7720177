package raftstore_test

import (
	"errors"
	"log/slog"
	"testing"

	"github.com/hashicorp/raft"

	"github.com/meshd/meshd/server/store/raftstore"
)

// What was cut off is gone, although its bytes still lie in the newest file: a member
// that needs it is sent the state.
func TestCutEntriesAreGone(t *testing.T) {
	t.Parallel()
	entries, closed, err := raftstore.OpenLog(raftstore.Config{Dir: t.TempDir() + "/store", ID: "s1.00000000"}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := closed(); err != nil {
			t.Error(err)
		}
	})
	for i := range uint64(10) {
		if err := entries.StoreLog(&raft.Log{Index: i + 1, Term: 1, Data: []byte("entry")}); err != nil {
			t.Fatal(err)
		}
	}
	if err := entries.DeleteRange(1, 4); err != nil {
		t.Fatal(err)
	}
	for i := range uint64(10) {
		var entry raft.Log
		err := entries.GetLog(i+1, &entry)
		if cut := i+1 <= 4; cut != errors.Is(err, raft.ErrLogNotFound) || !cut && (err != nil || entry.Index != i+1) {
			t.Errorf("entry %d, of which 1 to 4 were cut off: %v", i+1, err)
		}
	}
}
