package raftstore_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/meshd/meshd/server/store"
)

// childDir is the environment variable that makes TestKill write until it is
// killed.
const childDir = "MESHD_RAFTSTORE_TEST_CHILD"

// writers of a child each write their own keys in order, one after the other.
const writers = 3

// child acknowledges on standard output: "writer number generation revision".
func child(t *testing.T, dir string) {
	t.Helper()
	m := run(t, small(dir))
	failed := make(chan error, writers)
	for w := range writers {
		go func() { failed <- writeForEver(t.Context(), m, w) }()
	}
	select {
	case err := <-m.done:
		t.Fatal(err)
	case err := <-failed:
		t.Fatal(err)
	}
}

func writeForEver(ctx context.Context, e store.Engine, w int) error {
	snapshot, err := e.List(ctx, fmt.Sprintf("w%d/", w))
	if err != nil {
		return err
	}
	for n := len(snapshot.Pairs); ; n++ {
		key := fmt.Sprintf("w%d/%08d", w, n)
		p, err := e.Commit(ctx, store.Txn{
			Checks: []store.Check{{Key: key}},
			Ops: []store.Op{
				{Key: key, Value: []byte(strconv.Itoa(n))},
				{Key: "last/" + strconv.Itoa(w), Value: []byte(strconv.Itoa(n))},
			},
		})
		if err != nil {
			return err
		}
		if _, err := fmt.Fprintf(os.Stdout, "%d %d %s %d\n", w, n, p.Generation, p.Revision); err != nil {
			return err
		}
	}
}

// TestKill kills a writing process at random points and demands that every
// acknowledged write is there afterwards, whole and at a position that covers
// its own.
func TestKill(t *testing.T) {
	if dir := os.Getenv(childDir); dir != "" {
		child(t, dir)
		return
	}
	const kills = 12
	dir := filepath.Join(t.TempDir(), "state")
	acked := [writers]int{-1, -1, -1}
	var last store.Position
	total := 0
	for range kills {
		lines := killed(t, dir, 20+rand.IntN(120))
		for _, line := range lines {
			var w, n int
			var p store.Position
			if _, err := fmt.Sscan(line, &w, &n, &p.Generation, &p.Revision); err != nil {
				t.Fatalf("%q: %v", line, err)
			}
			if !last.IsZero() && p.Generation != last.Generation {
				t.Fatalf("generation %s became %s over a kill", last.Generation, p.Generation)
			}
			acked[w] = n
			if p.Covers(last) {
				last = p
			}
		}
		total += len(lines)
		m := serving(t, run(t, small(dir)))
		for w := range writers {
			checkWriter(t, m, w, acked[w], last)
		}
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
		if err := <-m.done; err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d kills, %d acknowledged writes, none lost", kills, total)
}

func checkWriter(t *testing.T, m *member, w, acked int, last store.Position) {
	t.Helper()
	snapshot, err := m.List(t.Context(), fmt.Sprintf("w%d/", w))
	if err != nil {
		t.Fatal(err)
	}
	if !snapshot.Position.Covers(last) {
		t.Fatalf("the store is at %v after an acknowledgement at %v", snapshot.Position, last)
	}
	if len(snapshot.Pairs) < acked+1 {
		t.Fatalf("writer %d: %d writes are there, number %d was acknowledged", w, len(snapshot.Pairs), acked)
	}
	for n, p := range snapshot.Pairs {
		if p.Key != fmt.Sprintf("w%d/%08d", w, n) || string(p.Value) != strconv.Itoa(n) {
			t.Fatalf("writer %d: write %d is %s = %q", w, n, p.Key, p.Value)
		}
	}
	state, err := m.List(t.Context(), "last/"+strconv.Itoa(w))
	if err != nil {
		t.Fatal(err)
	}
	if n := len(snapshot.Pairs); n > 0 && (len(state.Pairs) != 1 || string(state.Pairs[0].Value) != strconv.Itoa(n-1)) {
		t.Fatalf("writer %d: half a transaction: %d writes and %v", w, n, state.Pairs)
	}
}

// killed runs a child and kills it after some acknowledgements. It returns all
// of them, with those that were on their way.
func killed(t *testing.T, dir string, after int) []string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), self, "-test.run=^TestKill$")
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
	var (
		lines []string
		once  sync.Once
	)
	scanner := bufio.NewScanner(out)
	for scanner.Scan() {
		if lines = append(lines, scanner.Text()); len(lines) >= after {
			once.Do(func() {
				if err := cmd.Process.Signal(syscall.SIGKILL); err != nil {
					t.Errorf("kill: %v", err)
				}
			})
		}
	}
	var exit *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &exit) || exit.ExitCode() != -1 {
		t.Fatalf("the writing process ended by itself: %v: %s", err, stderr.String())
	}
	return lines
}
