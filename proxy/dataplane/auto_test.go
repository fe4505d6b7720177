package dataplane_test

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/intentions"
	"github.com/meshd/meshd/proxy"
)

// greeting is like MySQL's, which speaks first: protocol 10, a version, and more.
const greeting = "J\x00\x00\x00\x0a8.0.36\x00stand-in"

// greet speaks first, then echoes.
func greet(c *net.TCPConn) {
	if _, err := io.WriteString(c, greeting); err == nil {
		echo(c)
	}
}

// wantGreeting reads it, and exchanges a few bytes after it.
func wantGreeting(t *testing.T, c net.Conn) {
	t.Helper()
	got := make([]byte, len(greeting))
	if _, err := io.ReadFull(c, got); err != nil || string(got) != greeting {
		t.Fatalf("the greeting is %q, %v", got, err)
	}
	if got := exchange(t, c, "\x03\x00\x00\x01"); got != "\x03\x00\x00\x01" {
		t.Fatalf("after the greeting it echoed %q", got)
	}
}

// request sends a request, whose bytes come one at a time if slowly, and returns the answer's status and body.
func request(t *testing.T, c net.Conn, slowly bool) (status int, body string) {
	t.Helper()
	text := "GET /v1/x HTTP/1.1\r\nHost: api\r\n\r\n"
	for slowly && len(text) > 20 {
		if _, err := io.WriteString(c, text[:1]); err != nil {
			t.Fatal(err)
		}
		text = text[1:]
	}
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatalf("read an answer: %v", err)
	}
	defer func() { _ = resp.Body.Close() }()
	all, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(all)
}

// detections are how often a host found each protocol.
func detections(h *host, protocol string) float64 {
	return h.metric("mesh_protocol_detections_total", "protocol", protocol)
}

func TestAutoHTTP(t *testing.T) {
	app := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, r.Header.Get("X-Forwarded-Client-Cert"))
	})
	rules := allow()
	rules.Action, rules.Rules = "", []intentions.Rule{{Action: intentions.Allow, PathPrefix: "/v1/"}}
	m := newMesh(t, options{protocol: catalog.ProtocolAuto, apps: []string{app}, intention: rules})
	for i, slowly := range []bool{false, true, false} {
		status, body := request(t, dial(t, m.upstream), slowly)
		if status != 200 || !strings.Contains(body, "/svc/web") {
			t.Fatalf("request %d: %d %q, want 200 and the caller's name", i, status, body)
		}
	}
	if n := detections(m.a, "http1"); n != 3 {
		t.Errorf("HTTP/1 was found %v times, want 3", n)
	}
	silent := dial(t, m.upstream) // the port is known to speak HTTP: this one may wait
	status, _ := request(t, silent, false)
	if status != 200 {
		t.Errorf("a late request got %d", status)
	}
}

// TestAutoOfManyKinds: whoever speaks first, and whatever it is, reaches the application as it is.
func TestAutoOfManyKinds(t *testing.T) {
	tests := map[string]struct {
		app   func(*net.TCPConn)
		use   func(*testing.T, net.Conn)
		found string
	}{
		"the server speaks first": {greet, func(t *testing.T, c net.Conn) { t.Helper(); wantGreeting(t, c) }, "server-first"},
		"a startup message": {echo, func(t *testing.T, c net.Conn) {
			t.Helper()
			if got := exchange(t, c, "\x00\x00\x00\x08\x04\xd2\x16\x2f"); len(got) != 8 {
				t.Errorf("echoed %q", got)
			}
		}, "tcp"},
		"like HTTP, but not": {echo, func(t *testing.T, c net.Conn) {
			t.Helper()
			if got := exchange(t, c, "GET key\r\n"); got != "GET key\r\n" {
				t.Errorf("echoed %q", got)
			}
		}, "tcp"},
		"a part of what may be HTTP, then nothing": {echo, func(t *testing.T, c net.Conn) {
			t.Helper()
			if got := exchange(t, c, "GE"); got != "GE" {
				t.Errorf("echoed %q", got)
			}
		}, "undecided"},
		"a part of what may be HTTP, then the end": {echo, func(t *testing.T, c net.Conn) {
			t.Helper()
			got, err := sendAll(c, "GE")
			if err != nil || got != "GE" {
				t.Errorf("echoed %q, %v", got, err)
			}
		}, "undecided"},
		"nothing but the end": {func(c *net.TCPConn) {
			if rest, err := io.ReadAll(c); err == nil && len(rest) == 0 {
				_, _ = io.WriteString(c, "seen")
			}
		}, func(t *testing.T, c net.Conn) {
			t.Helper()
			if got, err := sendAll(c, ""); err != nil || got != "seen" {
				t.Errorf("got %q, %v", got, err)
			}
		}, "undecided"},
		"TLS": {echo, func(t *testing.T, c net.Conn) {
			t.Helper()
			hello := helloFor(t, "db.example.com")
			if got := exchange(t, c, hello); got != hello {
				t.Errorf("the ClientHello arrived changed")
			}
		}, "tls"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			m := newMesh(t, options{protocol: catalog.ProtocolAuto, apps: []string{serveTCP(t, tt.app)}, intention: allow()})
			for range 2 { // the second one when the port is learnt
				c := dial(t, m.upstream)
				tt.use(t, c)
				_ = c.Close()
			}
			if n := detections(m.a, tt.found); n != 2 {
				t.Errorf("%s was found %v times, want 2", tt.found, n)
			}
			eventually(t, "all is over", func() bool {
				return m.a.metric("mesh_connections_open") == 0 && m.b.metric("mesh_connections_open") == 0
			})
		})
	}
}

// sendAll sends text and the end, and returns all that comes back.
func sendAll(c net.Conn, text string) (string, error) {
	if _, err := io.WriteString(c, text); err != nil {
		return "", err
	}
	half, ok := c.(*net.TCPConn)
	if !ok {
		return "", errors.ErrUnsupported
	}
	if err := half.CloseWrite(); err != nil {
		return "", err
	}
	got, err := io.ReadAll(c)
	return string(got), err
}

// helloFor returns what crypto/tls sends first.
func helloFor(t *testing.T, name string) string {
	t.Helper()
	near, far := net.Pipe()
	done := make(chan error, 1)
	go func() {
		done <- tls.Client(near, &tls.Config{ServerName: name, MinVersion: tls.VersionTLS12}).Handshake()
	}()
	head := make([]byte, 5)
	if _, err := io.ReadFull(far, head); err != nil {
		t.Fatal(err)
	}
	rest := make([]byte, int(head[3])<<8|int(head[4]))
	if _, err := io.ReadFull(far, rest); err != nil {
		t.Fatal(err)
	}
	_, _ = far.Close(), near.Close()
	if err := <-done; err == nil {
		t.Error("the handshake ended well")
	}
	return string(head) + string(rest)
}

// TestAutoTellsTheNameThatTLSAsksFor in the access log.
func TestAutoTellsTheNameThatTLSAsksFor(t *testing.T) {
	m := newMesh(t, options{protocol: catalog.ProtocolAuto, apps: []string{serveTCP(t, echo)}, intention: allow()})
	path := filepath.Join(t.TempDir(), "access.log")
	m.a.plan.AccessLog = path
	m.a.apply()
	c := dial(t, m.upstream)
	exchange(t, c, helloFor(t, "db.example.com"))
	_ = c.Close()
	eventually(t, "it is in the access log", func() bool {
		log, err := os.ReadFile(path)
		return err == nil && bytes.Contains(log, []byte(`"protocol":"tls","server_name":"db.example.com"`))
	})
}

// TestAutoLearnsAnew when the application behind a port becomes another one.
func TestAutoLearnsAnew(t *testing.T) {
	web := serveHTTP(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "web") })
	m := newMesh(t, options{protocol: catalog.ProtocolAuto, apps: []string{web}, intention: allow()})
	if status, body := request(t, dial(t, m.upstream), false); status != 200 || body != "web" {
		t.Fatalf("%d %q", status, body)
	}
	m.b.plan.Inbounds[0].Local = serveTCP(t, greet)
	m.b.apply()
	wantGreeting(t, dial(t, m.upstream)) // the client is silent where others spoke HTTP: it is asked whether that is still so
	started := time.Now()
	wantGreeting(t, dial(t, m.upstream))
	if took := time.Since(started); took > time.Second {
		t.Errorf("once it was known that the server speaks first, a connection took %s", took)
	}
	m.b.plan.Inbounds[0].Local = web
	m.b.apply()
	for range 2 {
		if status, body := request(t, dial(t, m.upstream), false); status != 200 || body != "web" {
			t.Fatalf("%d %q", status, body)
		}
	}
	if n := detections(m.a, "server-first"); n != 2 {
		t.Errorf("the server spoke first %v times, want 2", n)
	}
}

// TestAutoAnswersWhoSpeaksHTTP: denied, or without an instance, HTTP gets a reason; others are reset.
func TestAutoAnswersWhoSpeaksHTTP(t *testing.T) {
	m := newMesh(t, options{protocol: catalog.ProtocolAuto, apps: []string{"127.0.0.1:1"}, intention: allow()})
	endpoints := m.a.plan.Clusters[0].Endpoints
	for name, tt := range map[string]struct {
		change func(*proxy.Cluster)
		status int
		reason string
	}{
		"denied":      {func(c *proxy.Cluster) { c.Denied, c.Endpoints = "no intention allows web to call api", nil }, 403, "denied"},
		"no instance": {func(c *proxy.Cluster) { c.Denied, c.Endpoints = "", nil }, 503, "no-healthy-instance"},
		"not running": {func(c *proxy.Cluster) { c.Denied, c.Endpoints = "", endpoints }, 503, "connect-failed"},
	} {
		t.Run(name, func(t *testing.T) {
			tt.change(&m.a.plan.Clusters[0])
			m.a.apply()
			c := dial(t, m.upstream)
			if status, body := request(t, c, false); status != tt.status || !strings.HasPrefix(body, tt.reason) {
				t.Errorf("HTTP got %d %q, want %d %s", status, body, tt.status, tt.reason)
			}
			_ = c.Close()
			c = dial(t, m.upstream)
			if _, err := c.Write([]byte{0, 1, 2, 3}); err != nil {
				t.Fatal(err)
			}
			wantReset(t, c)
			wantRefused(t, m.upstream)
		})
	}
}

// TestAutoRefusesWhatRulesCanNotJudge: bytes that are not HTTP never get past HTTP rules.
func TestAutoRefusesWhatRulesCanNotJudge(t *testing.T) {
	rules := allow()
	rules.Action, rules.Rules = "", []intentions.Rule{{Action: intentions.Allow, PathPrefix: "/v1/"}}
	reached := make(chan struct{}, 16)
	app := serveTCP(t, func(c *net.TCPConn) { reached <- struct{}{}; greet(c) })
	m := newMesh(t, options{protocol: catalog.ProtocolAuto, apps: []string{app}, intention: rules})
	for _, first := range []string{"\x00\x00\x00\x08", "get key\r\n", "GE", ""} {
		c := dial(t, m.upstream)
		if _, err := io.WriteString(c, first); err != nil {
			t.Fatal(err)
		}
		wantReset(t, c)
	}
	if n := m.b.metric("mesh_connections_refused_total", "reason", "not-http"); n != 4 {
		t.Errorf("%v connections were refused as not HTTP, want 4", n)
	}
	if len(reached) > 0 {
		t.Error("the application was reached")
	}
}

// TestAutoDenyCutsWhoIsSilent: a connection on which nobody has spoken is cut like any other.
func TestAutoDenyCutsWhoIsSilent(t *testing.T) {
	m := newMesh(t, options{protocol: catalog.ProtocolAuto, apps: []string{serveTCP(t, echo)}, intention: allow()})
	c := dial(t, m.upstream)
	eventually(t, "the far side is open", func() bool { return m.b.metric("mesh_connections_open", "direction", "inbound") == 1 })
	m.a.plan.Clusters[0].Denied, m.a.plan.Clusters[0].Endpoints = "denied", nil
	if got := m.a.apply(); got.Closed != 1 {
		t.Errorf("Apply closed %d connections, want 1", got.Closed)
	}
	wantReset(t, c)
}

// BenchmarkServerFirst is how long a client waits for the greeting of a server that speaks first, once its port is known.
func BenchmarkServerFirst(b *testing.B) {
	for _, protocol := range []catalog.Protocol{catalog.ProtocolTCP, catalog.ProtocolAuto} {
		b.Run(string(protocol), func(b *testing.B) {
			m := newMesh(b, options{protocol: protocol, apps: []string{serveTCP(b, greet)}, intention: allow()})
			for b.Loop() {
				c, err := net.Dial("tcp", m.upstream)
				if err != nil {
					b.Fatal(err)
				}
				if _, err := io.ReadFull(c, make([]byte, len(greeting))); err != nil {
					b.Fatal(err)
				}
				_ = c.Close()
			}
		})
	}
}
