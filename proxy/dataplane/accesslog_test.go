package dataplane_test

import (
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/intentions"
	"github.com/meshd/meshd/proxy/dataplane"
)

// accessLine is what docs/reference/access-log.md promises.
type accessLine struct {
	Time          time.Time `json:"time"`
	Kind          string    `json:"kind"`
	Direction     string    `json:"direction"`
	Source        string    `json:"source"`
	Destination   string    `json:"destination"`
	Endpoint      string    `json:"endpoint"`
	Peer          string    `json:"peer"`
	Method        string    `json:"method"`
	Authority     string    `json:"authority"`
	Path          string    `json:"path"`
	Status        int       `json:"status"`
	BytesSent     int64     `json:"bytes_sent"`
	BytesReceived int64     `json:"bytes_received"`
	DurationMS    float64   `json:"duration_ms"`
	Reason        string    `json:"reason"`
	Decision      string    `json:"decision"`
	Intention     string    `json:"intention"`
	Rule          *int      `json:"rule"`
	ErrorID       string    `json:"error_id"`
}

// accessLines reads a log; a line that is no JSON, or has a member too many, fails the test.
func accessLines(t *testing.T, path string) []accessLine {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		return nil // not opened yet
	}
	var all []accessLine
	for line := range bytes.Lines(data) {
		if !bytes.HasSuffix(line, []byte("\n")) {
			break // it is being written
		}
		d := json.NewDecoder(bytes.NewReader(line))
		d.DisallowUnknownFields()
		var one accessLine
		if err := d.Decode(&one); err != nil {
			t.Fatalf("line %q: %v", line, err)
		}
		all = append(all, one)
	}
	return all
}

// wantLines waits for a log to have these lines, whatever their time, duration, error id and peer are.
func wantLines(t *testing.T, path string, want ...accessLine) []accessLine {
	t.Helper()
	var got []accessLine
	eventually(t, "the log has all lines", func() bool {
		got = accessLines(t, path)
		return len(got) >= len(want)
	})
	if diff := cmp.Diff(want, got, cmpopts.IgnoreFields(accessLine{}, "Time", "DurationMS", "ErrorID", "Peer")); diff != "" {
		t.Errorf("log (-want +got):\n%s", diff)
	}
	for i, line := range got {
		if age := time.Since(line.Time); age < 0 || age > time.Minute || line.DurationMS < 0 || line.Peer == "" {
			t.Errorf("line %d says time %s, duration %v, peer %q", i, line.Time, line.DurationMS, line.Peer)
		}
	}
	return got
}

func (m *mesh) logTo(path string) {
	m.a.plan.AccessLog, m.b.plan.AccessLog = path+".a", path+".b"
	m.a.apply()
	m.b.apply()
}

const (
	webID = "spiffe://mesh.example.com/ns/default/svc/web"
	apiID = "spiffe://mesh.example.com/ns/default/svc/api"
)

func TestAccessLogOfHTTP(t *testing.T) {
	app := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		w.WriteHeader(http.StatusCreated)
		_, _ = io.WriteString(w, "four")
	})
	i := allow()
	i.Action, i.Rules = "", []intentions.Rule{{Action: intentions.Allow, Methods: []string{"POST"}, PathPrefix: "/v1/"}}
	m := newMesh(t, options{protocol: catalog.ProtocolHTTP, apps: []string{app}, intention: i})
	path := filepath.Join(t.TempDir(), "access")
	m.logTo(path)
	c := client(t)
	if got := get(t, c, "POST", "http://"+m.upstream+"/v1/x%22y?secret=1", "abc"); got.status != 201 {
		t.Fatalf("got %d", got.status)
	}
	denied := get(t, c, "GET", "http://"+m.upstream+"/v1/x", "")
	refused := get(t, c, "GET", "http://"+m.upstream+"/", strings.Repeat("x", 10))

	rule := 0
	allowed := accessLine{
		Kind: "http", Source: webID, Destination: apiID, Endpoint: "api-a", Method: "POST", Authority: m.upstream,
		Path: "/v1/x%22y", Status: 201, BytesSent: 3, BytesReceived: 4,
	}
	inside := allowed
	inside.Direction, inside.Decision, inside.Intention, inside.Rule = "inbound", "rule", "web → api", &rule
	allowed.Direction = "outbound"
	deny := accessLine{
		Kind: "http", Direction: "inbound", Source: webID, Destination: apiID, Endpoint: "api-a", Method: "GET", Authority: m.upstream,
		Path: "/v1/x", Status: 403, BytesReceived: int64(len(denied.body)), Reason: "denied", Decision: "no-rule-matched",
		Intention: "web → api",
	}
	deny2 := deny
	deny2.Path, deny2.BytesReceived = "/", int64(len(refused.body))
	got := wantLines(t, path+".b", inside, deny, deny2)
	if id := denied.header.Get("Mesh-Error-Id"); id == "" || got[1].ErrorID != id {
		t.Errorf("the log has error id %q, the client was told %q", got[1].ErrorID, id)
	}
	outside := accessLines(t, path+".a")
	eventually(t, "the caller's side has three lines", func() bool {
		outside = accessLines(t, path+".a")
		return len(outside) == 3
	})
	if diff := cmp.Diff(allowed, outside[0], cmpopts.IgnoreFields(accessLine{}, "Time", "DurationMS", "Peer")); diff != "" {
		t.Errorf("outbound (-want +got):\n%s", diff)
	}
	for _, h := range []*host{m.a, m.b} {
		if n := h.metric("mesh_access_log_lines_total"); n != 3 {
			t.Errorf("%v lines were counted, want 3", n)
		}
	}

	// Off again: nothing is written, what is there stays.
	m.b.plan.AccessLog = ""
	m.b.apply()
	get(t, c, "POST", "http://"+m.upstream+"/v1/x", "")
	m.b.stop()
	if n := len(accessLines(t, path+".b")); n != 3 {
		t.Errorf("%d lines after the log was turned off, want 3", n)
	}
}

func TestAccessLogOfTCP(t *testing.T) {
	m := newMesh(t, options{protocol: catalog.ProtocolTCP, apps: []string{serveTCP(t, echo)}, intention: allow()})
	path := filepath.Join(t.TempDir(), "access")
	m.logTo(path)
	c := dial(t, m.upstream)
	exchange(t, c, "hello")
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, c); err != nil {
		t.Fatal(err)
	}
	line := accessLine{Kind: "tcp", Direction: "inbound", Source: webID, Destination: apiID, Endpoint: "api-a", BytesSent: 5, BytesReceived: 5}
	ended := line
	ended.Decision, ended.Intention = "action", "web → api"
	wantLines(t, path+".b", ended)

	c = dial(t, m.upstream)
	exchange(t, c, "hello")
	m.intend(deny())
	m.b.apply()
	cut := ended
	cut.Reason = "policy-changed"
	wantLines(t, path+".b", ended, cut)
	wantReset(t, c)
	wantRefused(t, m.upstream)
	refused := line
	refused.BytesSent, refused.BytesReceived, refused.Decision, refused.Reason = 0, 0, "action", "denied"
	refused.Intention = "web → api"
	plain := accessLine{Kind: "tcp", Direction: "inbound", Reason: "plaintext"}
	wantLines(t, path+".b", ended, cut, refused)
	stranger := dial(t, m.port)
	if _, err := io.WriteString(stranger, "GET / HTTP/1.1\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	wantLines(t, path+".b", ended, cut, refused, plain)

	outbound := line
	outbound.Direction = "outbound"
	eventually(t, "the caller's side tells of its sessions", func() bool { return len(accessLines(t, path+".a")) >= 2 })
	ignored := cmpopts.IgnoreFields(accessLine{}, "Time", "DurationMS", "Peer")
	if diff := cmp.Diff(outbound, accessLines(t, path+".a")[0], ignored); diff != "" {
		t.Errorf("outbound (-want +got):\n%s", diff)
	}
}

func TestAccessLogIsRotated(t *testing.T) {
	app := serveHTTP(t, func(http.ResponseWriter, *http.Request) {})
	m := newMesh(t, options{protocol: catalog.ProtocolHTTP, apps: []string{app}, intention: allow()})
	path := filepath.Join(t.TempDir(), "access")
	m.logTo(path)
	c := client(t)
	send := func() { get(t, c, "GET", "http://"+m.upstream+"/", "") }
	send()
	eventually(t, "a line is written", func() bool { return len(accessLines(t, path+".b")) == 1 })
	for _, move := range []struct {
		to    string
		hurry bool
	}{{".1", true}, {".2", false}} {
		if err := os.Rename(path+".b", path+move.to); err != nil {
			t.Fatal(err)
		}
		if move.hurry {
			m.b.plane.ReopenAccessLog()
			send()
		}
		eventually(t, "the file is there again", func() bool {
			if !move.hurry {
				send()
			}
			return len(accessLines(t, path+".b")) > 0
		})
		if n := len(accessLines(t, path+move.to)); move.hurry && n != 1 {
			t.Errorf("the file that was moved away has %d lines, want 1", n)
		}
	}
	m.b.stop() // writes what waits
	all := 0
	for _, end := range []string{".1", ".2", ".b"} {
		all += len(accessLines(t, path+end))
	}
	if requests := int(m.b.metric("mesh_requests_total")); all != requests {
		t.Errorf("%d lines in all files, want one for each of %d requests", all, requests)
	}
}

func TestAccessLogThatCantBeWrittenHoldsUpNothing(t *testing.T) {
	app := serveHTTP(t, func(http.ResponseWriter, *http.Request) {})
	m := newMesh(t, options{protocol: catalog.ProtocolHTTP, apps: []string{app}, intention: allow()})
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	reader, err := os.OpenFile(fifo, os.O_RDONLY|syscall.O_NONBLOCK, 0) // it is open and never read
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = reader.Close() }()
	m.a.plan.AccessLog, m.b.plan.AccessLog = filepath.Join(dir, "missing", "log"), fifo
	m.a.apply()
	m.b.apply()
	c := client(t)
	const requests = 700
	long := "/" + strings.Repeat("x", 3000)
	for range requests {
		if got := get(t, c, "GET", "http://"+m.upstream+long, ""); got.status != 200 {
			t.Fatalf("got %d", got.status)
		}
	}
	for _, h := range []*host{m.a, m.b} {
		eventually(t, "every line is written or counted as dropped", func() bool {
			return h.metric("mesh_access_log_lines_total")+h.metric("mesh_access_log_dropped_total") == requests
		})
	}
	if n := m.a.metric("mesh_access_log_dropped_total"); n != requests {
		t.Errorf("%v lines for a folder that is not there were counted as dropped, want all %d", n, requests)
	}
	if n := m.b.metric("mesh_access_log_dropped_total"); n == 0 {
		t.Errorf("no line for a pipe that nobody reads was dropped")
	}
}

func TestAccessLogEscapes(t *testing.T) {
	for _, s := range []string{"plain", `a"b\c`, "line\nend\x00\x1f\x7f", "ü€𝄞", "\xff\xfe\xc3", "\u2028"} {
		checkMember(t, s)
	}
}

func FuzzAccessLogMember(f *testing.F) {
	f.Add("plain")
	f.Add("\xc3\"\\\n")
	f.Fuzz(func(t *testing.T, s string) { checkMember(t, s) })
}

// checkMember holds what is written for a string against encoding/json.
func checkMember(t *testing.T, s string) {
	t.Helper()
	line := append(dataplane.AppendMember([]byte(`{"a":1`), "x", []byte(s)), '}')
	var got, want struct {
		X string `json:"x"`
	}
	if err := json.Unmarshal(line, &got); err != nil {
		t.Fatalf("%q gives %q: %v", s, line, err)
	}
	reference, err := json.Marshal(map[string]string{"x": s})
	if err == nil {
		err = json.Unmarshal(reference, &want)
	}
	if err != nil || got != want {
		t.Errorf("%q is read as %q, want %q (%v)", s, got.X, want.X, err)
	}
}
