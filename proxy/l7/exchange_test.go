package l7_test

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/meshd/meshd/proxy/http1"
	"github.com/meshd/meshd/proxy/l7"
)

// chain is HTTP/1 → n framed connections → HTTP/1.
func chain(tb testing.TB, upstream string, n int) *proxy {
	tb.Helper()
	far := l7.NewPool(l7.PoolConfig{Dial: dialer(upstream)})
	var next l7.Upstream = far
	for range n {
		inner := next
		up, stop := framed(handler(func(ex *l7.Exchange) l7.Response { return inner.Forward(ex) }))
		tb.Cleanup(stop)
		next = up
	}
	p := start(tb, options{upstream: upstream, handler: func(*proxy) l7.Handler {
		return handler(func(ex *l7.Exchange) l7.Response { return next.Forward(ex) })
	}})
	tb.Cleanup(far.CloseIdle)
	return p
}

// TestTransportsMeet sends the same messages over HTTP/1 alone, and through one
// and two connections of another kind in the middle.
func TestTransportsMeet(t *testing.T) {
	upstream := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/hints" {
			w.Header().Set("Link", "</a>")
			w.WriteHeader(http.StatusEarlyHints)
		}
		if err := http.NewResponseController(w).EnableFullDuplex(); err != nil {
			t.Error(err)
		}
		w.Header().Set("Trailer", "X-Sum")
		_, _ = io.Copy(w, r.Body)
		w.Header().Set("X-Sum", r.Trailer.Get("X-In"))
	})
	for hops := range 3 {
		t.Run(fmt.Sprint(hops, " hops"), func(t *testing.T) {
			p := chain(t, upstream, hops)
			client := httpClient(t)
			var wg sync.WaitGroup
			for i := range 20 {
				wg.Go(func() {
					body := bytes.Repeat([]byte{byte('a' + i)}, 10_000*i)
					req := newRequest(t, "POST", "http://"+p.addr+"/hints", io.MultiReader(bytes.NewReader(body)))
					req.Trailer = http.Header{"X-In": {fmt.Sprint(i)}}
					hints := 0
					req = req.WithContext(httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{
						Got1xxResponse: func(int, textproto.MIMEHeader) error { hints++; return nil },
					}))
					resp, err := client.Do(req)
					if err != nil {
						t.Error(err)
						return
					}
					defer func() { _ = resp.Body.Close() }() // read to its end
					got, err := io.ReadAll(resp.Body)
					if err != nil || !bytes.Equal(got, body) || resp.Trailer.Get("X-Sum") != fmt.Sprint(i) || hints != 1 {
						t.Errorf("exchange %d: %d bytes of %d, %v, trailers %v, %d hints", i, len(got), len(body), err, resp.Trailer, hints)
					}
				})
			}
			wg.Wait()
		})
	}
}

func TestAbortsCrossTransports(t *testing.T) {
	for hops := range 3 {
		t.Run(fmt.Sprint(hops, " hops, client goes"), func(t *testing.T) {
			seen, inside := make(chan error, 1), make(chan struct{})
			upstream := serveRaw(t, func(_ *net.TCPConn, r *bufio.Reader) {
				_, err := readHead(r)
				close(inside)
				if err != nil {
					seen <- err
					return
				}
				seen <- resetSeen(r)
			})
			c := connect(t, chain(t, upstream, hops).addr)
			c.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nhello")
			<-inside
			if err := c.Close(); err != nil {
				t.Fatal(err)
			}
			if err := <-seen; err != nil {
				t.Error(err)
			}
		})
		t.Run(fmt.Sprint(hops, " hops, upstream breaks off"), func(t *testing.T) {
			upstream := serveRaw(t, func(nc *net.TCPConn, r *bufio.Reader) {
				if _, err := readHead(r); err == nil {
					say(nc, "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
				}
			})
			c := connect(t, chain(t, upstream, hops).addr)
			c.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n")
			if _, err := io.ReadAll(c.r); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("got %v, want a reset", err)
			}
		})
		t.Run(fmt.Sprint(hops, " hops, early response"), func(t *testing.T) {
			upstream := serveRaw(t, func(nc *net.TCPConn, r *bufio.Reader) {
				if _, err := readHead(r); err == nil {
					say(nc, "HTTP/1.1 413 No\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno")
				}
			})
			c := connect(t, chain(t, upstream, hops).addr)
			c.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\nhello")
			if resp, body := c.response("POST"); resp.StatusCode != 413 || body != "no" {
				t.Errorf("got %d %q", resp.StatusCode, body)
			}
		})
	}
}

// sink is an Upstream that answers at once, without any goroutine.
type instantAnswer struct{}

func (instantAnswer) Forward(*l7.Exchange) l7.Response {
	q := newQueue(nil, nil)
	q.heads = []*l7.ResponseHead{{Status: 200, Length: -1}}
	return openResponse{q}
}

// openResponse has a head, and a body that does not end before it is cancelled.
type openResponse struct{ *queue }

func (openResponse) Close() {}

// TestStreamsNeedNoGoroutines opens 200 exchanges between two connections with
// readers of their own, and counts.
func TestStreamsNeedNoGoroutines(t *testing.T) {
	far, stopFar := framed(handler(func(ex *l7.Exchange) l7.Response { return instantAnswer{}.Forward(ex) }))
	defer stopFar()
	near, stopNear := framed(handler(func(ex *l7.Exchange) l7.Response { return far.Forward(ex) }))
	defer stopNear()
	before := runtime.NumGoroutine()
	var open []l7.Response
	for range 200 {
		body := newQueue(nil, nil)
		resp := near.Forward(&l7.Exchange{Request: l7.Head{Method: []byte("POST"), Path: []byte("/")}, Body: body})
		if h, err := resp.Head(nil); err != nil || h.Status != 200 {
			t.Fatal(h, err)
		}
		open = append(open, resp)
	}
	if grown := runtime.NumGoroutine() - before; grown > 20 {
		t.Errorf("200 open streams through two connections: %d more goroutines", grown)
	}
	for _, resp := range open {
		resp.Cancel(l7.ClientGone)
		resp.Close()
	}
}

// echo answers with the request's body, once it has all of it.
func echo(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body) // a body that broke off is short
	_, _ = w.Write(body)
}

// replay is a body that can be pulled again from its start, while it is small.
type replay struct {
	l7.Body
	kept  []byte
	from  int
	ended bool
	limit int
}

func (r *replay) Next(limit int, w l7.Waker) ([]byte, error) {
	if r.from < len(r.kept) {
		view := r.kept[r.from:min(len(r.kept), r.from+limit)]
		if r.from += len(view); r.from == len(r.kept) && r.ended {
			return view, io.EOF
		}
		return view, nil
	}
	if r.ended {
		return nil, io.EOF
	}
	view, err := r.Body.Next(limit, w)
	r.kept = append(r.kept, view...)
	r.from = len(r.kept)
	r.ended = err == io.EOF //nolint:errorlint // by contract as it is
	return view, err
}

// Cancel keeps the source alive: another try may want it.
func (r *replay) Cancel(l7.Reason) {}

// retrying asks a second upstream if the first answers 503.
type retrying struct {
	l7.Response
	ex     *l7.Exchange
	second l7.Upstream
	tried  bool
}

func (r *retrying) Head(w l7.Waker) (*l7.ResponseHead, error) {
	for {
		h, err := r.Response.Head(w)
		body, _ := r.ex.Body.(*replay)
		again := err == nil && h.Status == 503 && !r.tried && (body == nil || len(body.kept) <= body.limit)
		if !again {
			return h, err
		}
		r.tried = true
		r.Response.Cancel(l7.Superseded)
		r.Response.Close()
		if body != nil {
			body.from = 0
		}
		r.Response = r.second.Forward(r.ex)
	}
}

// TestRetryOnExchange holds that retry with a replayed body needs nothing but
// the contract, over either transport.
func TestRetryOnExchange(t *testing.T) {
	bad := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		w.WriteHeader(http.StatusServiceUnavailable)
	})
	good := serveHTTP(t, echo)
	for _, over := range []string{"http/1", "framed"} {
		t.Run(over, func(t *testing.T) {
			first := l7.NewPool(l7.PoolConfig{Dial: dialer(bad)})
			second := l7.NewPool(l7.PoolConfig{Dial: dialer(good)})
			t.Cleanup(first.CloseIdle)
			t.Cleanup(second.CloseIdle)
			var one, two l7.Upstream = first, second
			if over == "framed" {
				a, stopA := framed(handler(func(ex *l7.Exchange) l7.Response { return first.Forward(ex) }))
				b, stopB := framed(handler(func(ex *l7.Exchange) l7.Response { return second.Forward(ex) }))
				t.Cleanup(stopA)
				t.Cleanup(stopB)
				one, two = a, b
			}
			p := start(t, options{upstream: good, handler: func(*proxy) l7.Handler {
				return handler(func(ex *l7.Exchange) l7.Response {
					if ex.Body != nil {
						ex.Body = &replay{Body: ex.Body, limit: 64 << 10}
					}
					return &retrying{Response: one.Forward(ex), ex: ex, second: two}
				})
			}})
			body := strings.Repeat("x", 20_000)
			for range 3 {
				resp, got := do(t, httpClient(t), newRequest(t, "POST", "http://"+p.addr+"/", strings.NewReader(body)))
				if resp.StatusCode != 200 || got != body {
					t.Errorf("got %d with %d bytes, want 200 with %d", resp.StatusCode, len(got), len(body))
				}
			}
		})
	}
}

// tee copies what the primary pulls into a queue for the mirror. A mirror that
// does not keep up is cut off; the primary never waits for it.
type tee struct {
	l7.Body
	mirror *queue
	ahead  int
	mu     sync.Mutex
}

func (b *tee) Next(limit int, w l7.Waker) ([]byte, error) {
	view, err := b.Body.Next(limit, w)
	b.mu.Lock()
	b.ahead += len(view)
	cut := b.ahead > 64<<10
	b.mu.Unlock()
	data := append([]byte(nil), view...)
	ended := err == io.EOF //nolint:errorlint // by contract as it is
	switch {
	case cut:
		b.mirror.fail(l7.Overload)
	default:
		b.mirror.put(func() {
			if len(data) > 0 {
				b.mirror.chunks = append(b.mirror.chunks, data)
			}
			b.mirror.ended = ended
		})
	}
	return view, err
}

// TestMirrorOnExchange holds that a mirror that hangs costs the primary nothing.
func TestMirrorOnExchange(t *testing.T) {
	hung := serveRaw(t, func(nc *net.TCPConn, _ *bufio.Reader) {
		_, _ = nc.Write(nil)
		<-t.Context().Done()
	})
	good := serveHTTP(t, echo)
	mirrorPool := l7.NewPool(l7.PoolConfig{Dial: dialer(hung)})
	var mirrors sync.WaitGroup
	var mu sync.Mutex
	var running []l7.Response
	p := start(t, options{upstream: good, handler: func(p *proxy) l7.Handler {
		return handler(func(ex *l7.Exchange) l7.Response {
			b := &tee{Body: ex.Body}
			b.mirror = newQueue(func(n int) {
				b.mu.Lock()
				b.ahead -= n
				b.mu.Unlock()
			}, nil)
			ex.Body = b
			copied := &l7.Exchange{Body: b.mirror, Conn: &l7.ConnInfo{}, Request: l7.Head{
				Method: append([]byte(nil), ex.Request.Method...), Authority: append([]byte(nil), ex.Request.Authority...),
				Path: append([]byte(nil), ex.Request.Path...), Fields: copyFields(ex.Request.Fields), Length: -1,
			}}
			resp := mirrorPool.Forward(copied)
			mu.Lock()
			running = append(running, resp)
			mu.Unlock()
			mirrors.Go(func() {
				defer resp.Close()
				_, _ = resp.Head(nil) // whatever it says
			})
			return p.pool.Forward(ex)
		})
	}})
	began := time.Now()
	body := strings.Repeat("x", 2<<20)
	if _, got := do(t, httpClient(t), newRequest(t, "POST", "http://"+p.addr+"/", strings.NewReader(body))); got != body {
		t.Errorf("got %d bytes", len(got))
	}
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("the primary took %v beside a mirror that hangs", took)
	}
	mu.Lock()
	for _, resp := range running {
		resp.Cancel(l7.Superseded)
	}
	mu.Unlock()
	mirrors.Wait()
}

func TestHeadAnswersPolicy(t *testing.T) {
	var fields http1.Fields
	fields.Add([]byte("X-Team"), []byte("a"))
	fields.Add([]byte("x-team"), []byte("b"))
	ex := &l7.Exchange{Request: l7.Head{Method: []byte("GET"), Path: []byte("/p"), Authority: []byte("h"), Fields: fields}}
	r := ex.ForPolicy()
	for _, tt := range []struct {
		name string
		i    int
		want string
		ok   bool
	}{{"x-team", 0, "a", true}, {"x-team", 1, "b", true}, {"x-team", 2, "", false}, {"host", 0, "h", true}, {"host", 1, "h", false}} {
		if got, ok := r.Headers.HeaderValue(tt.name, tt.i); ok != tt.ok || ok && string(got) != tt.want {
			t.Errorf("%s %d: got %q, %v", tt.name, tt.i, got, ok)
		}
	}
	if n := testing.AllocsPerRun(100, func() { ex.ForPolicy().Headers.HeaderValue("x-team", 1) }); n != 0 || r.Method != "GET" || r.Path != "/p" {
		t.Errorf("%v allocations, %s %s", n, r.Method, r.Path)
	}
}
