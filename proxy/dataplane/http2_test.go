package dataplane_test

import (
	"crypto/tls"
	"crypto/x509"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/intentions"
	"github.com/meshd/meshd/proxy/dataplane"
)

// protocols are the versions of HTTP of a net/http client or server, in plain text.
func protocols(two bool) *http.Protocols {
	p := &http.Protocols{}
	p.SetHTTP1(!two)
	p.SetUnencryptedHTTP2(two)
	return p
}

// serveHTTP2 runs an application that speaks nothing but HTTP/2, in plain text.
func serveHTTP2(tb testing.TB, handle http.HandlerFunc) string {
	tb.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	srv := &http.Server{Handler: handle, Protocols: protocols(true)}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = srv.Serve(l)
	}()
	tb.Cleanup(func() {
		_ = srv.Close()
		<-done
	})
	return l.Addr().String()
}

// clientOf returns an HTTP client of one version.
func clientOf(tb testing.TB, two bool) *http.Client {
	tb.Helper()
	transport := &http.Transport{DisableCompression: true, Protocols: protocols(two)}
	tb.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: 20 * time.Second}
}

// tells answers with what reached it.
func tells(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	w.Header().Set("Trailer", "X-Sum")
	_, _ = io.WriteString(w, r.Proto+" "+r.URL.Path+" "+string(body)+" "+r.Header.Get("X-Forwarded-Client-Cert"))
	w.Header().Set("X-Sum", "42")
}

// TestVersionsOfHTTP: the application is spoken to as it is declared, whatever its caller speaks.
func TestVersionsOfHTTP(t *testing.T) {
	tests := map[string]struct {
		protocol catalog.Protocol
		upgrade  bool
		two      bool // the client speaks HTTP/2
		want     string
	}{
		"http, called by HTTP/1":       {catalog.ProtocolHTTP, false, false, "HTTP/1.1"},
		"http, called by HTTP/2":       {catalog.ProtocolHTTP, false, true, "HTTP/1.1"},
		"upgraded, called by HTTP/1":   {catalog.ProtocolHTTP, true, false, "HTTP/1.1"},
		"upgraded, called by HTTP/2":   {catalog.ProtocolHTTP, true, true, "HTTP/1.1"},
		"http2, called by HTTP/1":      {catalog.ProtocolHTTP2, false, false, "HTTP/2.0"},
		"http2, called by HTTP/2":      {catalog.ProtocolHTTP2, false, true, "HTTP/2.0"},
		"grpc, called by HTTP/2":       {catalog.ProtocolGRPC, false, true, "HTTP/2.0"},
		"undeclared, called by HTTP/1": {catalog.ProtocolAuto, false, false, "HTTP/1.1"},
		"undeclared, called by HTTP/2": {catalog.ProtocolAuto, false, true, "HTTP/2.0"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			rules := allow()
			rules.Action, rules.Rules = "", []intentions.Rule{{Action: intentions.Allow, PathPrefix: "/v1/"}}
			app := serveHTTP(t, tells)
			if tt.want == "HTTP/2.0" {
				app = serveHTTP2(t, tells)
			}
			m := newMesh(t, options{protocol: tt.protocol, apps: []string{app}, intention: rules})
			m.a.plan.Clusters[0].Upgrade = tt.upgrade
			m.a.apply()
			c := clientOf(t, tt.two)
			for range 3 {
				got := get(t, c, http.MethodPost, "http://"+m.upstream+"/v1/x", "body")
				want := tt.want + " /v1/x body By=spiffe://mesh.example.com/ns/default/svc/api;URI=spiffe://mesh.example.com/ns/default/svc/web"
				if got.status != 200 || got.body != want {
					t.Fatalf("%d %q, want %q", got.status, got.body, want)
				}
			}
			if got := get(t, c, http.MethodPost, "http://"+m.upstream+"/admin", "body"); got.status != 403 || got.header.Get("Mesh-Error") != "denied" {
				t.Errorf("what no rule allows got %d, %v", got.status, got.header)
			}
			if n := m.b.metric("mesh_requests_total", "class", "2xx"); n != 3 {
				t.Errorf("%v requests were counted, want 3", n)
			}
		})
	}
}

// TestUpgradeSharesConnections: requests of HTTP/1, each on a connection of its own, share one between the proxies.
func TestUpgradeSharesConnections(t *testing.T) {
	const n = 20
	var arrived sync.WaitGroup
	arrived.Add(n)
	app := serveHTTP(t, func(http.ResponseWriter, *http.Request) {
		arrived.Done()
		arrived.Wait()
	})
	m := newMesh(t, options{protocol: catalog.ProtocolHTTP, apps: []string{app}, intention: allow()})
	m.a.plan.Clusters[0].Upgrade = true
	m.a.apply()
	var all sync.WaitGroup
	for range n {
		c := clientOf(t, false)
		all.Go(func() {
			if got := get(t, c, http.MethodGet, "http://"+m.upstream+"/", ""); got.status != 200 {
				t.Errorf("got %d", got.status)
			}
		})
	}
	arrived.Wait()
	if open := m.b.metric("mesh_connections_open", "direction", "inbound"); open != 1 {
		t.Errorf("%v connections between the proxies, want 1", open)
	}
	all.Wait()
}

// TestDenyCutsOneStream: of two streams on one connection, only the one that the new policy denies is cut.
func TestDenyCutsOneStream(t *testing.T) {
	release := make(chan struct{})
	app := serveHTTP2(t, func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusOK)
		_ = http.NewResponseController(w).Flush()
		select {
		case <-release:
			_, _ = io.WriteString(w, "whole")
		case <-r.Context().Done():
		}
	})
	m := newMesh(t, options{protocol: catalog.ProtocolHTTP2, apps: []string{app}, intention: allow()})
	c := clientOf(t, true)
	begin := func(path string) io.Reader {
		t.Helper()
		resp, err := c.Get("http://" + m.upstream + path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = resp.Body.Close() })
		return resp.Body
	}
	keeps, loses := begin("/v1/x"), begin("/admin")
	rules := allow()
	rules.Action, rules.Rules = "", []intentions.Rule{{Action: intentions.Allow, PathPrefix: "/v1/"}}
	m.intend(rules)
	if got := m.b.apply(); got.Closed != 1 {
		t.Errorf("Apply says that %d were cut, want 1", got.Closed)
	}
	if _, err := io.ReadAll(loses); err == nil {
		t.Error("the stream that is denied now ended well")
	}
	close(release)
	if body, err := io.ReadAll(keeps); err != nil || string(body) != "whole" {
		t.Errorf("the other stream got %q, %v", body, err)
	}
	if n := m.b.metric("mesh_connections_cut_total"); n != 0 {
		t.Errorf("%v connections were cut", n)
	}
	eventually(t, "it is counted", func() bool {
		return m.b.metric("mesh_request_failures_total", "reason", "policy-changed") == 1
	})
}

// TestManyStreams on one connection count each, against limits too.
func TestManyStreams(t *testing.T) {
	const n = 50
	var arrived sync.WaitGroup
	arrived.Add(n)
	release := make(chan struct{})
	app := serveHTTP2(t, func(http.ResponseWriter, *http.Request) {
		arrived.Done()
		<-release
	})
	m := newMesh(t, options{protocol: catalog.ProtocolHTTP2, apps: []string{app}, intention: allow()})
	m.a.plan.Clusters[0].Limits = catalog.Limits{Connections: 1, Requests: n}
	m.a.apply()
	c := clientOf(t, true)
	var all sync.WaitGroup
	for range n {
		all.Go(func() {
			if got := get(t, c, http.MethodGet, "http://"+m.upstream+"/", ""); got.status != 200 {
				t.Errorf("got %d", got.status)
			}
		})
	}
	arrived.Wait()
	if got := get(t, c, http.MethodGet, "http://"+m.upstream+"/", ""); got.status != 503 || !strings.HasPrefix(got.body, "overload") {
		t.Errorf("one too many got %d %q", got.status, got.body)
	}
	close(release)
	all.Wait()
	if got := m.b.metric("mesh_requests_total", "class", "2xx"); got != n {
		t.Errorf("%v requests were counted, want %d", got, n)
	}
}

// TestHTTP2Drain: GOAWAY, and what runs is answered.
func TestHTTP2Drain(t *testing.T) {
	started, release := make(chan struct{}), make(chan struct{})
	app := serveHTTP2(t, func(http.ResponseWriter, *http.Request) {
		close(started)
		<-release
	})
	m := newMesh(t, options{protocol: catalog.ProtocolHTTP2, apps: []string{app}, intention: allow()})
	c := clientOf(t, true)
	status := make(chan int, 1)
	go func() { status <- get(t, c, http.MethodGet, "http://"+m.upstream+"/", "").status }()
	<-started
	drained := make(chan dataplane.Drained, 1)
	go func() { drained <- m.a.plane.Drain(t.Context(), soon(t, 0)) }()
	eventually(t, "nothing is accepted any more", func() bool {
		listeners, err := m.a.plane.Listeners()
		return err == nil && len(listeners) == 0
	})
	close(release)
	if got := <-status; got != 200 {
		t.Errorf("the request under way got %d", got)
	}
	if got := <-drained; got.Cut != 0 {
		t.Errorf("drained %+v", got)
	}
}

// olderProxy is the mesh port of a proxy that knows no HTTP/2: it agrees on http/1.1, which it answers itself, or on mesh-tcp, whose
// bytes it carries to app.
func olderProxy(t *testing.T, m *mesh, app string) string {
	t.Helper()
	leaf := m.ca.leaf(t, service("api"), time.Hour)
	roots := x509.NewCertPool()
	roots.AddCert(m.ca.root)
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{
		Certificates: []tls.Certificate{*leaf.TLS()}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: roots,
		NextProtos: []string{"http/1.1", "mesh-tcp"}, MinVersion: tls.VersionTLS13,
	})
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	all.Go(func() {
		for {
			nc, err := l.Accept()
			if err != nil {
				return
			}
			all.Go(func() { carryOld(t, nc, app) })
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		m.a.stop()
		all.Wait()
	})
	return l.Addr().String()
}

// carryOld carries the bytes of a connection, of whatever protocol.
func carryOld(t *testing.T, nc net.Conn, app string) {
	t.Helper()
	defer func() { _ = nc.Close() }()
	c, ok := nc.(*tls.Conn)
	if !ok || c.HandshakeContext(t.Context()) != nil {
		return
	}
	up, err := net.Dial("tcp", app)
	if err != nil {
		return
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = io.Copy(up, c)
		_ = up.Close()
	}()
	_, _ = io.Copy(c, up)
	_ = c.Close()
	<-done
}

// TestOlderDestination: towards a proxy that knows no HTTP/2, requests go the way that it knows, and HTTP/2 as bytes.
func TestOlderDestination(t *testing.T) {
	tests := map[string]struct {
		protocol catalog.Protocol
		upgrade  bool
		two      bool
		want     string
	}{
		"http":                         {catalog.ProtocolHTTP, false, false, "HTTP/1.1"},
		"upgraded, called by HTTP/1":   {catalog.ProtocolHTTP, true, false, "HTTP/1.1"},
		"upgraded, called by HTTP/2":   {catalog.ProtocolHTTP, true, true, "HTTP/1.1"},
		"http2":                        {catalog.ProtocolHTTP2, false, true, "HTTP/2.0"},
		"undeclared, called by HTTP/1": {catalog.ProtocolAuto, false, false, "HTTP/1.1"},
		"undeclared, called by HTTP/2": {catalog.ProtocolAuto, false, true, "HTTP/2.0"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			app := serveHTTP(t, tells)
			if tt.want == "HTTP/2.0" {
				app = serveHTTP2(t, tells)
			}
			m := newMesh(t, options{protocol: tt.protocol, apps: []string{app}, intention: allow()})
			m.a.plan.Clusters[0].Upgrade = tt.upgrade
			m.a.plan.Clusters[0].Endpoints[0].Address = olderProxy(t, m, app)
			m.a.apply()
			c := clientOf(t, tt.two)
			for range 3 {
				if got := get(t, c, http.MethodPost, "http://"+m.upstream+"/v1/x", "body"); got.status != 200 || !strings.HasPrefix(got.body, tt.want+" /v1/x body") {
					t.Fatalf("%d %q, want %s", got.status, got.body, tt.want)
				}
			}
			// The proxy there is replaced by a newer one.
			m.a.plan.Clusters[0].Endpoints[0].Address = m.port
			m.a.apply()
			if got := get(t, c, http.MethodPost, "http://"+m.upstream+"/v1/x", "body"); got.status != 200 || !strings.HasPrefix(got.body, tt.want+" /v1/x body") {
				t.Errorf("from a newer proxy: %d %q, want %s", got.status, got.body, tt.want)
			}
		})
	}
}

// TestOlderCaller: one that calls HTTP/2 mesh-tcp is judged by its requests all the same.
func TestOlderCaller(t *testing.T) {
	rules := allow()
	rules.Action, rules.Rules = "", []intentions.Rule{{Action: intentions.Allow, PathPrefix: "/v1/"}}
	m := newMesh(t, options{protocol: catalog.ProtocolGRPC, apps: []string{serveHTTP2(t, tells)}, intention: rules})
	leaf := m.ca.leaf(t, service("web"), time.Hour)
	config := &tls.Config{
		Certificates: []tls.Certificate{*leaf.TLS()}, InsecureSkipVerify: true,
		ServerName: m.b.plan.Inbounds[0].ServerName, NextProtos: []string{"mesh-tcp"}, MinVersion: tls.VersionTLS13,
	}
	near := serveTCP(t, func(c *net.TCPConn) {
		up, err := tls.Dial("tcp", m.port, config)
		if err != nil {
			return
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			_, _ = io.Copy(up, c)
			_ = up.Close()
		}()
		_, _ = io.Copy(c, up)
		_ = c.Close()
		<-done
	})
	c := clientOf(t, true)
	if got := get(t, c, http.MethodPost, "http://"+near+"/v1/x", "body"); got.status != 200 || !strings.HasSuffix(got.body, "/svc/web") {
		t.Errorf("what a rule allows got %d %q", got.status, got.body)
	}
	if got := get(t, c, http.MethodPost, "http://"+near+"/admin", "body"); got.status != 403 {
		t.Errorf("what no rule allows got %d", got.status)
	}
	c.CloseIdleConnections()
}

// TestDeclaredHTTPTakesNothingElse on its way to an application of HTTP/2 either.
func TestDeclaredHTTPTakesNothingElse(t *testing.T) {
	m := newMesh(t, options{protocol: catalog.ProtocolGRPC, apps: []string{serveHTTP2(t, tells)}, intention: allow()})
	c := dial(t, m.upstream)
	if _, err := io.WriteString(c, "EHLO client\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	answer, err := io.ReadAll(c)
	if goAway := "\x00\x00\x00\x01the connection does not begin with the preface of HTTP/2"; err != nil || !strings.HasSuffix(string(answer), goAway) {
		t.Errorf("it got %q, %v, want a GOAWAY with PROTOCOL_ERROR", answer, err)
	}
}
