package agent_test

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/meshd/meshd/agent"
)

// TestSupervise runs a script in place of mesh-proxy: it is started with what
// mesh-proxy needs to know, started again when it dies, and ended with the
// agent.
func TestSupervise(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	log := filepath.Join(b.dir, "runs")
	b.write("proxy.sh", "#!/bin/sh\ntrap 'exit 0' TERM\necho \"$$ $*\" >> "+log+"\nwhile :; do sleep 0.05; done\n")
	b.cfg.Proxy.Supervise, b.cfg.Proxy.Binary = true, filepath.Join(b.dir, "proxy.sh")
	b.cfg.Proxy.StateDir = filepath.Join(b.dir, "proxy")
	if err := os.Chmod(b.cfg.Proxy.Binary, 0o700); err != nil {
		t.Fatal(err)
	}
	stop := b.start()
	run := func(n int) (pid int, args string) {
		t.Helper()
		ctx := b.deadline()
		for {
			data, err := os.ReadFile(log)
			if lines := strings.Split(strings.TrimSpace(string(data)), "\n"); err == nil && strings.HasSuffix(string(data), "\n") && len(lines) >= n {
				first, rest, _ := strings.Cut(lines[n-1], " ")
				if pid, err = strconv.Atoi(first); err != nil {
					t.Fatal(err)
				}
				return pid, rest
			}
			select {
			case <-time.After(10 * time.Millisecond):
			case <-ctx.Done():
				t.Fatalf("run %d never came: %q", n, data)
			}
		}
	}
	pid, args := run(1)
	want := "--feed " + b.cfg.Proxy.Socket + " --id p1 --state " + b.cfg.Proxy.StateDir + " --metrics " + agent.DefaultProxyMetrics + " --drain-timeout 8s --log-level ERROR"
	if args != want {
		t.Errorf("started with %q, want %q", args, want)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	pid, _ = run(2)
	stop()
	if err := syscall.Kill(pid, 0); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("the process outlived its agent: %v", err)
	}
}
