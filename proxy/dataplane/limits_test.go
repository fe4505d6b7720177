package dataplane_test

import (
	"io"
	"net"
	"net/http"
	"reflect"
	"strings"
	"sync/atomic"
	"testing"

	xhttp2 "golang.org/x/net/http2"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/intentions"
	"github.com/meshd/meshd/proxy"
	"github.com/meshd/meshd/proxy/dataplane"
	"github.com/meshd/meshd/proxy/http1"
	"github.com/meshd/meshd/proxy/http2"
)

// TestEveryLimitHasACounter: a limit or a counter that nobody exports fails here.
func TestEveryLimitHasACounter(t *testing.T) {
	var count http2.Counters
	v := reflect.ValueOf(&count).Elem()
	for i := range v.NumField() {
		one, ok := reflect.TypeAssert[*atomic.Uint64](v.Field(i).Addr())
		if !ok {
			t.Fatalf("%s is no counter", v.Type().Field(i).Name)
		}
		one.Store(uint64(i) + 1)
	}
	seen := map[uint64]string{}
	for label, read := range dataplane.HTTP2Limits(&count) {
		seen[read()] = label
	}
	for i := range v.NumField() {
		if seen[uint64(i)+1] == "" {
			t.Errorf("http2.Counters.%s is in no metric", v.Type().Field(i).Name)
		}
	}

	// What tells that a limit is reached: by its name in the code, the label and the error. Windows have none but a violation of them.
	limits := map[string]struct {
		label string
		err   error
	}{
		"Streams": {"streams", nil}, // the stream is refused with REFUSED_STREAM, or waits
		"Resets":  {"resets", http2.ErrResets}, "Control": {"control", http2.ErrControl},
		"Continuations": {"continuations", http2.ErrContinuations}, "Answers": {"answers", http2.ErrAnswers},
		"StreamWindow": {"protocol", nil}, "Window": {"protocol", nil}, // FLOW_CONTROL_ERROR
	}
	labels := dataplane.HTTP2Limits(&count)
	for field := range reflect.TypeFor[http2.Limits]().Fields() {
		if row, ok := limits[field.Name]; !ok || labels[row.label] == nil {
			t.Errorf("http2.Limits.%s has no counter", field.Name)
		}
	}
	names := map[string]string{"HeadBytes": "head-bytes", "LineBytes": "line-bytes", "Fields": "fields", "AllowUnderscore": "underscore"}
	h := newHost(t, dataplane.Limits{})
	for field := range reflect.TypeFor[http1.Limits]().Fields() {
		if name := names[field.Name]; !h.has("mesh_http1_refusals_total", "limit", name) {
			t.Errorf("http1.Limits.%s has no counter", field.Name)
		}
	}
	for label := range labels {
		if !h.has("mesh_http2_refusals_total", "limit", label) {
			t.Errorf("mesh_http2_refusals_total has no limit %q", label)
		}
	}
}

// has reports whether there is a series of a name with the label.
func (h *host) has(name, label, value string) bool {
	h.t.Helper()
	families, err := h.registry.Gather()
	if err != nil {
		h.t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			for _, l := range m.GetLabel() {
				if f.GetName() == name && l.GetName() == label && l.GetValue() == value {
					return true
				}
			}
		}
	}
	return false
}

// TestLimitsOfAPlan: each one reaches what it bounds, and the mesh's are not lowered below what many clients need.
func TestLimitsOfAPlan(t *testing.T) {
	plan := proxy.Limits{
		Connections: 1, HeadBytes: 2048, LineBytes: 1024, Fields: 11, AllowUnderscore: true,
		HTTP2: proxy.HTTP2Limits{Streams: 2, StreamWindow: 1 << 17, Window: 1 << 18, Resets: 3, Control: 400, Continuations: 5, Answers: 6000},
	}
	for field, value := range reflect.ValueOf(plan.HTTP2).Fields() {
		if value.IsZero() {
			t.Fatalf("the test does not set http2.%s", field.Name)
		}
	}
	if err := plan.Validate(); err != nil {
		t.Fatal(err)
	}
	own, mesh, upstream := dataplane.LimitsOf(plan)
	want := http2.Limits{Streams: 2, StreamWindow: 1 << 17, Window: 1 << 18, Resets: 3, Control: 400, Continuations: 5, Answers: 6000}
	if own.HTTP2 != want || own.Head != (http1.Limits{HeadBytes: 2048, LineBytes: 1024, Fields: 11, AllowUnderscore: true}) || own.Connections != 1 {
		t.Errorf("for applications %+v", own)
	}
	want.Streams, want.Window, want.Resets = 1000, 16<<20, 10_000
	if mesh != want {
		t.Errorf("for other proxies %+v, want %+v", mesh, want)
	}
	want.Streams, want.Window = 0, 1<<18
	if upstream != want {
		t.Errorf("for upstreams %+v, want %+v", upstream, want)
	}
	plan.HTTP2.Streams, plan.HTTP2.Window, plan.HTTP2.Resets = 2000, 32<<20, 20_000
	if _, mesh, _ = dataplane.LimitsOf(plan); mesh.Streams != 2000 || mesh.Window != 32<<20 || mesh.Resets != 20_000 {
		t.Errorf("higher ones give %+v", mesh)
	}
}

// TestLimitsComeWithThePlan: new connections are held to them, and live ones go on.
func TestLimitsComeWithThePlan(t *testing.T) {
	m := newMesh(t, options{protocol: catalog.ProtocolHTTP2, apps: []string{serveHTTP2(t, tells)}, intention: allow()})
	c := clientOf(t, false)
	large := func() int {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+m.upstream+"/v1/x", http.NoBody)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("X-Large", strings.Repeat("x", 3000))
		resp, err := c.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		_, err = io.Copy(io.Discard, resp.Body)
		_ = resp.Body.Close()
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode
	}
	if got := large(); got != 200 {
		t.Fatalf("with the defaults: %d", got)
	}
	m.a.plan.Limits = proxy.Limits{HeadBytes: 4096, LineBytes: 1024, HTTP2: proxy.HTTP2Limits{Control: 100}}
	m.a.apply()
	if got := large(); got != 200 {
		t.Errorf("on the connection from before: %d", got)
	}
	c = clientOf(t, false) // on a connection of its own
	if got := large(); got != 431 {
		t.Errorf("a line of 3,000 bytes got %d, want 431", got)
	}
	eventually(t, "the line is counted", func() bool { return m.a.metric("mesh_http1_refusals_total", "limit", "line-bytes") == 1 })
	c = clientOf(t, true)
	if got := large(); got != 431 {
		t.Errorf("a field of 3,000 bytes over HTTP/2 got %d, want 431", got)
	}
	eventually(t, "the field is counted", func() bool { return m.a.metric("mesh_http2_refusals_total", "limit", "head-size") == 1 })

	near := dial(t, m.upstream)
	if _, err := io.WriteString(near, xhttp2.ClientPreface); err != nil {
		t.Fatal(err)
	}
	f := xhttp2.NewFramer(near, near)
	if err := f.WriteSettings(); err != nil {
		t.Fatal(err)
	}
	for range 150 { // the default admits 1,000
		if err := f.WritePriority(1, xhttp2.PriorityParam{StreamDep: 3}); err != nil {
			break // it has ended the connection by now
		}
	}
	for {
		frame, err := f.ReadFrame()
		if err != nil {
			t.Fatalf("it ended without a GOAWAY: %v", err)
		}
		if away, ok := frame.(*xhttp2.GoAwayFrame); ok {
			if away.ErrCode != xhttp2.ErrCodeEnhanceYourCalm || string(away.DebugData()) != http2.ErrControl.Error() {
				t.Errorf("it ended with %s %q", away.ErrCode, away.DebugData())
			}
			break
		}
	}
	eventually(t, "it is counted", func() bool { return m.a.metric("mesh_http2_refusals_total", "limit", "control") == 1 })

	m.a.plan.Limits = proxy.Limits{HTTP2: proxy.HTTP2Limits{Window: 1}}
	if _, err := m.a.plane.Apply(t.Context(), m.a.plan, m.a.keys, m.a.sockets); err == nil || !strings.Contains(err.Error(), "limits.http2.window") {
		t.Errorf("a plan with a wrong limit: %v", err)
	}
}

// TestWhatIsNotHTTPIsRefused on every port where HTTP is declared, or where rules of HTTP decide, and is counted.
func TestWhatIsNotHTTPIsRefused(t *testing.T) {
	strange := map[string]string{
		"binary": "\x00\x01\x02\x03\xff\xfe\r\n\r\n", "TLS": helloFor(t, "api.example.com"), "SSH": "SSH-2.0-OpenSSH_9.6\r\n\r\n",
	}
	for _, protocol := range []catalog.Protocol{catalog.ProtocolHTTP, catalog.ProtocolHTTP2, catalog.ProtocolGRPC, catalog.ProtocolAuto} {
		for name, bytes := range strange {
			t.Run(string(protocol)+" "+name, func(t *testing.T) {
				rules := allow()
				rules.Action, rules.Rules = "", []intentions.Rule{{Action: intentions.Allow, PathPrefix: "/v1/"}}
				var reached atomic.Int64
				app := serveTCP(t, func(c *net.TCPConn) { reached.Add(1); echo(c) })
				m := newMesh(t, options{protocol: protocol, apps: []string{app}, intention: rules})
				c := dial(t, m.upstream)
				if _, err := io.WriteString(c, bytes); err != nil {
					t.Fatal(err)
				}
				answer, _ := io.ReadAll(c) // to its end, of whichever kind
				switch {
				case protocol == catalog.ProtocolAuto && len(answer) > 0:
					t.Errorf("it was answered %q, want a reset", answer)
				case protocol != catalog.ProtocolAuto && !strings.HasPrefix(string(answer), "HTTP/1.1 4") && !strings.Contains(string(answer), "preface of HTTP/2"):
					t.Errorf("it was answered %q, want a refusal", answer)
				}
				eventually(t, "it is counted", func() bool {
					return m.b.metric("mesh_connections_refused_total", "reason", "not-http")+
						m.a.metric("mesh_request_failures_total", "reason", "bad-request")+
						m.a.metric("mesh_http2_refusals_total", "limit", "protocol") == 1
				})
				if reached.Load() != 0 {
					t.Error("the application was reached")
				}
			})
		}
	}
}
