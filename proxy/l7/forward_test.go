package l7_test

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/meshd/meshd/proxy/l7"
)

func httpClient(tb testing.TB) *http.Client {
	tb.Helper()
	tr := &http.Transport{DisableCompression: true, MaxIdleConnsPerHost: 64}
	tb.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

func newRequest(tb testing.TB, method, url string, body io.Reader) *http.Request {
	tb.Helper()
	req, err := http.NewRequestWithContext(tb.Context(), method, url, body)
	if err != nil {
		tb.Fatal(err)
	}
	return req
}

func do(tb testing.TB, c *http.Client, req *http.Request) (answered, string) {
	tb.Helper()
	resp, err := c.Do(req)
	if err != nil {
		tb.Fatal(err)
	}
	return whole(tb, resp)
}

// TestMessages sends what applications send through the proxy, between
// net/http on both sides.
func TestMessages(t *testing.T) {
	upstream := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		switch r.URL.Path {
		case "/chunked":
			w.WriteHeader(http.StatusOK)
			for _, part := range []string{"one ", "two ", "three"} {
				say(w, "%s", part)
				if f, ok := w.(http.Flusher); ok {
					f.Flush()
				}
			}
		case "/trailers":
			w.Header().Set("Trailer", "X-Sum")
			say(w, "%s", body)
			w.Header().Set("X-Sum", r.Trailer.Get("X-In"))
		case "/204":
			w.WriteHeader(http.StatusNoContent)
		case "/304":
			w.Header().Set("ETag", `"x"`)
			w.WriteHeader(http.StatusNotModified)
		case "/close":
			w.Header().Set("Connection", "close")
			say(w, "bye")
		case "/large":
			w.Header().Set("Content-Length", "1000000")
			_, _ = w.Write(bytes.Repeat([]byte("x"), 1000000))
		default:
			say(w, "%s %s %d %q", r.Method, r.URL.Path, r.ContentLength, body)
		}
	})
	p := start(t, options{upstream: upstream})
	for _, tt := range []struct {
		name, method, path string
		body               io.Reader
		trailer            string
		status             int
		want               string
		wantTrailer        string
	}{
		{name: "get", method: "GET", path: "/a", status: 200, want: `GET /a 0 ""`},
		{name: "head", method: "HEAD", path: "/a", status: 200},
		{name: "post sized", method: "POST", path: "/a", body: strings.NewReader("hello"), status: 200, want: `POST /a 5 "hello"`},
		{name: "post empty", method: "POST", path: "/a", status: 200, want: `POST /a 0 ""`},
		{name: "post chunked", method: "POST", path: "/a", body: io.MultiReader(strings.NewReader("hel"), strings.NewReader("lo")), status: 200, want: `POST /a -1 "hello"`},
		{name: "delete", method: "DELETE", path: "/a", status: 200, want: `DELETE /a 0 ""`},
		{name: "response chunked", method: "GET", path: "/chunked", status: 200, want: "one two three"},
		{name: "trailers both ways", method: "POST", path: "/trailers", body: io.MultiReader(strings.NewReader("x")), trailer: "7", status: 200, want: "x", wantTrailer: "7"},
		{name: "204", method: "GET", path: "/204", status: 204},
		{name: "304", method: "GET", path: "/304", status: 304},
		{name: "upstream closes", method: "GET", path: "/close", status: 200, want: "bye"},
		{name: "large", method: "GET", path: "/large", status: 200, want: strings.Repeat("x", 1000000)},
		{name: "dots are resolved", method: "GET", path: "/a/../b//c/%7e", status: 200, want: `GET /b/c/~ 0 ""`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			req := newRequest(t, tt.method, "http://"+p.addr+tt.path, tt.body)
			if tt.trailer != "" {
				req.Trailer = http.Header{"X-In": {tt.trailer}}
			}
			resp, body := do(t, httpClient(t), req)
			if resp.StatusCode != tt.status || body != tt.want || resp.Trailer.Get("X-Sum") != tt.wantTrailer {
				t.Errorf("got %d %.80q trailer %q, want %d %.80q trailer %q",
					resp.StatusCode, body, resp.Trailer.Get("X-Sum"), tt.status, tt.want, tt.wantTrailer)
			}
			if r := p.next(t); r.Status != tt.status || r.Reason != l7.None || r.Out != int64(len(tt.want)) {
				t.Errorf("record %+v", r)
			}
		})
	}
}

func TestConnectionsAreKept(t *testing.T) {
	accepted := 0
	upstream := serveRaw(t, func(nc *net.TCPConn, r *bufio.Reader) {
		accepted++
		for {
			if _, err := readHead(r); err != nil {
				return
			}
			say(nc, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
		}
	})
	p := start(t, options{upstream: upstream})
	c := connect(t, p.addr)
	for range 50 {
		c.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n")
		if _, body := c.response("GET"); body != "ok" {
			t.Fatal(body)
		}
	}
	if accepted != 1 {
		t.Errorf("50 requests took %d connections to the upstream, want 1", accepted)
	}
}

func TestPipelining(t *testing.T) {
	upstream := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		say(w, "%s%s", r.URL.Path, body)
	})
	p := start(t, options{upstream: upstream})
	c := connect(t, p.addr)
	c.send("GET /1 HTTP/1.1\r\nHost: a\r\n\r\n" +
		"POST /2 HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc" +
		"POST /3 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nxyz\r\n0\r\n\r\n" +
		"HEAD /4 HTTP/1.1\r\nHost: a\r\n\r\n" +
		"GET /5 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\nGET /never HTTP/1.1\r\nHost: a\r\n\r\n")
	for _, tt := range []struct{ method, want string }{{"GET", "/1"}, {"POST", "/2abc"}, {"POST", "/3xyz"}, {"HEAD", ""}, {"GET", "/5"}} {
		if _, body := c.response(tt.method); body != tt.want {
			t.Errorf("got %q, want %q", body, tt.want)
		}
	}
	c.ended()
}

func TestForwardedHead(t *testing.T) {
	heads := make(chan string, 8)
	upstream := serveRaw(t, func(nc *net.TCPConn, r *bufio.Reader) {
		for {
			head, err := readHead(r)
			if err != nil {
				return
			}
			heads <- head
			say(nc, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: x-hop\r\nX-Hop: 1\r\nX-End: 2\r\nKeep-Alive: timeout=5\r\n\r\n")
		}
	})
	p := start(t, options{upstream: upstream, info: l7.ConnInfo{ForwardedClientCert: "By=spiffe://a/x;URI=spiffe://a/y", Authority: "fallback"}})
	for _, tt := range []struct{ name, in, want string }{
		{
			"hop by hop fields stay",
			"GET /a?b HTTP/1.1\r\nHost: API.example.:80\r\nConnection: keep-alive, x-secret\r\nX-Secret: 1\r\nTE: trailers\r\nX-Keep: 2\r\n\r\n",
			"GET /a?b HTTP/1.1\r\nHost: api.example:80\r\nX-Keep: 2\r\nx-forwarded-client-cert: By=spiffe://a/x;URI=spiffe://a/y\r\n",
		},
		{
			"what only the mesh may say is removed",
			"GET / HTTP/1.1\r\nHost: a\r\nX-Forwarded-Client-Cert: URI=spiffe://evil\r\nMesh-Error: x\r\nx-forwarded-client-cert: two\r\n\r\n",
			"GET / HTTP/1.1\r\nHost: a\r\nx-forwarded-client-cert: By=spiffe://a/x;URI=spiffe://a/y\r\n",
		},
		{
			"1.0 without host",
			"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
			"GET / HTTP/1.1\r\nHost: fallback\r\nx-forwarded-client-cert: By=spiffe://a/x;URI=spiffe://a/y\r\n",
		},
		{
			"absolute form and the smallest path",
			"POST http://a/x/./%41/../y HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n",
			"POST /x/y HTTP/1.1\r\nHost: a\r\nx-forwarded-client-cert: By=spiffe://a/x;URI=spiffe://a/y\r\nContent-Length: 0\r\n",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := connect(t, p.addr)
			c.send("%s", tt.in)
			resp, _ := c.response("GET")
			if diff := cmp.Diff(tt.want, <-heads); diff != "" {
				t.Error(diff)
			}
			if resp.Header.Get("X-Hop") != "" || resp.Header.Get("Keep-Alive") != "" || resp.Header.Get("X-End") != "2" {
				t.Errorf("response fields %v", resp.Header)
			}
		})
	}
}

// TestFramingIsWrittenAnew has each side use what the other cannot know.
func TestFramingIsWrittenAnew(t *testing.T) {
	answers := map[string]string{
		"/chunked": "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;ext=1\r\nhello\r\n0\r\nX-Sum: 1\r\n\r\n",
		"/close":   "HTTP/1.0 200 OK\r\n\r\nhello",
		"/sized":   "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
		"/204":     "HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n",
		"/304":     "HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n",
	}
	upstream := serveRaw(t, func(nc *net.TCPConn, r *bufio.Reader) {
		head, err := readHead(r)
		if err == nil {
			say(nc, "%s", answers[strings.Fields(head)[1]])
		}
	})
	p := start(t, options{upstream: upstream})
	const sized, chunked, kept = "Content-Length: 5\r\n", "Transfer-Encoding: chunked\r\n", "Connection: keep-alive\r\n"
	const closed, ok = "Connection: close\r\n", "HTTP/1.1 200 OK\r\n"
	for _, tt := range []struct{ request, want string }{
		{"GET /chunked HTTP/1.1", ok + chunked + closed + "\r\n5\r\nhello\r\n0\r\nX-Sum: 1\r\n\r\n"},
		{"GET /close HTTP/1.1", ok + chunked + closed + "\r\n5\r\nhello\r\n0\r\n\r\n"},
		{"GET /sized HTTP/1.1", ok + sized + closed + "\r\nhello"},
		{"GET /204 HTTP/1.1", "HTTP/1.1 204 No Content\r\n" + closed + "\r\n"},
		{"GET /304 HTTP/1.1", "HTTP/1.1 304 Not Modified\r\n" + sized + closed + "\r\n"},
		{"HEAD /sized HTTP/1.1", ok + sized + closed + "\r\n"},
		{"HEAD /chunked HTTP/1.1", ok + closed + "\r\n"},
		{"GET /chunked HTTP/1.0", ok + closed + "\r\nhello"},
		{"GET /close HTTP/1.0", ok + closed + "\r\nhello"},
		{"GET /sized HTTP/1.0", ok + sized + closed + "\r\nhello"},
	} {
		c := connect(t, p.addr)
		c.send("%s\r\nHost: a\r\nConnection: close\r\n\r\n", tt.request)
		got, err := io.ReadAll(c.r)
		if err != nil {
			t.Errorf("%s: %v", tt.request, err)
		}
		if diff := cmp.Diff(tt.want, string(got)); diff != "" {
			t.Errorf("%s: %s", tt.request, diff)
		}
	}
	c := connect(t, p.addr)
	for range 2 {
		c.send("GET /sized HTTP/1.0\r\nHost: a\r\nConnection: keep-alive\r\n\r\n")
		if head, err := readHead(c.r); err != nil || head != ok+sized+kept {
			t.Fatalf("got %q, %v", head, err)
		}
		if _, err := c.r.Discard(5); err != nil {
			t.Fatal(err)
		}
	}
}

func TestInterimResponses(t *testing.T) {
	upstream := serveHTTP(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Link", "</a.css>; rel=preload")
		w.WriteHeader(http.StatusEarlyHints)
		w.WriteHeader(http.StatusEarlyHints)
		say(w, "done")
	})
	p := start(t, options{upstream: upstream})
	seen := 0
	trace := &httptrace.ClientTrace{Got1xxResponse: func(code int, h textproto.MIMEHeader) error {
		if code == http.StatusEarlyHints && h.Get("Link") != "" {
			seen++
		}
		return nil
	}}
	req := newRequest(t, "GET", "http://"+p.addr+"/", nil)
	if _, body := do(t, httpClient(t), req.WithContext(httptrace.WithClientTrace(t.Context(), trace))); body != "done" || seen != 2 {
		t.Errorf("got %q after %d early hints, want done after 2", body, seen)
	}
	c := connect(t, p.addr)
	c.send("GET / HTTP/1.0\r\nHost: a\r\n\r\n")
	if resp, body := c.response("GET"); resp.StatusCode != 200 || body != "done" {
		t.Errorf("HTTP/1.0 got %d %q, want no interim response", resp.StatusCode, body)
	}
}

func TestExpectContinue(t *testing.T) {
	upstream := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/refused" {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		body, _ := io.ReadAll(r.Body)
		say(w, "got %s", body)
	})
	p := start(t, options{upstream: upstream})
	c := connect(t, p.addr)
	c.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n")
	if head, err := readHead(c.r); err != nil || head != "HTTP/1.1 100 Continue\r\n" {
		t.Fatalf("got %q, %v; want 100 Continue", head, err)
	}
	c.send("hello")
	if _, body := c.response("POST"); body != "got hello" {
		t.Errorf("got %q", body)
	}
	c.send("POST /refused HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n")
	if resp, _ := c.response("POST"); resp.StatusCode != 403 {
		t.Errorf("got %d, want 403 without a 100 before it", resp.StatusCode)
	}
	c.ended()
}

// TestLargeBodies carries 64 MiB each way, at once, with checksums.
func TestLargeBodies(t *testing.T) {
	const size = 64 << 20
	upstream := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/sized" {
			w.Header().Set("Content-Length", fmt.Sprint(size))
		}
		if err := http.NewResponseController(w).EnableFullDuplex(); err != nil {
			t.Error(err)
		}
		_, _ = io.Copy(w, r.Body)
	})
	p := start(t, options{upstream: upstream})
	for _, path := range []string{"/sized", "/chunked"} {
		t.Run(path, func(t *testing.T) {
			sent, received := sha256.New(), sha256.New()
			body := io.TeeReader(io.LimitReader(&pattern{}, size), sent)
			req := newRequest(t, "POST", "http://"+p.addr+path, body)
			if path == "/sized" {
				req.ContentLength = size
			}
			resp, err := httpClient(t).Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = resp.Body.Close() }() // read to its end
			n, err := io.Copy(received, resp.Body)
			if err != nil || n != size || !bytes.Equal(sent.Sum(nil), received.Sum(nil)) {
				t.Errorf("got %d bytes, %v, sums equal %v", n, err, bytes.Equal(sent.Sum(nil), received.Sum(nil)))
			}
		})
	}
}

// pattern is bytes that do not repeat at any buffer's size.
type pattern struct{ n int }

func (p *pattern) Read(b []byte) (int, error) {
	for i := range b {
		b[i] = byte(p.n >> (p.n % 13))
		p.n++
	}
	return len(b), nil
}
