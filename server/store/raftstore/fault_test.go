package raftstore_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/meshd/meshd/server/store"
)

// The first failed write or sync ends the engine at once; a write is never
// acknowledged after it; what was acknowledged before is there after a restart.
func TestFailedWriteIsFatal(t *testing.T) {
	for _, row := range []struct {
		name   string
		device string // takes the place of the log's file
		mode   int
	}{
		{"write fails", "/dev/null", os.O_RDONLY},
		{"sync fails", "/dev/null", os.O_RDWR}, // takes writes; fsync is EINVAL
	} {
		t.Run(row.name, func(t *testing.T) {
			cfg := small(filepath.Join(t.TempDir(), "state"))
			cfg.SnapshotEntries = 1 << 20
			m := serving(t, run(t, cfg))
			acked, err := m.Commit(t.Context(), store.Txn{Ops: []store.Op{{Key: "a", Value: []byte("1")}}})
			if err != nil {
				t.Fatal(err)
			}
			replaceFiles(t, filepath.Join(cfg.Dir, "wal"), ".wal", row.device, row.mode)

			begun := time.Now()
			_, err = m.Commit(t.Context(), store.Txn{Ops: []store.Op{{Key: "b", Value: []byte("1")}}})
			if !errors.Is(err, store.ErrUnknownOutcome) {
				t.Errorf("commit on a broken disk: %v", err)
			}
			if err := <-m.done; err == nil || !strings.Contains(err.Error(), "write log entries") {
				t.Errorf("run on a broken disk: %v", err)
			}
			if took := time.Since(begun); took > 5*time.Second {
				t.Errorf("the engine ended after %v", took)
			}
			if _, err := m.Commit(t.Context(), store.Txn{}); !errors.Is(err, store.ErrClosed) {
				t.Errorf("commit after the end: %v", err)
			}

			again := serving(t, run(t, cfg))
			snapshot, err := again.List(t.Context(), "a")
			if err != nil || !snapshot.Position.Covers(acked) || len(snapshot.Pairs) != 1 {
				t.Errorf("after the restart: %v, %v", snapshot, err)
			}
		})
	}
}

// replaceFiles makes the open descriptors of files in dir refer to a device.
func replaceFiles(t *testing.T, dir, suffix, device string, mode int) {
	t.Helper()
	to, err := os.OpenFile(device, mode, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = to.Close() }()
	open, err := filepath.Glob("/proc/self/fd/*")
	if err != nil {
		t.Fatal(err)
	}
	replaced := 0
	for _, link := range open {
		path, err := os.Readlink(link)
		if err != nil || filepath.Dir(path) != dir || !strings.HasSuffix(path, suffix) {
			continue
		}
		var fd int
		if _, err := fmt.Sscan(filepath.Base(link), &fd); err != nil {
			t.Fatal(err)
		}
		if err := unix.Dup3(int(to.Fd()), fd, unix.O_CLOEXEC); err != nil {
			t.Fatal(err)
		}
		replaced++
	}
	if replaced == 0 {
		t.Fatalf("no open file %s in %s", suffix, dir)
	}
}

// Damage of what is on the disk is found at the start, and nothing is served.
func TestDamageIsRefused(t *testing.T) {
	needle := []byte("needle-in-a-haystack")
	flip := func(t *testing.T, path string) {
		t.Helper()
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		at := bytes.Index(b, needle)
		if at < 0 {
			t.Fatalf("%s does not hold what was written", path)
		}
		b[at+3] ^= 0x20
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	newest := func(t *testing.T, pattern string) string {
		t.Helper()
		found, err := filepath.Glob(pattern)
		if err != nil || len(found) == 0 {
			t.Fatalf("%s: %v, %v", pattern, found, err)
		}
		last := found[0]
		for _, path := range found {
			if info, err := os.Stat(path); err == nil {
				if than, err := os.Stat(last); err == nil && info.ModTime().After(than.ModTime()) {
					last = path
				}
			}
		}
		return last
	}
	for _, row := range []struct {
		name   string
		every  uint64 // log entries per snapshot
		damage func(t *testing.T, dir string)
	}{
		{"log entry", 1 << 20, func(t *testing.T, dir string) {
			t.Helper()
			flip(t, newest(t, dir+"/wal/*.wal"))
		}},
		{"snapshot", 20, func(t *testing.T, dir string) {
			t.Helper()
			flip(t, newest(t, dir+"/snapshots/*/state.bin"))
		}},
		{"snapshots are gone", 20, func(t *testing.T, dir string) {
			t.Helper()
			if err := os.RemoveAll(dir + "/snapshots"); err != nil {
				t.Fatal(err)
			}
		}},
		{"snapshot's description", 20, func(t *testing.T, dir string) {
			t.Helper()
			found, err := filepath.Glob(dir + "/snapshots/*/meta.json")
			if err != nil || len(found) == 0 {
				t.Fatal(found, err)
			}
			for _, path := range found {
				if err := os.WriteFile(path, []byte("{"), 0o600); err != nil {
					t.Fatal(err)
				}
			}
		}},
	} {
		t.Run(row.name, func(t *testing.T) {
			cfg := small(filepath.Join(t.TempDir(), "state"))
			cfg.SnapshotEntries, cfg.TrailingEntries = row.every, 1
			m := serving(t, run(t, cfg))
			for i := range 50 {
				op := store.Op{Key: fmt.Sprintf("key/%d", i), Value: needle}
				if _, err := m.Commit(t.Context(), store.Txn{Ops: []store.Op{op}}); err != nil {
					t.Fatal(err)
				}
			}
			if row.every < 50 {
				awaitSnapshot(t, m, cfg.Dir)
			}
			if err := errors.Join(m.Close(), <-m.done); err != nil {
				t.Fatal(err)
			}
			row.damage(t, cfg.Dir)
			broken := run(t, cfg)
			if err := <-broken.done; !errors.Is(err, store.ErrCorrupt) {
				t.Fatalf("start with damage: %v", err)
			}
			if _, err := broken.List(t.Context(), ""); !errors.Is(err, store.ErrClosed) {
				t.Fatalf("list with damage: %v", err)
			}
		})
	}
}

// awaitSnapshot commits until a snapshot has appeared and the log was cut.
func awaitSnapshot(t *testing.T, m *member, dir string) {
	t.Helper()
	ctx, stop := context.WithTimeout(t.Context(), time.Minute)
	defer stop()
	for {
		if _, err := m.Commit(ctx, store.Txn{Ops: []store.Op{{Key: "more", Value: []byte("1")}}}); err != nil {
			t.Fatal(err)
		}
		if found, err := filepath.Glob(dir + "/snapshots/*-*-*/state.bin"); err != nil || len(found) >= 2 {
			return
		}
	}
}

// Commits that are under way when the engine closes end with an answer, and none
// of the acknowledged ones is lost.
func TestCloseUnderLoad(t *testing.T) {
	m := serving(t, run(t, small(filepath.Join(t.TempDir(), "state"))))
	results := make(chan error, 512)
	for i := range cap(results) {
		go func() {
			_, err := m.Commit(t.Context(), store.Txn{Ops: []store.Op{{Key: fmt.Sprint(i)}}})
			results <- err
		}()
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-m.done; err != nil {
		t.Fatal(err)
	}
	acked := 0
	for range cap(results) {
		switch err := <-results; {
		case err == nil:
			acked++
		case !errors.Is(err, store.ErrClosed):
			t.Errorf("commit over a close: %v", err)
		}
	}
	again := serving(t, run(t, m.cfg))
	snapshot, err := again.List(t.Context(), "")
	if err != nil || len(snapshot.Pairs) < acked {
		t.Fatalf("%d writes were acknowledged, %d are there, %v", acked, len(snapshot.Pairs), err)
	}
}
