package planted_test

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/meshd/meshd/server/fault"
	"github.com/meshd/meshd/server/store"
	"github.com/meshd/meshd/server/store/raftstore"
	"github.com/meshd/meshd/tests/fault/history"
)

// dirEnv names the state directory of TestWriter.
const dirEnv = "MESHD_TEST_DIR"

// writers of TestWriter each have a key.
const writers = 3

// program builds these tests with the tag fault.
func program(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "planted.test")
	if out, err := exec.CommandContext(t.Context(), "go", "test", "-c", "-tags", "fault", "-o", path, ".").CombinedOutput(); err != nil {
		t.Fatalf("build with the tag fault: %v\n%s", err, out)
	}
	return path
}

// lone runs a server alone in the directory.
func lone(t *testing.T, dir string) *raftstore.Engine {
	t.Helper()
	cfg := config(dir, "server-0")
	e, err := raftstore.New(cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- e.Run(context.WithoutCancel(t.Context())) }()
	t.Cleanup(func() { _ = e.Close() })
	ctx, stop := context.WithTimeout(t.Context(), patience)
	defer stop()
	if _, err := e.Barrier(ctx); err != nil {
		t.Fatalf("%v; %v", err, e.Close())
	}
	return e
}

// TestWriter is run by TestPoints as a program of its own. It writes until it dies,
// and says before and after each write which one.
func TestWriter(t *testing.T) {
	dir := os.Getenv(dirEnv)
	if dir == "" {
		t.Skip("run by TestPoints")
	}
	e := lone(t, dir)
	failed := make(chan error)
	for w := range writers {
		go func() { failed <- writeOn(t.Context(), e, w) }()
	}
	t.Fatal(<-failed)
}

func writeOn(ctx context.Context, e *raftstore.Engine, w int) error {
	key := fmt.Sprintf("k%d", w)
	all, err := e.List(ctx, key)
	if err != nil {
		return err
	}
	seen := store.Pair{}
	if len(all.Pairs) > 0 {
		seen = all.Pairs[0]
	}
	for n := 0; ; n++ {
		value := fmt.Sprintf("p%d-%d", os.Getpid(), n)
		if _, err := fmt.Fprintf(os.Stdout, "write %s %q %q\n", key, seen.Value, value); err != nil {
			return err
		}
		at, err := e.Commit(ctx, store.Txn{
			Checks: []store.Check{{Key: key, ModRevision: seen.ModRevision}}, Ops: []store.Op{{Key: key, Value: []byte(value)}},
		})
		if err != nil {
			return err
		}
		if _, err := fmt.Fprintf(os.Stdout, "wrote %s %d\n", key, at.Revision); err != nil {
			return err
		}
		seen = store.Pair{Value: []byte(value), ModRevision: at.Revision}
	}
}

// storePoints are the failpoints that a lone server comes by; the others are for
// real servers, see TestFailpoints in tests/fault.
func storePoints() []string {
	return slices.DeleteFunc(fault.Points(), func(point string) bool {
		return strings.HasPrefix(point, "ca-") || strings.HasPrefix(point, "key-")
	})
}

// TestPoints is F4 for the store: a server panics, or is gone, at each point where
// it is half done with something; once at the first time that it comes by, once
// later. What it acknowledged is there when it starts again.
func TestPoints(t *testing.T) {
	if fault.Enabled {
		t.Skip("the programs that this test starts are the ones that can fail")
	}
	built, log := program(t), history.New()
	dir := filepath.Join(t.TempDir(), "state")
	clients := 0
	for _, point := range storePoints() {
		for _, action := range []string{"panic", "exit:3"} {
			if strings.HasPrefix(point, "snapshot-install") || strings.HasPrefix(point, "vote") {
				action, _, _ = strings.Cut(action, ":") // once in a life of this server
			}
			t.Run(point+"="+action, func(t *testing.T) {
				writeUntil(t, built, dir, point+"="+action, log, clients)
				clients += writers
				e := lone(t, dir)
				reader := newClient(t, log, clients)
				for w := range writers {
					reader.read(&member{Engine: e}, fmt.Sprintf("k%d", w), true)
				}
				clients++
				if err := e.Close(); err != nil {
					t.Error(err)
				}
			})
			if t.Failed() {
				return
			}
		}
	}
	ops := log.Ops()
	t.Logf("%d operations", len(ops))
	if err := history.Check(ops, decision); err != nil {
		t.Error(err)
	}
}

// writeUntil runs TestWriter until the failpoint ends it, and records what it did.
func writeUntil(t *testing.T, built, dir, points string, log *history.History, client int) {
	t.Helper()
	ctx, stop := context.WithTimeout(t.Context(), patience)
	defer stop()
	cmd := exec.CommandContext(ctx, built, "-test.run=^TestWriter$")
	cmd.Env = append(os.Environ(), dirEnv+"="+dir, fault.EnvPoints+"="+points)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	open := map[string]history.Op{} // by key: what is under way
	for lines := bufio.NewScanner(out); lines.Scan(); {
		var op history.Op
		var key string
		var revision uint64
		if n, _ := fmt.Sscanf(lines.Text(), "write %s %q %q", &op.Key, &op.Expect, &op.Value); n == 3 {
			op.Client, op.Kind, op.Invoked = client+int(op.Key[1]-'0'), history.Write, log.Now()
			open[op.Key] = op
		} else if n, _ := fmt.Sscanf(lines.Text(), "wrote %s %d", &key, &revision); n == 2 {
			op := open[key]
			op.Outcome, op.Revision, op.Returned = history.OK, revision, log.Now()
			log.Add(op)
			delete(open, key)
		}
	}
	err = cmd.Wait()
	for _, op := range open {
		op.Outcome = history.Unknown
		log.Add(op)
	}
	point, _, _ := strings.Cut(points, "=")
	if err == nil || !strings.Contains(stderr.String(), "failpoint "+point) {
		t.Fatalf("%s was not hit within %v: %v\n%s", points, patience, err, tail(stderr.String()))
	}
}

func tail(s string) string { return s[max(0, len(s)-3000):] }
