package e2e_test

import (
	"encoding/base64"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/meshd/meshd/tests/canary"
)

// sweepMesh looks for the secrets of a mesh in all that its programs have left in the
// folders of their hosts: logs, state, snapshots, cores, and what they told Prometheus.
// An agent and its proxy keep the private keys of their own host, and programs know
// what such keys look like.
func sweepMesh(secrets []canary.Secret, folders ...string) ([]canary.Find, error) {
	inputs := canary.Inputs()
	inputs["mesh.token"] = "the token that Prometheus has"
	finds, _, err := canary.Mesh{
		Folders: folders, Inputs: inputs,
		Secrets: append(slices.Clone(secrets), canary.Secret{Name: "the operator's token", Value: []byte(adminToken)}),
		KeepsKeys: func(path string) bool {
			return slices.ContainsFunc([]string{"/agent/", "/proxy/", "/lib/mesh-proxy/", "/usr/local/bin/"}, func(part string) bool {
				return strings.Contains(path, part)
			})
		},
	}.Sweep()
	return finds, err
}

// mustBeClean fails the test if a secret is where none may be.
func mustBeClean(t *testing.T, secrets []canary.Secret, folders ...string) {
	t.Helper()
	finds, err := sweepMesh(secrets, folders...)
	if err != nil {
		t.Errorf("look for secrets: %v", err)
	}
	for i, f := range finds {
		if i < 10 {
			t.Errorf("a secret is where none may be: %s", f)
		}
	}
}

// folders are those of all tests that the network's hosts were made for.
func (n *network) folders() []string {
	all := map[string]bool{}
	for _, h := range n.hosts {
		all[filepath.Dir(filepath.Dir(h.Dir))] = true
	}
	return slices.Sorted(maps.Keys(all))
}

// sweepMachines looks into all machines before the first of them goes.
func (n *network) sweepMachines() {
	if n.sweptInside {
		return
	}
	n.sweptInside = true
	var inside []string
	for _, m := range n.machines {
		inside = append(inside, fmt.Sprintf("/proc/%d/root%s/own", m.pid, m.Dir))
	}
	mustBeClean(n.machines[0].T, n.secrets, inside...)
}

// keepMetrics writes what a program tells Prometheus into the host's folder when the
// test ends, for the sweep. It is the program's that was started last.
func (h *host) keepMetrics(p *process, curl ...string) {
	h.T.Helper()
	h.T.Cleanup(func() {
		if p.Running() {
			out := h.Path("metrics-" + filepath.Base(p.Log))
			if r := h.Run("curl", append([]string{"--silent", "--max-time", "2", "--output", out}, curl...)...); r.Code != 0 {
				h.T.Logf("%s tells no metrics any more: curl exit %d", p.Name, r.Code)
			}
		}
	})
}

// TestSweep plants each secret of a mesh where none may be, and wants the sweep that
// follows every test to find it.
func TestSweep(t *testing.T) {
	t.Parallel()
	s := newSpine(t)
	s.meshctl(0, "intention", "allow", "web", "api", "--wait")
	key := strings.TrimSpace(readFile(t, s.server.Path("cluster.key")))
	if len(s.net.secrets) < 2 {
		t.Fatalf("%d join tokens are known", len(s.net.secrets))
	}
	joined := string(s.net.secrets[0].Value)
	for i, row := range []struct{ name, content string }{
		{"web/agent.log", "level=INFO msg=joined token=" + joined},
		{"web/metrics-proxy.log", `mesh_requests_total{authorization="Bearer ` + adminToken + `"} 1`},
		{"web/core.17", "\x7fELF\x00\x00" + key},
		{"srv/data/snapshots/planted.snapshot", base64.StdEncoding.EncodeToString([]byte("?" + adminToken))},
		{"srv/traces.json", fmt.Sprintf("%x", key)},
		{"srv/data/planted.pem", "-----BEGIN EC PRIVATE KEY-----\n"},
	} {
		dir := t.TempDir()
		path := filepath.Join(dir, row.name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(row.content), 0o600); err != nil {
			t.Fatal(err)
		}
		finds, err := sweepMesh(s.net.secrets, s.net.folders()...)
		if err != nil {
			t.Fatal(err)
		}
		if len(finds) == 0 || !slices.ContainsFunc(finds, func(f canary.Find) bool { return f.Path == path }) {
			t.Errorf("%d: %s: %v", i, row.name, finds)
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
	mustBeClean(t, s.net.secrets, s.net.folders()...)
}
