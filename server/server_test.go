package server_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server"
	"github.com/meshd/meshd/server/meshpb"
)

const trustDomain = "mesh.test"

// instance is a running server.
type instance struct {
	*server.Server
	dir  string
	logs *bytes.Buffer
	stop func()
}

// run starts a server in dir and waits until it serves or has failed.
func run(tb testing.TB, config server.Config) (*instance, error) {
	tb.Helper()
	config.Listener = listen(tb)
	if config.TrustDomain == "" {
		config.TrustDomain = trustDomain
	}
	config.Name, config.Advertise = "server-1", "127.0.0.1"
	logs := &bytes.Buffer{}
	s, err := server.New(config, slog.New(slog.NewTextHandler(logs, nil)))
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	select {
	case <-s.Started():
	case err := <-done:
		cancel()
		return nil, err
	}
	stopped := false
	i := &instance{Server: s, dir: config.DataDir, logs: logs}
	i.stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			tb.Errorf("Run: %v", err)
		}
	}
	tb.Cleanup(i.stop)
	return i, nil
}

func mustRun(tb testing.TB, config server.Config) *instance {
	tb.Helper()
	i, err := run(tb, config)
	if err != nil {
		tb.Fatal(err)
	}
	return i
}

func privateDir(tb testing.TB) string {
	tb.Helper()
	dir := filepath.Join(tb.TempDir(), "server")
	if err := os.Mkdir(dir, 0o700); err != nil {
		tb.Fatal(err)
	}
	return dir
}

// local returns a client of the admin socket.
func (i *instance) local() *http.Client {
	return &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", i.AdminSocket())
		},
	}}
}

// call does one request and decodes the answer.
func call(tb testing.TB, c *http.Client, method, url, token, body string, into any) int {
	tb.Helper()
	req, err := http.NewRequestWithContext(tb.Context(), method, url, strings.NewReader(body))
	if err != nil {
		tb.Fatal(err)
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	res, err := c.Do(req)
	if err != nil {
		tb.Fatal(err)
	}
	defer func() { _ = res.Body.Close() }()
	raw, err := io.ReadAll(res.Body)
	if err != nil {
		tb.Fatal(err)
	}
	if into != nil && res.StatusCode == http.StatusOK {
		if err := json.Unmarshal(raw, into); err != nil {
			tb.Fatalf("%s %s: %v in %s", method, url, err, raw)
		}
	}
	return res.StatusCode
}

func (i *instance) roots(tb testing.TB) ca.Bundle {
	tb.Helper()
	var bundle ca.Bundle
	if code := call(tb, i.local(), http.MethodGet, "http://x/v1/ca/roots", "", "", &bundle); code != http.StatusOK {
		tb.Fatalf("roots: status %d", code)
	}
	return bundle
}

// https returns a client that trusts the server as curl --cacert would.
func (i *instance) https(tb testing.TB) *http.Client {
	tb.Helper()
	config := ca.ClientConfig(ca.ClientOptions{
		Bundle: func() ca.Bundle { return i.roots(tb) }, Accept: ca.ExpectKind(trustDomain, spiffe.KindServer),
		ALPN: []string{"h2", "http/1.1"},
	})
	return &http.Client{Transport: &http.Transport{TLSClientConfig: config, ForceAttemptHTTP2: true, DisableKeepAlives: true}}
}

func (i *instance) join(tb testing.TB, node string, secret []byte) (*ca.Leaf, error) {
	tb.Helper()
	config := ca.PinnedConfig(i.roots(tb).Hash(trustDomain), meshpb.ServerName, []string{"h2"})
	conn, err := grpc.NewClient("passthrough:///"+i.Address(), grpc.WithTransportCredentials(credentials.NewTLS(config)))
	if err != nil {
		tb.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	key, err := ca.GenerateKey()
	if err != nil {
		tb.Fatal(err)
	}
	csr, err := ca.NewCSR(key)
	if err != nil {
		tb.Fatal(err)
	}
	res, err := meshpb.NewMeshClient(conn).Join(tb.Context(), &meshpb.JoinRequest{Secret: secret, Csr: csr, Node: node})
	if err != nil {
		return nil, err
	}
	chain, err := ca.ParseChain(res.GetChain())
	if err != nil {
		tb.Fatal(err)
	}
	leaf, err := ca.NewLeaf(chain, key)
	if err != nil {
		tb.Fatal(err)
	}
	return leaf, nil
}

func (i *instance) mesh(tb testing.TB, leaf *ca.Leaf) meshpb.MeshClient {
	tb.Helper()
	config := ca.ClientConfig(ca.ClientOptions{
		Leaf:   func() (*tls.Certificate, error) { return leaf.TLS(), nil },
		Bundle: func() ca.Bundle { return i.roots(tb) }, Accept: ca.ExpectKind(trustDomain, spiffe.KindServer),
		ServerName: meshpb.ServerName, ALPN: []string{"h2"},
	})
	conn, err := grpc.NewClient("passthrough:///"+i.Address(), grpc.WithTransportCredentials(credentials.NewTLS(config)))
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = conn.Close() })
	return meshpb.NewMeshClient(conn)
}

func adminToken(tb testing.TB, dir string) string {
	tb.Helper()
	raw, err := os.ReadFile(filepath.Join(dir, "admin.token"))
	if err != nil {
		tb.Fatal(err)
	}
	return strings.TrimSpace(string(raw))
}

// joinToken asks the API for a join token and returns its secret.
func (i *instance) joinToken(tb testing.TB, node, services string) []byte {
	tb.Helper()
	var made struct {
		Token string `json:"token"`
	}
	body := fmt.Sprintf(`{"node":%q,"services":[%s]}`, node, services)
	if code := call(tb, i.local(), http.MethodPost, "http://x/v1/join-tokens", "", body, &made); code != http.StatusOK {
		tb.Fatalf("join token: status %d", code)
	}
	token, err := ca.ParseJoinToken(made.Token)
	if err != nil {
		tb.Fatal(err)
	}
	return token.Secret.Reveal()
}

func TestServerFromFirstStartToRestart(t *testing.T) {
	t.Parallel()
	dir := privateDir(t)
	first := mustRun(t, server.Config{DataDir: dir})
	token := adminToken(t, dir)
	base := "https://" + first.Address()
	for _, row := range []struct {
		name, method, url, token string
		client                   *http.Client
		want                     int
	}{
		{"health needs nothing", http.MethodGet, base + "/v1/healthz", "", first.https(t), 200},
		{"status needs a token", http.MethodGet, base + "/v1/status", "", first.https(t), 401},
		{"a wrong token", http.MethodGet, base + "/v1/status", "mesht_wrong", first.https(t), 401},
		{"the admin token", http.MethodGet, base + "/v1/status", token, first.https(t), 200},
		{"the admin socket", http.MethodGet, "http://x/v1/status", "", first.local(), 200},
	} {
		if got := call(t, row.client, row.method, row.url, row.token, "", nil); got != row.want {
			t.Errorf("%s: status %d, want %d", row.name, got, row.want)
		}
	}
	bundle := first.roots(t)
	leaf, err := first.join(t, "vm-a", first.joinToken(t, "vm-a", `"web"`))
	if err != nil {
		t.Fatal(err)
	}
	register(t, first.mesh(t, leaf))
	first.stop()

	second := mustRun(t, server.Config{DataDir: dir})
	if !second.roots(t).Equal(bundle) {
		t.Error("the CA is another one after a restart")
	}
	if got := call(t, second.https(t), http.MethodGet, "https://"+second.Address()+"/v1/status", token, "", nil); got != 200 {
		t.Errorf("the admin token after a restart: status %d", got)
	}
	register(t, second.mesh(t, leaf)) // the node's certificate is as good as before
	if strings.Contains(first.logs.String()+second.logs.String(), token) {
		t.Error("the admin token is in the log")
	}
	found := ""
	err = filepath.WalkDir(filepath.Join(dir, "store"), func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		raw, err := os.ReadFile(path)
		if bytes.Contains(raw, []byte(token)) {
			found = path
		}
		return err
	})
	if err != nil || found != "" {
		t.Errorf("the admin token is stored in %q, %v", found, err)
	}
}

func register(tb testing.TB, mesh meshpb.MeshClient) {
	tb.Helper()
	definition := catalog.Definition{Name: "web", Port: 8080, Protocol: catalog.ProtocolHTTP}
	parts := make([][]byte, 0, 3)
	for _, v := range []any{definition.Service(), definition.Instance("vm-a", "127.0.0.1:7443"), catalog.InstanceStatus{Health: catalog.HealthPassing}} {
		raw, err := json.Marshal(v)
		if err != nil {
			tb.Fatal(err)
		}
		parts = append(parts, raw)
	}
	res, err := mesh.Register(tb.Context(), &meshpb.RegisterRequest{
		Registrations: []*meshpb.Registration{{Service: parts[0], Instance: parts[1], Status: parts[2]}},
	})
	if err != nil {
		tb.Fatal(err)
	}
	for _, r := range res.GetRefusals() {
		tb.Errorf("refused: %v", r)
	}
}

func TestServerCertificate(t *testing.T) {
	t.Parallel()
	s := mustRun(t, server.Config{DataDir: privateDir(t)})
	roots := s.roots(t)
	for _, row := range []struct {
		name   string
		sni    string
		alpn   []string
		want   string
		refuse bool
	}{
		{name: "http/1.1", sni: "localhost", alpn: []string{"http/1.1"}, want: "http/1.1"},
		{name: "http/2", sni: "localhost", alpn: []string{"h2", "http/1.1"}, want: "h2"},
		{name: "no protocol", sni: "localhost", want: ""},
		{name: "gRPC", sni: meshpb.ServerName, alpn: []string{"h2"}, want: "h2"},
		{name: "unknown protocol", sni: "localhost", alpn: []string{"smtp"}, refuse: true},
	} {
		config := ca.ClientConfig(ca.ClientOptions{
			Bundle: func() ca.Bundle { return roots }, Accept: ca.Expect(spiffe.Server(trustDomain, "server-1")), ServerName: row.sni, ALPN: row.alpn,
		})
		conn, err := tls.Dial("tcp", s.Address(), config)
		if (err != nil) != row.refuse {
			t.Errorf("%s: %v", row.name, err)
			continue
		}
		if err != nil {
			continue
		}
		cs := conn.ConnectionState()
		if cs.NegotiatedProtocol != row.want {
			t.Errorf("%s: protocol %q", row.name, cs.NegotiatedProtocol)
		}
		for _, host := range []string{"localhost", "127.0.0.1", "server-1"} {
			if err := cs.PeerCertificates[0].VerifyHostname(host); err != nil {
				t.Errorf("%s: %v", row.name, err)
			}
		}
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
	}
	plain, err := net.Dial("tcp", s.Address())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := plain.Write([]byte("GET /v1/healthz HTTP/1.1\r\nHost: x\r\n\r\n")); err != nil {
		t.Fatal(err)
	}
	answer, _ := io.ReadAll(plain)
	if bytes.Contains(answer, []byte("200")) {
		t.Errorf("plaintext was answered: %q", answer)
	}
	if err := plain.Close(); err != nil {
		t.Error(err)
	}
}

func TestServerRefusesToStart(t *testing.T) {
	t.Parallel()
	used := privateDir(t)
	mustRun(t, server.Config{DataDir: used}).stop()
	wide := privateDir(t)
	if err := os.Chmod(wide, 0o750); err != nil {
		t.Fatal(err)
	}
	file := func(content string, mode os.FileMode) string {
		path := filepath.Join(t.TempDir(), "file")
		if err := os.WriteFile(path, []byte(content), mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	otherKey := filepath.Join(t.TempDir(), "key")
	if err := ca.WriteClusterKey(otherKey, ca.GenerateClusterKey()); err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct {
		name   string
		config server.Config
		is     error
		says   string
	}{
		{"another trust domain", server.Config{DataDir: used, TrustDomain: "other.test"}, server.ErrTrustDomain, `"mesh.test"`},
		{"an open directory", server.Config{DataDir: wide}, server.ErrMode, "chmod 0700"},
		{"another cluster key", server.Config{DataDir: used, ClusterKeyFile: otherKey}, nil, "cluster_key_file"},
		{"no cluster key", server.Config{DataDir: privateDir(t), ClusterKeyFile: "/nonexistent/key"}, os.ErrNotExist, "keygen"},
		{"a short token", server.Config{DataDir: privateDir(t), BootstrapTokenFile: file("secret", 0o600)}, nil, "easy to guess"},
		{"an open token file", server.Config{DataDir: privateDir(t), BootstrapTokenFile: file(strings.Repeat("x", 40), 0o644)}, server.ErrMode, "chmod 0600"},
		{"no token file", server.Config{DataDir: privateDir(t), BootstrapTokenFile: "/nonexistent/token"}, os.ErrNotExist, "first admin token"},
	} {
		_, err := run(t, row.config)
		if err == nil || row.is != nil && !errors.Is(err, row.is) || !strings.Contains(err.Error(), row.says) {
			t.Errorf("%s: %v", row.name, err)
		}
	}
}

func TestBootstrapToken(t *testing.T) {
	t.Parallel()
	secret := strings.Repeat("0123456789abcdef", 4)
	path := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(path, []byte(secret+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	dir := privateDir(t)
	first := mustRun(t, server.Config{DataDir: dir, BootstrapTokenFile: path})
	if got := call(t, first.https(t), http.MethodGet, "https://"+first.Address()+"/v1/status", secret, "", nil); got != 200 {
		t.Errorf("status %d", got)
	}
	first.stop()
	// It is read once: later the file may be gone, and another one changes nothing.
	if err := os.WriteFile(path, []byte(strings.Repeat("z", 64)), 0o600); err != nil {
		t.Fatal(err)
	}
	second := mustRun(t, server.Config{DataDir: dir, BootstrapTokenFile: path})
	if got := call(t, second.https(t), http.MethodGet, "https://"+second.Address()+"/v1/status", strings.Repeat("z", 64), "", nil); got != 401 {
		t.Errorf("a later token file was taken: status %d", got)
	}
	second.stop()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	mustRun(t, server.Config{DataDir: dir, BootstrapTokenFile: path}).stop()
}

// The admin socket takes this process's user and root, whatever the file's mode says.
func TestAdminSocketPeer(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("only root can act as another user")
	}
	s := mustRun(t, server.Config{DataDir: privateDir(t), AdminSocket: filepath.Join(t.TempDir(), "admin.sock")})
	if info, err := os.Stat(s.AdminSocket()); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	const nobody = 65534
	answer := make(chan string, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread, and its user, end with the goroutine
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			answer <- err.Error()
			return
		}
		defer func() { _ = unix.Close(fd) }()
		// With root's rights over files, so that only the check of the peer is left.
		if _, _, errno := unix.RawSyscall(unix.SYS_PRCTL, unix.PR_SET_SECUREBITS, 1<<2, 0); errno != 0 {
			answer <- errno.Error()
			return
		}
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, nobody, nobody, nobody); errno != 0 {
			answer <- errno.Error()
			return
		}
		if err := unix.Connect(fd, &unix.SockaddrUnix{Name: s.AdminSocket()}); err != nil {
			answer <- err.Error()
			return
		}
		_, _ = unix.Write(fd, []byte("GET /v1/status HTTP/1.0\r\n\r\n"))
		buffer := make([]byte, 4096)
		n, err := unix.Read(fd, buffer)
		answer <- fmt.Sprint(string(buffer[:max(n, 0)]), err)
	}()
	if got := <-answer; strings.Contains(got, "HTTP/1") || got == "permission denied" {
		t.Errorf("a foreign user got %q, want a closed connection", got)
	}
	if code := call(t, s.local(), http.MethodGet, "http://x/v1/status", "", "", nil); code != 200 {
		t.Errorf("root: status %d", code)
	}
}

// A snapshot goes back to the cluster that it is of, and to no other.
func TestSnapshotRestore(t *testing.T) {
	t.Parallel()
	ours := mustRun(t, server.Config{DataDir: privateDir(t)})
	leaf, err := ours.join(t, "vm-a", ours.joinToken(t, "vm-a", `"web"`))
	if err != nil {
		t.Fatal(err)
	}
	snapshot := ours.snapshot(t)
	other := mustRun(t, server.Config{DataDir: privateDir(t), TrustDomain: "other.test"})
	twin := mustRun(t, server.Config{DataDir: privateDir(t)})
	roots := other.roots(t)
	for name, row := range map[string]struct {
		to   *instance
		body string
		want bool
	}{
		"another cluster": {other, snapshot, false},
		"another key":     {twin, snapshot, false},
		"cut off":         {ours, snapshot[:len(snapshot)-10], false},
		"garbage":         {ours, "snapshot", false},
		"its own":         {ours, snapshot, true},
	} {
		code := call(t, row.to.local(), http.MethodPut, "http://x/v1/snapshot", "", row.body, nil)
		if (code == http.StatusOK) != row.want {
			t.Errorf("%s: status %d", name, code)
		}
	}
	if !other.roots(t).Equal(roots) {
		t.Error("the other cluster has another CA now")
	}
	register(t, ours.mesh(t, leaf)) // the node is as good as before
}

func (i *instance) snapshot(tb testing.TB) string {
	tb.Helper()
	req, err := http.NewRequestWithContext(tb.Context(), http.MethodGet, "http://x/v1/snapshot", nil)
	if err != nil {
		tb.Fatal(err)
	}
	res, err := i.local().Do(req)
	if err != nil {
		tb.Fatal(err)
	}
	defer func() { _ = res.Body.Close() }()
	raw, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != http.StatusOK {
		tb.Fatalf("status %d, %v", res.StatusCode, err)
	}
	return string(raw)
}
