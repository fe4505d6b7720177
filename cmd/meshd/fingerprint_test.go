package main_test

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/meshd/meshd/server"
	"github.com/meshd/meshd/server/client"
)

// TestFingerprint: what the command prints is what PinnedRoots takes.
func TestFingerprint(t *testing.T) {
	t.Parallel()
	dir, err := os.MkdirTemp("", "mshd") //nolint:usetesting // the socket's path must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	bin := filepath.Join(dir, "meshd")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", bin, ".").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	file := filepath.Join(dir, "server.hcl")
	data := filepath.Join(dir, "data")
	if err := os.WriteFile(file, fmt.Appendf(nil, "trust_domain = %q\ndata_dir = %q\n", "mesh.example.com", data), 0o600); err != nil {
		t.Fatal(err)
	}
	fingerprint := func() (string, error) {
		out, err := exec.CommandContext(t.Context(), bin, "server", "fingerprint", "--config", file).CombinedOutput()
		return strings.TrimSpace(string(out)), err
	}
	if text, err := fingerprint(); err == nil || !strings.Contains(text, "cannot be reached") {
		t.Errorf("without a server: %q, %v", text, err)
	}
	address := serve(t, data)
	text, err := fingerprint()
	if err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	pin, err := client.ParseFingerprint(strings.ToUpper(strings.TrimPrefix(text, "sha256:")))
	if err != nil {
		t.Fatal(err)
	}
	roots, err := client.PinnedRoots(t.Context(), address, pin)
	if err != nil || roots.Hash("mesh.example.com") != pin {
		t.Errorf("%v, %v", roots.TrustDomains(), err)
	}
	pin[0]++
	if _, err := client.PinnedRoots(t.Context(), address, pin); client.CodeOf(err) != client.CodeUnreachable {
		t.Errorf("of another mesh: %v", err)
	}
}

func serve(t *testing.T, data string) (address string) {
	t.Helper()
	listener, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s, err := server.New(server.Config{TrustDomain: "mesh.example.com", Name: "s1", DataDir: data, Listener: listener}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	select {
	case <-s.Started():
	case err := <-ended:
		ended <- err
		t.Fatal(err)
	}
	return s.Address()
}
