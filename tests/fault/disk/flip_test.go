package disk_test

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/meshd/meshd/server/store"
	"github.com/meshd/meshd/server/store/raftstore"
)

// openEnv names a state directory to open. It makes TestOpen a program of its
// own: what it opens may be damaged so that it does not survive it.
const openEnv = "MESHD_TEST_OPEN"

const memberName = "server-1"

// small is a lone server whose log rotates and whose state is saved often.
func small(dir string) raftstore.Config {
	return raftstore.Config{
		Dir: dir, ID: memberName, SegmentBytes: 1 << 20,
		SnapshotEntries: 60, SnapshotInterval: 10 * time.Millisecond, TrailingEntries: 10,
	}
}

// engine runs a store until the test ends or stop is called, which returns what
// Run returned.
func engine(t *testing.T, cfg raftstore.Config) (e *raftstore.Engine, stop func() error) {
	t.Helper()
	e, err := raftstore.New(cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- e.Run(context.WithoutCancel(t.Context())) }()
	stop = func() error {
		err := errors.Join(e.Close(), <-done)
		done <- nil
		return err
	}
	t.Cleanup(func() { _ = stop() })
	return e, stop
}

func hash(e *raftstore.Engine) string {
	sum := e.State().Hash()
	return hex.EncodeToString(sum[:])
}

// TestOpen opens the directory that openEnv names and prints what it is: the hash
// of its state and Raft's term, or why it is refused.
func TestOpen(t *testing.T) {
	dir := os.Getenv(openEnv)
	if dir == "" {
		t.Skip("run by the tests of damage")
	}
	e, stop := engine(t, small(dir))
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if _, err := e.Barrier(ctx); err != nil {
		err = errors.Join(stop(), err)
		_, _ = fmt.Fprintf(os.Stdout, "\nrefused corrupt=%v %q\n", errors.Is(err, store.ErrCorrupt), err)
		return
	}
	_, _ = fmt.Fprintf(os.Stdout, "\nserves %s %d\n", hash(e), e.Stats().Term)
}

// opened is what TestOpen found.
type opened struct {
	state   string // hash; "" if it was refused
	term    uint64
	refusal string
	corrupt bool // the refusal is store.ErrCorrupt
	output  string
}

func open(t *testing.T, dir string) opened {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), self, "-test.run=^TestOpen$")
	cmd.Env = append(os.Environ(), openEnv+"="+dir)
	out, err := cmd.CombinedOutput()
	o := opened{output: string(out)}
	for line := range strings.Lines(o.output) {
		if n, _ := fmt.Sscanf(line, "serves %s %d", &o.state, &o.term); n == 2 {
			return o
		}
		if n, _ := fmt.Sscanf(line, "refused corrupt=%t %q", &o.corrupt, &o.refusal); n == 2 {
			return o
		}
	}
	t.Errorf("a damaged directory ends the program: %v\n%s", err, out)
	return o
}

// sample is a state directory, and every state that it went through.
type sample struct {
	dir    string
	states []string // hashes, in order
	term   uint64
}

// makeSample writes a history with deletions, two snapshots, and entries of the
// log after them.
func makeSample(t *testing.T) sample {
	t.Helper()
	s := sample{dir: filepath.Join(t.TempDir(), "state")}
	rnd := rand.New(rand.NewPCG(7, 7))
	for round := range 3 {
		e, stop := engine(t, small(s.dir))
		for i := range 70 {
			value := make([]byte, 100+rnd.IntN(400))
			for j := range value {
				value[j] = byte(rnd.Uint32())
			}
			ops := []store.Op{{Key: fmt.Sprintf("key/%d", rnd.IntN(50)), Value: value}}
			if i%5 == 0 {
				ops = append(ops, store.Op{Key: fmt.Sprintf("other/%d", rnd.IntN(20)), Delete: i%10 == 0})
			}
			if _, err := e.Commit(t.Context(), store.Txn{Ops: ops}); err != nil {
				t.Fatal(err)
			}
			s.states = append(s.states, hash(e))
		}
		awaitSnapshot(t, s.dir, round)
		s.term = e.Stats().Term
		if err := stop(); err != nil {
			t.Fatal(err)
		}
	}
	if o := open(t, clone(t, s.dir)); o.state != s.states[len(s.states)-1] || o.term != s.term+1 {
		t.Fatalf("without damage it is %+v, want state %s of term %d", o, s.states[len(s.states)-1], s.term+1)
	}
	return s
}

// awaitSnapshot waits until a state was saved that is newer than the given number
// of them.
func awaitSnapshot(t *testing.T, dir string, older int) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for range 2000 {
		found, err := filepath.Glob(dir + "/snapshots/*/state.bin")
		if err == nil && len(found) > min(older, 1) && !strings.Contains(strings.Join(found, ""), ".tmp") {
			return
		}
		<-tick.C
	}
	t.Fatal("no state was saved within 10 s")
}

func clone(t *testing.T, dir string) string {
	t.Helper()
	to := filepath.Join(t.TempDir(), "state")
	if err := os.CopyFS(to, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(to, 0o700); err != nil {
		t.Fatal(err)
	}
	return to
}

// files returns the paths under dir that match, relative to it, and the extent of
// each that holds anything but zeros.
func files(t *testing.T, dir string, match func(path string) bool) map[string]int64 {
	t.Helper()
	found := map[string]int64{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		relative, _ := filepath.Rel(dir, path)
		if used := len(bytes.TrimRight(b, "\x00")); used > 0 && match(relative) {
			found[relative] = int64(used)
		}
		return err
	})
	if err != nil || len(found) == 0 {
		t.Fatalf("no such files in %s: %v", dir, err)
	}
	return found
}

func flip(t *testing.T, path string, at int64, bit int) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	b[at] ^= 1 << bit
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// A flipped bit is found before anything is served, or it changes nothing: it
// lies in what is not used. Of the log, the last batch may be cut off, as a crash
// tears it.
func TestFlips(t *testing.T) {
	t.Parallel()
	s := makeSample(t)
	last := s.states[len(s.states)-1]
	for _, row := range []struct {
		name  string
		flips int
		match func(path string) bool
		tail  bool // may cut the end off
	}{
		{"log", 150, func(p string) bool { return strings.HasSuffix(p, ".wal") }, true},
		{"meta", 100, func(p string) bool { return p == "wal/meta" }, false},
		{"snapshot", 80, func(p string) bool { return strings.HasSuffix(p, "state.bin") }, false},
		{"description of a snapshot", 80, func(p string) bool { return strings.HasSuffix(p, "meta.json") }, false},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			found := files(t, s.dir, row.match)
			paths := sortedKeys(found)
			var refused, harmless, cut int
			for seed := range uint64(row.flips) {
				rnd := rand.New(rand.NewPCG(seed, 1))
				path := paths[rnd.IntN(len(paths))]
				at, bit := rnd.Int64N(found[path]), rnd.IntN(8)
				dir := clone(t, s.dir)
				flip(t, filepath.Join(dir, path), at, bit)
				where := fmt.Sprintf("seed %d: bit %d of byte %d of %s", seed, bit, at, path)
				switch o := open(t, dir); {
				case o.refusal != "" && o.corrupt:
					refused++
				case o.refusal != "":
					t.Errorf("%s: refused for another reason: %s", where, o.refusal)
				case o.state == last && o.term == s.term+1:
					harmless++
				case row.tail && o.state == s.states[len(s.states)-2]:
					cut++ // the last batch of the log can't be told from one that a crash tore
				default:
					t.Errorf("%s: it serves state %s of term %d, %d writes behind; it was %s of term %d",
						where, o.state, o.term, len(s.states)-1-slices.Index(s.states, o.state), last, s.term)
				}
			}
			t.Logf("%d flips: %d refused, %d harmless, %d cut off the end", row.flips, refused, harmless, cut)
		})
	}
}
