package main_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/meshd/meshd/agent"
	"github.com/meshd/meshd/server"
	"github.com/meshd/meshd/server/client"
)

const canaryToken = "canary-admin-token-0123456789abcdef-0123456789"

// site is a server and an agent of one host, without a proxy.
type site struct {
	dir, adminSocket, agentSocket, joinToken string
}

// newSite runs both until the test ends, and waits until the host has its
// certificates.
func newSite(t *testing.T) *site {
	t.Helper()
	dir, err := os.MkdirTemp("", "mdb") //nolint:usetesting // the paths of the sockets must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	s := &site{dir: dir, adminSocket: filepath.Join(dir, "admin.sock"), agentSocket: filepath.Join(dir, "agent.sock")}
	s.write(t, "admin.token", canaryToken+"\n")
	s.write(t, "services.d/web.hcl", "service \"web\" {\n  check \"alive\" {\n    http   = \"http://127.0.0.1:1/\"\n    interval = \"1s\"\n    header = { authorization = [\"Bearer canary-of-a-check\"] }\n  }\n"+
		fmt.Sprintf("  upstream \"api\" { local_port = %d }\n}\n", freePort(t)))
	listener, err := loopback(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	srv, err := server.New(server.Config{
		TrustDomain: "mesh.example.com", Name: "s1", DataDir: filepath.Join(dir, "server"), AdminSocket: s.adminSocket,
		BootstrapTokenFile: filepath.Join(dir, "admin.token"), Listener: listener,
	}, log)
	if err != nil {
		t.Fatal(err)
	}
	s.background(t, srv.Run)
	<-srv.Started()
	api, err := client.New(client.Config{Address: "unix://" + s.adminSocket})
	if err != nil {
		t.Fatal(err)
	}
	token, err := api.JoinToken(t.Context(), client.JoinTokenRequest{Node: "vm-a", Services: []string{"web"}})
	if err != nil {
		t.Fatal(err)
	}
	s.joinToken = token.Token
	s.write(t, "join.token", s.joinToken)
	a, err := agent.New(agent.Config{
		Servers: []string{srv.Address()}, NodeName: "vm-a", Advertise: "127.0.0.1", DataDir: filepath.Join(dir, "agent"),
		ServicesDir: filepath.Join(dir, "services.d"), Socket: s.agentSocket, Join: agent.Join{TokenFile: filepath.Join(dir, "join.token")},
		Proxy:   agent.Proxy{Socket: filepath.Join(dir, "proxy.sock"), MeshAddress: "127.0.0.1", MeshPort: freePort(t), Metrics: "127.0.0.1:1"},
		Metrics: agent.Metrics{Address: "off"},
	}, log)
	if err != nil {
		t.Fatal(err)
	}
	s.background(t, a.Run)
	for i := 0; ; i++ {
		status, err := exec.Command(filepath.Join(bin, "meshctl"), "check", "--wait", "--timeout", "1s", "--agent-socket", s.agentSocket).CombinedOutput()
		if strings.Contains(string(status), "svc/web, ") {
			return s
		}
		if i == 20 {
			t.Fatalf("no certificate: %v\n%s", err, status)
		}
	}
}

func (s *site) background(t *testing.T, run func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

func (s *site) write(t *testing.T, name, content string) {
	t.Helper()
	path := filepath.Join(s.dir, name)
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, []byte(content), 0o600)); err != nil {
		t.Fatal(err)
	}
}

func freePort(t *testing.T) uint16 {
	t.Helper()
	l, err := loopback(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close() //nolint:errcheck // only its number is wanted
	addr, ok := l.Addr().(*net.TCPAddr)
	if !ok {
		t.Fatal(l.Addr())
	}
	return uint16(addr.Port)
}

// canaries are the secrets of the site, by what they are: each in every form in
// which it might leak.
func (s *site) canaries(t *testing.T) map[string][][]byte {
	t.Helper()
	secrets := map[string][]byte{"admin token": []byte(canaryToken), "join token": []byte(s.joinToken), "check header": []byte("canary-of-a-check")}
	keys := 0
	err := filepath.WalkDir(s.dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if d.Name() == "cluster.key" {
			secrets["cluster key"] = bytes.TrimSpace(data)
		}
		for rest := data; ; {
			var block *pem.Block
			if block, rest = pem.Decode(rest); block == nil {
				return nil
			}
			if block.Type != "PRIVATE KEY" {
				continue
			}
			keys++
			secrets[fmt.Sprintf("key %d of %s", keys, path)] = block.Bytes
			if parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes); err == nil {
				if key, ok := parsed.(*ecdsa.PrivateKey); ok {
					raw, err := key.Bytes()
					if err != nil {
						return err
					}
					secrets[fmt.Sprintf("scalar of key %d", keys)] = raw
				}
			}
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	if keys < 2 || secrets["cluster key"] == nil {
		t.Fatalf("%d keys found, cluster key %t: the test does not know where they are", keys, secrets["cluster key"] != nil)
	}
	out := map[string][][]byte{}
	for what, secret := range secrets {
		out[what] = [][]byte{
			secret, []byte(hex.EncodeToString(secret)), []byte(base64.StdEncoding.EncodeToString(secret)),
			[]byte(base64.RawStdEncoding.EncodeToString(secret)), []byte(base64.RawURLEncoding.EncodeToString(secret)),
		}
	}
	return out
}

// unpack returns the files of a bundle without the name of its folder; what is
// compressed in it is returned as it is when it is not.
func unpack(t *testing.T, packed []byte) map[string][]byte {
	t.Helper()
	zip, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{}
	for r := tar.NewReader(zip); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		var from io.Reader = r
		if strings.HasSuffix(h.Name, ".gz") {
			if from, err = gzip.NewReader(r); err != nil {
				t.Fatal(err)
			}
		}
		data, err := io.ReadAll(from)
		if err != nil {
			t.Fatal(err)
		}
		_, name, _ := strings.Cut(h.Name, "/")
		files[name] = data
	}
}

func TestDebugHoldsNoSecret(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	cmd := exec.Command(filepath.Join(bin, "meshctl"), "debug", "--out", "-", "--agent-socket", s.agentSocket)
	cmd.Env = append(os.Environ(), "MESH_ADDR=unix://"+s.adminSocket, "MESH_TOKEN="+canaryToken)
	packed, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v\n%s", err, stderrOf(err))
	}
	files := unpack(t, packed)
	for name, part := range map[string]string{
		"meshctl.json": `"version"`, "host/status.json": `"node":"vm-a"`, "host/config.json": `"data_dir":"` + s.dir, "host/plan.json": `{`,
		"host/view.json": `"kind":"roots"`, "host/metrics.txt": "mesh_agent_", "host/goroutines.txt": "goroutine ", "host/heap.pb.gz": "",
		"host/check.txt": "identity spiffe://mesh.example.com/ns/default/svc/web", "server/status.json": `"trust_domain": "mesh.example.com"`,
		"server/config.json": `"admin_socket":"` + s.dir, "server/nodes.json": `"vm-a"`, "server/history.json": "transactions",
		"server/roots.pem": "BEGIN CERTIFICATE", "server/metrics.txt": "mesh_server_", "server/goroutines.txt": "goroutine ", "server/heap.pb.gz": "",
		"server/check.txt": "node vm-a connected", "system/limits": "Max open files", "skipped.txt": "",
	} {
		if data, ok := files[name]; !ok || !bytes.Contains(data, []byte(part)) {
			t.Errorf("%s: there %t, no %q in it", name, ok, part)
		}
	}
	if text := string(files["host/check.txt"]); !strings.Contains(text, " ! web may not call its upstream api: no intention allows web to call api → meshctl explain web api\n") {
		t.Errorf("check says nothing of a denied upstream:\n%s", text)
	}
	for what, forms := range s.canaries(t) {
		for name, data := range files {
			if slices.ContainsFunc(forms, func(form []byte) bool { return bytes.Contains(data, form) }) {
				t.Errorf("%s is in %s", what, name)
			}
		}
	}
	for name, data := range files {
		if bytes.Contains(data, []byte("PRIVATE KEY")) {
			t.Errorf("a private key is in %s", name)
		}
	}
}

// TestDebugWithoutServer: on a host whose servers are dead a bundle is made all
// the same, to a file for its owner only.
func TestDebugWithoutServer(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	out := filepath.Join(t.TempDir(), "bundle.tar.gz")
	cmd := exec.Command(filepath.Join(bin, "meshctl"), "debug", "--out", out, "--agent-socket", s.agentSocket)
	cmd.Env = []string{"MESH_ADDR=unix://" + s.dir + "/none.sock", "HOME=" + s.dir}
	text, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	info, err := os.Stat(out)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	packed, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	files := unpack(t, packed)
	var st agent.Status
	if err := json.Unmarshal(files["host/status.json"], &st); err != nil || st.Node != "vm-a" || st.Started.After(time.Now()) {
		t.Errorf("%+v, %v", st, err)
	}
	if !strings.Contains(string(files["skipped.txt"]), "server: the server cannot be reached") {
		t.Errorf("skipped: %s", files["skipped.txt"])
	}
}

func stderrOf(err error) string {
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		return string(exit.Stderr)
	}
	return ""
}
