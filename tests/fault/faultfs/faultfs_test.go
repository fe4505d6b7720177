package faultfs_test

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/meshd/meshd/tests/fault/faultfs"
)

// mounted returns a filesystem that is mounted at a folder.
func mounted(t *testing.T) (fs *faultfs.FS, dir string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root; make e2e runs this as root")
	}
	fs, dir = faultfs.New(), t.TempDir()
	if err := fs.Mount(dir); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		fs.Set(faultfs.Faults{})
		if err := fs.Unmount(); err != nil {
			t.Error(err)
		}
	})
	return fs, dir
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// write writes a file, and syncs it if asked.
func write(t *testing.T, path string, data []byte, sync bool) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	must(t, err)
	_, err = f.WriteAt(data, 0)
	must(t, err)
	if sync {
		must(t, f.Sync())
	}
	must(t, f.Close())
}

func syncDir(t *testing.T, path string) {
	t.Helper()
	d, err := os.Open(path)
	must(t, err)
	must(t, errors.Join(d.Sync(), d.Close()))
}

func lose(t *testing.T, fs *faultfs.FS, loss faultfs.Loss, seed uint64) faultfs.Lost {
	t.Helper()
	lost, err := fs.PowerLoss(loss, rand.New(rand.NewPCG(seed, 0)))
	must(t, err)
	return lost
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	must(t, err)
	return string(b)
}

// It is a filesystem: programs that know nothing of it get along.
func TestPrograms(t *testing.T) {
	_, dir := mounted(t)
	script := `set -e
		mkdir -p a/b; echo one >a/b/f; echo two >>a/b/f; mv a/b a/c; test "$(cat a/c/f)" = "one
two"; chmod 600 a/c/f; test "$(stat -c %a a/c/f)" = 600; : >a/c/f; test ! -s a/c/f
		dd if=/dev/urandom of=big bs=100000 count=30 conv=fsync 2>/dev/null; cp big big2; cmp big big2
		truncate -s 5000 big2; cmp -n 5000 big big2; test "$(stat -c %s big2)" = 5000
		fallocate -l 1000000 pre; test "$(stat -c %s pre)" = 1000000
		tar cf - a | tar tf - | sort | tr '\n' ' ' | grep -q '^a/ a/c/ a/c/f $'
		exec 9>lock; flock -n 9; ! flock -n lock true; exec 9>&-; flock -n lock true
		! rmdir a 2>/dev/null; rm -r a; test "$(ls | tr '\n' ' ')" = "big big2 lock pre "`
	cmd := exec.CommandContext(t.Context(), "bash", "-c", `cd "$0"; `+script, dir)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

// A power loss takes what was not synced, and nothing else.
func TestDrop(t *testing.T) {
	fs, dir := mounted(t)
	p := func(name string) string { return filepath.Join(dir, name) }
	must(t, os.Mkdir(p("kept"), 0o700))
	write(t, p("kept/synced"), []byte("synced"), true)
	write(t, p("kept/renamed"), []byte("old name"), true)
	write(t, p("kept/removed"), []byte("comes back"), true)
	syncDir(t, p("kept"))
	syncDir(t, dir)

	write(t, p("kept/synced"), []byte("SYNCED and more"), false)
	must(t, os.Rename(p("kept/renamed"), p("kept/new")))
	must(t, os.Remove(p("kept/removed")))
	write(t, p("kept/no-dir-sync"), []byte("content is synced, its name is not"), true)
	must(t, os.Mkdir(p("gone"), 0o700))
	write(t, p("gone/file"), []byte("synced in a folder without a name"), true)
	syncDir(t, p("gone"))

	lost := lose(t, fs, faultfs.Drop, 0)
	if lost.Sectors != 1 || lost.Entries != 4 {
		t.Errorf("lost %+v, want 1 sector (of synced) and 4 entries (new, removed, no-dir-sync, gone)", lost)
	}
	for name, want := range map[string]string{"synced": "synced", "renamed": "old name", "removed": "comes back"} {
		if got := read(t, p("kept/"+name)); got != want {
			t.Errorf("%s holds %q, want %q", name, got, want)
		}
	}
	for _, name := range []string{"kept/new", "kept/no-dir-sync", "gone"} {
		if _, err := os.Stat(p(name)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is there: %v", name, err)
		}
	}
	// A rename that is synced before the content leaves an empty file.
	write(t, p("temporary"), []byte("never synced"), false)
	must(t, os.Rename(p("temporary"), p("final")))
	syncDir(t, dir)
	lose(t, fs, faultfs.Drop, 0)
	if got := read(t, p("final")); got != "" {
		t.Errorf("final holds %q", got)
	}
}

// Torn and garbled writes leave sectors of both, or of neither; what was synced
// stays; a seed says which.
func TestTear(t *testing.T) {
	const size, sector = 64 << 10, 512
	for _, row := range []struct {
		name  string
		loss  faultfs.Loss
		noise bool
	}{{"tear", faultfs.Tear, false}, {"garble", faultfs.Garble, true}} {
		t.Run(row.name, func(t *testing.T) {
			fs, dir := mounted(t)
			path := filepath.Join(dir, "file")
			once := func(seed uint64) string {
				write(t, path, bytes.Repeat([]byte{'o'}, size), true)
				syncDir(t, dir)
				write(t, path, bytes.Repeat([]byte{'n'}, size/2), false)
				lose(t, fs, row.loss, seed)
				return read(t, path)
			}
			after := once(1)
			if len(after) != size || after[size/2:] != strings.Repeat("o", size/2) {
				t.Error("what was synced is not what it was")
			}
			var old, written, noise int
			for at := 0; at < size/2; at += sector {
				switch after[at : at+sector] {
				case strings.Repeat("o", sector):
					old++
				case strings.Repeat("n", sector):
					written++
				default:
					noise++
				}
			}
			if old == 0 || written == 0 || noise > 0 != row.noise {
				t.Errorf("%d sectors are old, %d written, %d noise", old, written, noise)
			}
			if once(1) != after || once(2) == after {
				t.Error("the losses do not follow the seed")
			}
			// A tail that was not synced ends anywhere, and the names in between.
			sizes := map[int]bool{}
			for seed := range uint64(8) {
				write(t, path, make([]byte, 2*size), false)
				lose(t, fs, row.loss, seed)
				sizes[len(read(t, path))] = true
				must(t, os.Truncate(path, size))
				write(t, path, []byte("x"), true)
			}
			if len(sizes) < 4 {
				t.Errorf("sizes after the loss of a tail: %v", sizes)
			}
		})
	}
}

// After a sync that failed, the next one succeeds without what it should have
// written.
func TestFailedSync(t *testing.T) {
	fs, dir := mounted(t)
	path := filepath.Join(dir, "file")
	write(t, path, []byte("old"), true)
	syncDir(t, dir)
	fs.Set(faultfs.Faults{FailSyncs: 1})
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	must(t, err)
	_, err = f.WriteAt([]byte("new"), 0)
	must(t, err)
	if err := f.Sync(); !errors.Is(err, unix.EIO) {
		t.Errorf("the first sync: %v", err)
	}
	must(t, f.Sync())
	must(t, f.Close())
	if got := read(t, path); got != "new" {
		t.Errorf("programs see %q", got)
	}
	if s := fs.Stats(); s.Failed != 1 || s.Syncs != 3 {
		t.Errorf("%+v", s)
	}
	lose(t, fs, faultfs.Drop, 0)
	if got := read(t, path); got != "old" {
		t.Errorf("the disk holds %q", got)
	}
}

func TestDelay(t *testing.T) {
	const delay = 80 * time.Millisecond
	fs, dir := mounted(t)
	fs.Set(faultfs.Faults{SyncDelay: delay})
	f, err := os.Create(filepath.Join(dir, "file"))
	must(t, err)
	begun := time.Now()
	_, err = f.WriteString("x")
	must(t, err)
	if took := time.Since(begun); took >= delay {
		t.Errorf("a write took %v", took)
	}
	begun = time.Now()
	must(t, errors.Join(f.Sync(), f.Close()))
	if took := time.Since(begun); took < delay {
		t.Errorf("a sync took %v", took)
	}
}

// A call that hangs goes on when the disk does, and can be killed until then.
func TestHang(t *testing.T) {
	for _, row := range []struct {
		name   string
		faults faultfs.Faults
		other  string // goes on meanwhile
	}{
		{"sync", faultfs.Faults{HangSync: true}, "echo x >other"},
		{"write", faultfs.Faults{HangWrite: true}, "cat file"},
	} {
		t.Run(row.name, func(t *testing.T) {
			fs, dir := mounted(t)
			start := func(script string) *exec.Cmd {
				cmd := exec.CommandContext(t.Context(), "sh", "-c", `cd "$0"; `+script, dir)
				must(t, cmd.Start())
				return cmd
			}
			hanging := func(want int) {
				t.Helper()
				for {
					changed := fs.Changed()
					if fs.Stats().Hanging == want {
						return
					}
					select {
					case <-changed:
					case <-time.After(10 * time.Second):
						t.Fatalf("%d calls hang, want %d", fs.Stats().Hanging, want)
					}
				}
			}
			// The kernel lets one call at a time into a file.
			const program = "exec dd if=/dev/zero bs=1k count=1 conv=fsync status=none of="
			must(t, start(program+"file").Wait())
			fs.Set(row.faults)
			killed, patient := start(program+"one"), start(program+"two")
			hanging(2)
			must(t, start(row.other).Wait())
			must(t, killed.Process.Signal(unix.SIGTERM)) // what ends a program is SIGKILL inside
			if err := killed.Wait(); err == nil {
				t.Error("the killed program ended well")
			}
			hanging(1)
			fs.Set(faultfs.Faults{})
			must(t, patient.Wait())
			hanging(0)
		})
	}
}

// A full disk takes no more, until something is removed.
func TestFull(t *testing.T) {
	fs, dir := mounted(t)
	fs.Set(faultfs.Faults{Capacity: 1 << 20})
	first, second := filepath.Join(dir, "first"), filepath.Join(dir, "second")
	write(t, first, make([]byte, 600<<10), true)
	err := os.WriteFile(second, make([]byte, 600<<10), 0o600)
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("beyond the capacity: %v", err)
	}
	write(t, first, []byte("within"), true) // takes nothing more
	if f, err := os.OpenFile(first, os.O_RDWR, 0); err != nil {
		t.Error(err)
	} else if err := unix.Fallocate(int(f.Fd()), 0, 0, 2<<20); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("reserve beyond the capacity: %v", err)
	} else {
		must(t, f.Close())
	}
	if s := fs.Stats(); s.Full == 0 || s.Used > 1<<20 {
		t.Errorf("%+v", s)
	}
	must(t, os.Remove(first))
	must(t, os.WriteFile(second, make([]byte, 900<<10), 0o600))
}

func TestMountedTwice(t *testing.T) {
	fs, dir := mounted(t)
	if err := fs.Mount(dir); !errors.Is(err, faultfs.ErrMounted) {
		t.Error(err)
	}
}
