package l7_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/meshd/meshd/proxy/l7"
)

// handler is a Handler in a function.
type handler func(ex *l7.Exchange) l7.Response

func (h handler) Handle(ex *l7.Exchange) l7.Response { return h(ex) }

// record is what a test looks at of a Record.
type record struct {
	Method, Authority, Path string
	Status                  int
	Reason                  l7.Reason
	ErrorID                 string
	In, Out                 int64
	Retried                 bool
	Cause                   string
}

// proxy is a listener in front of one pool.
type proxy struct {
	addr string
	pool *l7.Pool
	srv  *l7.Server

	mu      sync.Mutex
	conns   map[*l7.Conn]struct{}
	told    chan record
	serving sync.WaitGroup
}

type options struct {
	handler  func(p *proxy) l7.Handler
	server   func(*l7.ServerConfig)
	pool     func(*l7.PoolConfig)
	info     l7.ConnInfo
	wrap     func(net.Conn) (net.Conn, error)
	upstream string
}

// start runs a proxy until the test ends, and then requires that every
// connection's Serve has returned.
func start(tb testing.TB, o options) *proxy {
	tb.Helper()
	p := &proxy{conns: map[*l7.Conn]struct{}{}, told: make(chan record, 4096)}
	pool := l7.PoolConfig{Dial: dialer(o.upstream)}
	if o.pool != nil {
		o.pool(&pool)
	}
	p.pool = l7.NewPool(pool)
	cfg := l7.ServerConfig{Sink: p.sink, Log: slog.New(slog.DiscardHandler)}
	cfg.Handler = handler(func(ex *l7.Exchange) l7.Response { return p.pool.Forward(ex) })
	if o.handler != nil {
		cfg.Handler = o.handler(p)
	}
	if o.server != nil {
		o.server(&cfg)
	}
	p.srv = l7.NewServer(cfg)
	ln := listen(tb)
	p.addr = ln.Addr().String()
	ctx := tb.Context()
	var accepting sync.WaitGroup
	accepting.Go(func() {
		for {
			nc, err := ln.Accept()
			if err != nil {
				return
			}
			p.serving.Go(func() { p.serve(ctx, nc, o) })
		}
	})
	tb.Cleanup(func() {
		if err := ln.Close(); err != nil {
			tb.Error(err)
		}
		accepting.Wait()
		for _, c := range p.live() {
			c.Abort(l7.Draining)
		}
		p.serving.Wait()
		p.pool.CloseIdle()
	})
	return p
}

func (p *proxy) serve(ctx context.Context, nc net.Conn, o options) {
	if o.wrap != nil {
		wrapped, err := o.wrap(nc)
		if err != nil {
			_ = nc.Close()
			return
		}
		nc = wrapped
	}
	c := p.srv.NewConn(nc, o.info)
	p.mu.Lock()
	p.conns[c] = struct{}{}
	p.mu.Unlock()
	_ = c.Serve(ctx) // tests look at records
	p.mu.Lock()
	delete(p.conns, c)
	p.mu.Unlock()
}

func (p *proxy) live() []*l7.Conn {
	p.mu.Lock()
	defer p.mu.Unlock()
	var conns []*l7.Conn
	for c := range p.conns {
		conns = append(conns, c)
	}
	return conns
}

// serves waits until so many connections are served, and returns them.
func (p *proxy) serves(tb testing.TB, n int) []*l7.Conn {
	tb.Helper()
	ctx, cancel := context.WithTimeout(tb.Context(), 10*time.Second)
	defer cancel()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		if conns := p.live(); len(conns) == n {
			return conns
		}
		select {
		case <-ctx.Done():
			tb.Fatalf("%d connections are served, want %d", len(p.live()), n)
		case <-tick.C:
		}
	}
}

func (p *proxy) sink(r *l7.Record) {
	select {
	case p.told <- record{
		string(r.Method), string(r.Authority), string(r.Path), r.Status, r.Reason, r.ErrorID,
		r.RequestBytes, r.ResponseBytes, r.Retried, fmt.Sprint(r.Err),
	}:
	default:
	}
}

// next returns the next record.
func (p *proxy) next(t *testing.T) record {
	t.Helper()
	select {
	case r := <-p.told:
		return r
	case <-time.After(10 * time.Second):
		t.Fatal("no record within 10 s")
		return record{}
	}
}

func dialer(addr string) func(context.Context) (net.Conn, error) {
	return func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "tcp", addr)
	}
}

func listen(tb testing.TB) net.Listener {
	tb.Helper()
	ln, err := (&net.ListenConfig{}).Listen(tb.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	return ln
}

// serveHTTP runs net/http as the application.
func serveHTTP(tb testing.TB, h http.HandlerFunc) string {
	tb.Helper()
	ln := listen(tb)
	srv := &http.Server{Handler: h, ReadHeaderTimeout: time.Minute, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(ln) }()
	tb.Cleanup(func() {
		if err := srv.Close(); err != nil {
			tb.Error(err)
		}
		if err := <-done; !errors.Is(err, http.ErrServerClosed) {
			tb.Error(err)
		}
	})
	return ln.Addr().String()
}

// serveRaw gives each connection to serve, which owns it until it returns.
func serveRaw(tb testing.TB, serve func(nc *net.TCPConn, r *bufio.Reader)) string {
	tb.Helper()
	ln := listen(tb)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			nc, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer func() { _ = nc.Close() }() // the test may have reset it
				if tcp, ok := nc.(*net.TCPConn); ok {
					_ = tcp.SetDeadline(time.Now().Add(20 * time.Second))
					serve(tcp, bufio.NewReader(tcp))
				}
			})
		}
	})
	tb.Cleanup(func() {
		if err := ln.Close(); err != nil {
			tb.Error(err)
		}
		wg.Wait()
	})
	return ln.Addr().String()
}

// echoUpstream answers every request head with smallAnswer, without
// allocating per request.
func echoUpstream(tb testing.TB) string {
	tb.Helper()
	out := []byte(smallAnswer)
	return serveRaw(tb, func(nc *net.TCPConn, _ *bufio.Reader) {
		buf := make([]byte, 4096)
		_ = nc.SetDeadline(time.Time{})
		for {
			n, err := nc.Read(buf)
			if err != nil {
				return
			}
			if !bytes.HasSuffix(buf[:n], []byte("\r\n\r\n")) {
				continue
			}
			if _, err := nc.Write(out); err != nil {
				return
			}
		}
	})
}

const (
	smallAnswer = "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nDate: Sun, 22 Nov 2026 00:00:00 GMT\r\nContent-Length: 5\r\n\r\nhello"
	smallHead   = "GET /v1/items?page=2 HTTP/1.1\r\nHost: api.example\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n"
)

// readHead reads lines up to the empty one and returns them.
func readHead(r *bufio.Reader) (string, error) {
	var head strings.Builder
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			return head.String(), err
		}
		if line == "\r\n" {
			return head.String(), nil
		}
		head.WriteString(line)
	}
}

// client is a raw connection to a proxy.
type client struct {
	tb testing.TB
	*net.TCPConn
	r *bufio.Reader
}

func connect(tb testing.TB, addr string) *client {
	tb.Helper()
	nc, err := dialer(addr)(tb.Context())
	if err != nil {
		tb.Fatal(err)
	}
	tcp, ok := nc.(*net.TCPConn)
	if !ok {
		tb.Fatalf("got a %T", nc)
	}
	if err := tcp.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = tcp.Close() })
	return &client{tb, tcp, bufio.NewReader(tcp)}
}

func (c *client) send(format string, args ...any) {
	c.tb.Helper()
	if _, err := fmt.Fprintf(c.TCPConn, format, args...); err != nil {
		c.tb.Fatal(err)
	}
}

// answered is what tests look at of a response.
type answered struct {
	StatusCode      int
	Header, Trailer http.Header
	Close           bool
}

// whole reads a response to its end.
func whole(tb testing.TB, resp *http.Response) (answered, string) {
	tb.Helper()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		tb.Fatal(err)
	}
	if err := resp.Body.Close(); err != nil {
		tb.Fatal(err)
	}
	return answered{resp.StatusCode, resp.Header, resp.Trailer, resp.Close}, string(body)
}

// response reads one response, body included.
func (c *client) response(method string) (answered, string) {
	c.tb.Helper()
	resp, err := http.ReadResponse(c.r, &http.Request{Method: method})
	if err != nil {
		c.tb.Fatal(err)
	}
	return whole(c.tb, resp)
}

// say writes to a peer who may be gone: what he reads is for the test to check.
func say(w io.Writer, format string, args ...any) { _, _ = fmt.Fprintf(w, format, args...) }

// ended requires the connection's orderly end.
func (c *client) ended() {
	c.tb.Helper()
	if b, err := c.r.ReadByte(); !errors.Is(err, io.EOF) {
		c.tb.Fatalf("got byte %q, %v; want the end of the connection", b, err)
	}
}
