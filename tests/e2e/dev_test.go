package e2e_test

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestDevDemo is what `make run` runs: one command, from denied to allowed, and
// nothing left behind.
func TestDevDemo(t *testing.T) {
	t.Parallel()
	// A machine of its own, for a server may run on this one.
	h := newNetwork(t).machine(t, "laptop", t.TempDir(), "")
	within := func(args ...string) []string {
		return append([]string{"-t", strconv.Itoa(h.pid), "-m", "-r", "-w"}, args...)
	}
	temp := h.Path("tmp")
	if err := os.Mkdir(temp, 0o700); err != nil {
		t.Fatal(err)
	}
	dev := h.Start("dev", "nsenter", within("env", "TMPDIR="+temp, filepath.Join(bin, "meshd"), "dev", "--demo")...)
	saw := func(limit time.Duration, text string) {
		t.Helper()
		eventually(t, limit, "the demo says "+text, func() string {
			if said := readFile(t, dev.Log); !strings.Contains(said, text) {
				return "so far: " + tail(dev.Log, 10)
			}
			return ""
		})
	}
	saw(30*time.Second, "GET /hello  403  mesh-error: denied")
	saw(15*time.Second, "$ meshctl intention allow web api")
	saw(5*time.Second, "GET /hello  200  api was called by By=spiffe://dev.mesh/ns/default/svc/api;URI=spiffe://dev.mesh/ns/default/svc/web")
	// meshctl finds it with no setting.
	if r := h.Run("nsenter", within(filepath.Join(bin, "meshctl"), "intention", "deny", "web", "api", "--replace", "--wait")...); r.Code != 0 {
		t.Errorf("meshctl without settings: %d %s%s", r.Code, r.Stdout, r.Stderr)
	}
	before := strings.Count(readFile(t, dev.Log), "403")
	eventually(t, 5*time.Second, "the demo is denied again", func() string {
		if strings.Count(readFile(t, dev.Log), "403") > before-1 && strings.Contains(tail(dev.Log, 1), "403") {
			return ""
		}
		return "so far: " + tail(dev.Log, 3)
	})
	if r := h.Run("nsenter", within(filepath.Join(bin, "meshctl"), "services")...); r.Code != 0 || !strings.Contains(r.Stdout, "api") {
		t.Errorf("meshctl services: %s%s", r.Stdout, r.Stderr)
	}
	// A second one says why it can't, and leaves nothing (see below).
	if r := h.Run("nsenter", within("env", "TMPDIR="+temp, filepath.Join(bin, "meshd"), "dev", "--demo")...); r.Code == 0 ||
		!strings.Contains(r.Stderr, "a server runs on this machine already") {
		t.Errorf("a second meshd dev: %d %s%s", r.Code, r.Stdout, r.Stderr)
	}
	dev.Kill(syscall.SIGINT)
	select {
	case <-dev.Done():
	case <-time.After(10 * time.Second):
		t.Fatalf("meshd dev has not ended 10 s after SIGINT:\n%s", tail(dev.Log, 20))
	}
	if dev.Err() != nil {
		t.Errorf("meshd dev: %v", dev.Err())
	}
	left, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range left {
		line, err := os.ReadFile(p)
		if err == nil && strings.HasPrefix(string(line), filepath.Join(bin, "mesh-proxy")) && strings.Contains(string(line), temp) {
			t.Errorf("left behind: %s", strings.ReplaceAll(string(line), "\x00", " "))
		}
	}
	if dirs, err := os.ReadDir(temp); err != nil || len(dirs) > 0 {
		t.Errorf("left behind: %v, %v", dirs, err)
	}
}
