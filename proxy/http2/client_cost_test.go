package http2_test

import (
	"io"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/meshd/meshd/proxy/http2"
	"github.com/meshd/meshd/proxy/l7"
)

// oneHop is a client, a proxy and an application, all of HTTP/2, in this process:
// run sends n requests, streams of them at a time.
func oneHop(tb testing.TB, body int) (run func(n, streams int)) {
	tb.Helper()
	plain := fields("content-type", "text/plain")
	quiet := func(c *http2.ServerConfig) { c.Sink = nil }
	text := []byte(strings.Repeat("x", body))
	app := serve(tb, handler(func(*l7.Exchange) l7.Response {
		return &answer{head: l7.ResponseHead{Status: 200, Fields: plain, Length: int64(body)}, text: text}
	}), quiet)
	inner := newPool(tb, app.addr, nil)
	proxy := serve(tb, handler(inner.Forward), quiet)
	outer := newPool(tb, proxy.addr, nil)
	return func(n, streams int) {
		var wg sync.WaitGroup
		for range streams {
			wg.Go(func() {
				ex := newExchange("GET /v1/items?page=2", nil, "user-agent: bench", "accept: */*")
				head := ex.Request
				ex.Begin(ex.Conn, nil, &head, l7.Instant())
				for range n / streams {
					if err := drain(outer.Forward(ex), body); err != nil {
						tb.Error(err)
						return
					}
				}
			})
		}
		wg.Wait()
	}
}

// drain consumes a response, without memory of its own.
func drain(resp l7.Response, want int) error {
	defer resp.Close()
	if _, err := resp.Head(nil); err != nil {
		return err
	}
	for got := 0; ; {
		view, err := resp.Next(16<<10, nil)
		got += len(view)
		switch {
		case err == io.EOF && got == want: //nolint:errorlint // by contract as it is
			return nil
		case err == io.EOF: //nolint:errorlint // by contract as it is
			return io.ErrUnexpectedEOF
		case err != nil:
			return err
		}
	}
}

// TestExchangesCostNoMemory counts what 20,000 exchanges allocate, in client,
// proxy and application together, and how many goroutines are there.
func TestExchangesCostNoMemory(t *testing.T) {
	run := oneHop(t, 100)
	run(2000, 8)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	const n = 20000
	run(n, 8)
	runtime.ReadMemStats(&after)
	each := float64(after.Mallocs-before.Mallocs) / n
	t.Logf("%.3f allocations per exchange", each)
	if each > 2 && !raceEnabled { // one is the application's answer here
		t.Errorf("%.2f allocations per exchange", each)
	}
}

func BenchmarkOneHop(b *testing.B) {
	for _, c := range []struct {
		name    string
		body    int
		streams int
	}{{"100B/1", 100, 1}, {"100B/8", 100, 8}, {"100B/64", 100, 64}, {"10KiB/64", 10 << 10, 64}} {
		b.Run(c.name, func(b *testing.B) {
			run := oneHop(b, c.body)
			run(1000, c.streams)
			b.ReportAllocs()
			b.ResetTimer()
			run(b.N/c.streams*c.streams+c.streams, c.streams)
		})
	}
}
