package e2e_test

import (
	"bufio"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

const webDefinition = `service "web" {
  upstream "api" { local_port = 9191 }
  upstream "echo" { local_port = 9192 }
}
`

const apiDefinition = `service "api" {
  port     = 8080
  protocol = "http"
  check "alive" {
    http     = "http://127.0.0.1:8080/healthz"
    interval = "1s"
    timeout  = "500ms"
  }
}
service "echo" {
  port     = 8070
  protocol = "tcp"
}
`

// spine is the thinnest mesh: web on one host calls api and echo on another.
type spine struct {
	*cluster
	web, api *member
}

func newSpine(t *testing.T) *spine {
	t.Helper()
	s := &spine{cluster: newCluster(t)}
	s.web, s.api = s.join("vm-a", "web"), s.join("vm-b", "api,echo")
	s.serve()
	return s
}

// serve starts the applications and waits until the mesh knows of them.
func (s *spine) serve() {
	s.t.Helper()
	s.api.nginx(8080, "api")
	serveEcho(s.api.Listen("127.0.0.1:8070"))
	s.web.define("web.hcl", webDefinition)
	s.api.define("api.hcl", apiDefinition)
	// The first answer is the mesh's own: it is up, and nothing is allowed.
	s.web.answers(20*time.Second, "403", "http://127.0.0.1:9191/hello")
	eventually(s.t, 10*time.Second, "api and echo are healthy", func() string {
		r := s.meshctl(0, "services", "-o", "csv")
		if strings.Contains(r.Stdout, "\napi,default:http,1,1,0\n") && strings.Contains(r.Stdout, "\necho,default:tcp,1,1,0\n") {
			return ""
		}
		return r.Stdout
	})
}

// serveEcho answers every connection with what it sends, half-close included.
func serveEcho(l net.Listener) {
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close() //nolint:errcheck // the far side is gone anyway
				_, _ = io.Copy(c, c)
			}()
		}
	}()
}

// allowed waits until api and echo are open to web.
func (s *spine) allowed() {
	s.t.Helper()
	s.meshctl(0, "intention", "allow", "web", "api", "--wait")
	s.meshctl(0, "intention", "allow", "web", "echo", "--wait")
	s.web.answers(15*time.Second, "200", "http://127.0.0.1:9191/hello")
}

func TestDeniedThenAllowed(t *testing.T) {
	t.Parallel()
	s := newSpine(t)
	stop := s.net.capture(t, s.server)

	status, headers, body := s.web.curl("http://127.0.0.1:9191/secret-path-1")
	if status != "403" || headers["mesh-error"] != "denied" || len(headers["mesh-error-id"]) != 6 {
		t.Fatalf("without an intention: %s %v %s", status, headers, body)
	}
	r := s.meshctl(3, "explain", "web", "api", "GET", "/secret-path-1")
	if !strings.Contains(r.Stdout, "DENIED by policy") || !strings.Contains(r.Stdout, "meshctl intention allow web api") {
		t.Errorf("explain: %s", r.Stdout)
	}
	start := time.Now()
	w := s.meshctl(0, "intention", "allow", "web", "api", "--wait")
	s.web.answers(time.Second, "200", "http://127.0.0.1:9191/secret-path-2")
	t.Logf("allow → 200 in %s, of which --wait: %s", time.Since(start).Round(time.Millisecond), strings.TrimSpace(w.Stderr))
	if took := time.Since(start); took > time.Second+200*time.Millisecond {
		t.Errorf("allow took %s to arrive, want at most 1 s", took)
	}
	status, _, body = s.web.curl("-H", "x-forwarded-client-cert: By=forged", "http://127.0.0.1:9191/secret-path-3?q=%2e")
	want := "instance=api uri=/secret-path-3?q=%2e xfcc=By=spiffe://mesh.example.com/ns/default/svc/api;URI=spiffe://mesh.example.com/ns/default/svc/web\n"
	if status != "200" || body != want {
		t.Errorf("allowed: %s %q, want %q", status, body, want)
	}
	if seen := stop(); strings.Contains(seen, "secret-path") || strings.Contains(seen, "HTTP/1.1") || strings.Contains(seen, "instance=api") {
		t.Error("the capture on the bridge shows plaintext")
	} else if !strings.Contains(seen, s.api.addrBytes()) {
		t.Errorf("the capture of %d bytes shows no packet of %s: it proves nothing", len(seen), s.api.Address)
	}
	if r := s.meshctl(0, "explain", "web", "api", "GET", "/x"); !strings.Contains(r.Stdout, "ALLOWED") {
		t.Errorf("explain: %s", r.Stdout)
	}
	for _, m := range []*member{s.web, s.api} {
		if r := m.checkLocal(); r.Code != 0 {
			t.Errorf("meshctl check on %s: exit %d\n%s%s", m.Name, r.Code, r.Stdout, r.Stderr)
		}
	}
	if r := s.meshctl(0, "intention", "allow", "web", "api"); !strings.Contains(r.Stdout, "unchanged") {
		t.Errorf("the same again: %s", r.Stdout)
	}
}

// addrBytes is the host's address as packets carry it.
func (h *host) addrBytes() string { return string(net.ParseIP(h.Address).To4()) }

func TestHTTPRules(t *testing.T) {
	t.Parallel()
	s := newSpine(t)
	s.meshctl(0, "intention", "allow", "web", "api", "--http", "GET /pub/*")
	const base = "http://127.0.0.1:9191"
	s.web.answers(5*time.Second, "200", base+"/pub/x")
	for _, c := range []struct{ method, path, status, says string }{
		{"GET", "/pub/x", "200", "uri=/pub/x "},
		{"GET", "/pub/a/../x", "200", "uri=/pub/x "},
		{"POST", "/pub/x", "403", "denied"},
		{"GET", "/pub/../admin", "403", "denied"},
		{"GET", "/pub/%2e%2e/admin", "403", "denied"},
		{"GET", "/pub/%2E%2e/admin", "403", "denied"},
		{"GET", "/pub/..%2fadmin", "400", "bad-request"},
		{"GET", "/pub/..;x/admin", "400", "bad-request"},
		{"GET", `/pub/..\admin`, "400", "bad-request"},
		{"GET", "//admin", "403", "denied"},
		{"GET", "/pub", "403", "denied"},
	} {
		status, headers, body := s.web.curl("-X", c.method, base+c.path)
		if status != c.status || !strings.Contains(body+headers["mesh-error"], c.says) {
			t.Errorf("%s %s: %s %q %s, want %s and %q", c.method, c.path, status, headers["mesh-error"], body, c.status, c.says)
		}
	}
	if r := s.meshctl(7, "intention", "allow", "web", "api", "--http", "POST /pub/*"); !strings.Contains(r.Stderr, "--add") {
		t.Errorf("a second rule without --add: %s", r.Stderr)
	}
	s.meshctl(0, "intention", "allow", "web", "api", "--http", "POST /pub/*", "--add", "--wait")
	s.web.answers(time.Second, "200", "-X", "POST", base+"/pub/x")
}

func TestDenyCutsLiveConnections(t *testing.T) {
	t.Parallel()
	s := newSpine(t)
	s.allowed()
	stream := s.web.connect("127.0.0.1:9192")
	exchange(t, stream, "before")
	idle := s.web.connect("127.0.0.1:9191")
	request := "GET /hello HTTP/1.1\r\nHost: api\r\n\r\n"
	reader := bufio.NewReader(idle)
	if _, err := io.WriteString(idle, request); err != nil {
		t.Fatal(err)
	}
	if line, err := reader.ReadString('\n'); err != nil || !strings.Contains(line, "200") {
		t.Fatalf("keep-alive connection: %q %v", line, err)
	}
	start := time.Now()
	r := s.meshctl(0, "intention", "deny", "web", "echo", "--replace", "--wait")
	t.Logf("deny: %s", strings.TrimSpace(r.Stderr))
	s.meshctl(0, "intention", "deny", "web", "api", "--replace")
	if err := stream.SetReadDeadline(start.Add(2 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if n, err := stream.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the TCP stream is open 2 s after the deny: %d bytes, %v", n, err)
	}
	t.Logf("the TCP stream was cut %s after the deny", time.Since(start).Round(time.Millisecond))
	// The keep-alive connection is closed, or answers what comes with 403.
	s.web.answers(2*time.Second, "403", "http://127.0.0.1:9191/hello")
	if err := idle.SetDeadline(time.Now().Add(2 * time.Second)); err != nil {
		t.Fatal(err)
	}
	_, _ = io.WriteString(idle, request) // may fail already: the connection is cut
	rest, err := io.ReadAll(reader)
	if strings.Contains(string(rest[min(len(rest), 200):]), " 200 ") || errors.Is(err, os.ErrDeadlineExceeded) && !strings.Contains(string(rest), " 403 ") {
		t.Errorf("the keep-alive connection after the deny: %q, %v", rest, err)
	}
}

// connect opens a connection from the host.
func (h *host) connect(addr string) net.Conn {
	h.T.Helper()
	c, err := h.Dial(addr)
	if err != nil {
		h.T.Fatalf("%s to %s: %v", h.Name, addr, err)
	}
	h.T.Cleanup(func() { _ = c.Close() })
	return c
}

// exchange sends a text to an echo service and reads it back.
func exchange(t *testing.T, c net.Conn, text string) {
	t.Helper()
	if err := c.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(text))
	if _, err := io.ReadFull(c, got); err != nil || string(got) != text {
		t.Fatalf("echo: %q, %v, want %q", got, err, text)
	}
	if err := c.SetDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}
}

func TestHalfClose(t *testing.T) {
	t.Parallel()
	s := newSpine(t)
	s.allowed()
	c := s.web.connect("127.0.0.1:9192")
	text := strings.Repeat("half-close ", 100_000)
	go func() {
		_, _ = io.WriteString(c, text)
		if tc, ok := c.(*net.TCPConn); ok {
			_ = tc.CloseWrite()
		}
	}()
	if err := c.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(c); err != nil || string(got) != text {
		t.Errorf("after the half-close came %d of %d bytes, %v", len(got), len(text), err)
	}
}

func TestMeshPortRefusesStrangers(t *testing.T) {
	t.Parallel()
	s := newSpine(t)
	s.allowed()
	mesh := s.api.Address + ":7443"
	serverName := "default.api.api.default.mesh"

	plain := s.web.connect(mesh)
	if err := plain.SetDeadline(time.Now().Add(7 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(plain, "GET /hello HTTP/1.1\r\nHost: api\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(plain); strings.Contains(string(got), "HTTP/1.1") || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("plaintext on the mesh port: %q, %v", got, err)
	}
	leafOf := func(id string) *tls.Certificate { return foreignLeaf(t, id) }
	for _, c := range []struct {
		name string
		cert *tls.Certificate
	}{
		{"no certificate", nil},
		{"a foreign trust domain", leafOf("spiffe://other.example/ns/default/svc/web")},
		{"a foreign CA that mints our ID", leafOf("spiffe://mesh.example.com/ns/default/svc/web")},
		{"a foreign CA that mints the destination's ID", leafOf("spiffe://mesh.example.com/ns/default/svc/api")},
	} {
		cfg := &tls.Config{InsecureSkipVerify: true, ServerName: serverName, NextProtos: []string{"http/1.1"}, MinVersion: tls.VersionTLS13}
		if c.cert != nil {
			cfg.Certificates = []tls.Certificate{*c.cert}
		}
		raw := s.web.connect(mesh)
		conn := tls.Client(raw, cfg)
		if err := conn.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
			t.Fatal(err)
		}
		_, _ = io.WriteString(conn, "GET /hello HTTP/1.1\r\nHost: api\r\n\r\n")
		got, err := io.ReadAll(conn)
		if len(got) != 0 || err == nil {
			t.Errorf("%s: %q, %v; want a refused handshake", c.name, got, err)
		}
	}
	s.web.answers(time.Second, "200", "http://127.0.0.1:9191/hello")
}

// foreignLeaf is a well-formed leaf for an identity from a CA of no trust.
func foreignLeaf(t *testing.T, id string) *tls.Certificate {
	t.Helper()
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	caCert := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "foreign"}, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	u, err := url.Parse(id)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(2), NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour), URIs: []*url.URL{u},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, leaf, caCert, &key.PublicKey, caKey)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// TestNodeCannotBecomeAnotherService: root on vm-a has all that vm-a has, and
// is still not api.
func TestNodeCannotBecomeAnotherService(t *testing.T) {
	t.Parallel()
	s := newSpine(t)
	s.allowed()
	s.web.nginx(8090, "thief")
	s.web.define("thief.hcl", "service \"api\" {\n  port     = 8090\n  protocol = \"http\"\n}\n")
	eventually(t, 5*time.Second, "the agent says why api is refused", func() string {
		text := tail(s.web.agent.Log, 50)
		if strings.Contains(text, "vm-a may not run default/api") || strings.Contains(text, "may not register default/api") || strings.Contains(text, "may not run") {
			return ""
		}
		return "it says: " + text
	})
	if r := s.meshctl(0, "instances", "api", "-o", "json"); strings.Contains(r.Stdout, `"vm-a"`) {
		t.Errorf("vm-a is an instance of api: %s", r.Stdout)
	}
	for range 20 {
		if status, _, body := s.web.curl("http://127.0.0.1:9191/hello"); status != "200" || strings.Contains(body, "thief") {
			t.Fatalf("traffic of api: %s %s", status, body)
		}
	}
	// No leaf of api ever reaches the host.
	err := filepath.WalkDir(s.web.Dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() || strings.Contains(path, "services.d") || strings.HasSuffix(path, ".log") {
			return err
		}
		data, err := os.ReadFile(path)
		if err == nil && strings.Contains(string(data), "BEGIN CERTIFICATE") && strings.Contains(path, "leaf") && strings.Contains(path, "api") {
			t.Errorf("%s looks like a leaf of api", path)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestJoinTokenWorksOnce(t *testing.T) {
	t.Parallel()
	s := newSpine(t)
	token := s.token("vm-c", "web")
	first := s.prepare("vm-c")
	first.Write(token, 0o600, "join.token")
	first.startAgent()
	eventually(t, 10*time.Second, "vm-c is a node", func() string {
		if r := s.meshctl(0, "get", "nodes"); !strings.Contains(r.Stdout, "vm-c  connected") {
			return r.Stdout + tail(first.agent.Log, 5)
		}
		return ""
	})
	if fileExists(first.Path("join.token")) {
		t.Error("the token file is still there after the join")
	}
	second := s.prepare("vm-d")
	second.agentConfig = second.Write(strings.ReplaceAll(readFile(t, second.agentConfig), `"vm-d"`, `"vm-c"`), 0o600, "agent.hcl")
	second.Write(token, 0o600, "join.token")
	second.startAgent()
	eventually(t, 10*time.Second, "the second use is refused with its cause", func() string {
		if text := tail(second.agent.Log, 20); !strings.Contains(text, "used") {
			return "it says: " + text
		}
		return ""
	})
}

func readFile(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// TestInstancesOfOneHost: each request reaches the instance that the caller
// picked, though all share address, port and identity.
func TestInstancesOfOneHost(t *testing.T) {
	t.Parallel()
	s := newSpine(t)
	s.api.nginx(8081, "api-2")
	s.api.nginx(8082, "api-3")
	s.api.define("more.hcl", `service "api" {
  id       = "api-2"
  port     = 8081
  protocol = "http"
}
service "api" {
  id       = "api-3"
  port     = 8082
  protocol = "http"
}
`)
	s.allowed()
	seen := map[string]int{}
	eventually(t, 15*time.Second, "all three instances answer", func() string {
		_, _, body := s.web.curl("http://127.0.0.1:9191/count")
		name, _, _ := strings.Cut(strings.TrimPrefix(body, "instance="), " ")
		seen[name]++
		if seen["api"] < 5 || seen["api-2"] < 5 || seen["api-3"] < 5 {
			return fmt.Sprint(seen)
		}
		return ""
	})
	t.Logf("requests per instance: %v", seen)
	// The proxy's own account of whom it picked must be what nginx counted.
	for port, name := range map[int]string{8080: "api", 8081: "api-2", 8082: "api-3"} {
		log := readFile(t, s.api.Path(fmt.Sprintf("nginx-%d.access.log", port)))
		if got := strings.Count(log, "GET /count "); got != seen[name] {
			t.Errorf("%s has %d requests in its log, the callers saw %d of it", name, got, seen[name])
		}
	}
}

func TestProxyDrainsOnSIGTERM(t *testing.T) {
	t.Parallel()
	s := newSpine(t)
	s.allowed()
	c := s.web.connect("127.0.0.1:9192")
	exchange(t, c, "before")
	s.api.proxy.Kill(syscall.SIGTERM)
	exchange(t, c, "while it drains")
	_ = c.Close()
	select {
	case <-s.api.proxy.Done():
	case <-time.After(10 * time.Second):
		t.Fatalf("mesh-proxy has not ended 10 s after its last connection did:\n%s", tail(s.api.proxy.Log, 20))
	}
	if s.api.proxy.Err() != nil {
		t.Errorf("mesh-proxy: %v", s.api.proxy.Err())
	}
}

// TestNodeIsEvictedAndComesBack: a deleted node is refused at once, and a new
// token is all that it takes to come back.
func TestNodeIsEvictedAndComesBack(t *testing.T) {
	t.Parallel()
	s := newSpine(t)
	s.allowed()
	s.meshctl(0, "delete", "node", "vm-b")
	eventually(t, 5*time.Second, "the instances of vm-b are gone", func() string {
		if r := s.meshctl(0, "get", "instances", "-o", "csv"); strings.Contains(r.Stdout, "vm-b") {
			return r.Stdout
		}
		return ""
	})
	s.web.answers(5*time.Second, "503", hello)
	eventually(t, 10*time.Second, "its agent says why", func() string {
		r := s.api.checkLocal()
		if r.Code == 3 && strings.Contains(r.Stdout, "token") {
			return ""
		}
		return fmt.Sprintf("exit %d: %s%s", r.Code, r.Stdout, r.Stderr)
	})
	s.api.Write(s.token("vm-b", "api,echo"), 0o600, "join.token")
	took := s.web.answers(15*time.Second, "200", hello)
	t.Logf("back %s after the token", took.Round(time.Millisecond))
}

// TestLostSYN: every second SYN towards vm-b is lost. The kernel repeats one after
// a second, which is all that a connection may take, so the proxy must not wait
// for that.
func TestLostSYN(t *testing.T) {
	t.Parallel()
	s := newSpine(t)
	s.allowed()
	for _, rule := range [][]string{
		{"add", "table", "inet", "loss"},
		{"add", "chain", "inet", "loss", "in", "{ type filter hook input priority 0; }"},
		{"add", "rule", "inet", "loss", "in", "tcp dport 7443 tcp flags & (syn | ack) == syn numgen inc mod 2 == 0 counter drop"},
	} {
		if r := s.api.Run("nft", rule...); r.Code != 0 {
			t.Fatalf("nft %v: %s", rule, r.Stderr)
		}
	}
	for i := range 10 {
		start := time.Now()
		c := s.web.connect("127.0.0.1:9192")
		exchange(t, c, fmt.Sprintf("connection %d", i))
		if took := time.Since(start); took > 900*time.Millisecond {
			t.Errorf("connection %d took %s", i, took)
		}
		_ = c.Close()
	}
	if r := s.api.Run("nft", "list", "table", "inet", "loss"); strings.Contains(r.Stdout, "packets 0 ") {
		t.Errorf("no SYN was lost, so this proves nothing: %s", r.Stdout)
	}
}
