package e2e_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

const gib = 1 << 30

// maxGrowth is how many KiB a transfer may cost a proxy.
const maxGrowth = 16 << 10

// grows runs f and demands that the proxies' private memory stays within a bound
// of what it was before.
func (m *real) grows(t *testing.T, what string, f func()) {
	t.Helper()
	pids := map[string]int{"caller's proxy": m.web.proxy.PID(), "callee's proxy": m.far.proxy.PID()}
	before, most := map[string]int{}, map[string]int{}
	for name, pid := range pids {
		before[name] = private(t, pid)
	}
	done := make(chan struct{})
	begun := time.Now()
	go func() {
		defer close(done)
		f()
	}()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for running := true; running; {
		select {
		case <-done:
			running = false
		case <-tick.C:
		}
		for name, pid := range pids {
			most[name] = max(most[name], private(t, pid))
		}
	}
	took := time.Since(begun)
	for name := range pids {
		t.Logf("%s in %s: the %s had %d KiB before, %d at most", what, took.Round(10*time.Millisecond), name, before[name], most[name])
		if most[name] > before[name]+maxGrowth {
			t.Errorf("%s: the %s grew by %d KiB, want at most %d", what, name, most[name]-before[name], maxGrowth)
		}
	}
}

// TestGigabytes: 1 GiB up and 1 GiB down, over HTTP and over TCP, arrive whole and
// pass through bounded memory.
func TestGigabytes(t *testing.T) {
	t.Parallel()
	m := newReal(t, offer{name: "sink", protocol: "http", port: 8301, local: 9301}, offer{name: "bulk", protocol: "tcp", port: 8302, local: 9302})
	srv := sink(m.far.Listen("127.0.0.1:8301"))
	t.Cleanup(func() { _ = srv.Close() })
	l := m.far.Listen("127.0.0.1:8302")
	m.web.answers(10*time.Second, "200", atSink+"/")
	sum, c := sumOf(t, gib), m.web.client(&http.Transport{})

	m.grows(t, "1 GiB up over HTTP", func() {
		resp, err := c.Post(atSink+"/sum", "application/octet-stream", io.LimitReader(newPattern(gib), gib))
		if err != nil {
			t.Error(err)
			return
		}
		defer resp.Body.Close() //nolint:errcheck // read to its end
		if body, err := io.ReadAll(resp.Body); err != nil || !strings.Contains(string(body), fmt.Sprint("POST ", gib, " ", sum)) {
			t.Errorf("the server got %q, %v, want %s", body, err, sum)
		}
	})
	m.grows(t, "1 GiB down over HTTP", func() {
		resp, err := c.Get(fmt.Sprint(atSink, "/bytes/", gib))
		if err != nil {
			t.Error(err)
			return
		}
		defer resp.Body.Close() //nolint:errcheck // read to its end
		if got, err := sumUp(resp.Body); err != nil || got != sum {
			t.Errorf("the client got %s, %v, want %s", got, err, sum)
		}
	})
	up, down := make(chan string, 1), m.web.connect("127.0.0.1:9302")
	far, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close() //nolint:errcheck // ended below
	m.grows(t, "1 GiB up over TCP", func() {
		go func() {
			got, err := sumUp(far)
			up <- fmt.Sprint(got, err)
		}()
		if _, err := io.Copy(down, newPattern(gib)); err != nil {
			t.Error(err)
		}
		_ = down.(*net.TCPConn).CloseWrite() //nolint:errcheck,forcetypeassert // a TCP connection by its making
		if got := <-up; got != sum+"<nil>" {
			t.Errorf("the server got %s, want %s", got, sum)
		}
	})
	m.grows(t, "1 GiB down over TCP", func() {
		go func() {
			_, _ = io.Copy(far, newPattern(gib))
			_ = far.Close()
		}()
		if got, err := sumUp(down); err != nil || got != sum {
			t.Errorf("the client got %s, %v, want %s", got, err, sum)
		}
	})
}

func sumUp(r io.Reader) (string, error) {
	sum := sha256.New()
	_, err := io.Copy(struct{ io.Writer }{sum}, struct{ io.Reader }{r})
	return hex.EncodeToString(sum.Sum(nil)), err
}

// most is how many connections TestManyConnections holds.
const most = 8000

// TestManyConnections: 8,000 connections are open at once, over HTTP and then over
// TCP, and at the end each one answers once more.
func TestManyConnections(t *testing.T) {
	t.Parallel()
	descriptors(t, 2*most+2000)
	const limits = "    limits {\n      connections = 10000\n      requests    = 10000\n    }\n"
	m := newReal(t, offer{name: "sink", protocol: "http", port: 8301, local: 9301, limits: limits}, offer{name: "line", protocol: "tcp", port: 8302, local: 9302, limits: limits})
	srv := sink(m.far.Listen("127.0.0.1:8301"))
	t.Cleanup(func() { _ = srv.Close() })
	serveLines(m.far.Listen("127.0.0.1:8302"))
	m.web.answers(10*time.Second, "200", atSink+"/")
	for _, c := range []struct{ name, addr, request, answer string }{
		{"HTTP", "127.0.0.1:9301", "GET /32 HTTP/1.1\r\nHost: sink\r\n\r\n", "HTTP/1.1 200 OK\r\n"},
		{"TCP", "127.0.0.1:9302", "a line of 32 bytes and no more.\n", "a line of 32 bytes and no more.\n"},
	} {
		before := [2]int{private(t, m.web.proxy.PID()), private(t, m.far.proxy.PID())}
		begun := time.Now()
		all := make([]net.Conn, most)
		asked := m.everyone(t, all, c.addr, c.request, c.answer)
		t.Logf("%s: %d connections are open and have answered after %s", c.name, len(all), time.Since(begun).Round(time.Millisecond))
		for i, p := range []*process{m.web.proxy, m.far.proxy} {
			now := private(t, p.PID())
			t.Logf("%s: %s has %d KiB, %.1f KiB per connection, right after its answer", c.name, p.Name, now, float64(now-before[i])/most)
			if now > before[i]+most*80 {
				t.Errorf("%s: %s needs more than 80 KiB per connection", c.name, p.Name)
			}
		}
		asked += m.everyone(t, all, c.addr, c.request, c.answer)
		if asked != 2*most {
			t.Errorf("%s: %d answers of %d", c.name, asked, 2*most)
		}
		for _, one := range all {
			_ = one.Close()
		}
		eventually(t, 20*time.Second, "the connections are gone", func() string {
			_, _, text := m.far.curl("http://127.0.0.1:7491/metrics")
			for line := range strings.Lines(text) {
				if n := 0; strings.HasPrefix(line, "mesh_connections_open{") {
					if _, err := fmt.Sscanf(line[strings.Index(line, "}")+1:], "%d", &n); err != nil || n > 300 { // kept ones may stay
						return line
					}
				}
			}
			return ""
		})
	}
}

// descriptors sees to it that this process, and those that it starts, may have
// that many.
func descriptors(t *testing.T, n uint64) {
	t.Helper()
	var now syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &now); err != nil {
		t.Fatal(err)
	}
	if now.Cur >= n && now.Max >= n {
		return
	}
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: n, Max: max(n, now.Max)}); err != nil {
		t.Fatalf("%d descriptors are needed, %d allowed: %v", n, now.Max, err)
	}
}

// serveLines answers every line with itself, with little memory per connection.
func serveLines(l net.Listener) {
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close() //nolint:errcheck // the far side is gone anyway
				var b [64]byte
				for {
					n, err := c.Read(b[:])
					if err != nil {
						return
					}
					if _, err := c.Write(b[:n]); err != nil {
						return
					}
				}
			}()
		}
	}()
}

// everyone sends a request on each connection, 64 at a time, and returns how many
// answered. A connection that is not there yet is opened.
func (m *real) everyone(t *testing.T, all []net.Conn, addr, request, answer string) int {
	t.Helper()
	dial := m.web.dialer()
	var next, good atomic.Int64
	var workers sync.WaitGroup
	for range 64 {
		workers.Go(func() {
			for i := next.Add(1) - 1; i < int64(len(all)); i = next.Add(1) - 1 {
				if all[i] == nil {
					c, err := dial(addr)
					if err != nil {
						t.Errorf("connection %d: %v", i, err)
						return
					}
					all[i] = c
					t.Cleanup(func() { _ = c.Close() })
				}
				if got, err := askOnce(all[i], request, answer); err != nil {
					t.Errorf("connection %d: %q, %v", i, got, err)
					return
				}
				good.Add(1)
			}
		})
	}
	workers.Wait()
	return int(good.Load())
}

// askOnce sends a request and reads the answer to it.
func askOnce(c net.Conn, request, answer string) (got []byte, err error) {
	if err := c.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		return nil, err
	}
	if _, err := io.WriteString(c, request); err != nil {
		return nil, err
	}
	buffer := make([]byte, 512)
	for n := 0; ; {
		more, err := c.Read(buffer[n:])
		n += more
		if whole(buffer[:n], answer) || err != nil {
			return buffer[:n], err
		}
	}
}

// whole tells whether an answer that must begin like that has come to its end: that
// of a line, and for HTTP that of sink's line.
func whole(got []byte, begins string) bool {
	return bytes.HasPrefix(got, []byte(begins)) && (!strings.HasPrefix(begins, "HTTP") || bytes.HasSuffix(got, []byte("GET /32\n")))
}

// TestSlowPeers: those who read or write a byte each 100 ms don't slow down others.
func TestSlowPeers(t *testing.T) {
	t.Parallel()
	m := newReal(t, offer{name: "sink", protocol: "http", port: 8301, local: 9301}, offer{name: "line", protocol: "tcp", port: 8302, local: 9302})
	srv := sink(m.far.Listen("127.0.0.1:8301"))
	t.Cleanup(func() { _ = srv.Close() })
	serveLines(m.far.Listen("127.0.0.1:8302"))
	m.web.answers(10*time.Second, "200", atSink+"/")
	load := m.web.stream(atSink+"/fast", 100)
	load.more(t, 100)
	alone := load.more(t, 200)

	ctx, stop := context.WithCancel(t.Context())
	var slow sync.WaitGroup
	for i := range 40 {
		write, read := m.web.connect("127.0.0.1:9301"), m.web.connect("127.0.0.1:9301")
		line := m.web.connect("127.0.0.1:9302")
		slow.Go(func() { drip(ctx, write, "POST /sum HTTP/1.1\r\nHost: sink\r\nContent-Length: 1000\r\n\r\n", true) })
		slow.Go(func() { drip(ctx, read, "GET /bytes/10000000 HTTP/1.1\r\nHost: sink\r\n\r\n", false) })
		slow.Go(func() { drip(ctx, line, "", i%2 == 0) })
	}
	load.more(t, 200) // until the buffers between are full, the readers are not slow
	// Peers that hold others up do so all the time; this machine is busy at times.
	before := percentile(alone, 95)
	eventually(t, time.Minute, "fast requests are as fast as alone", func() string {
		beside := load.more(t, 100)
		lost(t, "beside slow ones", beside)
		during := percentile(beside, 95)
		t.Logf("95 of 100 requests take at most %s alone, %s beside 120 slow peers", before.Round(10*time.Microsecond), during.Round(10*time.Microsecond))
		if during > 3*before+20*time.Millisecond {
			return fmt.Sprintf("%s, %s alone", during, before)
		}
		return ""
	})
	stop()
	slow.Wait()
	exchange(t, m.web.connect("127.0.0.1:9302"), "a line\n")
}

// drip sends a text at once, and then writes or reads a byte each 100 ms.
func drip(ctx context.Context, c net.Conn, first string, writes bool) {
	defer c.Close() //nolint:errcheck // given up
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	_, err := io.WriteString(c, first)
	for err == nil {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if writes {
			_, err = c.Write([]byte("x"))
		} else {
			if derr := c.SetReadDeadline(time.Now().Add(time.Second)); derr != nil {
				return
			}
			if _, err = c.Read(make([]byte, 1)); errors.Is(err, context.DeadlineExceeded) || isTimeout(err) {
				err = nil // nothing to read from an echo
			}
		}
	}
}

func isTimeout(err error) bool {
	ne, ok := errors.AsType[net.Error](err)
	return ok && ne.Timeout()
}

// percentile is the time that so many of a hundred replies took at most.
func percentile(replies []reply, p int) time.Duration {
	all := make([]time.Duration, 0, len(replies))
	for _, r := range replies {
		all = append(all, r.took)
	}
	slices.Sort(all)
	return all[min(len(all)-1, len(all)*p/100)]
}

// TestBurst: many new connections at the same moment, to a callee that nobody has
// called before, are all served.
func TestBurst(t *testing.T) {
	t.Parallel()
	m := newReal(t, offer{name: "sink", protocol: "http", port: 8301, local: 9301}, offer{name: "line", protocol: "tcp", port: 8302, local: 9302})
	srv := sink(m.far.Listen("127.0.0.1:8301"))
	t.Cleanup(func() { _ = srv.Close() })
	serveLines(m.far.Listen("127.0.0.1:8302"))
	for _, c := range []struct{ name, addr, request, answer string }{
		{"TCP", "127.0.0.1:9302", "a line\n", "a line\n"}, {"HTTP", "127.0.0.1:9301", "GET /32 HTTP/1.1\r\nHost: sink\r\n\r\n", "HTTP/1.1 200 OK\r\n"},
	} {
		const burst = 400
		var all []net.Conn
		for range burst {
			all = append(all, m.web.connect(c.addr))
		}
		begun := time.Now()
		var asking sync.WaitGroup
		for i, one := range all {
			asking.Go(func() {
				if got, err := askOnce(one, c.request, c.answer); err != nil {
					t.Errorf("%s: connection %d: %q, %v", c.name, i, got, err)
				}
			})
		}
		asking.Wait()
		t.Logf("%s: %d at once are answered after %s", c.name, burst, time.Since(begun).Round(time.Millisecond))
	}
}
