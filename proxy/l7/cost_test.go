//go:build !race && unix

package l7_test

import (
	"bytes"
	"io"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/meshd/meshd/proxy/l7"
)

// quietServer counts bytes in the sink: the one of the other tests copies.
func quietServer(cfg *l7.ServerConfig) {
	var bytes int64
	cfg.Sink = func(r *l7.Record) { bytes += r.ResponseBytes }
}

// exchanges runs n requests, one after the other, on one connection.
func exchanges(tb testing.TB, c *client, n int, request []byte, answer int) {
	tb.Helper()
	buf := make([]byte, 64<<10)
	if err := c.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		tb.Fatal(err)
	}
	for range n {
		if _, err := c.Write(request); err != nil {
			tb.Fatal(err)
		}
		if _, err := io.ReadAtLeast(c.TCPConn, buf, answer); err != nil {
			tb.Fatal(err)
		}
	}
}

// answerSize asks once and returns how long the proxy's answer is.
func answerSize(tb testing.TB, c *client, request []byte) int {
	tb.Helper()
	if _, err := c.Write(request); err != nil {
		tb.Fatal(err)
	}
	total := 0
	buf := make([]byte, 64<<10)
	for {
		n, err := c.Read(buf)
		if err != nil {
			tb.Fatal(err)
		}
		total += n
		if i := bytes.Index(buf[:total], []byte("\r\n\r\n")); i >= 0 {
			return total
		}
	}
}

// TestMallocsPerRequest (not under the race detector, which makes pools forget
// at random) counts the allocations of the whole process, the test's
// own client and upstream included, which make none.
func TestMallocsPerRequest(t *testing.T) {
	const n = 100_000
	p := start(t, options{upstream: echoUpstream(t), server: quietServer})
	c := connect(t, p.addr)
	request := []byte(smallHead)
	size := answerSize(t, c, request)
	exchanges(t, c, 1000, request, size)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	exchanges(t, c, n, request, size)
	runtime.ReadMemStats(&after)
	per := float64(after.Mallocs-before.Mallocs) / n
	t.Logf("%.4f mallocs per proxied request over %d requests", per, n)
	if per > 0.1 {
		t.Errorf("%.4f mallocs per proxied request, want at most 0.1", per)
	}
}

// BenchmarkProxied reports the CPU time of client, proxy and upstream together:
// they share the process. BenchmarkDirect is the same without the proxy.
func BenchmarkProxied(b *testing.B) {
	p := start(b, options{upstream: echoUpstream(b), server: quietServer})
	benchmark(b, p.addr)
}

// BenchmarkDirect is what client and upstream cost alone.
func BenchmarkDirect(b *testing.B) { benchmark(b, echoUpstream(b)) }

func benchmark(b *testing.B, addr string) {
	b.Helper()
	request := []byte(smallHead)
	c := connect(b, addr)
	size := answerSize(b, c, request)
	exchanges(b, c, 100, request, size)
	b.ReportAllocs()
	b.ResetTimer()
	start := cpu(b)
	exchanges(b, c, b.N, request, size)
	b.ReportMetric(float64((cpu(b)-start).Nanoseconds())/float64(b.N), "cpu-ns/op")
}

func cpu(tb testing.TB) time.Duration {
	tb.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		tb.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// TestMallocsPerRequestOverTLS is the same through two proxies with TLS between.
// crypto/tls makes one allocation per record that it must wait for
// (readFromUntil), so one per request and hop; there is to be none beside it.
func TestMallocsPerRequestOverTLS(t *testing.T) {
	const n = 20_000
	near := twoHops(t, echoUpstream(t), quietServer)
	c := connect(t, near.addr)
	request := []byte(smallHead)
	size := answerSize(t, c, request)
	exchanges(t, c, 1000, request, size)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	exchanges(t, c, n, request, size)
	runtime.ReadMemStats(&after)
	per := float64(after.Mallocs-before.Mallocs) / n / 2
	t.Logf("%.4f mallocs per request and hop over %d requests", per, n)
	if per > 1.1 {
		t.Errorf("%.4f mallocs per request and hop, want at most 1.1", per)
	}
}

// BenchmarkTwoHopsTLS is client, two proxies with TLS between, and upstream.
func BenchmarkTwoHopsTLS(b *testing.B) {
	near := twoHops(b, echoUpstream(b), quietServer)
	benchmark(b, near.addr)
}
