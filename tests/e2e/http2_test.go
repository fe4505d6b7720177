package e2e_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	xhttp2 "golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// Services of TestHTTP2Peers, as web calls them.
const (
	atHTTP2, atNghttpd, atHTTP1 = "http://127.0.0.1:9601", "http://127.0.0.1:9602", "http://127.0.0.1:9604"
)

// manyStreams are open at once to one instance.
const manyStreams = 1000

// prior is a transport with prior knowledge of HTTP/2.
func prior() *http.Transport {
	t := &http.Transport{Protocols: new(http.Protocols), DisableCompression: true}
	t.Protocols.SetUnencryptedHTTP2(true)
	return t
}

// crowd holds requests until so many are there at once.
type crowd struct {
	size  int64
	there atomic.Int64
	full  chan struct{}
	begun chan struct{} // a request to /hang or /swallow is there,
	gone  chan error    // and why it ended
}

// sink2 is sink over HTTP/2 with prior knowledge alone, with a place to meet.
func sink2(l net.Listener, c *crowd) *http.Server {
	inner := sink(nowhere{}).Handler
	mux := http.NewServeMux()
	mux.Handle("/", inner)
	mux.HandleFunc("/meet", func(w http.ResponseWriter, r *http.Request) {
		if c.there.Add(1) == c.size {
			close(c.full)
		}
		select {
		case <-c.full:
			_, _ = fmt.Fprintf(w, "met over %s", r.Proto)
		case <-r.Context().Done():
		}
	})
	mux.HandleFunc("/hang", func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, "first")
		_ = http.NewResponseController(w).Flush()
		c.begun <- struct{}{}
		<-r.Context().Done()
		c.gone <- r.Context().Err()
	})
	mux.HandleFunc("/swallow", func(w http.ResponseWriter, r *http.Request) {
		c.begun <- struct{}{}
		_, err := io.Copy(io.Discard, r.Body)
		c.gone <- err
	})
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: time.Minute, Protocols: new(http.Protocols), HTTP2: &http.HTTP2Config{MaxConcurrentStreams: 250}}
	srv.Protocols.SetUnencryptedHTTP2(true)
	go func() { _ = srv.Serve(l) }()
	return srv
}

// nowhere is a listener without connections.
type nowhere struct{ net.Listener }

// Accept implements net.Listener.
func (nowhere) Accept() (net.Conn, error) { return nil, net.ErrClosed }

// Close implements net.Listener.
func (nowhere) Close() error { return nil }

// TestHTTP2Peers: curl, h2load, nghttp, Python and Go call nghttpd and Go through
// two proxies, over HTTP/2 and over HTTP/1.1, from end to end and translated.
func TestHTTP2Peers(t *testing.T) { //nolint:tparallel // the peers share two hosts
	t.Parallel()
	m := newReal(t, offer{name: "sink", protocol: "http2", port: 8601, local: 9601}, offer{name: "nghttpd", protocol: "http2", port: 8602, local: 9602},
		offer{name: "old", protocol: "http", port: 8604, local: 9604})
	c := &crowd{size: manyStreams, full: make(chan struct{}), begun: make(chan struct{}, 16), gone: make(chan error, 16)}
	srv := sink2(m.far.Listen("127.0.0.1:8601"), c)
	t.Cleanup(func() { _ = srv.Close() })
	old := sink(m.far.Listen("127.0.0.1:8604"))
	t.Cleanup(func() { _ = old.Close() })
	m.far.Write("a page of nghttpd's\n", 0o644, "www", "page.txt")
	m.far.serve(8602, "nghttpd", "--no-tls", "-a", "127.0.0.1", "-d", m.far.Path("www"), "8602")
	for _, base := range []string{atHTTP2 + "/", atNghttpd + "/page.txt", atHTTP1 + "/"} {
		m.web.answers(10*time.Second, "200", base)
	}
	t.Run("curl", m.curlHTTP2)
	t.Run("h2load", m.h2load)
	t.Run("python", m.pythonToHTTP2)
	t.Run("many streams", func(t *testing.T) { m.meet(t, c) })
	t.Run("vanish", func(t *testing.T) { m.vanishHTTP2(t, c) })
	t.Run("1 GiB", m.gigabyteHTTP2)
}

func (m *real) curlHTTP2(t *testing.T) {
	const size = 3 << 20
	file := m.web.Write(pull(t, newPattern(size)), 0o644, "upload.bin")
	sum := sumOf(t, size)
	for _, c := range []struct {
		name string
		args []string
		want []string // in what it prints, standard error first
	}{
		{"GET", []string{"-v", "--http2-prior-knowledge", atNghttpd + "/page.txt"}, []string{"< HTTP/2 200", "a page of nghttpd's"}},
		{"404", []string{"-v", "--http2-prior-knowledge", atNghttpd + "/nothing"}, []string{"< HTTP/2 404"}},
		{"HEAD", []string{"-I", "--http2-prior-knowledge", atHTTP2 + "/bytes/5000000000"}, []string{"HTTP/2 200", "content-length: 5000000000"}},
		{"POST", []string{"--http2-prior-knowledge", "--data-binary", "@" + file, atHTTP2 + "/sum"}, []string{"POST 3145728 " + sum}},
		{"PUT without a length", []string{"--http2-prior-knowledge", "-H", "Content-Length:", "-T", file, atHTTP2 + "/sum"}, []string{"PUT 3145728 " + sum}},
		{"from HTTP/1.1", []string{"-v", "--http1.1", atNghttpd + "/page.txt"}, []string{"< HTTP/1.1 200", "a page of nghttpd's"}},
		{"POST from HTTP/1.1", []string{"--http1.1", "--data-binary", "@" + file, atHTTP2 + "/sum"}, []string{"POST 3145728 " + sum}},
		{"chunked from HTTP/1.1", []string{"--http1.1", "-H", "Transfer-Encoding: chunked", "-T", file, atHTTP2 + "/sum"}, []string{"PUT 3145728 " + sum}},
		{"to HTTP/1.1", []string{"-v", "--http2-prior-knowledge", "--data-binary", "@" + file, atHTTP1 + "/sum"}, []string{"< HTTP/2 200", "POST 3145728 " + sum}},
	} {
		r := m.web.Run("curl", append([]string{"--silent", "--show-error", "--max-time", "20"}, c.args...)...)
		for _, want := range c.want {
			if r.Code != 0 || !strings.Contains(r.Stderr+r.Stdout, want) {
				t.Errorf("%s: curl exit %d, without %q:\n%s%s", c.name, r.Code, want, r.Stderr, r.Stdout)
			}
		}
	}
	r := m.web.Run("nghttp", "-v", atNghttpd+"/page.txt", atNghttpd+"/page.txt")
	if r.Code != 0 || !strings.Contains(r.Stdout, ":status: 200") || !strings.Contains(r.Stdout, "GOAWAY") {
		t.Errorf("nghttp: exit %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
}

var h2loadRequests = regexp.MustCompile(`requests: (\d+) total, (\d+) started, (\d+) done, (\d+) succeeded, 0 failed, 0 errored, 0 timeout`)

// h2load runs 20,000 requests on ten connections of 100 streams.
func (m *real) h2load(t *testing.T) {
	r := m.web.Run("h2load", "-c", "10", "-m", "100", "-n", "20000", atNghttpd+"/page.txt")
	n := h2loadRequests.FindStringSubmatch(r.Stdout)
	if r.Code != 0 || n == nil || n[1] != n[4] || !strings.Contains(r.Stdout, "status codes: 20000 2xx") {
		t.Errorf("h2load: exit %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
}

// pythonToHTTP2 is http.client, which speaks HTTP/1.1 only.
func (m *real) pythonToHTTP2(t *testing.T) {
	const client = `
import hashlib, http.client
c = http.client.HTTPConnection("127.0.0.1", 9601, timeout=20)
for i in range(50):
    c.request("GET", f"/{i}")
    r = c.getresponse()
    assert (r.status, r.read()) == (200, f"instance=sink GET /{i}\n".encode()), r.status
sock = c.sock
c.request("PUT", "/sum", body=b"z" * 200_000)
assert hashlib.sha256(b"z" * 200_000).hexdigest().encode() in c.getresponse().read()
c.request("POST", "/sum", body=(b"y" * 1000 for _ in range(500)), encode_chunked=True, headers={"Transfer-Encoding": "chunked"})
assert hashlib.sha256(b"y" * 500_000).hexdigest().encode() in c.getresponse().read()
c.request("GET", "/bytes/20000000")
assert len(c.getresponse().read()) == 20_000_000
assert c.sock is sock, "the connection was not kept"
print("all good")
`
	r := m.web.Run(python, "-c", client)
	if r.Code != 0 || r.Stdout != "all good\n" {
		t.Errorf("http.client: exit %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
}

// meet has many streams open at once: none is answered before all are there.
func (m *real) meet(t *testing.T, c *crowd) {
	t.Helper()
	client := m.web.client(prior())
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	var asking sync.WaitGroup
	var met atomic.Int64
	for range c.size {
		asking.Go(func() {
			req, err := http.NewRequestWithContext(ctx, http.MethodGet, atHTTP2+"/meet", nil)
			if err != nil {
				t.Error(err)
				return
			}
			resp, err := client.Do(req)
			if err != nil {
				if ctx.Err() == nil {
					t.Error(err)
				}
				return
			}
			defer resp.Body.Close() //nolint:errcheck // read to its end
			if body, err := io.ReadAll(resp.Body); err != nil || string(body) != "met over HTTP/2.0" {
				t.Errorf("%s %q, %v", resp.Status, body, err)
				cancel() // they will never be all there
				return
			}
			met.Add(1)
		})
	}
	asking.Wait()
	if met.Load() != c.size {
		t.Errorf("%d streams were open at once, want %d", met.Load(), c.size)
	}
}

// vanishHTTP2: the application hears of clients that are gone, whether they reset
// a stream or their connection ends.
func (m *real) vanishHTTP2(t *testing.T, c *crowd) {
	t.Helper()
	for _, path := range []string{"/hang", "/swallow"} {
		for how, vanish := range map[string]func(c net.Conn, f *xhttp2.Framer) error{
			"a stream is reset":   func(_ net.Conn, f *xhttp2.Framer) error { return f.WriteRSTStream(1, xhttp2.ErrCodeCancel) },
			"the connection ends": func(c net.Conn, _ *xhttp2.Framer) error { return c.Close() },
			"the client goes away": func(c net.Conn, f *xhttp2.Framer) error {
				return errors.Join(f.WriteGoAway(0, xhttp2.ErrCodeNo, nil), c.Close())
			},
		} {
			conn := m.web.connect("127.0.0.1:9601")
			f := xhttp2.NewFramer(conn, conn)
			var head bytes.Buffer
			enc := hpack.NewEncoder(&head)
			for _, field := range []hpack.HeaderField{{Name: ":method", Value: "POST"}, {Name: ":scheme", Value: "http"}, {Name: ":path", Value: path}, {Name: ":authority", Value: "sink"}} {
				if err := enc.WriteField(field); err != nil {
					t.Fatal(err)
				}
			}
			_, err := io.WriteString(conn, xhttp2.ClientPreface)
			err = errors.Join(err, f.WriteSettings(), f.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: 1, BlockFragment: head.Bytes(), EndHeaders: true}),
				f.WriteData(1, false, make([]byte, 1000)))
			if err != nil {
				t.Fatal(err)
			}
			select {
			case <-c.begun:
			case <-time.After(10 * time.Second):
				t.Fatalf("%s at %s: the request does not arrive", how, path)
			}
			if err := vanish(conn, f); err != nil {
				t.Error(err)
			}
			select {
			case err := <-c.gone:
				if err == nil {
					t.Errorf("%s at %s: the application takes what came for all", how, path)
				}
			case <-time.After(10 * time.Second):
				t.Errorf("%s at %s: the application does not hear of it", how, path)
			}
			_ = conn.Close()
		}
	}
	m.web.answers(5*time.Second, "200", atHTTP2+"/")
}

// gigabyteHTTP2 sends 1 GiB up and another one down at once, on one connection.
func (m *real) gigabyteHTTP2(t *testing.T) {
	sum, client := sumOf(t, gib), m.web.client(prior())
	m.grows(t, "1 GiB up and 1 GiB down over HTTP/2", func() {
		var both sync.WaitGroup
		both.Go(func() {
			resp, err := client.Post(atHTTP2+"/sum", "application/octet-stream", io.LimitReader(newPattern(gib), gib))
			if err != nil {
				t.Error(err)
				return
			}
			defer resp.Body.Close() //nolint:errcheck // read to its end
			if body, err := io.ReadAll(resp.Body); err != nil || !strings.Contains(string(body), fmt.Sprint("POST ", gib, " ", sum)) {
				t.Errorf("the server got %q, %v, want %s", body, err, sum)
			}
		})
		both.Go(func() {
			resp, err := client.Get(fmt.Sprint(atHTTP2, "/bytes/", gib))
			if err != nil {
				t.Error(err)
				return
			}
			defer resp.Body.Close() //nolint:errcheck // read to its end
			if got, err := sumUp(resp.Body); err != nil || got != sum {
				t.Errorf("the client got %s, %v, want %s", got, err, sum)
			}
		})
		both.Wait()
	})
}
