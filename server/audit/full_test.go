package audit_test

import (
	"errors"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/server/audit"
)

// childDir is the environment variable that makes TestDiskFull run out of room.
const childDir = "MESHD_AUDIT_TEST_CHILD"

// fileLimit is what room there is, as the limit of a file's size (setrlimit(2)):
// writes beyond it fail as on a full disk.
func fileLimit(t *testing.T, n uint64) {
	t.Helper()
	if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: n, Max: unix.RLIM_INFINITY}); err != nil {
		t.Fatal(err)
	}
}

// TestDiskFull: while records can't be written, changes are refused; when there is
// room again, they are not, without help, and no record is lost.
func TestDiskFull(t *testing.T) {
	if dir := os.Getenv(childDir); dir != "" {
		fillDisk(t, dir)
		return
	}
	t.Parallel()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), self, "-test.run=^TestDiskFull$", "-test.v")
	cmd.Env = append(os.Environ(), childDir+"="+filepath.Join(t.TempDir(), "audit"))
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS") {
		t.Errorf("%v\n%s", err, out)
	}
}

func fillDisk(t *testing.T, dir string) {
	t.Helper()
	signal.Ignore(syscall.SIGXFSZ) // EFBIG instead
	fileLimit(t, 8000)
	key := newKey(t)
	l, stop := start(t, audit.Config{Dir: dir, Key: key})
	kept := 0
	refused := false
	until(t, func() bool {
		done, err := l.Reserve()
		if refused = err != nil; refused {
			if !errors.Is(err, audit.ErrUnavailable) || !errors.Is(err, unix.EFBIG) {
				t.Fatal(err)
			}
			return true
		}
		done(request(kept))
		kept++
		return false
	})
	if l.Stats().Broken == nil || kept < 10 {
		t.Errorf("%+v after %d", l.Stats(), kept)
	}
	fileLimit(t, unix.RLIM_INFINITY)
	until(t, func() bool {
		done, err := l.Reserve()
		if err == nil {
			done(request(kept))
			kept++
		}
		return err == nil
	})
	stop()
	report, err := audit.Verify(dir, key)
	if err != nil || report.Last != uint64(kept)+2 || !report.Closed {
		t.Errorf("%d kept, %+v, %v", kept, report, err)
	}
	if _, err := audit.Verify(dir, ca.Secret{}); err != nil {
		t.Error(err)
	}
}

func until(t *testing.T, f func() bool) {
	t.Helper()
	deadline, tick := time.After(20*time.Second), time.NewTicker(5*time.Millisecond)
	defer tick.Stop()
	for !f() {
		select {
		case <-deadline:
			t.Fatal("it takes too long")
		case <-tick.C:
		}
	}
}
