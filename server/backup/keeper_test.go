package backup_test

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/meshd/meshd/server/backup"
	"github.com/meshd/meshd/server/store"
)

func never() <-chan struct{} { return nil }

func always(s backup.Schedule) func() backup.Schedule {
	return func() backup.Schedule { return s }
}

func names(tb testing.TB, dir string) []string {
	tb.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		tb.Fatal(err)
	}
	var out []string
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out
}

func TestTakeKeepsWhatTheScheduleSays(t *testing.T) {
	t.Parallel()
	start := time.Date(2026, 11, 1, 0, 30, 0, 0, time.UTC)
	e, c := engine(t, 1, 10), cluster()
	for name, row := range map[string]struct {
		schedule backup.Schedule
		every    time.Duration
		takes    int
		want     []string
	}{
		"the newest": {backup.Schedule{Retain: 2}, time.Hour, 5, []string{"20261101T033000Z", "20261101T043000Z"}},
		"and the last of each day": {
			backup.Schedule{Retain: 2, Days: 2}, 8 * time.Hour, 12, // to 16:30 of the fourth day
			[]string{"20261102T163000Z", "20261103T163000Z", "20261104T083000Z", "20261104T163000Z"},
		},
		"at least one":      {backup.Schedule{}, time.Hour, 3, []string{"20261101T023000Z"}},
		"that fit":          {backup.Schedule{Retain: 10, MaxBytes: 1000}, time.Hour, 5, []string{"20261101T033000Z", "20261101T043000Z"}},
		"the newest anyway": {backup.Schedule{Retain: 10, MaxBytes: 1}, time.Hour, 2, []string{"20261101T013000Z"}},
	} {
		dir := filepath.Join(t.TempDir(), "snapshots")
		k := backup.NewKeeper(dir, always(row.schedule), never, e, c, slog.New(slog.DiscardHandler))
		for i := range row.takes {
			if _, err := k.Take(t.Context(), start.Add(time.Duration(i)*row.every)); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
		}
		var want []string
		for _, stamp := range row.want {
			want = append(want, stamp+"-2.snapshot")
		}
		if diff := cmp.Diff(want, names(t, dir)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
		if s := k.Stats(); s.Kept != len(want) || s.Taken != row.takes || s.Failed != 0 || s.Size < 300 {
			t.Errorf("%s: %+v", name, s)
		}
	}
}

func TestTakeIsPrivateAndTidy(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "a", "snapshots")
	c := cluster()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{".unfinished-12", "notes.txt", "20261101T003000Z-1.snapshot.copy"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	k := backup.NewKeeper(dir, always(backup.Schedule{Retain: 1}), never, engine(t, 1, 10), c, slog.New(slog.DiscardHandler))
	path, err := k.Take(t.Context(), taken)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode: %v, %v", info, err)
	}
	want := []string{"20261101T003000Z-1.snapshot.copy", "20261122T024712Z-2.snapshot", "notes.txt"}
	if diff := cmp.Diff(want, names(t, dir)); diff != "" {
		t.Errorf("files (-want +got):\n%s", diff)
	}
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = file.Close() }()
	if report, err := backup.Inspect(file, c.Key); err != nil || !report.Verified {
		t.Errorf("inspect: %+v, %v", report, err)
	}
}

// failing is an engine whose barrier fails while down.
type failing struct {
	store.Engine
	down atomic.Bool
}

func (f *failing) Barrier(ctx context.Context) (store.Position, error) {
	if f.down.Load() {
		return store.Position{}, store.ErrNoLeader
	}
	return f.Engine.Barrier(ctx)
}

func TestRunTakesOnTime(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		e := &failing{Engine: engine(t, 1, 10)}
		var schedule atomic.Pointer[backup.Schedule]
		schedule.Store(&backup.Schedule{Interval: time.Hour, Retain: 100})
		var changes atomic.Pointer[chan struct{}]
		first, second := make(chan struct{}), make(chan struct{})
		changes.Store(&first)
		begun := time.Now()
		k := backup.NewKeeper(dir, func() backup.Schedule { return *schedule.Load() }, func() <-chan struct{} { return *changes.Load() }, e, cluster(), slog.New(slog.DiscardHandler))
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- k.Run(ctx) }()
		expect := func(after time.Duration, taken, failed int) {
			t.Helper()
			time.Sleep(time.Until(begun.Add(after))) //nolint:forbidigo // the clock of the bubble
			synctest.Wait()
			if s := k.Stats(); s.Taken != taken || s.Failed != failed {
				t.Errorf("after %s: %+v, want %d taken, %d failed", after, s, taken, failed)
			}
		}
		expect(time.Second, 1, 0) // there was none
		expect(59*time.Minute, 1, 0)
		expect(61*time.Minute, 2, 0)
		e.down.Store(true)
		expect(121*time.Minute+30*time.Second, 2, 2) // and again after a minute
		e.down.Store(false)
		expect(123*time.Minute, 3, 2)
		schedule.Store(&backup.Schedule{Interval: 10 * time.Minute, Retain: 100})
		changes.Store(&second)
		close(first)
		expect(133*time.Minute, 4, 2)
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if left := slices.DeleteFunc(names(t, dir), func(n string) bool { return strings.HasSuffix(n, ".snapshot") }); len(left) > 0 {
			t.Errorf("left: %v", left)
		}
		// A new leader with a folder that has a fresh one takes none.
		again := backup.NewKeeper(dir, always(backup.Schedule{Interval: time.Hour}), never, e, cluster(), slog.New(slog.DiscardHandler))
		ctx, cancel = context.WithCancel(t.Context())
		go func() { done <- again.Run(ctx) }()
		time.Sleep(time.Minute) //nolint:forbidigo // the clock of the bubble
		synctest.Wait()
		if s := again.Stats(); s.Taken != 0 || s.Kept != 4 || s.Last.IsZero() {
			t.Errorf("the next leader: %+v", s)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}
