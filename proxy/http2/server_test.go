package http2_test

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/meshd/meshd/proxy/http1"
	"github.com/meshd/meshd/proxy/http2"
	"github.com/meshd/meshd/proxy/l7"
)

// handler makes a Handler of a function.
type handler func(ex *l7.Exchange) l7.Response

func (h handler) Handle(ex *l7.Exchange) l7.Response { return h(ex) }

// records keeps what a sink was told.
type records struct {
	mu  sync.Mutex
	all []l7.Record
	got chan struct{}
	off atomic.Bool
}

func newRecords() *records { return &records{got: make(chan struct{}, 10000)} }

func (r *records) sink(rec *l7.Record) {
	if r.off.Load() {
		return
	}
	r.mu.Lock()
	c := *rec
	c.Method, c.Path, c.Authority = bytes.Clone(c.Method), bytes.Clone(c.Path), bytes.Clone(c.Authority)
	r.all = append(r.all, c)
	r.mu.Unlock()
	r.got <- struct{}{}
}

// next waits for the n-th record, counted from 0.
func (r *records) next(tb testing.TB) l7.Record {
	tb.Helper()
	select {
	case <-r.got:
	case <-time.After(20 * time.Second):
		tb.Fatal("no record came")
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	rec := r.all[0]
	r.all = r.all[1:]
	return rec
}

// serving is a listener whose connections are served.
type serving struct {
	addr  string
	count http2.Counters
	recs  *records

	mu    sync.Mutex
	conns []*http2.Conn
	ended chan error
}

func serve(tb testing.TB, h l7.Handler, change func(*http2.ServerConfig)) *serving {
	tb.Helper()
	s := &serving{recs: newRecords(), ended: make(chan error, 1000)}
	cfg := http2.ServerConfig{Counters: &s.count}
	cfg.Handler, cfg.Sink = h, s.recs.sink
	if change != nil {
		change(&cfg)
	}
	srv := http2.NewServer(cfg)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	s.addr = ln.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			nc, err := ln.Accept()
			if err != nil {
				return
			}
			c := srv.NewConn(nc, l7.ConnInfo{ForwardedClientCert: "By=a;URI=b"})
			s.mu.Lock()
			s.conns = append(s.conns, c)
			s.mu.Unlock()
			wg.Go(func() { s.ended <- c.Serve(ctx) })
		}
	})
	tb.Cleanup(func() {
		_ = ln.Close()
		cancel()
		wg.Wait()
	})
	return s
}

// tell logs what failed, but for clients that went away.
func (s *serving) tell(tb testing.TB) {
	tb.Helper()
	s.recs.mu.Lock()
	defer s.recs.mu.Unlock()
	for i := range s.recs.all {
		if r := &s.recs.all[i]; r.Reason != l7.None && r.Reason != l7.ClientGone {
			tb.Logf("%s: %s: %d, %v", s.addr, r.Path, r.Status, r.Err)
		}
	}
	for range len(s.ended) {
		tb.Logf("%s: a connection ended: %v", s.addr, <-s.ended)
	}
}

// conn returns the only connection.
func (s *serving) conn() *http2.Conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.conns[len(s.conns)-1]
}

// writers is how many connections have a writer.
func (s *serving) writers() (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.conns {
		if c.Writing() {
			n++
		}
	}
	return n
}

func (s *serving) end(tb testing.TB) error {
	tb.Helper()
	select {
	case err := <-s.ended:
		return err
	case <-time.After(20 * time.Second):
		tb.Fatal("the connection did not end")
		return nil
	}
}

// client returns net/http's client, which knows that the server speaks HTTP/2.
func client(tb testing.TB) *http.Client {
	tb.Helper()
	tr := &http.Transport{Protocols: &http.Protocols{}}
	tr.Protocols.SetUnencryptedHTTP2(true)
	tb.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: 30 * time.Second}
}

// answer is a response that is there at once, with what is asked of it.
type answer struct {
	head     l7.ResponseHead
	interim  []l7.ResponseHead
	body     l7.Body // nil for text
	text     []byte
	trailers http1.Fields
	closed   func()
}

func (a *answer) Head(l7.Waker) (*l7.ResponseHead, error) {
	if len(a.interim) > 0 {
		h := a.interim[0]
		a.interim = a.interim[1:]
		return &h, nil
	}
	return &a.head, nil
}

func (a *answer) Next(limit int, w l7.Waker) ([]byte, error) {
	if a.body != nil {
		return a.body.Next(limit, w)
	}
	n := min(limit, len(a.text))
	view := a.text[:n]
	if a.text = a.text[n:]; len(a.text) > 0 {
		return view, nil
	}
	return view, io.EOF
}

func (a *answer) Trailers() http1.Fields {
	if a.body != nil && a.trailers == nil {
		return a.body.Trailers()
	}
	return a.trailers
}
func (a *answer) Blocking() bool { return a.body != nil && a.body.Blocking() }
func (a *answer) Cancel(r l7.Reason) {
	if a.body != nil {
		a.body.Cancel(r)
	}
}

func (a *answer) Close() {
	if a.closed != nil {
		a.closed()
	}
}

func text(s string) *answer {
	return &answer{head: l7.ResponseHead{Status: 200, Length: int64(len(s)), Fields: fields("content-type", "text/plain")}, text: []byte(s)}
}

func fields(list ...string) (f http1.Fields) {
	for i := 0; i < len(list); i += 2 {
		f.Add([]byte(list[i]), []byte(list[i+1]))
	}
	return f
}

// echo answers with the request's body and trailers.
func echo(ex *l7.Exchange) l7.Response {
	if ex.Body == nil {
		return text("no body")
	}
	return &answer{head: l7.ResponseHead{Status: 200, Length: ex.Request.Length}, body: ex.Body}
}

// over1 forwards over HTTP/1 to h.
func over1(tb testing.TB, h http.HandlerFunc) *l7.Pool {
	tb.Helper()
	up := httptest.NewServer(h)
	tb.Cleanup(up.Close)
	p := l7.NewPool(l7.PoolConfig{Dial: dialAddr(up.Listener.Addr().String())})
	tb.Cleanup(p.CloseIdle)
	return p
}

func dialAddr(addr string) func(context.Context) (net.Conn, error) {
	return func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "tcp", addr)
	}
}

func fetch(tb testing.TB, c *http.Client, req *http.Request) (*http.Response, string) {
	tb.Helper()
	resp, err := c.Do(req)
	if err != nil {
		tb.Fatal(err)
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		tb.Fatal(err)
	}
	_ = resp.Body.Close()
	return resp, string(body)
}

func newRequestTo(tb testing.TB, method, url string, body io.Reader) *http.Request {
	tb.Helper()
	req, err := http.NewRequestWithContext(tb.Context(), method, url, body)
	if err != nil {
		tb.Fatal(err)
	}
	return req
}

func TestServesActive(t *testing.T) {
	t.Parallel()
	s := serve(t, handler(func(*l7.Exchange) l7.Response { return text("hello") }), nil)
	resp, body := fetch(t, client(t), newRequestTo(t, "GET", "http://"+s.addr+"/a/../b?x", nil)) //nolint:bodyclose // fetch did
	if resp.StatusCode != 200 || body != "hello" || resp.ContentLength != 5 {
		t.Errorf("got %d %q %d", resp.StatusCode, body, resp.ContentLength)
	}
	rec := s.recs.next(t)
	if string(rec.Path) != "/b" || rec.Status != 200 || rec.ResponseBytes != 5 || rec.Reason != l7.None {
		t.Errorf("record %+v", rec)
	}
}

func TestServesOverHTTP1(t *testing.T) {
	t.Parallel()
	p := over1(t, func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		w.Header().Set("Trailer", "X-Sum")
		w.Header().Set("X-Cert", r.Header.Get("X-Forwarded-Client-Cert"))
		_, _ = w.Write([]byte(r.Method + " " + r.URL.Path + " " + r.Host + " " + r.Header.Get("Cookie") + " "))
		_, _ = w.Write(b)
		w.Header().Set("X-Sum", "42")
	})
	s := serve(t, p2h(p), nil)
	c := client(t)
	for _, size := range []int{0, 1, 1000, 20 << 10, 300 << 10} {
		payload := strings.Repeat("x", size)
		var in io.Reader
		if size > 0 {
			in = strings.NewReader(payload)
		}
		req := newRequestTo(t, "POST", "http://"+s.addr+"/p", in)
		req.Host = "App.Example"
		req.Header.Set("Cookie", "a=1; b=2; c=3")
		resp, body := fetch(t, c, req) //nolint:bodyclose // fetch did
		if want := "POST /p app.example a=1; b=2; c=3 " + payload; body != want {
			t.Errorf("size %d: got %d bytes, want %d: %.80q", size, len(body), len(want), body)
		}
		if diff := cmp.Diff("42", resp.Trailer.Get("X-Sum")); diff != "" {
			t.Errorf("size %d: trailer %s", size, diff)
		}
		if diff := cmp.Diff("By=a;URI=b", resp.Header.Get("X-Cert")); diff != "" {
			t.Errorf("size %d: certificate %s", size, diff)
		}
		if rec := s.recs.next(t); rec.RequestBytes != int64(size) || rec.Reason != l7.None {
			t.Errorf("size %d: record %+v", size, rec)
		}
	}
}

func p2h(up l7.Upstream) l7.Handler { return handler(up.Forward) }

func TestEchoes(t *testing.T) {
	t.Parallel()
	s := serve(t, handler(echo), nil)
	c := client(t)
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			payload := strings.Repeat(string(rune('a'+i)), 100_000*(i%4)+i+1)
			req := newRequestTo(t, "POST", "http://"+s.addr+"/", strings.NewReader(payload))
			req.Trailer = http.Header{"X-T": {"v"}}
			req.ContentLength = -1
			resp, body := fetch(t, c, req) //nolint:bodyclose // fetch did
			if body != payload {
				t.Errorf("%d: got %d bytes, want %d", i, len(body), len(payload))
			}
			if got := resp.Trailer.Get("X-T"); got != "v" {
				t.Errorf("%d: trailer %q", i, got)
			}
		})
	}
	wg.Wait()
}

// hanging is a response that never comes.
type hanging struct {
	mu     sync.Mutex
	reason l7.Reason
	waker  l7.Waker
	closed chan l7.Reason // nil if nobody asks
}

func (h *hanging) Head(w l7.Waker) (*l7.ResponseHead, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.reason != l7.None {
		return nil, &l7.Error{Reason: h.reason}
	}
	h.waker = w
	return nil, l7.ErrPending
}

func (h *hanging) Next(int, l7.Waker) ([]byte, error) { panic("there was no head") }
func (*hanging) Trailers() http1.Fields               { return nil }
func (*hanging) Blocking() bool                       { return false }

func (h *hanging) Cancel(r l7.Reason) {
	h.mu.Lock()
	if h.reason == l7.None {
		h.reason = r
	}
	w := h.waker
	h.waker = nil
	h.mu.Unlock()
	if w != nil {
		w.Wake()
	}
}

func (h *hanging) Close() {
	if h.closed != nil {
		h.closed <- h.reason
	}
}
