package e2e_test

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
)

// offer is a service of vm-b, and the port of vm-a at which it is called.
type offer struct {
	name, protocol string
	port, local    int
	limits         string // of the upstream
}

// real is a mesh of two hosts: web on vm-a calls what vm-b offers.
type real struct {
	*cluster
	web, far *member
}

func newReal(t *testing.T, offers ...offer) *real {
	t.Helper()
	r := &real{cluster: newCluster(t)}
	var names []string
	upstreams, services := "service \"web\" {\n", ""
	for _, o := range offers {
		names = append(names, o.name)
		upstreams += fmt.Sprintf("  upstream %q {\n    local_port = %d\n%s  }\n", o.name, o.local, o.limits)
		services += fmt.Sprintf("service %q {\n  port     = %d\n  protocol = %q\n}\n", o.name, o.port, o.protocol)
	}
	r.web, r.far = r.join("vm-a", "web"), r.join("vm-b", strings.Join(names, ","))
	r.far.define("services.hcl", services)
	r.web.define("web.hcl", upstreams+"}\n")
	eventually(t, 20*time.Second, "all services are there", func() string {
		got := r.meshctl(0, "services", "-o", "csv").Stdout
		for _, name := range names {
			if !strings.Contains(got, "\n"+name+",") {
				return got
			}
		}
		return ""
	})
	r.far.listens(7443)
	for _, o := range offers {
		r.web.listens(o.local)
	}
	for _, name := range names { // counts the proxies that are there: they are
		r.meshctl(0, "intention", "allow", "web", name, "--wait")
	}
	return r
}

// listens waits until somebody listens at a port of the host, without connecting.
func (h *host) listens(port int) {
	h.T.Helper()
	eventually(h.T, 20*time.Second, fmt.Sprintf("somebody listens at port %d of %s", port, h.Name), func() string {
		if r := h.Run("ss", "-Hltn", fmt.Sprintf("sport = :%d", port)); r.Stdout == "" {
			return "nobody does " + r.Stderr
		}
		return ""
	})
}

// python is Debian's own, whose packages the tests use.
const python = "/usr/bin/python3"

// serve starts a daemon on the host and waits until it listens.
func (h *host) serve(port int, name string, args ...string) {
	h.T.Helper()
	p := h.Start(fmt.Sprintf("%s-%d", name[strings.LastIndexByte(name, '/')+1:], port), name, args...)
	h.keep(port, p)
	eventually(h.T, 20*time.Second, fmt.Sprintf("%s listens on %d", name, port), func() string {
		select {
		case <-p.Done():
			h.T.Fatalf("%s ended: %v\n%s", p.Name, p.Err(), tail(p.Log, 20))
		default:
		}
		c, err := h.Dial(fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			return err.Error()
		}
		_ = c.Close()
		return ""
	})
}

// sink is an HTTP application that tells what was sent to it, and sends what it is
// asked for.
func sink(l net.Listener) *http.Server {
	mux := http.NewServeMux()
	mux.HandleFunc("/sum", func(w http.ResponseWriter, r *http.Request) {
		sum := sha256.New()
		n, err := io.Copy(sum, r.Body)
		_, _ = fmt.Fprintf(w, "instance=sink %s %d %s expect=%q chunked=%t err=%v\n",
			r.Method, n, hex.EncodeToString(sum.Sum(nil)), r.Header.Get("Expect"), r.ContentLength < 0, err)
	})
	mux.HandleFunc("/bytes/{n}", func(w http.ResponseWriter, r *http.Request) {
		n, err := strconv.ParseInt(r.PathValue("n"), 10, 64)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		w.Header().Set("Content-Length", strconv.FormatInt(n, 10))
		_, _ = io.Copy(w, newPattern(n))
	})
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		_, _ = fmt.Fprintf(w, "instance=sink %s %s\n", r.Method, r.URL)
	})
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: time.Minute}
	go func() { _ = srv.Serve(l) }()
	return srv
}

// pattern is bytes without end in which no two blocks of 64 KiB are alike.
type pattern struct {
	block [64 << 10]byte
	at    int64
	left  int64
}

func newPattern(n int64) *pattern {
	p := &pattern{left: n}
	sum := sha256.Sum256([]byte("meshd"))
	for i := 0; i < len(p.block); i += len(sum) {
		copy(p.block[i:], sum[:])
		sum = sha256.Sum256(sum[:])
	}
	return p
}

// Read implements io.Reader.
func (p *pattern) Read(b []byte) (int, error) {
	if p.left == 0 {
		return 0, io.EOF
	}
	offset := int(p.at % int64(len(p.block)))
	if offset == 0 {
		copy(p.block[:8], fmt.Sprintf("%08x", p.at>>16))
	}
	n := copy(b[:min(int64(len(b)), p.left)], p.block[offset:])
	p.at += int64(n)
	p.left -= int64(n)
	return n, nil
}

// sumOf is the checksum of a pattern.
func sumOf(t *testing.T, n int64) string {
	t.Helper()
	sum := sha256.New()
	if _, err := io.Copy(sum, newPattern(n)); err != nil {
		t.Fatal(err)
	}
	return hex.EncodeToString(sum.Sum(nil))
}

const haproxyConfig = `
global
  maxconn 4000
defaults
  mode http
  timeout connect 5s
  timeout client 30s
  timeout server 30s
frontend in
  bind 127.0.0.1:%d
  default_backend out
backend out
  http-reuse always
  server s1 127.0.0.1:%d
`

// haproxy runs a real HAProxy on the host, from one port to another.
func (h *host) haproxy(port, to int) {
	h.T.Helper()
	conf := h.Write(fmt.Sprintf(haproxyConfig, port, to), 0o644, fmt.Sprintf("haproxy-%d.cfg", port))
	h.serve(port, "/usr/sbin/haproxy", "-db", "-f", conf)
}

// Servers of the HTTP peers, and the ports at which web calls them.
const (
	atSink, atNginx, atPython, atHAProxy = "http://127.0.0.1:9301", "http://127.0.0.1:9302", "http://127.0.0.1:9303", "http://127.0.0.1:9304"
	atBalancer                           = "http://127.0.0.1:9400" // HAProxy before the upstream of nginx
)

// TestHTTPPeers: curl, wrk, Python and HAProxy call nginx, HAProxy, Python and Go
// through two proxies.
func TestHTTPPeers(t *testing.T) { //nolint:tparallel // the peers share two hosts
	t.Parallel()
	m := newReal(t, offer{name: "sink", protocol: "http", port: 8301, local: 9301}, offer{name: "nginx", protocol: "http", port: 8302, local: 9302},
		offer{name: "python", protocol: "http", port: 8303, local: 9303}, offer{name: "haproxy", protocol: "http", port: 8304, local: 9304})
	srv := sink(m.far.Listen("127.0.0.1:8301"))
	t.Cleanup(func() { _ = srv.Close() })
	m.far.nginx(8302, "nginx")
	m.far.Write("a page of Python's\n", 0o644, "www", "page.txt")
	m.far.serve(8303, python, "-u", "-c", pythonServer, "8303", m.far.Path("www"))
	m.far.haproxy(8304, 8302)
	m.web.haproxy(9400, 9302)
	for _, base := range []string{atSink, atNginx, atPython, atHAProxy, atBalancer} {
		m.web.answers(10*time.Second, "200", base+"/page.txt")
	}
	t.Run("curl", m.curlPeers)
	t.Run("pipeline", m.pipeline)
	t.Run("wrk", m.wrk)
	t.Run("python", m.httpClient)
}

func (m *real) curlPeers(t *testing.T) {
	const size = 3 << 20
	file := m.web.Write(pull(t, newPattern(size)), 0o644, "upload.bin")
	sum := sumOf(t, size)
	for _, c := range []struct {
		name string
		args []string
		want []string // in what it prints, standard error first
	}{
		{"GET", []string{atNginx + "/x"}, []string{"instance=nginx uri=/x "}},
		{"GET of Python", []string{atPython + "/page.txt"}, []string{"a page of Python's"}},
		{"GET of HAProxy", []string{atHAProxy + "/x"}, []string{"instance=nginx uri=/x "}},
		{"GET through HAProxy", []string{atBalancer + "/x"}, []string{"instance=nginx uri=/x "}},
		{"404", []string{"-o", "/dev/null", "-w", "%{http_code}", atPython + "/nothing"}, []string{"404"}},
		{"HEAD", []string{"-I", atPython + "/page.txt"}, []string{"HTTP/1.1 200", "Content-Length: 19"}},
		{"HEAD of a big one", []string{"-I", atSink + "/bytes/5000000000"}, []string{"Content-Length: 5000000000"}},
		{"POST with Expect", []string{"-v", "-H", "Expect: 100-continue", "--data-binary", "@" + file, atSink + "/sum"}, []string{"< HTTP/1.1 100", "POST 3145728 " + sum}},
		{"PUT", []string{"-T", file, atSink + "/sum"}, []string{"PUT 3145728 " + sum, "chunked=false"}},
		{"chunked", []string{"-H", "Transfer-Encoding: chunked", "-T", file, atSink + "/sum"}, []string{"PUT 3145728 " + sum, "chunked=true"}},
		{"kept", []string{"-v", atNginx + "/1", atNginx + "/2", atNginx + "/3"}, []string{"Re-using existing connection", "uri=/1 ", "uri=/2 ", "uri=/3 "}},
		{"HTTP/1.0", []string{"-0", atNginx + "/x"}, []string{"instance=nginx uri=/x "}},
		{"range", []string{"-r", "2-5", atPython + "/page.txt"}, []string{"page"}},
	} {
		r := m.web.Run("curl", append([]string{"--silent", "--show-error", "--max-time", "20"}, c.args...)...)
		for _, want := range c.want {
			if r.Code != 0 || !strings.Contains(r.Stderr+r.Stdout, want) {
				t.Errorf("%s: curl exit %d, without %q:\n%s%s", c.name, r.Code, want, r.Stderr, r.Stdout)
			}
		}
	}
}

func pull(t *testing.T, r io.Reader) string {
	t.Helper()
	data, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// pipeline sends requests in one write, and reads the answers in their order.
func (m *real) pipeline(t *testing.T) {
	c := m.web.connect("127.0.0.1:9302")
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	const n = 20
	var all strings.Builder
	for i := range n {
		fmt.Fprintf(&all, "GET /pipelined/%d HTTP/1.1\r\nHost: nginx\r\n\r\n", i)
	}
	if _, err := io.WriteString(c, all.String()); err != nil {
		t.Fatal(err)
	}
	answers := bufio.NewReader(c)
	for i := range n {
		resp, err := http.ReadResponse(answers, nil)
		if err != nil {
			t.Fatalf("answer %d: %v", i, err)
		}
		body, err := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if err != nil || !strings.Contains(string(body), fmt.Sprintf("uri=/pipelined/%d ", i)) {
			t.Errorf("answer %d: %q, %v", i, body, err)
		}
	}
}

var (
	wrkRequests = regexp.MustCompile(`(\d+) requests in`)
	wrkTrouble  = regexp.MustCompile(`Socket errors|Non-2xx`)
)

// wrk runs a short closed loop at nginx.
func (m *real) wrk(t *testing.T) {
	r := m.web.Run("wrk", "-t", "1", "-c", "32", "-d", "1s", atNginx+"/wrk")
	n := wrkRequests.FindStringSubmatch(r.Stdout)
	if r.Code != 0 || n == nil || len(n[1]) < 3 || wrkTrouble.MatchString(r.Stdout) {
		t.Errorf("wrk: exit %d\n%s%s", r.Code, r.Stdout, r.Stderr)
		return
	}
	t.Logf("wrk: %s requests in 1 s, all of them 2xx", n[1])
}

// pythonServer is http.server with kept connections.
const pythonServer = `
import functools, http.server, sys
class Handler(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            n = 0
            while True:
                size = int(self.rfile.readline(), 16)
                n += len(self.rfile.read(size))
                self.rfile.readline()
                if size == 0: break
        else:
            n = len(self.rfile.read(int(self.headers["Content-Length"])))
        body = f"{n} bytes\n".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), functools.partial(Handler, directory=sys.argv[2])).serve_forever()
`

// pythonClient is http.client on one connection.
const pythonClient = `
import hashlib, http.client
c = http.client.HTTPConnection("127.0.0.1", 9303, timeout=20)
for _ in range(50):
    c.request("GET", "/page.txt")
    r = c.getresponse()
    assert (r.status, r.read()) == (200, b"a page of Python's\n"), r.status
sock = c.sock
c.request("POST", "/", body=b"x" * 1_000_000)
assert c.getresponse().read() == b"1000000 bytes\n"
c.request("POST", "/", body=(b"y" * 1000 for _ in range(500)), encode_chunked=True, headers={"Transfer-Encoding": "chunked"})
assert c.getresponse().read() == b"500000 bytes\n"
assert c.sock is sock, "the connection was not kept"
c.request("HEAD", "/page.txt")
r = c.getresponse()
assert (r.status, r.getheader("Content-Length"), r.read()) == (200, "19", b"")
d = http.client.HTTPConnection("127.0.0.1", 9301, timeout=20)
d.request("PUT", "/sum", body=b"z" * 200_000)
assert hashlib.sha256(b"z" * 200_000).hexdigest().encode() in d.getresponse().read()
d.request("GET", "/bytes/20000000")
assert len(d.getresponse().read()) == 20_000_000
print("all good")
`

func (m *real) httpClient(t *testing.T) {
	r := m.web.Run(python, "-c", pythonClient)
	if r.Code != 0 || r.Stdout != "all good\n" {
		t.Errorf("http.client: exit %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
}

// client returns an HTTP client on the host.
func (h *host) client(transport *http.Transport) *http.Client {
	dial := h.dialer()
	transport.DialContext = func(_ context.Context, _, addr string) (net.Conn, error) { return dial(addr) }
	h.T.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: 2 * time.Minute}
}

// asUser returns the arguments that run a program as another user.
func asUser(t *testing.T, user string, args ...string) []string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("only root can run as another")
	}
	return append([]string{"setpriv", "--reuid", user, "--regid", user, "--clear-groups"}, args...)
}
