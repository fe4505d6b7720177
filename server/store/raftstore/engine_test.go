package raftstore_test

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/meshd/meshd/server/store"
	"github.com/meshd/meshd/server/store/raftstore"
	"github.com/meshd/meshd/server/store/storetest"
)

func discard() *slog.Logger { return slog.New(slog.DiscardHandler) }

// small is a configuration whose log rotates and whose state is saved often.
func small(dir string) raftstore.Config {
	return raftstore.Config{
		Dir:              dir,
		ID:               "server-1",
		SegmentBytes:     1 << 20,
		SnapshotEntries:  50,
		SnapshotInterval: 10 * time.Millisecond,
		TrailingEntries:  10,
	}
}

// member is a running engine.
type member struct {
	*raftstore.Engine

	cfg  raftstore.Config
	done chan error
}

func run(t *testing.T, cfg raftstore.Config) *member {
	t.Helper()
	e, err := raftstore.New(cfg, discard())
	if err != nil {
		t.Fatal(err)
	}
	m := &member{Engine: e, cfg: cfg, done: make(chan error, 1)}
	go func() { m.done <- e.Run(t.Context()) }()
	t.Cleanup(func() { _ = m.Close() })
	return m
}

// serving waits until m serves, or fails the test with the error of Run.
func serving(t *testing.T, m *member) *member {
	t.Helper()
	ctx, stop := context.WithTimeout(t.Context(), time.Minute)
	defer stop()
	if _, err := m.Barrier(ctx); err != nil {
		t.Fatalf("barrier of a starting engine: %v", errors.Join(err, m.Close(), <-m.done))
	}
	return m
}

func TestSuite(t *testing.T) {
	var members sync.Map // by engine
	start := func(t *testing.T, cfg raftstore.Config) store.Engine {
		t.Helper()
		m := serving(t, run(t, cfg))
		members.Store(m.Engine, m)
		return m.Engine
	}
	storetest.Run(t, storetest.Factory{
		Open: func(t *testing.T) store.Engine {
			t.Helper()
			return start(t, small(filepath.Join(t.TempDir(), "state")))
		},
		Reopen: func(t *testing.T, e store.Engine) store.Engine {
			t.Helper()
			found, _ := members.Load(e)
			m, ok := found.(*member)
			if !ok {
				t.Fatalf("%T is not of this test", e)
			}
			if err := m.Close(); err != nil {
				t.Fatal(err)
			}
			if err := <-m.done; err != nil {
				t.Fatal(err)
			}
			return start(t, m.cfg)
		},
	})
}

func TestValidate(t *testing.T) {
	good := raftstore.Config{Dir: "d", ID: "a"}
	for _, row := range []struct {
		name string
		edit func(*raftstore.Config)
		want string
	}{
		{"good", func(*raftstore.Config) {}, ""},
		{"no directory", func(c *raftstore.Config) { c.Dir = "" }, "Dir: name the state directory"},
		{"no name", func(c *raftstore.Config) { c.ID = "" }, "ID: name this server"},
		{"small segments", func(c *raftstore.Config) { c.SegmentBytes = 4096 }, "SegmentBytes: 4096 is less than 1048576"},
		{"long lease", func(c *raftstore.Config) { c.LeaderLease = time.Second }, "LeaderLease: 1s is more than HeartbeatTimeout, 500ms"},
		{
			"short election", func(c *raftstore.Config) { c.ElectionTimeout = time.Millisecond },
			"ElectionTimeout: 1ms is less than HeartbeatTimeout, 500ms",
		},
	} {
		t.Run(row.name, func(t *testing.T) {
			cfg := good
			row.edit(&cfg)
			got := ""
			if err := cfg.Validate(); err != nil {
				got = err.Error()
			}
			if diff := cmp.Diff(row.want, got); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

// A lone server must not wait for the time-outs of an election.
func TestStartsAtOnce(t *testing.T) {
	cfg := small(filepath.Join(t.TempDir(), "state"))
	cfg.HeartbeatTimeout, cfg.ElectionTimeout = time.Hour, time.Hour
	cfg.SegmentBytes = 0
	for i := range 2 {
		begun := time.Now()
		m := serving(t, run(t, cfg))
		t.Logf("start %d serves after %v", i, time.Since(begun))
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
		if err := <-m.done; err != nil {
			t.Fatal(err)
		}
	}
}

func TestRunTwice(t *testing.T) {
	m := serving(t, run(t, small(filepath.Join(t.TempDir(), "state"))))
	if err := m.Run(t.Context()); !errors.Is(err, raftstore.ErrRunning) {
		t.Fatalf("a second Run: %v", err)
	}
	other := run(t, m.cfg)
	if err := <-other.done; !errors.Is(err, raftstore.ErrInUse) {
		t.Fatalf("a second engine on the same directory: %v", err)
	}
}

func TestCloseBeforeRun(t *testing.T) {
	e, err := raftstore.New(small(filepath.Join(t.TempDir(), "state")), discard())
	if err != nil {
		t.Fatal(err)
	}
	waiting := make(chan error)
	go func() {
		_, err := e.Watch(t.Context(), "", store.Position{}).Next(t.Context())
		waiting <- err
	}()
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-waiting; !errors.Is(err, store.ErrClosed) {
		t.Fatalf("a watcher of an engine that never ran: %v", err)
	}
	if err := e.Run(t.Context()); err != nil {
		t.Fatalf("run after close: %v", err)
	}
}

func TestPrivateDirectory(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	m := serving(t, run(t, small(dir)))
	info, err := os.Stat(dir)
	if err != nil || info.Mode().Perm() != 0o700 {
		t.Fatalf("a new state directory has mode %v, %v", info.Mode(), err)
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	for _, mode := range []os.FileMode{0o710, 0o704, 0o755} {
		if err := os.Chmod(dir, mode); err != nil {
			t.Fatal(err)
		}
		if err := <-run(t, small(dir)).done; !errors.Is(err, raftstore.ErrMode) {
			t.Errorf("a state directory of mode %o: %v", mode, err)
		}
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := <-run(t, small(file)).done; !errors.Is(err, raftstore.ErrMode) {
		t.Errorf("a file as state directory: %v", err)
	}
}
