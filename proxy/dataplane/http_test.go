package dataplane_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/intentions"
	"github.com/meshd/meshd/proxy"
	"github.com/meshd/meshd/proxy/dataplane"
)

// serveHTTP runs an application.
func serveHTTP(tb testing.TB, handle http.HandlerFunc) string {
	tb.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	srv := &http.Server{Handler: handle}
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

// client returns an HTTP client of its own, without environment proxies.
func client(tb testing.TB) *http.Client {
	tb.Helper()
	transport := &http.Transport{DisableCompression: true}
	tb.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: 20 * time.Second}
}

type answer struct {
	status int
	body   string
	header http.Header
}

func get(tb testing.TB, c *http.Client, method, url, body string) answer {
	tb.Helper()
	req, err := http.NewRequestWithContext(tb.Context(), method, url, strings.NewReader(body))
	if err != nil {
		tb.Fatal(err)
	}
	req.Header.Set("X-Forwarded-Client-Cert", "URI=spiffe://mesh.example.com/ns/default/svc/admin")
	res, err := c.Do(req)
	if err != nil {
		tb.Fatalf("%s %s: %v", method, url, err)
	}
	defer func() { _ = res.Body.Close() }()
	data, err := io.ReadAll(res.Body)
	if err != nil {
		tb.Fatalf("%s %s: body: %v", method, url, err)
	}
	return answer{res.StatusCode, string(data), res.Header}
}

func TestHTTPAllowed(t *testing.T) {
	app := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		_, _ = fmt.Fprintf(w, "%s %s %s %v", r.Method, r.URL, body, r.Header["X-Forwarded-Client-Cert"])
	})
	m := newMesh(t, options{protocol: catalog.ProtocolHTTP, apps: []string{app}, intention: allow()})
	c := client(t)
	for range 3 {
		got := get(t, c, "POST", "http://"+m.upstream+"/a/b?c=d", "body")
		if got.status != 200 || !strings.HasPrefix(got.body, "POST /a/b?c=d body [") {
			t.Fatalf("got %d %q", got.status, got.body)
		}
		if strings.Contains(got.body, "svc/admin") || !strings.Contains(got.body, "URI=spiffe://mesh.example.com/ns/default/svc/web") {
			t.Errorf("the application was shown %q as its caller", got.body)
		}
	}
	for _, h := range []*host{m.a, m.b} {
		eventually(t, "3 requests are counted", func() bool {
			return h.metric("mesh_requests_total", "source", "default/web", "destination", "default/api", "class", "2xx") == 3 &&
				h.metric("mesh_request_duration_seconds") == 3
		})
	}
	if n := m.b.metric("mesh_connections_open", "direction", "inbound"); n != 1 {
		t.Errorf("%v connections carry the requests, want 1 that is kept", n)
	}
}

func TestHTTPRulesAreAskedPerRequest(t *testing.T) {
	var reached atomic.Int64
	app := serveHTTP(t, func(http.ResponseWriter, *http.Request) { reached.Add(1) })
	i := allow()
	i.Action, i.Rules = "", []intentions.Rule{
		{Action: intentions.Deny, PathPrefix: "/pub/secret/"},
		{Action: intentions.Allow, Methods: []string{"GET"}, PathPrefix: "/pub/"},
		{Action: intentions.Allow, Path: "/team", Headers: []intentions.HeaderMatch{{Name: "x-team", Exact: "batch"}}},
	}
	m := newMesh(t, options{protocol: catalog.ProtocolHTTP, apps: []string{app}, intention: i})
	tests := []struct {
		line, header string
		status       int
		allowed      bool
	}{
		{"GET /pub/x", "", 200, true},
		{"GET /pub/secret/x", "", 403, false},
		{"POST /pub/x", "", 403, false},
		{"GET /pub/../admin", "", 403, false},
		{"GET /pub/%2e%2e/admin", "", 403, false},
		{"GET /pub/a%2fb", "", 400, false},
		{"GET /team", "X-Team: batch\r\n", 200, true},
		{"GET /team", "X-Team: batch\r\nX-Team: other\r\n", 403, false},
		{"GET /team", "", 403, false},
	}
	for _, tt := range tests {
		t.Run(tt.line, func(t *testing.T) {
			before := reached.Load()
			res := raw(t, m.upstream, tt.line+" HTTP/1.1\r\nHost: api\r\n"+tt.header+"\r\n")
			_ = res.Body.Close()
			if res.StatusCode != tt.status {
				t.Errorf("status %d, want %d", res.StatusCode, tt.status)
			}
			if tt.status == 403 && (res.Header.Get("mesh-error") != "denied" || res.Header.Get("mesh-error-id") == "") {
				t.Errorf("a denied response has %v", res.Header)
			}
			if got := reached.Load() > before; got != tt.allowed {
				t.Errorf("reached the application: %v, want %v", got, tt.allowed)
			}
		})
	}
}

// raw sends bytes as they are and reads one response.
func raw(tb testing.TB, address, request string) *http.Response {
	tb.Helper()
	c := dial(tb, address)
	if _, err := io.WriteString(c, request); err != nil {
		tb.Fatal(err)
	}
	res, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		tb.Fatalf("%q: %v", request, err)
	}
	return res
}

func TestHTTPDeniedClusterSaysDenied(t *testing.T) {
	m := newMesh(t, options{protocol: catalog.ProtocolHTTP, apps: []string{"127.0.0.1:1"}, intention: allow()})
	m.a.plan.Clusters[0].Denied, m.a.plan.Clusters[0].Endpoints = "no intention allows web to call api", nil
	m.a.apply()
	got := get(t, client(t), "GET", "http://"+m.upstream+"/", "")
	if got.status != 403 || got.header.Get("mesh-error") != "denied" {
		t.Errorf("got %d %v", got.status, got.header)
	}
}

func TestAListenerMayLeadElsewhere(t *testing.T) {
	answer := func(text string) string {
		return serveHTTP(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, text) })
	}
	m := newMesh(t, options{protocol: catalog.ProtocolHTTP, apps: []string{answer("api")}, intention: allow()})
	c := client(t)
	if got := get(t, c, "GET", "http://"+m.upstream+"/", ""); got.body != "api" {
		t.Fatalf("got %q", got.body)
	}
	// db is on the same host; the same connection of the application must lead there from now on.
	sni := proxy.ServerName("main", "db", "db", catalog.DefaultNamespace)
	m.b.plan.Inbounds = append(m.b.plan.Inbounds, proxy.Inbound{
		ServerName: sni, Service: service("db"), Instance: "db", Port: "main", Protocol: catalog.ProtocolHTTP, Local: answer("db"),
	})
	m.b.plan.Policies = append(m.b.plan.Policies, proxy.Policy{
		Service:    catalog.Name{Namespace: catalog.DefaultNamespace, Name: "db"},
		Intentions: []intentions.Intention{{Source: "web", Destination: "db", Action: intentions.Allow}},
	})
	m.b.keys = append(m.b.keys, m.ca.leaf(t, service("db"), time.Hour))
	m.b.apply()
	m.a.plan.Clusters = append(m.a.plan.Clusters, proxy.Cluster{
		Name: "default/db:main", Service: service("db"), Port: "main", Protocol: catalog.ProtocolHTTP,
		Endpoints: []proxy.Endpoint{{Instance: "db", Node: "vm-b", Address: m.port, ServerName: sni}},
	})
	m.a.plan.Listeners[0].Cluster = "default/db:main"
	m.a.apply()
	if got := get(t, c, "GET", "http://"+m.upstream+"/", ""); got.body != "db" {
		t.Errorf("got %q", got.body)
	}
	eventually(t, "the request is counted for db", func() bool {
		return m.a.metric("mesh_requests_total", "destination", "default/db") == 1 &&
			m.a.metric("mesh_requests_total", "destination", "default/api") == 1
	})
}

// TestDeadApplication has an instance whose proxy answers and whose application is gone: another one is asked, whatever the
// method, as long as no body is gone.
func TestDeadApplication(t *testing.T) {
	m := newMesh(t, options{protocol: catalog.ProtocolHTTP, apps: []string{"127.0.0.1:1", serveHTTP(t, ok)}, intention: allow()})
	c := client(t)
	for i := range 40 {
		method := []string{"GET", "POST", "DELETE"}[i%3]
		if got := get(t, c, method, "http://"+m.upstream+"/", ""); got.status != 200 {
			t.Fatalf("%s %d: got %d %v", method, i, got.status, got.header)
		}
	}
	if n := m.a.metric("mesh_endpoint_ejected"); n != 1 {
		t.Errorf("%v endpoints are ejected, want the one whose application is gone", n)
	}
}

// TestApplicationsDoNotSpeakForTheMesh has one that says what only its proxy may: it is told to nobody, and nobody acts on it.
func TestApplicationsDoNotSpeakForTheMesh(t *testing.T) {
	var asked atomic.Int32
	app := serveHTTP(t, func(w http.ResponseWriter, _ *http.Request) {
		asked.Add(1)
		w.Header().Set("mesh-error", "connect-failed")
		w.Header().Set("Mesh-Error-Id", "123456")
		w.Header().Set("X-Kept", "yes")
		w.WriteHeader(http.StatusServiceUnavailable)
	})
	m := newMesh(t, options{protocol: catalog.ProtocolHTTP, apps: []string{app, app}, intention: allow()})
	got := get(t, client(t), "POST", "http://"+m.upstream+"/", "")
	if got.status != 503 || got.header.Get("mesh-error") != "" || got.header.Get("mesh-error-id") != "" || got.header.Get("x-kept") != "yes" {
		t.Errorf("got %d %v", got.status, got.header)
	}
	if n := asked.Load(); n != 1 {
		t.Errorf("the application was asked %d times", n)
	}
}

func TestHTTPErrorsOfOurOwn(t *testing.T) {
	m := newMesh(t, options{protocol: catalog.ProtocolHTTP, apps: []string{"127.0.0.1:1"}, intention: allow()})
	t.Run("the application is down", func(t *testing.T) {
		got := get(t, client(t), "GET", "http://"+m.upstream+"/", "")
		if got.status != 503 || got.header.Get("mesh-error") != "connect-failed" {
			t.Errorf("got %d %v", got.status, got.header)
		}
	})
	t.Run("no certificate of the caller", func(t *testing.T) {
		keys := m.a.keys
		m.a.keys = nil
		m.a.apply()
		got := get(t, client(t), "GET", "http://"+m.upstream+"/", "")
		if got.status != 503 || got.header.Get("mesh-error") != "no-leaf" || !strings.Contains(got.body, "meshctl check") {
			t.Errorf("got %d %v %q", got.status, got.header, got.body)
		}
		m.a.keys = keys
		m.a.apply()
	})
	t.Run("no instance", func(t *testing.T) {
		m.a.plan.Clusters[0].Endpoints = nil
		m.a.apply()
		got := get(t, client(t), "GET", "http://"+m.upstream+"/", "")
		if got.status != 503 || got.header.Get("mesh-error") != "no-healthy-instance" {
			t.Errorf("got %d %v", got.status, got.header)
		}
	})
}

func TestHTTPPassesOverADeadEndpoint(t *testing.T) {
	app := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) { _, _ = io.Copy(w, r.Body) })
	m := newMesh(t, options{protocol: catalog.ProtocolHTTP, apps: []string{app}, intention: allow()})
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	dead := m.a.plan.Clusters[0].Endpoints[0]
	dead.Instance, dead.Address = "api-dead", closed.Addr().String()
	_ = closed.Close()
	m.a.plan.Clusters[0].Endpoints = append(m.a.plan.Clusters[0].Endpoints, dead)
	m.a.apply()
	c := client(t)
	for range 30 {
		if got := get(t, c, "POST", "http://"+m.upstream+"/", "body"); got.status != 200 || got.body != "body" {
			t.Fatalf("got %d %q", got.status, got.body)
		}
	}
}

func TestDenyCutsHTTPStreams(t *testing.T) {
	started := make(chan struct{}, 2)
	app := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/stream" {
			return
		}
		_, _ = io.WriteString(w, "first")
		_ = http.NewResponseController(w).Flush()
		started <- struct{}{}
		<-r.Context().Done()
	})
	tests := map[string]func(m *mesh) dataplane.Applied{
		"by policy": func(m *mesh) dataplane.Applied {
			m.intend(deny())
			return m.b.apply()
		},
		"by denied cluster": func(m *mesh) dataplane.Applied {
			m.a.plan.Clusters[0].Denied, m.a.plan.Clusters[0].Endpoints = "denied", nil
			return m.a.apply()
		},
		"by a rule that the stream matches": func(m *mesh) dataplane.Applied {
			i := allow()
			i.Action, i.Rules = "", []intentions.Rule{{Action: intentions.Allow, Path: "/other"}}
			m.intend(i)
			return m.b.apply()
		},
	}
	for name, change := range tests {
		t.Run(name, func(t *testing.T) {
			m := newMesh(t, options{protocol: catalog.ProtocolHTTP, apps: []string{app}, intention: allow()})
			req, err := http.NewRequestWithContext(t.Context(), "GET", "http://"+m.upstream+"/stream", nil)
			if err != nil {
				t.Fatal(err)
			}
			res, err := client(t).Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = res.Body.Close() }()
			<-started
			if _, err := io.ReadFull(res.Body, make([]byte, 5)); err != nil {
				t.Fatal(err)
			}
			at := time.Now()
			if got := change(m); got.Closed == 0 {
				t.Errorf("Apply says that %d were closed", got.Closed)
			}
			if rest, err := io.ReadAll(res.Body); err == nil {
				t.Errorf("the stream ended as if complete, with %q", rest)
			}
			if took := time.Since(at); took > 2*time.Second {
				t.Errorf("it took %s", took)
			}
		})
	}
}

func TestDenyCutsIdleKeepAlive(t *testing.T) {
	app := serveHTTP(t, func(http.ResponseWriter, *http.Request) {})
	m := newMesh(t, options{protocol: catalog.ProtocolHTTP, apps: []string{app}, intention: allow()})
	c := dial(t, m.upstream)
	br := bufio.NewReader(c)
	if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: api\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	res, err := http.ReadResponse(br, nil)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = io.Copy(io.Discard, res.Body)
	_ = res.Body.Close()
	m.intend(deny())
	m.b.apply()
	m.a.plan.Clusters[0].Denied, m.a.plan.Clusters[0].Endpoints = "denied", nil
	m.a.apply()
	if _, err := br.ReadByte(); !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the connection is still there: %v", err)
	}
	for _, h := range []*host{m.a, m.b} {
		eventually(t, "no connection is open", func() bool { return h.metric("mesh_connections_open") == 0 })
	}
}

// One connection that is refused, then allowed, then refused again: the first refusal leaves it alone, the last one cuts it.
func TestKeepAliveThroughRefusals(t *testing.T) {
	app := serveHTTP(t, func(http.ResponseWriter, *http.Request) {})
	m := newMesh(t, options{protocol: catalog.ProtocolHTTP, apps: []string{app}, intention: allow()})
	endpoints := m.a.plan.Clusters[0].Endpoints
	deny := func() dataplane.Applied {
		m.a.plan.Clusters[0].Denied, m.a.plan.Clusters[0].Endpoints = "denied", nil
		return m.a.apply()
	}
	deny()
	c := dial(t, m.upstream)
	br := bufio.NewReader(c)
	ask := func(want int) {
		t.Helper()
		if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: api\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		res, err := http.ReadResponse(br, nil)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, res.Body)
		_ = res.Body.Close()
		if res.StatusCode != want {
			t.Fatalf("status %d, want %d", res.StatusCode, want)
		}
	}
	ask(http.StatusForbidden)
	if got := deny(); got.Closed != 0 {
		t.Errorf("%d connections were cut for what had been refused anyway", got.Closed)
	}
	ask(http.StatusForbidden)
	m.a.plan.Clusters[0].Denied, m.a.plan.Clusters[0].Endpoints = "", endpoints
	m.a.apply()
	ask(http.StatusOK)
	if got := deny(); got.Closed != 1 {
		t.Errorf("%d connections were cut, want 1", got.Closed)
	}
	if _, err := br.ReadByte(); !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the connection is still there: %v", err)
	}
}

// A thousand requests while both plans change all the time.
func TestPlanChangesLoseNoRequest(t *testing.T) {
	var served atomic.Int64
	handle := func(w http.ResponseWriter, r *http.Request) {
		served.Add(1)
		_, _ = io.Copy(w, r.Body)
	}
	m := newMesh(t, options{
		protocol: catalog.ProtocolHTTP, apps: []string{serveHTTP(t, handle), serveHTTP(t, handle)}, intention: allow(),
	})
	var enough atomic.Bool
	changes := make(chan int, 1)
	go func() {
		n := 0
		endpoints := m.a.plan.Clusters[0].Endpoints
		for ; !enough.Load(); n++ {
			// Every change takes an endpoint away or brings it back, and renews a leaf now and then.
			m.a.plan.Clusters[0].Endpoints = slices.Clone(endpoints[:1+n%2])
			if n%10 == 0 {
				m.a.keys[0] = m.ca.leaf(t, service("web"), time.Hour)
				m.b.keys[0] = m.ca.leaf(t, service("api"), time.Hour)
			}
			m.a.apply()
			m.b.apply()
			pause := time.NewTimer(3 * time.Millisecond)
			<-pause.C
		}
		changes <- n
	}()
	const workers, each = 8, 125
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			c := client(t)
			for i := range each {
				body := fmt.Sprintf("%d/%d", w, i)
				req, err := http.NewRequestWithContext(t.Context(), "POST", "http://"+m.upstream+"/", strings.NewReader(body))
				if err != nil {
					t.Error(err)
					return
				}
				res, err := c.Do(req)
				if err != nil {
					t.Errorf("request %s: %v", body, err)
					continue
				}
				got, err := io.ReadAll(res.Body)
				_ = res.Body.Close()
				if err != nil || res.StatusCode != 200 || string(got) != body {
					t.Errorf("request %s: %d %q, %v", body, res.StatusCode, got, err)
				}
			}
		})
	}
	wg.Wait()
	enough.Store(true)
	if n := <-changes; n < 10 {
		t.Errorf("only %d changes of plan happened meanwhile", n)
	}
	if n := served.Load(); n != workers*each {
		t.Errorf("the applications served %d requests, want %d, each once", n, workers*each)
	}
}

// soon is done after d.
func soon(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

func TestDrain(t *testing.T) {
	release := make(chan struct{})
	started := make(chan struct{}, 1)
	app := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/slow" {
			started <- struct{}{}
			<-release
		}
		_, _ = io.WriteString(w, "done")
	})
	m := newMesh(t, options{protocol: catalog.ProtocolHTTP, apps: []string{app}, intention: allow()})
	idle := client(t)
	get(t, idle, "GET", "http://"+m.upstream+"/", "")
	slow := make(chan answer, 1)
	c := client(t)
	go func() { slow <- get(t, c, "GET", "http://"+m.upstream+"/slow", "") }()
	<-started
	drained := make(chan int, 1)
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		drained <- m.a.plane.Drain(ctx, soon(t, 50*time.Millisecond)).Cut
	}()
	eventually(t, "the idle connection is closed", func() bool { return m.a.metric("mesh_connections_open", "direction", "outbound") == 1 })
	close(release)
	if got := <-slow; got.status != 200 || got.body != "done" {
		t.Errorf("the request that ran got %d %q", got.status, got.body)
	}
	if cut := <-drained; cut != 0 {
		t.Errorf("Drain cut %d connections", cut)
	}
}

// TestDrainLosesNoRequest: a request that is on its way when the drain begins, on a connection that has said nothing yet or is
// idle, is answered, and told that it was the connection's last; who stays silent is let go after the grace.
func TestDrainLosesNoRequest(t *testing.T) {
	app := serveHTTP(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "done") })
	m := newMesh(t, options{protocol: catalog.ProtocolHTTP, apps: []string{app}, intention: allow()})
	request := func(c net.Conn) (status int, last bool) {
		t.Helper()
		_, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: api\r\n\r\n")
		var resp *http.Response
		if err == nil {
			resp, err = http.ReadResponse(bufio.NewReader(c), nil)
		}
		if err != nil {
			t.Fatalf("a request after the drain began: %v", err)
		}
		defer func() { _ = resp.Body.Close() }()
		if _, err := io.ReadAll(resp.Body); err != nil {
			t.Fatalf("a request after the drain began: %v", err)
		}
		return resp.StatusCode, resp.Close
	}
	idle, fresh, silent := dial(t, m.upstream), dial(t, m.upstream), dial(t, m.upstream)
	request(idle)
	eventually(t, "all are accepted", func() bool { return m.a.plane.Left() == 3 })
	drained := make(chan dataplane.Drained, 1)
	go func() { drained <- m.a.plane.Drain(t.Context(), soon(t, 3*time.Second)) }()
	eventually(t, "nothing is accepted any more", func() bool {
		listeners, err := m.a.plane.Listeners()
		return err == nil && len(listeners) == 0
	})
	for name, c := range map[string]net.Conn{"idle": idle, "fresh": fresh} {
		if status, last := request(c); status != 200 || !last {
			t.Errorf("%s: got %d, close %v; want an answer that is the last", name, status, last)
		}
	}
	if n, err := silent.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
		t.Errorf("the silent connection got %d bytes and %v, want its end", n, err)
	}
	if got := <-drained; got != (dataplane.Drained{Begun: 3}) {
		t.Errorf("drained %+v", got)
	}
}

func TestDrainCutsAtItsDeadline(t *testing.T) {
	m := newMesh(t, options{protocol: catalog.ProtocolTCP, apps: []string{serveTCP(t, echo)}, intention: allow()})
	c := dial(t, m.upstream)
	exchange(t, c, "before")
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if cut := m.a.plane.Drain(ctx, ctx).Cut; cut != 1 {
		t.Errorf("Drain cut %d connections, want 1", cut)
	}
	wantReset(t, c)
}
