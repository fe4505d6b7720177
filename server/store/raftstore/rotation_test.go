package raftstore_test

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/meshd/meshd/server/store"
)

// TestCrashWhileTheLogBeginsAnotherFile starts from copies of the directory that
// were made right after writes, as a crash would leave it. Some fall between the
// end of a file of the log and the name of the next one.
func TestCrashWhileTheLogBeginsAnotherFile(t *testing.T) {
	t.Parallel()
	cfg := small(filepath.Join(t.TempDir(), "state"))
	cfg.SnapshotEntries = 1 << 20
	m := serving(t, run(t, cfg))
	value := make([]byte, 100<<10)
	for i := range 45 { // 4 files
		at, err := m.Commit(t.Context(), store.Txn{Ops: []store.Op{{Key: fmt.Sprintf("k%d", i%3), Value: value}}})
		if err != nil {
			t.Fatal(err)
		}
		again := cfg
		again.Dir = filepath.Join(t.TempDir(), "copy")
		if err := os.CopyFS(again.Dir, os.DirFS(cfg.Dir)); err != nil {
			continue // a file went meanwhile: no state of a moment
		}
		if err := os.Chmod(again.Dir, 0o700); err != nil {
			t.Fatal(err)
		}
		c := serving(t, run(t, again))
		got, err := c.Commit(t.Context(), store.Txn{Ops: []store.Op{{Key: "after", Value: nil}}})
		if err != nil || !got.Covers(at) {
			t.Errorf("after write %d: %v, %v", i, got, err)
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		if err := <-c.done; err != nil {
			t.Error(err)
		}
	}
}
