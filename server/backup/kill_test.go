package backup_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/server/backup"
	"github.com/meshd/meshd/server/store"
	"github.com/meshd/meshd/server/store/raftstore"
)

// childDir is the environment variable that makes TestKillDuringRestore restore
// until it is killed.
const childDir = "MESHD_BACKUP_TEST_CHILD"

// open runs an engine on disk until the returned function is called.
func open(tb testing.TB, dir string) (store.Engine, func()) {
	tb.Helper()
	e, err := raftstore.New(raftstore.Config{Dir: filepath.Join(dir, "store"), ID: "s1"}, slog.New(slog.DiscardHandler))
	if err != nil {
		tb.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- e.Run(ctx) }()
	ready, stop := context.WithTimeout(tb.Context(), 20*time.Second)
	defer stop()
	for {
		if _, err = e.Barrier(ready); err == nil || !errors.Is(err, store.ErrNoLeader) {
			break
		}
	}
	if err != nil {
		cancel()
		tb.Fatal(err, <-done)
	}
	return e, func() {
		cancel()
		if err := <-done; err != nil {
			tb.Error(err)
		}
	}
}

// child restores one snapshot after the other, and tells of each.
func child(t *testing.T, dir string) {
	t.Helper()
	e, stop := open(t, dir)
	defer stop()
	key, err := ca.ReadClusterKey(filepath.Join(dir, "key"))
	if err != nil {
		t.Fatal(err)
	}
	for n := 0; ; n++ {
		name := []string{"b", "a"}[n%2]
		file, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := backup.Restore(t.Context(), bytes.NewReader(file), e, backup.Cluster{TrustDomain: "mesh.test", Key: key}, backup.Policy{}); err != nil {
			t.Fatal(err)
		}
		if _, err := fmt.Fprintln(os.Stdout, "restored "+name); err != nil {
			t.Fatal(err)
		}
	}
}

// TestKillDuringRestore kills a restoring process at random points. All of the old
// state must be there afterwards, or all of the new one.
func TestKillDuringRestore(t *testing.T) {
	if dir := os.Getenv(childDir); dir != "" {
		child(t, dir)
		return
	}
	const kills = 10
	dir := t.TempDir()
	c := cluster()
	if err := ca.WriteClusterKey(filepath.Join(dir, "key"), c.Key); err != nil {
		t.Fatal(err)
	}
	states := map[string]map[string]string{}
	for name, n := range map[string]int{"a": 600, "b": 500} {
		e := engine(t, n, 1000)
		put(t, e, "node/name", name)
		states[name] = content(t, e)
		if err := os.WriteFile(filepath.Join(dir, name), save(t, e, c), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	seen := map[string]int{}
	for range kills {
		killed(t, dir)
		e, stop := open(t, dir)
		got := content(t, e)
		stop()
		name := got["node/name"]
		if diff := cmp.Diff(states[name], got); diff != "" && len(got) > 0 {
			t.Fatalf("after a kill the state is neither one nor the other; beside %q (-want +got):\n%.2000s", name, diff)
		}
		seen[name]++
	}
	t.Logf("%d kills, states %v", kills, seen)
}

// killed runs a child and kills it at a random time after its first restore.
func killed(t *testing.T, dir string) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), self, "-test.run=^TestKillDuringRestore$")
	cmd.Env = append(os.Environ(), childDir+"="+dir)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	scanner := bufio.NewScanner(out)
	if scanner.Scan() {
		time.AfterFunc(rand.N(150*time.Millisecond), func() { _ = cmd.Process.Kill() }) // it is alive until then, or Wait says so
	}
	for scanner.Scan() {
	}
	var exit *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &exit) || exit.ExitCode() != -1 {
		t.Fatalf("the restoring process ended by itself: %v: %s", err, stderr.String())
	}
}
