package dataplane_test

import (
	"bufio"
	"context"
	"net"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/proxy"
	"github.com/meshd/meshd/proxy/l7"
)

// The application and the client of the benchmarks do as little as possible, so that what is measured is the proxy's.
const (
	benchRequest  = "GET /v1/items/42?x=y HTTP/1.1\r\nHost: api.mesh\r\nUser-Agent: bench\r\nAccept: */*\r\nX-Request-Id: 0123456789abcdef\r\n\r\n"
	benchResponse = "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 100\r\n\r\n"
)

func benchApp(tb testing.TB) string {
	tb.Helper()
	response := append([]byte(benchResponse), make([]byte, 100)...)
	return serveTCP(tb, func(c *net.TCPConn) {
		br := bufio.NewReaderSize(c, 4096)
		for {
			for {
				line, err := br.ReadSlice('\n')
				if err != nil {
					return
				}
				if len(line) == 2 {
					break
				}
			}
			if _, err := c.Write(response); err != nil {
				return
			}
		}
	})
}

//nolint:gochecknoglobals // a constant
var requestBytes = []byte(benchRequest)

// benchClient sends one request and reads its response.
type benchClient struct {
	tb testing.TB
	c  net.Conn
	br *bufio.Reader
}

func newBenchClient(tb testing.TB, address string) *benchClient {
	tb.Helper()
	c := dial(tb, address)
	if err := c.SetDeadline(time.Time{}); err != nil {
		tb.Fatal(err)
	}
	return &benchClient{tb: tb, c: c, br: bufio.NewReaderSize(c, 4096)}
}

func (b *benchClient) do() {
	b.send()
	b.receive()
}

func (b *benchClient) send() {
	if _, err := b.c.Write(requestBytes); err != nil {
		b.tb.Fatal(err)
	}
}

func (b *benchClient) receive() {
	for first := true; ; first = false {
		line, err := b.br.ReadSlice('\n')
		if err != nil {
			b.tb.Fatal(err)
		}
		if first && string(line[9:12]) != "200" {
			b.tb.Fatalf("status line %q", line)
		}
		if len(line) == 2 {
			break
		}
	}
	if _, err := b.br.Discard(100); err != nil {
		b.tb.Fatal(err)
	}
}

func cpu(tb testing.TB) time.Duration {
	tb.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		tb.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// loaded gives a mesh a plan of a usual size: 20 clusters of 5 endpoints, 100 intentions.
func loaded(m *mesh) {
	for i := range 20 {
		name := "s" + string(rune('a'+i))
		cl := proxy.Cluster{Name: "default/" + name + ":main", Service: service(name), Port: "main", Protocol: catalog.ProtocolHTTP}
		for j := range 5 {
			id := name + "-" + string(rune('a'+j))
			cl.Endpoints = append(cl.Endpoints, proxy.Endpoint{
				Instance: id, Node: "vm", Address: "127.0.0.1:1", ServerName: proxy.ServerName("main", id, name, catalog.DefaultNamespace),
			})
		}
		m.a.plan.Clusters = append(m.a.plan.Clusters, cl)
	}
	policy := &m.b.plan.Policies[0]
	for i := range 99 {
		other := *deny()
		other.Source = "caller-" + string(rune('a'+i%26)) + string(rune('a'+i/26))
		policy.Intentions = append(policy.Intentions, other)
	}
	m.a.apply()
	m.b.apply()
}

// plainHop is the HTTP of the data plane alone: no TLS, no policy, no plan.
func plainHop(tb testing.TB, app string) string {
	tb.Helper()
	var d net.Dialer
	pool := l7.NewPool(l7.PoolConfig{Dial: func(ctx context.Context) (net.Conn, error) { return d.DialContext(ctx, "tcp", app) }})
	server := l7.NewServer(l7.ServerConfig{Handler: forward{pool}, Log: testLog(tb)})
	tb.Cleanup(pool.CloseIdle)
	return serveTCP(tb, func(c *net.TCPConn) {
		_ = server.NewConn(c, l7.ConnInfo{Source: service("web")}).Serve(context.Background())
	})
}

type forward struct{ pool *l7.Pool }

func (f forward) Handle(ex *l7.Exchange) l7.Response { return f.pool.Forward(ex) }

// BenchmarkHTTP tells CPU and allocations per request of the whole process: the client and the application are in it. "direct"
// is what those two cost alone.
func BenchmarkHTTP(b *testing.B) {
	run := func(b *testing.B, address string) {
		b.Helper()
		c := newBenchClient(b, address)
		for range 100 {
			c.do()
		}
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		started := cpu(b)
		for b.Loop() {
			c.do()
		}
		used := cpu(b) - started
		runtime.ReadMemStats(&after)
		b.ReportMetric(float64(used.Nanoseconds())/float64(b.N)/1000, "cpu-µs/req")
		b.ReportMetric(float64(after.Mallocs-before.Mallocs)/float64(b.N), "mallocs/req")
	}
	b.Run("direct", func(b *testing.B) { run(b, benchApp(b)) })
	b.Run("one plain hop", func(b *testing.B) { run(b, plainHop(b, benchApp(b))) })
	b.Run("two mTLS hops", func(b *testing.B) {
		m := newMesh(b, options{protocol: catalog.ProtocolHTTP, apps: []string{benchApp(b)}, intention: allow()})
		loaded(m)
		run(b, m.upstream)
	})
}

// TestAllocationsPerRequest bounds what a proxied request may allocate in the whole process, both proxies, client and
// application included.
func TestAllocationsPerRequest(t *testing.T) {
	m := newMesh(t, options{protocol: catalog.ProtocolHTTP, apps: []string{benchApp(t)}, intention: allow()})
	loaded(m)
	c := newBenchClient(t, m.upstream)
	const requests = 3000
	for range requests {
		c.do()
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for range requests {
		c.do()
	}
	runtime.ReadMemStats(&after)
	per := float64(after.Mallocs-before.Mallocs) / requests
	t.Logf("%.3f allocations per request over two mTLS hops", per)
	if per > mallocsPerRequest {
		t.Errorf("%.3f allocations per request, at most %.1f are accepted", per, mallocsPerRequest)
	}
}
