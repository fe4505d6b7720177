package dataplane_test

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/intentions"
	"github.com/meshd/meshd/proxy/dataplane"
	"github.com/meshd/meshd/proxy/flow"
)

// grpcApp answers with the status that the method's name is, in trailers, or in the head alone for those that begin with "only".
func grpcApp(w http.ResponseWriter, r *http.Request) {
	_, _ = io.Copy(io.Discard, r.Body)
	method := r.URL.Path[strings.LastIndexByte(r.URL.Path, '/')+1:]
	w.Header().Set("Content-Type", "application/grpc")
	w.Header().Set("X-Timeout", r.Header.Get("Grpc-Timeout"))
	if code, only := strings.CutPrefix(method, "only"); only {
		w.Header().Set("Grpc-Status", code)
		return
	}
	if method == "hang" {
		<-r.Context().Done()
		return
	}
	_, _ = w.Write([]byte{0, 0, 0, 0, 0})
	w.Header().Set(http.TrailerPrefix+"Grpc-Status", method)
}

// reply is what a client of gRPC is told.
type reply struct {
	http          int
	status        string
	message       string
	meshError, id string
	timeout       string
}

// call calls a method as a client of gRPC does.
func call(t *testing.T, c *http.Client, address, method, timeout string) reply {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://"+address+"/pkg.Service/"+method, bytes.NewReader([]byte{0, 0, 0, 0, 0}))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/grpc")
	req.Header.Set("Te", "trailers")
	if timeout != "" {
		req.Header.Set("Grpc-Timeout", timeout)
	}
	resp, err := c.Do(req)
	if err != nil {
		t.Fatalf("%s: %v", method, err)
	}
	defer func() { _ = resp.Body.Close() }()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		t.Fatalf("%s: %v", method, err)
	}
	status := resp.Trailer.Get("Grpc-Status")
	if status == "" {
		status = resp.Header.Get("Grpc-Status")
	}
	return reply{
		resp.StatusCode, status, resp.Header.Get("Grpc-Message"), resp.Header.Get("Mesh-Error"), resp.Header.Get("Mesh-Error-Id"),
		resp.Header.Get("X-Timeout"),
	}
}

// TestGRPC: rules by method, statuses from trailers or the head, errors of the proxy's own as statuses, and all of it counted.
func TestGRPC(t *testing.T) {
	rules := allow()
	rules.Action, rules.Rules = "", []intentions.Rule{
		{Action: intentions.Deny, Path: "/pkg.Service/secret"}, {Action: intentions.Allow, PathPrefix: "/pkg.Service/"},
	}
	m := newMesh(t, options{protocol: catalog.ProtocolGRPC, apps: []string{serveHTTP2(t, grpcApp)}, intention: rules})
	log := filepath.Join(t.TempDir(), "access.log")
	m.a.plan.AccessLog = log
	m.a.apply()
	c := clientOf(t, true)
	for _, tt := range []struct{ method, status, name, class string }{
		{"0", "0", "OK", "2xx"},
		{"5", "5", "NOT_FOUND", "4xx"},
		{"13", "13", "INTERNAL", "5xx"},
		{"only3", "3", "INVALID_ARGUMENT", "4xx"},
		{"only99", "99", "UNKNOWN", "5xx"},
	} {
		if got := call(t, c, m.upstream, tt.method, ""); got.http != 200 || got.status != tt.status || got.meshError != "" {
			t.Errorf("%s: %+v", tt.method, got)
		}
		for _, h := range []*host{m.a, m.b} {
			eventually(t, tt.method+" is counted", func() bool { return h.metric("mesh_grpc_requests_total", "grpc_status", tt.name) == 1 })
		}
	}
	denied := call(t, c, m.upstream, "secret", "")
	if denied.http != 200 || denied.status != "7" || denied.meshError != "denied" || !strings.HasPrefix(denied.message, "denied: ") || !flow.ValidID(denied.id) {
		t.Errorf("what a rule denies: %+v", denied)
	}
	for _, tt := range []struct {
		class string
		want  float64
	}{{"2xx", 1}, {"4xx", 3}, {"5xx", 2}} {
		eventually(t, tt.class, func() bool { return m.a.metric("mesh_requests_total", "class", tt.class) == tt.want })
	}
	eventually(t, "the access log tells", func() bool {
		data, err := os.ReadFile(log)
		return err == nil && bytes.Contains(data, []byte(`"grpc_status":"NOT_FOUND"`)) && bytes.Contains(data, []byte(`"grpc_status":"PERMISSION_DENIED"`))
	})
	var found []flow.Record
	err := m.a.plane.Watch(t.Context(), flow.Query{Want: flow.Find, ID: denied.id}, func(a flow.Answer) error {
		found = append(found, a.Records...)
		return nil
	})
	if err != nil || len(found) != 1 || found[0].Reason != "denied" || found[0].GRPC != "PERMISSION_DENIED" {
		t.Errorf("the caller's proxy knows of the denial: %+v, %v", found, err)
	}
}

// TestGRPCWithoutInstance: the errors of the caller's proxy are statuses as well.
func TestGRPCWithoutInstance(t *testing.T) {
	m := newMesh(t, options{protocol: catalog.ProtocolGRPC, apps: []string{"127.0.0.1:1"}, intention: allow()})
	c := clientOf(t, true)
	if got := call(t, c, m.upstream, "0", ""); got.http != 200 || got.status != "14" || got.meshError != "connect-failed" {
		t.Errorf("an application that does not run: %+v", got)
	}
	m.a.plan.Clusters[0].Endpoints = nil
	m.a.apply()
	if got := call(t, c, m.upstream, "0", ""); got.http != 200 || got.status != "14" || got.meshError != "no-healthy-instance" {
		t.Errorf("no instance: %+v", got)
	}
}

// TestGRPCTriesAnotherInstance where the first one's application does not run.
func TestGRPCTriesAnotherInstance(t *testing.T) {
	m := newMesh(t, options{protocol: catalog.ProtocolGRPC, apps: []string{"127.0.0.1:1", serveHTTP2(t, grpcApp)}, intention: allow()})
	c := clientOf(t, true)
	good := 0
	for range 20 {
		if got := call(t, c, m.upstream, "0", ""); got.status == "0" {
			good++
		}
	}
	if good < 10 {
		t.Errorf("%d of 20 went well", good)
	}
}

// TestGRPCDeadline: the time that a caller allows is cut on the way, and kept.
func TestGRPCDeadline(t *testing.T) {
	m := newMesh(t, options{protocol: catalog.ProtocolGRPC, apps: []string{serveHTTP2(t, grpcApp)}, intention: allow()})
	c := clientOf(t, true)
	got := call(t, c, m.upstream, "0", "10S")
	unit := got.timeout[len(got.timeout)-1:]
	n, err := strconv.ParseInt(got.timeout[:len(got.timeout)-1], 10, 64)
	if err != nil || unit != "u" || n >= 10_000_000 || n < 1_000_000 {
		t.Errorf("of 10 s, %q reached the application", got.timeout)
	}
	if got := call(t, c, m.upstream, "hang", "50m"); got.status != "4" || got.meshError != "timeout" {
		t.Errorf("a call that takes too long: %+v", got)
	}
	if got := call(t, c, m.upstream, "0", "soon"); got.status != "0" || got.timeout != "soon" {
		t.Errorf("a time-out that is none: %+v", got)
	}
	if got := call(t, c, m.upstream, "0", "0n"); got.status != "4" {
		t.Errorf("no time at all: %+v", got)
	}
}

// TestGRPCUnavailableEjects: an instance that says five times in a row that it is unavailable is left out, and comes back.
func TestGRPCUnavailableEjects(t *testing.T) {
	m := newMesh(t, options{
		protocol: catalog.ProtocolGRPC, intention: allow(),
		apps: []string{
			serveHTTP2(t, func(w http.ResponseWriter, r *http.Request) {
				r.URL.Path = "/only14"
				grpcApp(w, r)
			}),
			serveHTTP2(t, grpcApp),
		},
	})
	c := clientOf(t, true)
	eventually(t, "it is ejected", func() bool {
		call(t, c, m.upstream, "0", "")
		return m.a.metric("mesh_endpoint_ejected", "instance", "api-a") == 1
	})
	if n := m.a.metric("mesh_grpc_requests_total", "grpc_status", "UNAVAILABLE"); n < 5 {
		t.Errorf("it was ejected after %v answers", n)
	}
}

// TestGRPCOverHTTP1: an error for who speaks gRPC's content type over HTTP/1 has its status, too.
func TestGRPCOverHTTP1(t *testing.T) {
	m := newMesh(t, options{protocol: catalog.ProtocolHTTP, apps: []string{serveHTTP(t, tells)}, intention: deny()})
	if got := call(t, client(t), m.upstream, "0", ""); got.http != 200 || got.status != "7" || got.meshError != "denied" {
		t.Errorf("%+v", got)
	}
}

// TestGRPCStream: messages go both ways while both sides are open.
func TestGRPCStream(t *testing.T) {
	app := serveHTTP2(t, func(w http.ResponseWriter, r *http.Request) {
		flush := http.NewResponseController(w).Flush
		w.Header().Set("Content-Type", "application/grpc")
		_ = flush()
		buf := make([]byte, 6)
		for {
			if _, err := io.ReadFull(r.Body, buf); err != nil {
				break
			}
			_, _ = w.Write(buf)
			_ = flush()
		}
		w.Header().Set(http.TrailerPrefix+"Grpc-Status", "0")
	})
	m := newMesh(t, options{protocol: catalog.ProtocolGRPC, apps: []string{app}, intention: allow()})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	up, write := io.Pipe()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+m.upstream+"/pkg.Service/Chat", up)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/grpc")
	resp, err := clientOf(t, true).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	for i := range byte(100) {
		message := []byte{0, 0, 0, 0, 1, i}
		if _, err := write.Write(message); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(message))
		if _, err := io.ReadFull(resp.Body, got); err != nil || !bytes.Equal(got, message) {
			t.Fatalf("message %d came back as %v, %v", i, got, err)
		}
	}
	_ = write.Close()
	if rest, err := io.ReadAll(resp.Body); err != nil || len(rest) != 0 || resp.Trailer.Get("Grpc-Status") != "0" {
		t.Errorf("the end: %v, %v, %v", rest, err, resp.Trailer)
	}
}

// FuzzGRPCFields: whatever peers write there, a time-out is never made longer than it was, nor shorter by more than what 8 digits
// can't say.
func FuzzGRPCFields(f *testing.F) {
	for _, s := range []string{"1S", "99999999n", "99999999H", "1H", "0u", "", "S", "1", "-1S", "100000000S", "5", "16", "17"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if status := dataplane.ParseStatus(b); status < 0 || status > 16 {
			t.Fatalf("%q is status %d", b, status)
		}
		d, ok := dataplane.ParseTimeout(b)
		if !ok {
			return
		}
		text := dataplane.AppendTimeout(nil, d)
		again, ok := dataplane.ParseTimeout(text)
		if !ok || len(text) > 9 || again > d || d-again > d/1e7 {
			t.Fatalf("%q is %s, written as %q, which is %s, %v", b, d, text, again, ok)
		}
	})
}
