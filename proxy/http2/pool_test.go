package http2_test

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	xhttp2 "golang.org/x/net/http2"

	"github.com/meshd/meshd/proxy/http2"
	"github.com/meshd/meshd/proxy/l7"
)

// A further connection is opened when the peer's streams are used up, one dial
// at a time.
func TestPoolGrows(t *testing.T) {
	t.Parallel()
	gate, arrived := make(chan struct{}), make(chan struct{}, 8)
	var conns, dials, dialing, together atomic.Int32
	settings := []xhttp2.Setting{{ID: xhttp2.SettingMaxConcurrentStreams, Val: 2}}
	addr := serveFrames(t, settings, func(p *rawPeer) {
		first := conns.Add(1) == 1
		var ids []uint32
		for r := p.request(); r != nil; r = p.request() {
			if r.PseudoValue("path") == "/" {
				p.answer(r.StreamID, "ok") // and the limit is known
				continue
			}
			if ids = append(ids, r.StreamID); first && len(ids) > 2 {
				t.Error("more streams than the peer allows")
			}
			arrived <- struct{}{}
			if len(ids) == 1 {
				wait := gate
				go func() {
					<-wait
					_ = p.nc.SetReadDeadline(time.Unix(1, 0)) // the loop ends
				}()
			}
		}
		_ = p.nc.SetReadDeadline(time.Now().Add(10 * time.Second))
		for _, id := range ids {
			p.answer(id, "held")
		}
		_, _ = io.Copy(io.Discard, p.nc) // to its end
	})
	pool := newPool(t, addr, func(c *http2.PoolConfig) {
		c.MaxConns, c.ConnectTimeout = 2, 10*time.Second
		dial := c.Dial
		c.Dial = func(ctx context.Context) (net.Conn, error) {
			dials.Add(1)
			if dialing.Add(1) > 1 {
				together.Add(1)
			}
			defer dialing.Add(-1)
			return dial(ctx)
		}
	})
	if g := pull(pool.Forward(newExchange("GET /", nil)), false); g.Body != "ok" {
		t.Fatalf("the first: %+v", g)
	}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			if g := pull(pool.Forward(newExchange("GET /held", nil)), false); g.Body != "held" {
				t.Errorf("got %+v", g)
			}
		})
	}
	for range 4 {
		<-arrived
	}
	close(gate)
	wg.Wait()
	if dials.Load() != 2 || together.Load() != 0 {
		t.Errorf("%d dials, %d at once, want 2, one at a time", dials.Load(), together.Load())
	}
}

type noWait struct{}

func (noWait) Wake() {}

// Who waits for too long, or as one of too many, is told.
func TestPoolPatience(t *testing.T) {
	t.Parallel()
	settings := []xhttp2.Setting{{ID: xhttp2.SettingMaxConcurrentStreams, Val: 1}}
	asked := make(chan struct{}, 1)
	addr := serveFrames(t, settings, func(p *rawPeer) {
		for r := p.request(); r != nil; r = p.request() {
			if r.PseudoValue("path") == "/hold" {
				asked <- struct{}{}
				continue
			}
			p.answer(r.StreamID, "ok")
		}
	})
	pool := newPool(t, addr, func(c *http2.PoolConfig) { c.MaxConns, c.MaxWaiting, c.ConnectTimeout = 1, 1, 2*time.Second })
	if g := pull(pool.Forward(newExchange("GET /", nil)), false); g.Body != "ok" {
		t.Fatalf("%+v", g)
	}
	holds := pool.Forward(newExchange("GET /hold", nil))
	if _, err := holds.Head(noWait{}); !errors.Is(err, l7.ErrPending) {
		t.Fatal(err)
	}
	<-asked
	waits := pool.Forward(newExchange("GET /", nil))
	if _, err := waits.Head(noWait{}); !errors.Is(err, l7.ErrPending) {
		t.Fatal(err)
	}
	if g := pull(pool.Forward(newExchange("GET /", nil)), true); g.Reason != l7.Overload {
		t.Errorf("one of too many: %+v", g)
	}
	if g := pull(waits, false); g.Reason != l7.Overload {
		t.Errorf("one that waits too long: %+v", g)
	}
	holds.Cancel(l7.ClientGone)
	if g := pull(holds, false); g.Reason != l7.ClientGone {
		t.Errorf("the one that held the stream: %+v", g)
	}
	if g := pull(pool.Forward(newExchange("GET /", nil)), true); g.Body != "ok" {
		t.Errorf("after it: %+v", g)
	}
}

func TestPoolDialFails(t *testing.T) {
	t.Parallel()
	mine := errors.New("mine")
	pool := http2.NewPool(http2.PoolConfig{Dial: func(context.Context) (net.Conn, error) { return nil, mine }})
	resp := pool.Forward(newExchange("GET /", nil))
	_, err := resp.Head(nil)
	var e *l7.Error
	if !errors.As(err, &e) || e.Reason != l7.ConnectFailed || !errors.Is(err, mine) {
		t.Errorf("got %v, want ConnectFailed because of mine", err)
	}
	resp.Close()
	pool = http2.NewPool(http2.PoolConfig{ConnectTimeout: 50 * time.Millisecond, Dial: func(ctx context.Context) (net.Conn, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	}})
	if g := pull(pool.Forward(newExchange("GET /", nil)), true); g.Reason != l7.ConnectFailed {
		t.Errorf("got %+v, want ConnectFailed", g)
	}
	// One that is over before its connection is there.
	dialing := make(chan struct{})
	pool = http2.NewPool(http2.PoolConfig{Dial: func(context.Context) (net.Conn, error) {
		<-dialing
		return nil, mine
	}})
	resp = pool.Forward(newExchange("GET /", nil))
	if _, err := resp.Head(noWait{}); !errors.Is(err, l7.ErrPending) {
		t.Error(err)
	}
	resp.Cancel(l7.Superseded)
	resp.Close()
	close(dialing)
}

// An upstream that speaks something else is told apart from one that is down.
func TestPoolOtherProtocol(t *testing.T) {
	t.Parallel()
	var lc net.ListenConfig
	ln, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		nc, err := ln.Accept()
		if err != nil {
			return
		}
		_, _ = io.WriteString(nc, "HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
		_, _ = io.Copy(io.Discard, nc)
		_ = nc.Close()
	}()
	var dials atomic.Int32
	pool := newPool(t, ln.Addr().String(), func(c *http2.PoolConfig) {
		dial := c.Dial
		c.Dial = func(ctx context.Context) (net.Conn, error) {
			dials.Add(1)
			return dial(ctx)
		}
	})
	if g := pull(pool.Forward(newExchange("GET /", nil)), false); g.Reason != l7.UpstreamProtocol || dials.Load() != 1 {
		t.Errorf("after %d dials: got %+v", dials.Load(), g)
	}
	_ = ln.Close()
	<-done
}

// Idle connections end in good order: after their time, or at once by CloseIdle.
func TestPoolIdle(t *testing.T) {
	t.Parallel()
	for _, by := range []string{"time", "CloseIdle"} {
		t.Run(by, func(t *testing.T) {
			t.Parallel()
			ended := make(chan xhttp2.ErrCode, 1)
			addr := serveFrames(t, nil, func(p *rawPeer) {
				r := p.request()
				if r == nil {
					return
				}
				p.answer(r.StreamID, "ok")
				if f, ok := p.next(xhttp2.FrameGoAway).(*xhttp2.GoAwayFrame); ok {
					ended <- f.ErrCode
				} else {
					ended <- xhttp2.ErrCodeInternal
				}
			})
			pool := newPool(t, addr, func(c *http2.PoolConfig) {
				if by == "time" {
					c.IdleTimeout = 100 * time.Millisecond
				}
			})
			if g := pull(pool.Forward(newExchange("GET /", nil)), false); g.Body != "ok" {
				t.Fatalf("%+v", g)
			}
			if by == "CloseIdle" {
				if n := pool.Idle(); n != 1 {
					t.Errorf("%d idle connections, want 1", n)
				}
				pool.CloseIdle()
			}
			if code := <-ended; code != xhttp2.ErrCodeNo {
				t.Errorf("ended with %v", code)
			}
			if n := pool.Idle(); n != 0 {
				t.Errorf("%d idle connections, want none", n)
			}
		})
	}
}

// A silent connection with streams is asked, and given up if it does not answer.
func TestPoolKeepAlive(t *testing.T) {
	t.Parallel()
	pinged := make(chan struct{}, 1)
	addr := serveFrames(t, nil, func(p *rawPeer) {
		if p.request() == nil {
			return
		}
		if p.next(xhttp2.FramePing) != nil {
			pinged <- struct{}{}
		}
		p.next(xhttp2.FrameGoAway)
	})
	pool := newPool(t, addr, func(c *http2.PoolConfig) { c.PingAfter, c.PingTimeout = 500*time.Millisecond, 500*time.Millisecond })
	if g := pull(pool.Forward(newExchange("POST /", nil)), false); g.Reason != l7.UpstreamReset {
		t.Errorf("got %+v", g)
	}
	<-pinged
}

// What ends an exchange from our side resets its stream, and leaves the others alone.
func TestPoolAborts(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		change func(ex *l7.Exchange, c *http2.PoolConfig)
		act    func(resp l7.Response)
		want   l7.Reason
	}{
		"cancel":      {act: func(resp l7.Response) { resp.Cancel(l7.PolicyChanged) }, want: l7.PolicyChanged},
		"deadline":    {change: func(ex *l7.Exchange, _ *http2.PoolConfig) { ex.Deadline = time.Now().Add(time.Second) }, want: l7.Timeout},
		"silence":     {change: func(_ *l7.Exchange, c *http2.PoolConfig) { c.StreamIdle = time.Second }, want: l7.Timeout},
		"client gone": {change: func(ex *l7.Exchange, _ *http2.PoolConfig) { ex.Client = goneClient{} }, want: l7.ClientGone},
		"body fails": {change: func(ex *l7.Exchange, _ *http2.PoolConfig) {
			ex.Body, ex.Request.Length = &textBody{parts: []string{"abc"}, fail: &l7.Error{Reason: l7.RequestTimeout}}, -1
		}, want: l7.RequestTimeout},
	} {
		for _, active := range []bool{false, true} {
			if active && name == "client gone" {
				continue // a connection with a reader of its own cancels by itself
			}
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				reset, there := make(chan xhttp2.ErrCode, 1), make(chan struct{})
				addr := serveFrames(t, nil, func(p *rawPeer) {
					if p.request() == nil {
						return
					}
					close(there)
					if f, ok := p.next(xhttp2.FrameRSTStream).(*xhttp2.RSTStreamFrame); ok {
						reset <- f.ErrCode
					} else {
						close(reset)
					}
					if r := p.request(); r != nil {
						p.answer(r.StreamID, "still here")
						p.next(xhttp2.FrameGoAway)
					}
				})
				ex := newExchange("GET /", nil)
				pool := newPool(t, addr, func(cfg *http2.PoolConfig) {
					if c.change != nil {
						c.change(ex, cfg)
					}
				})
				resp := pool.Forward(ex)
				if _, err := resp.Head(noWait{}); !errors.Is(err, l7.ErrPending) && c.want != l7.RequestTimeout {
					t.Fatal(err)
				}
				<-there
				if c.act != nil {
					c.act(resp)
				}
				if g := pull(resp, active); g.Reason != c.want {
					t.Errorf("got %+v, want %v", g, c.want)
				}
				if code, ok := <-reset; !ok || code != xhttp2.ErrCodeCancel {
					t.Errorf("reset with %v, %v", code, ok)
				}
				if g := pull(pool.Forward(newExchange("GET /", nil)), active); g.Body != "still here" {
					t.Errorf("its neighbour: %+v", g)
				}
			})
		}
	}
}

type goneClient struct{}

func (goneClient) Gone() bool { return true }

// Streams whose clients do not read hold only what their windows let them; the
// others go on, and so do they when they are read again.
func TestPoolSlowStreams(t *testing.T) {
	t.Parallel()
	const slow, size = 40, 200 << 10
	body := strings.Repeat("0123456789abcdef", size/16)
	addr := netHTTP(t, func(w writer, r *reader) {
		_, _ = io.WriteString(w, body)
	})
	pool := newPool(t, addr, nil)
	var held []l7.Response
	for range slow {
		resp := pool.Forward(newExchange("GET /", nil))
		if h, err := resp.Head(nil); err != nil || h.Status != 200 {
			t.Fatal(h, err)
		}
		held = append(held, resp)
	}
	for range 10 {
		if g := pull(pool.Forward(newExchange("GET /", nil)), true); g.Body != body {
			t.Fatalf("beside the slow ones: %d bytes, %v %s", len(g.Body), g.Reason, g.Detail)
		}
	}
	for i, resp := range held {
		var all strings.Builder
		for {
			view, err := resp.Next(32<<10, nil)
			all.Write(view)
			if err == io.EOF { //nolint:errorlint // by contract as it is
				break
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		if all.String() != body {
			t.Errorf("slow stream %d: %d bytes of %d", i, all.Len(), size)
		}
		resp.Close()
	}
}

// Uploads pass at the pace of the windows, and a response that is complete before them ends them.
func TestPoolUploads(t *testing.T) {
	t.Parallel()
	addr := netHTTP(t, func(w writer, r *reader) {
		if r.URL.Path == "/early" {
			w.WriteHeader(413)
			return
		}
		_, _ = io.Copy(w, r.Body)
	})
	pool := newPool(t, addr, nil)
	part := strings.Repeat("x", 100_000)
	for _, active := range []bool{false, true} {
		body := &textBody{parts: []string{part, part, part}}
		if g := pull(pool.Forward(newExchange("POST /", body)), active); len(g.Body) != 300_000 {
			t.Errorf("active %v: %d bytes came back, %v %s", active, len(g.Body), g.Reason, g.Detail)
		}
		body = &textBody{parts: []string{strings.Repeat(part, 50)}}
		g := pull(pool.Forward(newExchange("POST /early", body)), active)
		if _, why := body.seen(); g.Status != 413 || why != l7.EarlyResponse {
			t.Errorf("active %v: early response: %+v, the body's reason is %v", active, g, why)
		}
	}
}
