package e2e_test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/meshd/meshd/server/client"
)

// disaster is a cluster of three servers on loopback addresses of its own, whose
// machines are lost and recovered as docs/operations/disaster-recovery.md says.
type disaster struct {
	*testing.T
	dir     string
	running [3]*exec.Cmd
}

func (c *disaster) config(i int) string {
	return filepath.Join(c.dir, fmt.Sprintf("server-%d.hcl", i+1))
}

func (c *disaster) data(i int) string { return filepath.Join(c.dir, fmt.Sprintf("s%d", i+1)) }

func (c *disaster) start(i int) {
	c.Helper()
	log, err := os.OpenFile(c.data(i)+".log", os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		c.Fatal(err)
	}
	cmd := exec.Command(filepath.Join(bin, "meshd"), "server", "--config", c.config(i))
	cmd.Stderr = log
	if err := cmd.Start(); err != nil {
		c.Fatal(err)
	}
	c.running[i] = cmd
	c.Cleanup(func() { c.kill(i) })
}

func (c *disaster) kill(i int) {
	if cmd := c.running[i]; cmd != nil {
		_ = cmd.Process.Kill() // it may have ended
		_ = cmd.Wait()         // of a signal
		c.running[i] = nil
	}
}

// meshctl repeats a command on server i until it succeeds and its output has all of
// the texts.
func (c *disaster) meshctl(i int, command string, texts ...string) {
	c.Helper()
	ctx, cancel := context.WithTimeout(c.Context(), 60*time.Second)
	defer cancel()
	var out []byte
	var err error
	for tick := time.NewTicker(100 * time.Millisecond); ctx.Err() == nil; {
		if out, err = c.run(ctx, i, "meshctl", strings.Fields(command)...); err == nil {
			missing := false
			for _, text := range texts {
				missing = missing || !bytes.Contains(out, []byte(text))
			}
			if !missing {
				return
			}
		}
		<-tick.C
	}
	c.Fatalf("server %d: meshctl %s: %v, want %q in\n%s", i+1, command, err, texts, out)
}

// voters waits until server i counts n servers with a vote.
func (c *disaster) voters(i, n int) {
	c.Helper()
	ctx, cancel := context.WithTimeout(c.Context(), 60*time.Second)
	defer cancel()
	api, err := client.New(client.Config{Address: "unix://" + filepath.Join(c.data(i), "admin.sock")})
	if err != nil {
		c.Fatal(err)
	}
	want := fmt.Sprintf("\nmesh_server_raft_voters %d\n", n)
	var text []byte
	for tick := time.NewTicker(100 * time.Millisecond); ctx.Err() == nil; <-tick.C {
		if text, err = api.Metrics(ctx); err == nil && bytes.Contains(text, []byte(want)) {
			return
		}
	}
	c.Fatalf("server %d: %v, want%sin\n%s", i+1, err, want, text)
}

func (c *disaster) run(ctx context.Context, i int, program string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, filepath.Join(bin, program), args...)
	cmd.Env = append(os.Environ(), "MESH_ADDR=unix://"+filepath.Join(c.data(i), "admin.sock"))
	return cmd.CombinedOutput()
}

// TestQuorumLost: two of three machines are lost with their state. The third goes on
// alone after meshd server recover, with everything that was acknowledged, and two
// new machines join it.
func TestQuorumLost(t *testing.T) {
	t.Parallel()
	dir, err := os.MkdirTemp("", "lost") //nolint:usetesting // the sockets' paths must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	t.Cleanup(func() { mustBeClean(t, nil, dir) })
	c := &disaster{T: t, dir: dir}
	key := filepath.Join(dir, "cluster.key")
	if out, err := c.run(t.Context(), 0, "meshctl", "operator", "keygen", key); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for i := range c.running {
		text := fmt.Sprintf(`
			trust_domain     = "mesh.test"
			name             = "server-%d"
			data_dir         = %q
			cluster_key_file = %q
			bind             = "127.77.0.%d"
			bootstrap_expect = 3
			retry_join       = ["127.77.0.1", "127.77.0.2", "127.77.0.3"]
		`, i+1, c.data(i), key, i+1)
		if err := os.WriteFile(c.config(i), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for i := range c.running {
		c.start(i)
	}
	c.meshctl(1, "intention allow web api")
	c.meshctl(0, "get intention web api", "allow")
	c.meshctl(2, "get intention web api", "allow")

	c.kill(1)
	c.kill(2)
	for _, i := range []int{1, 2} {
		if err := os.RemoveAll(c.data(i)); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := c.run(t.Context(), 0, "meshd", "server", "recover", "--yes", "--config", c.config(0)); err == nil || !bytes.Contains(out, []byte("in use")) {
		t.Errorf("recover while the server runs: %v\n%s", err, out)
	}
	c.kill(0)
	out, err := c.run(t.Context(), 0, "meshd", "server", "recover", "--look", "--config", c.config(0))
	if err != nil || !bytes.Contains(out, []byte("server   server-1")) || !bytes.Contains(out, []byte("server-3.")) {
		t.Errorf("look: %v\n%s", err, out)
	}
	if out, err := c.run(t.Context(), 0, "meshd", "server", "recover", "--config", c.config(0)); err == nil || !bytes.Contains(out, []byte("nothing was changed")) {
		t.Errorf("recover without a confirmation: %v\n%s", err, out)
	}
	if out, err := c.run(t.Context(), 0, "meshd", "server", "recover", "--yes", "--config", c.config(0)); err != nil {
		t.Fatalf("recover: %v\n%s", err, out)
	}
	if out, err := c.run(t.Context(), 1, "meshd", "server", "recover", "--yes", "--config", c.config(1)); err == nil || !bytes.Contains(out, []byte("no state")) {
		t.Errorf("recover a machine that has none: %v\n%s", err, out)
	}

	c.start(0)
	c.meshctl(0, "get intention web api", "allow")
	c.meshctl(0, "intention allow web db")

	c.start(1)
	c.start(2)
	for i := range c.running {
		c.meshctl(i, "get intention web db", "allow")
	}
	c.voters(0, 3)
	c.meshctl(1, "operator raft list-peers", "server-1", "server-2", "server-3", "leader")
	// Three again: one may be lost.
	c.kill(0)
	c.meshctl(1, "intention allow web cache")
	c.meshctl(2, "get intention web api", "allow")
}
