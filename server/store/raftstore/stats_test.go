package raftstore_test

import (
	"errors"
	"fmt"
	"path/filepath"
	"testing"

	"github.com/meshd/meshd/server/store/raftstore"
)

// The figures of a member follow what it does.
func TestStats(t *testing.T) {
	m := serving(t, run(t, small(filepath.Join(t.TempDir(), "state"))))
	before := m.Stats()
	if before.SnapshotsSaved != 0 || before.SnapshotsInstalled != 0 || before.RoomBytes == 0 || before.DiskFull || before.DiskHung {
		t.Errorf("at the start: %+v", before)
	}
	for i := range 200 {
		if _, err := m.Commit(t.Context(), put(fmt.Sprint(i))); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "a snapshot is saved", func() bool { return m.Stats().SnapshotsSaved > 0 && m.Stats().SnapshotBytes > 0 })
	now := m.Stats()
	if now.Syncs.Count < before.Syncs.Count+200 || now.Syncs.Sum <= before.Syncs.Sum || now.Applied < before.Applied+200 {
		t.Errorf("after 200 commits: %+v", now)
	}
	last := uint64(0)
	for _, bound := range []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5} {
		n, ok := now.Syncs.Buckets[bound]
		if !ok || n < last || n > now.Syncs.Count {
			t.Errorf("at most %v s took %d of %d syncs, %d less", bound, n, now.Syncs.Count, last)
		}
		last = n
	}
	over := raftstore.Stall(m.Engine)
	eventually(t, "the disk hangs", func() bool { return m.Stats().DiskHung })
	over()
	if err := errors.Join(m.Close(), <-m.done); err != nil {
		t.Fatal(err)
	}
	m.done <- nil
	if m.Stats().SnapshotsInstalled != 0 {
		t.Error("the state on the own disk counts as installed")
	}
}
