package raftstore_test

import (
	"errors"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/meshd/meshd/server/store"
	"github.com/meshd/meshd/server/store/raftstore"
)

func put(key string) store.Txn {
	return store.Txn{Ops: []store.Op{{Key: key, Value: []byte("1")}}}
}

// A disk without room refuses writes with a typed error and nothing else: reads
// go on, also over a restart, and writes when there is room again.
func TestFullDisk(t *testing.T) {
	var free atomic.Uint64
	free.Store(1 << 40)
	cfg := raftstore.WithRoom(small(filepath.Join(t.TempDir(), "state")), free.Load)
	m := serving(t, run(t, cfg))
	if _, err := m.Commit(t.Context(), put("before")); err != nil {
		t.Fatal(err)
	}
	free.Store(0)
	eventually(t, "a write is refused", func() bool {
		_, err := m.Commit(t.Context(), put("meanwhile"))
		if err != nil && (!errors.Is(err, store.ErrDiskFull) || errors.Is(err, store.ErrUnknownOutcome)) {
			t.Fatalf("a write to a full disk: %v", err)
		}
		return err != nil
	})
	for range 2 {
		if _, err := m.Barrier(t.Context()); err != nil {
			t.Errorf("a read on a full disk: %v", err)
		}
		if s, err := m.List(t.Context(), "before"); err != nil || len(s.Pairs) != 1 {
			t.Errorf("a list on a full disk: %v, %v", s, err)
		}
		if _, err := m.Commit(t.Context(), put("meanwhile")); !errors.Is(err, store.ErrDiskFull) {
			t.Errorf("a write to a full disk: %v", err)
		}
		if err := errors.Join(m.Close(), <-m.done); err != nil {
			t.Fatal(err)
		}
		m = serving(t, run(t, cfg))
	}
	free.Store(1 << 40)
	begun := time.Now()
	eventually(t, "a write is taken", func() bool {
		_, err := m.Commit(t.Context(), put("after"))
		return err == nil
	})
	if took := time.Since(begun); took > 5*time.Second {
		t.Errorf("the first write was taken %v after there was room", took)
	}
}

// A leader whose disk is full gives the leadership to a member with room.
func TestFullDiskOfTheLeader(t *testing.T) {
	var full atomic.Pointer[string] // the state directory that is full
	c := newClusterOf(t, 3, func(cfg *raftstore.Config) {
		dir := cfg.Dir
		*cfg = raftstore.WithRoom(*cfg, func() uint64 {
			if at := full.Load(); at != nil && *at == dir {
				return 0
			}
			return 1 << 40
		})
	})
	old := c.pick(t, true)
	full.Store(&old.cfg.Dir)
	eventually(t, "another member leads", func() bool { return c.pick(t, true) != old })
	for _, m := range c.members {
		if _, err := m.Commit(t.Context(), put(m.cfg.ID)); err != nil {
			t.Errorf("a write through %s: %v", m.cfg.ID, err)
		}
	}
	if s, err := old.List(t.Context(), ""); err != nil || len(s.Pairs) != 3 {
		t.Errorf("the member without room has %v, %v", s.Pairs, err)
	}
}

// A leader whose disk hangs falls silent, and another one is elected. When its
// disk is back before the limit it follows; after the limit its Run ends.
func TestHungDisk(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name string
		ends bool
	}{{"for a while", false}, {"for ever", true}} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			c := newCluster(t, 3)
			old := c.pick(t, true)
			begun := time.Now()
			over := raftstore.Stall(old.Engine)
			var next *member
			eventually(t, "another member leads", func() bool {
				for _, m := range c.members {
					if m != old && m.Leading() {
						next = m
					}
				}
				return next != nil
			})
			t.Logf("another member leads %v after the disk hung", time.Since(begun))
			if old.Leading() {
				t.Error("the member with the hung disk leads")
			}
			if _, err := next.Commit(t.Context(), put("next")); err != nil {
				t.Errorf("a write to the next leader: %v", err)
			}
			if !row.ends {
				over()
				if _, err := old.Commit(t.Context(), put("back")); err != nil {
					t.Errorf("a write through the member that is back: %v", err)
				}
				c.agree(t)
				return
			}
			if err := <-old.done; !errors.Is(err, raftstore.ErrDiskHung) {
				t.Errorf("run over a hung disk: %v", err)
			}
			old.done <- nil
			if took := time.Since(begun); took > 7*time.Second {
				t.Errorf("the process would have ended after %v", took)
			}
		})
	}
}
