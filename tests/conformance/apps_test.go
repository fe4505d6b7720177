package conformance_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/meshd/meshd/tests/conformance/rig"
)

// bad is what a recorder notes where an application was sent what it took for
// no request.
const bad = "<BADREQ>"

// sight is one request as an application saw it.
type sight struct {
	// Line is the method and the target as they arrived, or bad.
	Line string
	// Path is what the application made of the target, if it says.
	Path string
	// Body is the body's length, -1 where the application does not tell.
	Body int64
	// Identity is every x-forwarded-client-cert, joined by a bar.
	Identity string
	// Forged is what arrived in fields that only the mesh may set.
	Forged string
}

// recorder keeps what one application saw, in order.
type recorder struct {
	mu      sync.Mutex
	sights  []sight
	changed chan struct{}
	taken   int // how many were taken before those in sights
}

func newRecorder() *recorder { return &recorder{changed: make(chan struct{})} }

// add returns a number for setBody.
func (r *recorder) add(s sight) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.sights = append(r.sights, s)
	close(r.changed)
	r.changed = make(chan struct{})
	return r.taken + len(r.sights) - 1
}

// setBody notes the length of a body that has come in whole.
func (r *recorder) setBody(sight int, n int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if i := sight - r.taken; i >= 0 {
		r.sights[i].Body = n
	}
}

// wait waits until done finds what it waits for among the sights, and reports
// whether it did before the deadline.
func (r *recorder) wait(deadline time.Duration, done func([]sight) bool) bool {
	timeout := time.NewTimer(deadline)
	defer timeout.Stop()
	for {
		r.mu.Lock()
		changed, finished := r.changed, done(r.sights)
		r.mu.Unlock()
		if finished {
			return true
		}
		select {
		case <-changed:
		case <-timeout.C:
			return false
		}
	}
}

// take returns the sights and forgets them.
func (r *recorder) take() []sight {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := r.sights
	r.taken += len(out)
	r.sights = nil
	return out
}

// application starts a server that answers every request with a field x-seen
// that repeats method and target, and returns its address.
type application func(t *testing.T, dir string, to *recorder) string

// early is the name of the application that answers before it has the body.
const early = "nginx-early"

// applications are the servers that requests are sent to: three parsers that
// share nothing.
func applications() map[string]application {
	return map[string]application{"nginx": nginx, early: nginxEarly, "haproxy": haproxy, "go": golang}
}

// jsonLog is one line of the access log of nginx and HAProxy.
type jsonLog struct{ Request, Path, Identity, Forged, Body string }

func (l jsonLog) sight() sight {
	method, rest, _ := strings.Cut(l.Request, " ")
	target, version, _ := strings.Cut(rest, " ")
	s := sight{Line: method + " " + target, Path: l.Path, Identity: l.Identity, Forged: l.Forged, Body: -1}
	if method == "" || !strings.HasPrefix(version, "HTTP/1.") {
		s.Line = bad + " " + l.Request
	}
	if n, err := fmt.Sscan(l.Body, &s.Body); err != nil || n != 1 {
		s.Body = -1
	}
	return s
}

// logged returns what turns lines of a log into sights.
func logged(t *testing.T, to *recorder) func(string) {
	t.Helper()
	return func(line string) {
		var l jsonLog
		if err := json.Unmarshal([]byte(line), &l); err != nil {
			to.add(sight{Line: bad + " unreadable log line " + line, Body: -1})
			return
		}
		if l.Forged == "-" { // how HAProxy writes nothing
			l.Forged = ""
		}
		to.add(l.sight())
	}
}

// socket opens a socket for a program that the test starts.
func socket(t *testing.T) (string, *os.File) {
	t.Helper()
	address, file, err := rig.Listen()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := file.Close(); err != nil {
			t.Error(err)
		}
	})
	return address, file
}

func stopAtEnd(t *testing.T, p *rig.Process, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Stop(); err != nil {
			t.Error(err)
		}
	})
}

// nginx reads the whole body and passes it on, as a gateway does.
func nginx(t *testing.T, dir string, to *recorder) string {
	t.Helper()
	inner := filepath.Join(dir, "inner.sock")
	return startNginx(t, dir, to, "proxy_pass http://unix:"+inner+";", fmt.Sprintf(`
  server {
    listen unix:%s;
    access_log off;
    location / { return 200 "nginx\n"; }
  }`, inner))
}

func nginxEarly(t *testing.T, dir string, to *recorder) string {
	t.Helper()
	return startNginx(t, dir, to, `return 200 "nginx\n";`, "")
}

// startNginx sets nginx to be as lenient as it can be.
func startNginx(t *testing.T, dir string, to *recorder, answer, more string) string {
	t.Helper()
	address, file := socket(t)
	p, err := rig.StartNginx(dir, "worker_processes 1;\nevents {}", fmt.Sprintf(`
  log_format seen escape=json '{"Request":"$request","Path":"$uri","Identity":"$http_x_forwarded_client_cert","Forged":"$http_mesh_error"}';
  access_log /dev/stdout seen;
  underscores_in_headers on;
  ignore_invalid_headers off;
  large_client_header_buffers 8 64k;
  keepalive_requests 1000000;
  client_max_body_size 0;
  server {
    listen %s;
    server_name _;
    location / {
      add_header x-seen "$request_method $request_uri" always;
      %s
    }
  }
%s
`, address, answer, more), []*os.File{file}, logged(t, to))
	stopAtEnd(t, p, err)
	return address
}

// haproxy answers once it has the whole body.
func haproxy(t *testing.T, dir string, to *recorder) string {
	t.Helper()
	address, file := socket(t)
	p, err := rig.StartHAProxy(dir, `
global
  log stdout len 65535 format raw local0
  tune.bufsize 131072
  tune.http.logurilen 65535
  tune.http.maxhdr 1000
defaults
  mode http
  log global
  timeout client 60s
  timeout http-request 60s
  timeout http-keep-alive 60s
  option http-buffer-request
frontend app
  bind fd@3
  option dontlognull
  http-request set-var(txn.identity) req.fhdr(x-forwarded-client-cert),json(utf8s)
  http-request set-var(txn.forged) req.fhdr(mesh-error),json(utf8s)
  http-request set-var(txn.body) req.body_len
  log-format "{\"Request\":\"%[capture.req.method] %[capture.req.uri,json(utf8s)] %[capture.req.ver]\",\"Identity\":\"%[var(txn.identity)]\",\"Forged\":\"%[var(txn.forged)]\",\"Body\":\"%[var(txn.body)]\"}"
  http-request return status 200 content-type text/plain string haproxy hdr x-seen "%[method] %[pathq]"
`, []*os.File{file}, logged(t, to))
	stopAtEnd(t, p, err)
	return address
}

// golang is net/http. What it refuses by itself it answers with a status of
// 400 or more and without x-seen, which a tap on its connections finds.
func golang(t *testing.T, _ string, to *recorder) string {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		forged := mine(r.Header)
		n := to.add(sight{
			Line: r.Method + " " + r.RequestURI, Path: r.URL.Path, Body: -1,
			Identity: strings.Join(r.Header.Values("x-forwarded-client-cert"), "|"), Forged: forged,
		})
		body, err := io.Copy(io.Discard, r.Body)
		if err == nil {
			to.setBody(n, body)
		}
		if forged := mine(r.Trailer); forged != "" || r.Trailer.Get("x-forwarded-client-cert") != "" || r.Trailer.Get("host") != "" {
			to.add(sight{Line: bad + " trailer", Body: -1})
		}
		w.Header().Set("x-seen", r.Method+" "+r.RequestURI)
		_, _ = io.WriteString(w, "go\n") // the client may be gone
	})}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(tap{l, to}) }()
	t.Cleanup(func() {
		if err := srv.Close(); err != nil {
			t.Error(err)
		}
		if err := <-done; !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	})
	return l.Addr().String()
}

// mine returns the values of fields that only the mesh may set.
func mine(h http.Header) string {
	var out []string
	for name, values := range h {
		if strings.HasPrefix(strings.ToLower(name), "mesh-") {
			out = append(out, values...)
		}
	}
	return strings.Join(out, "|")
}

type tap struct {
	net.Listener
	to *recorder
}

func (l tap) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	return tapped{c, l.to}, err
}

type tapped struct {
	net.Conn
	to *recorder
}

func (c tapped) Write(b []byte) (int, error) {
	if s := string(b); strings.HasPrefix(s, "HTTP/1.1 4") || strings.HasPrefix(s, "HTTP/1.1 5") {
		line, _, _ := strings.Cut(s, "\r\n")
		c.to.add(sight{Line: bad + " answered " + line, Body: -1})
	}
	return c.Conn.Write(b)
}
