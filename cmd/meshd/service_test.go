package main_test

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// output is what a process writes, which can be waited for.
type output struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.Write(b)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.String()
}

// waitFor waits until the process has written a text.
func (o *output) waitFor(t *testing.T, text string) {
	t.Helper()
	deadline, tick := time.After(20*time.Second), time.NewTicker(10*time.Millisecond)
	defer tick.Stop()
	for !strings.Contains(o.String(), text) {
		select {
		case <-deadline:
			t.Fatalf("no %q in\n%s", text, o)
		case <-tick.C:
		}
	}
}

// TestServiceManager runs a server as systemd does: it says when it is ready, that
// it lives, that it reads its file again, and what of it needs a restart.
func TestServiceManager(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	bin := filepath.Join(dir, "meshd")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", bin, ".").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram", Name: filepath.Join(dir, "notify")})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	heard := &output{}
	go func() {
		message := make([]byte, 4096)
		for {
			n, err := conn.Read(message)
			if err != nil {
				return // closed
			}
			_, _ = fmt.Fprintf(heard, "<%s>\n", message[:n]) // memory
		}
	}()
	file := filepath.Join(dir, "server.hcl")
	write := func(more string) {
		t.Helper()
		text := fmt.Sprintf("trust_domain = %q\ndata_dir = %q\nbind = \"127.0.0.1\"\nport = %d\npeer_port = %d\n%s",
			"mesh.example.com", filepath.Join(dir, "data"), freePort(t), freePort(t), more)
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("")
	logs := &output{}
	cmd := exec.CommandContext(t.Context(), bin, "server", "--config", file)
	cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+filepath.Join(dir, "notify"), "WATCHDOG_USEC=300000")
	cmd.Stderr = logs
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	heard.waitFor(t, "<READY=1\nSTATUS=")
	heard.waitFor(t, "<STATUS=serving>")
	heard.waitFor(t, "<WATCHDOG=1>")
	hangup := func() {
		t.Helper()
		if err := cmd.Process.Signal(syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
	}

	write("log_level = \"debug\"\nsnapshots {\n  retain = 3\n}\nca {\n  leaf_ttl = \"2h\"\n}\nname = \"another\"\nretry_join = [\"10.0.0.1\"]\ncluster_key_file = \"/k\"\n")
	hangup()
	logs.waitFor(t, `msg="the configuration was read again" changed="[retry_join snapshots.retain log_level]"`)
	logs.waitFor(t, `level=WARN msg="some changes need a restart" keys="`)
	for _, key := range []string{"name", "cluster_key_file", "ca.leaf_ttl", "port", "peer_port"} {
		if !strings.Contains(logs.String(), key) {
			t.Errorf("%s is not named", key)
		}
	}
	heard.waitFor(t, "<RELOADING=1\nMONOTONIC_USEC=")
	heard.waitFor(t, "<READY=1>")

	write("ca {\n  leaf_ttl = \"1s\"\n}\n")
	hangup()
	logs.waitFor(t, "nothing was changed")
	logs.waitFor(t, "server.hcl:7: ca.leaf_ttl")

	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("%v\n%s", err, logs)
	}
	heard.waitFor(t, "<STOPPING=1>")

	// A mistake in the file is an exit code of its own: no restart helps.
	err = exec.CommandContext(t.Context(), bin, "server", "--config", file).Run()
	if exit, ok := err.(*exec.ExitError); !ok || exit.ExitCode() != 2 { //nolint:errorlint // Run returns it as it is
		t.Errorf("a bad file: %v", err)
	}
}

func freePort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	addr, ok := l.Addr().(*net.TCPAddr)
	if !ok {
		t.Fatalf("%v is no TCP address", l.Addr())
	}
	return addr.Port
}
