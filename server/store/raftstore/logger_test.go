package raftstore_test

import (
	"bytes"
	"context"
	"encoding/json"
	"log/slog"
	"path/filepath"
	"regexp"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/meshd/meshd/server/store/raftstore"
)

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

// What Raft logs arrives as records with attributes in snake case.
func TestLogs(t *testing.T) {
	var out lockedBuffer
	e, err := raftstore.New(small(filepath.Join(t.TempDir(), "state")), slog.New(slog.NewJSONHandler(&out, nil)))
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- e.Run(context.Background()) }()
	if _, err := e.Barrier(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	snake := regexp.MustCompile(`^[a-z0-9_]+$`)
	seen := map[string]bool{}
	for line := range bytes.Lines(out.b.Bytes()) {
		var record map[string]any
		if err := json.Unmarshal(line, &record); err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		for key := range record {
			if !snake.MatchString(key) {
				t.Errorf("key %q in %s", key, line)
			}
		}
		if msg, ok := record["msg"].(string); ok {
			seen[msg] = true
		}
	}
	for _, want := range []string{"entering leader state", "store leads"} {
		if !seen[want] {
			t.Errorf("nothing says %q: %v", want, seen)
		}
	}
}

// A member that is down does not fill the log.
func TestLogsAreLimited(t *testing.T) {
	var out lockedBuffer
	sink := raftstore.NewLogger(slog.New(slog.NewJSONHandler(&out, nil)))
	for range 1000 {
		sink.Error("failed to heartbeat to", "peer", "a", "error", "refused")
		sink.Error("failed to heartbeat to", "peer", "b", "error", "refused")
		sink.Info("entering follower state")
	}
	lines := map[string]int{}
	for line := range bytes.Lines(out.b.Bytes()) {
		var record struct{ Msg, Peer string }
		if err := json.Unmarshal(line, &record); err != nil {
			t.Fatal(err)
		}
		lines[record.Msg+record.Peer]++
	}
	want := map[string]int{"failed to heartbeat toa": 3, "failed to heartbeat tob": 3, "entering follower state": 1000}
	if diff := cmp.Diff(want, lines); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}
