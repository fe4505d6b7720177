package l7_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/meshd/meshd/proxy/l7"
)

func TestOwnErrors(t *testing.T) {
	deadPort := func(t *testing.T) string {
		t.Helper()
		ln := listen(t)
		if err := ln.Close(); err != nil {
			t.Fatal(err)
		}
		return ln.Addr().String()
	}
	answer := func(text string) func(t *testing.T) string {
		return func(t *testing.T) string {
			t.Helper()
			return serveRaw(t, func(nc *net.TCPConn, r *bufio.Reader) {
				if _, err := readHead(r); err == nil {
					say(nc, "%s", text)
				}
			})
		}
	}
	fails := func(e *l7.Error) func(*proxy) l7.Handler {
		return func(*proxy) l7.Handler {
			return handler(func(ex *l7.Exchange) l7.Response { return ex.Fail(e) })
		}
	}
	for _, tt := range []struct {
		name     string
		upstream func(t *testing.T) string
		handler  func(*proxy) l7.Handler
		status   int
		reason   l7.Reason
	}{
		{name: "connect", upstream: deadPort, status: 503, reason: l7.ConnectFailed},
		{name: "closed without a response", upstream: answer(""), status: 502, reason: l7.UpstreamReset},
		{name: "closed in the head", upstream: answer("HTTP/1.1 200 OK\r\nContent-"), status: 502, reason: l7.UpstreamReset},
		{name: "not HTTP", upstream: answer("220 mail ready\r\n\r\n"), status: 502, reason: l7.UpstreamProtocol},
		{name: "two lengths", upstream: answer("HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx"), status: 502, reason: l7.UpstreamProtocol},
		{name: "a switch nobody asked for", upstream: answer("HTTP/1.1 101 S\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"), status: 502, reason: l7.UpstreamProtocol},
		{name: "denied", handler: fails(&l7.Error{Reason: l7.Denied}), upstream: deadPort, status: 403, reason: l7.Denied},
		{name: "no instance", handler: fails(&l7.Error{Reason: l7.NoHealthyInstance}), upstream: deadPort, status: 503, reason: l7.NoHealthyInstance},
		{name: "a status of its own", handler: fails(&l7.Error{Reason: l7.Overload, Status: 429}), upstream: deadPort, status: 429, reason: l7.Overload},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := start(t, options{upstream: tt.upstream(t), handler: tt.handler})
			c := connect(t, p.addr)
			for range 2 { // the client's connection lives on
				c.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n")
				resp, body := c.response("GET")
				id := resp.Header.Get("mesh-error-id")
				if resp.StatusCode != tt.status || resp.Header.Get("mesh-error") != tt.reason.String() ||
					!regexp.MustCompile("^[0-9a-f]{6}$").MatchString(id) || !strings.HasPrefix(body, tt.reason.String()+": ") || strings.Count(body, "\n") != 1 {
					t.Errorf("got %d %q %q %q, want %d %s", resp.StatusCode, resp.Header.Get("mesh-error"), id, body, tt.status, tt.reason)
				}
				if r := p.next(t); r.Reason != tt.reason || r.Status != tt.status || r.ErrorID != id {
					t.Errorf("record %+v", r)
				}
			}
			c.send("HEAD / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
			if resp, body := c.response("HEAD"); resp.StatusCode != tt.status || body != "" {
				t.Errorf("HEAD got %d %q", resp.StatusCode, body)
			}
			c.ended()
		})
	}
}

// TestRefused holds that nothing behind a refused request is looked at.
func TestRefused(t *testing.T) {
	reached := make(chan string, 16)
	upstream := serveHTTP(t, func(_ http.ResponseWriter, r *http.Request) { reached <- r.URL.Path })
	p := start(t, options{upstream: upstream})
	for _, tt := range []struct {
		name, in string
		status   int
	}{
		{"two lengths", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\nContent-Length: 0\r\n\r\n", 400},
		{"length and chunked", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n", 400},
		{"connect", "CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n", 405},
		{"h2c", "GET / HTTP/1.1\r\nHost: a\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n", 501},
		{"preface", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505},
		{"encoded slash", "GET /a%2fb HTTP/1.1\r\nHost: a\r\n\r\n", 400},
		{"backslash", "GET /a\\b HTTP/1.1\r\nHost: a\r\n\r\n", 400},
		{"dot segment with parameter", "GET /a/..;x/b HTTP/1.1\r\nHost: a\r\n\r\n", 400},
		{"no host in 1.0", "GET / HTTP/1.0\r\n\r\n", 400},
		{"large head", "GET / HTTP/1.1\r\nHost: a\r\n" + strings.Repeat("X: "+strings.Repeat("y", 1000)+"\r\n", 40) + "\r\n", 431},
		{"long target", "GET /" + strings.Repeat("y", 9000) + " HTTP/1.1\r\nHost: a\r\n\r\n", 414},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := connect(t, p.addr)
			c.send("%sGET /canary HTTP/1.1\r\nHost: a\r\n\r\n", tt.in)
			resp, _ := c.response("GET")
			if resp.StatusCode != tt.status || resp.Header.Get("mesh-error") != "bad-request" {
				t.Errorf("got %d %s, want %d bad-request", resp.StatusCode, resp.Header.Get("mesh-error"), tt.status)
			}
			if !resp.Close {
				t.Error("no Connection: close")
			}
			c.ended()
			select {
			case path := <-reached:
				t.Errorf("%s reached the application", path)
			default:
			}
		})
	}
}

// TestDeadPooledConnections has a server that closes every connection after a
// response without saying so: the next request on it must not notice.
func TestDeadPooledConnections(t *testing.T) {
	const n = 10_000
	upstream := serveRaw(t, func(nc *net.TCPConn, r *bufio.Reader) {
		for range 2 {
			if _, err := readHead(r); err != nil {
				return
			}
			say(nc, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
		}
	})
	// A busy machine may take long for one of the 5,000 connections.
	p := start(t, options{upstream: upstream, pool: func(c *l7.PoolConfig) { c.ConnectTimeout = 20 * time.Second }})
	c := connect(t, p.addr)
	if err := c.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	failed := 0
	for range n {
		c.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n")
		if resp, body := c.response("GET"); resp.StatusCode != 200 || body != "ok" {
			t.Logf("got %d %q", resp.StatusCode, body)
			failed++
		}
		if r := p.next(t); r.Status != 200 {
			t.Logf("record %+v", r)
		}
	}
	if failed != 0 {
		t.Errorf("%d of %d requests failed", failed, n)
	}
}

// TestUnaskedBytesAreNotAnAnswer has a server that sends a response into a
// connection that waits in the pool.
func TestUnaskedBytesAreNotAnAnswer(t *testing.T) {
	sent := make(chan struct{}, 4)
	upstream := serveRaw(t, func(nc *net.TCPConn, r *bufio.Reader) {
		if _, err := readHead(r); err != nil {
			return
		}
		say(nc, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
		say(nc, "HTTP/1.1 408 Request Timeout\r\nContent-Length: 4\r\n\r\nevil")
		sent <- struct{}{}
		_, _ = readHead(r)
	})
	p := start(t, options{upstream: upstream})
	c := connect(t, p.addr)
	for range 20 {
		c.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n")
		if resp, body := c.response("GET"); resp.StatusCode != 200 || body != "ok" {
			t.Fatalf("got %d %q", resp.StatusCode, body)
		}
		<-sent
	}
}

// resetSeen reads to the end of nc and reports whether it was a reset.
func resetSeen(r io.Reader) error {
	_, err := io.Copy(io.Discard, r)
	if errors.Is(err, syscall.ECONNRESET) {
		return nil
	}
	return fmt.Errorf("want a reset, got %w", errors.Join(err, errors.New("end")))
}

func TestClientVanishesInItsBody(t *testing.T) {
	seen := make(chan error, 1)
	upstream := serveRaw(t, func(_ *net.TCPConn, r *bufio.Reader) {
		if _, err := readHead(r); err != nil {
			seen <- err
			return
		}
		seen <- resetSeen(r)
	})
	p := start(t, options{upstream: upstream})
	for _, reset := range []bool{false, true} {
		c := connect(t, p.addr)
		c.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\nhello")
		if reset {
			if err := c.SetLinger(0); err != nil {
				t.Fatal(err)
			}
		}
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
		if err := <-seen; err != nil {
			t.Errorf("reset %v: %v", reset, err)
		}
		if r := p.next(t); r.Reason != l7.ClientGone || r.Status != 0 {
			t.Errorf("record %+v", r)
		}
	}
}

func TestClientVanishesWhileItWaits(t *testing.T) {
	seen := make(chan error, 1)
	got := make(chan struct{})
	upstream := serveRaw(t, func(_ *net.TCPConn, r *bufio.Reader) {
		if _, err := readHead(r); err != nil {
			seen <- err
			return
		}
		close(got)
		seen <- resetSeen(r)
	})
	p := start(t, options{upstream: upstream})
	c := connect(t, p.addr)
	c.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n")
	<-got
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-seen; err != nil {
		t.Error(err)
	}
	if r := p.next(t); r.Reason != l7.ClientGone {
		t.Errorf("record %+v", r)
	}
}

func TestClientVanishesInTheResponse(t *testing.T) {
	seen := make(chan error, 1)
	upstream := serveRaw(t, func(nc *net.TCPConn, r *bufio.Reader) {
		if _, err := readHead(r); err != nil {
			seen <- err
			return
		}
		say(nc, "HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
		var err error
		for block := make([]byte, 64<<10); err == nil; {
			_, err = nc.Write(block)
		}
		seen <- err
	})
	p := start(t, options{upstream: upstream})
	c := connect(t, p.addr)
	c.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n")
	if _, err := io.ReadFull(c.r, make([]byte, 4096)); err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-seen; !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
		t.Errorf("the upstream's write: %v, want a reset", err)
	}
	if r := p.next(t); r.Reason != l7.ClientGone || r.Status != 200 {
		t.Errorf("record %+v", r)
	}
}

// TestUpstreamBreaksOff holds that half a response never looks whole.
func TestUpstreamBreaksOff(t *testing.T) {
	for _, head := range []string{
		"Content-Length: 100\r\n\r\nhalf",
		"Transfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
		"Transfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\nzz\r\n",
	} {
		upstream := serveRaw(t, func(nc *net.TCPConn, r *bufio.Reader) {
			if _, err := readHead(r); err == nil {
				say(nc, "HTTP/1.1 200 OK\r\n%s", head)
			}
		})
		p := start(t, options{upstream: upstream})
		c := connect(t, p.addr)
		c.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n")
		if _, err := io.ReadAll(c.r); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%q: got %v, want a reset", head, err)
		}
	}
}

func TestEarlyResponse(t *testing.T) {
	upstream := serveRaw(t, func(nc *net.TCPConn, r *bufio.Reader) {
		if _, err := readHead(r); err == nil {
			say(nc, "HTTP/1.1 413 Too Large\r\nContent-Length: 4\r\nConnection: close\r\n\r\nstop")
		}
	})
	p := start(t, options{upstream: upstream})
	c := connect(t, p.addr)
	c.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100000000\r\n\r\nbegin")
	if resp, body := c.response("POST"); resp.StatusCode != 413 || body != "stop" {
		t.Errorf("got %d %q", resp.StatusCode, body)
	}
	if r := p.next(t); r.Status != 413 || r.Reason != l7.None {
		t.Errorf("record %+v", r)
	}
}

// TestRefusedBodyIsDrained: a small body behind a refusal costs the client no
// connection when it has come already.
func TestRefusedBodyIsDrained(t *testing.T) {
	p := start(t, options{upstream: "127.0.0.1:1", handler: func(*proxy) l7.Handler {
		return handler(func(ex *l7.Exchange) l7.Response { return ex.Fail(&l7.Error{Reason: l7.Denied}) })
	}})
	c := connect(t, p.addr)
	for range 3 {
		c.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello")
		if resp, _ := c.response("POST"); resp.StatusCode != 403 || resp.Close {
			t.Fatalf("got %d, close %v", resp.StatusCode, resp.Close)
		}
	}
	c.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 500000\r\n\r\nhello")
	if resp, _ := c.response("POST"); resp.StatusCode != 403 || !resp.Close {
		t.Errorf("got %d, close %v", resp.StatusCode, resp.Close)
	}
}

func TestWebSocket(t *testing.T) {
	early := make(chan int, 1)
	upstream := serveRaw(t, func(nc *net.TCPConn, r *bufio.Reader) {
		head, err := readHead(r)
		if err != nil || !strings.Contains(head, "Connection: Upgrade\r\nUpgrade: websocket\r\n") {
			t.Errorf("got %q, %v", head, err)
			return
		}
		if strings.HasPrefix(head, "GET /refuse") {
			say(nc, "HTTP/1.1 400 No\r\nContent-Length: 0\r\n\r\n")
			head, err = readHead(r)
			if err != nil || !strings.HasPrefix(head, "GET /next") {
				t.Errorf("after a refusal: %q, %v", head, err)
			}
			say(nc, "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nnext")
			return
		}
		// No byte of the client may be here before the 101.
		_ = nc.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
		_, err = r.Peek(1)
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("bytes or %v before the 101", err)
		}
		early <- r.Buffered()
		_ = nc.SetReadDeadline(time.Now().Add(20 * time.Second))
		say(nc, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: x\r\n\r\nhello")
		_, _ = io.Copy(nc, r)
		say(nc, "bye")
	})
	p := start(t, options{upstream: upstream})
	const head = "GET %s HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: k\r\n\r\n"
	c := connect(t, p.addr)
	c.send(head+"early", "/")
	if n := <-early; n != 0 {
		t.Errorf("%d bytes reached the upstream before its 101", n)
	}
	got, err := readHead(c.r)
	if err != nil || !strings.HasPrefix(got, "HTTP/1.1 101 Switching Protocols\r\nSec-WebSocket-Accept: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n") {
		t.Fatalf("got %q, %v", got, err)
	}
	c.send(" and late")
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if all, err := io.ReadAll(c.r); err != nil || string(all) != "helloearly and latebye" {
		t.Errorf("got %q, %v", all, err)
	}
	if r := p.next(t); r.Status != 101 || r.In != 14 || r.Out != 22 {
		t.Errorf("record %+v", r)
	}

	c = connect(t, p.addr)
	c.send(head, "/refuse")
	if resp, _ := c.response("GET"); resp.StatusCode != 400 {
		t.Errorf("got %d", resp.StatusCode)
	}
	c.send("GET /next HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
	if _, body := c.response("GET"); body != "next" {
		t.Errorf("got %q", body)
	}
}

func TestTimeouts(t *testing.T) {
	hang := func(t *testing.T) string {
		t.Helper()
		return serveRaw(t, func(_ *net.TCPConn, r *bufio.Reader) { _, _ = io.Copy(io.Discard, r) })
	}
	t.Run("deadline", func(t *testing.T) {
		p := start(t, options{upstream: hang(t), handler: func(p *proxy) l7.Handler {
			return handler(func(ex *l7.Exchange) l7.Response {
				ex.Deadline = time.Now().Add(50 * time.Millisecond)
				return p.pool.Forward(ex)
			})
		}})
		c := connect(t, p.addr)
		c.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n")
		if resp, _ := c.response("GET"); resp.StatusCode != 504 || resp.Header.Get("mesh-error") != "timeout" {
			t.Errorf("got %d %s", resp.StatusCode, resp.Header.Get("mesh-error"))
		}
	})
	t.Run("silent upstream", func(t *testing.T) {
		p := start(t, options{upstream: hang(t), pool: func(c *l7.PoolConfig) { c.StreamIdle = 100 * time.Millisecond }})
		c := connect(t, p.addr)
		c.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n")
		if resp, _ := c.response("GET"); resp.StatusCode != 504 {
			t.Errorf("got %d", resp.StatusCode)
		}
	})
	t.Run("slow head", func(t *testing.T) {
		p := start(t, options{upstream: hang(t), server: func(c *l7.ServerConfig) { c.HeadTimeout = 500 * time.Millisecond }})
		c := connect(t, p.addr)
		c.send("GET / HTTP/1.1\r\nHost:")
		if resp, _ := c.response("GET"); resp.StatusCode != 408 {
			t.Errorf("got %d", resp.StatusCode)
		}
		c.ended()
	})
	t.Run("slow body", func(t *testing.T) {
		p := start(t, options{upstream: hang(t), server: func(c *l7.ServerConfig) { c.StreamIdle = 500 * time.Millisecond }})
		c := connect(t, p.addr)
		c.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhe")
		if resp, _ := c.response("POST"); resp.StatusCode != 408 {
			t.Errorf("got %d", resp.StatusCode)
		}
	})
	t.Run("body in drips", func(t *testing.T) {
		p := start(t, options{upstream: hang(t), server: func(c *l7.ServerConfig) { c.BodyGrace = 100 * time.Millisecond }})
		c := connect(t, p.addr)
		c.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n")
		stop := make(chan struct{})
		var wg sync.WaitGroup
		wg.Go(func() {
			drip := time.NewTicker(50 * time.Millisecond)
			defer drip.Stop()
			for {
				select {
				case <-stop:
					return
				case <-drip.C:
					say(c.TCPConn, "x")
				}
			}
		})
		resp, _ := c.response("POST")
		close(stop)
		wg.Wait()
		if resp.StatusCode != 408 {
			t.Errorf("got %d", resp.StatusCode)
		}
	})
	t.Run("idle", func(t *testing.T) {
		p := start(t, options{upstream: hang(t), server: func(c *l7.ServerConfig) { c.IdleTimeout = 50 * time.Millisecond }})
		connect(t, p.addr).ended()
	})
	t.Run("unused upstream connection", func(t *testing.T) {
		p := start(t, options{upstream: echoUpstream(t), pool: func(c *l7.PoolConfig) { c.IdleTimeout = 50 * time.Millisecond }})
		c := connect(t, p.addr)
		c.send(smallHead)
		c.response("GET")
		p.next(t)
		waitFor(t, "the unused connection to be closed", func() bool { return p.pool.Idle() == 0 })
	})
}

// waitFor polls, for want of an event, up to 10 s.
func waitFor(t *testing.T, what string, done func() bool) {
	t.Helper()
	deadline := time.NewTimer(10 * time.Second)
	defer deadline.Stop()
	poll := time.NewTicker(5 * time.Millisecond)
	defer poll.Stop()
	for !done() {
		select {
		case <-deadline.C:
			t.Fatalf("waited 10 s for %s", what)
		case <-poll.C:
		}
	}
}

func TestDrain(t *testing.T) {
	release := make(chan struct{})
	inside := make(chan struct{})
	upstream := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/slow" {
			close(inside)
			<-release
		}
		say(w, "ok")
	})
	p := start(t, options{upstream: upstream})
	idle, busy := connect(t, p.addr), connect(t, p.addr)
	idle.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n")
	idle.response("GET")
	busy.send("GET /slow HTTP/1.1\r\nHost: a\r\n\r\n")
	<-inside
	for _, c := range p.live() {
		c.Drain()
	}
	idle.ended()
	close(release)
	if resp, body := busy.response("GET"); body != "ok" || !resp.Close {
		t.Errorf("got %q, close %v; want the response and its close", body, resp.Close)
	}
	busy.ended()
}

// TestRetire: whoever has sent nothing yet may send one more request, whether it
// is the connection's first or not, and is told that it was the last.
func TestRetire(t *testing.T) {
	upstream := serveHTTP(t, func(w http.ResponseWriter, _ *http.Request) { say(w, "ok") })
	p := start(t, options{upstream: upstream})
	used, fresh := connect(t, p.addr), connect(t, p.addr)
	used.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n")
	used.response("GET")
	for _, c := range p.serves(t, 2) {
		c.Retire()
	}
	for name, c := range map[string]*client{"used": used, "fresh": fresh} {
		c.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n")
		if resp, body := c.response("GET"); body != "ok" || !resp.Close {
			t.Errorf("%s: got %q, close %v; want the response and its close", name, body, resp.Close)
		}
		c.ended()
	}
	other := start(t, options{upstream: upstream})
	silent := connect(t, other.addr)
	for _, c := range other.serves(t, 1) {
		c.Retire()
		c.Drain()
	}
	silent.ended()
}

func TestAbort(t *testing.T) {
	inside, seen := make(chan struct{}), make(chan error, 1)
	upstream := serveRaw(t, func(_ *net.TCPConn, r *bufio.Reader) {
		if _, err := readHead(r); err != nil {
			seen <- err
			return
		}
		close(inside)
		seen <- resetSeen(r)
	})
	p := start(t, options{upstream: upstream})
	c := connect(t, p.addr)
	c.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n")
	<-inside
	began := time.Now()
	for _, conn := range p.live() {
		conn.Abort(l7.PolicyChanged)
	}
	if _, err := c.r.ReadByte(); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the client got %v, want a reset", err)
	}
	if err := <-seen; err != nil {
		t.Errorf("upstream: %v", err)
	}
	if r := p.next(t); r.Reason != l7.PolicyChanged {
		t.Errorf("record %+v", r)
	}
	if took := time.Since(began); took > time.Second {
		t.Errorf("took %v", took)
	}
}
