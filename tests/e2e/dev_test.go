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
	temp := h.path("tmp")
	if err := os.Mkdir(temp, 0o700); err != nil {
		t.Fatal(err)
	}
	dev := h.start("dev", "nsenter", within("env", "TMPDIR="+temp, filepath.Join(bin, "meshd"), "dev", "--demo")...)
	saw := func(limit time.Duration, text string) {
		t.Helper()
		eventually(t, limit, "the demo says "+text, func() string {
			if said := readFile(t, dev.log); !strings.Contains(said, text) {
				return "so far: " + tail(dev.log, 10)
			}
			return ""
		})
	}
	saw(30*time.Second, "GET /hello  403  mesh-error: denied")
	saw(15*time.Second, "$ meshctl intention allow web api")
	saw(5*time.Second, "GET /hello  200  api was called by By=spiffe://dev.mesh/ns/default/svc/api;URI=spiffe://dev.mesh/ns/default/svc/web")
	// meshctl finds it with no setting.
	if r := h.run("nsenter", within(filepath.Join(bin, "meshctl"), "intention", "deny", "web", "api", "--replace", "--wait")...); r.code != 0 {
		t.Errorf("meshctl without settings: %d %s%s", r.code, r.stdout, r.stderr)
	}
	before := strings.Count(readFile(t, dev.log), "403")
	eventually(t, 5*time.Second, "the demo is denied again", func() string {
		if strings.Count(readFile(t, dev.log), "403") > before-1 && strings.Contains(tail(dev.log, 1), "403") {
			return ""
		}
		return "so far: " + tail(dev.log, 3)
	})
	if r := h.run("nsenter", within(filepath.Join(bin, "meshctl"), "services")...); r.code != 0 || !strings.Contains(r.stdout, "api") {
		t.Errorf("meshctl services: %s%s", r.stdout, r.stderr)
	}
	// A second one says why it can't, and leaves nothing (see below).
	if r := h.run("nsenter", within("env", "TMPDIR="+temp, filepath.Join(bin, "meshd"), "dev", "--demo")...); r.code == 0 ||
		!strings.Contains(r.stderr, "a server runs on this machine already") {
		t.Errorf("a second meshd dev: %d %s%s", r.code, r.stdout, r.stderr)
	}
	dev.kill(syscall.SIGINT)
	select {
	case <-dev.done:
	case <-time.After(10 * time.Second):
		t.Fatalf("meshd dev has not ended 10 s after SIGINT:\n%s", tail(dev.log, 20))
	}
	if dev.err != nil {
		t.Errorf("meshd dev: %v", dev.err)
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
