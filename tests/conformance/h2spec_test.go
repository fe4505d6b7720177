package conformance_test

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os/exec"
	"path/filepath"
	"regexp"
	"sync"
	"testing"

	"github.com/meshd/meshd/proxy/http2"
	"github.com/meshd/meshd/proxy/l7"
)

// plainApp is a plain server that reads what it is sent, and answers: over HTTP/2
// to whoever has prior knowledge.
func plainApp(t *testing.T) string {
	t.Helper()
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		_, _ = io.WriteString(w, "an answer of more than a few bytes\n")
	}))
	srv.Config.Protocols = new(http.Protocols)
	srv.Config.Protocols.SetHTTP1(true)
	srv.Config.Protocols.SetUnencryptedHTTP2(true)
	srv.Start()
	t.Cleanup(srv.Close)
	return srv.Listener.Addr().String()
}

// forwarder hands every request to one upstream.
type forwarder struct{ to l7.Upstream }

// Handle implements l7.Handler.
func (f forwarder) Handle(ex *l7.Exchange) l7.Response { return f.to.Forward(ex) }

// listenHTTP2 serves HTTP/2 with prior knowledge on loopback before an upstream
// until the end of the test.
func listenHTTP2(t *testing.T, to l7.Upstream, bounds http2.Limits) (string, *http2.Counters) {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	counters := &http2.Counters{}
	srv := http2.NewServer(http2.ServerConfig{
		ServerConfig: l7.ServerConfig{Handler: forwarder{to}, Log: slog.New(slog.DiscardHandler)},
		Bounds:       bounds, Counters: counters,
	})
	ctx, stop := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() {
		for {
			nc, err := l.Accept()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil {
				t.Error(err)
				return
			}
			running.Go(func() {
				_ = srv.NewConn(nc, l7.ConnInfo{}).Serve(ctx) // most clients here break off
			})
		}
	})
	t.Cleanup(func() {
		stop()
		_ = l.Close()
		running.Wait()
	})
	return l.Addr().String(), counters
}

// http1Upstream forwards to a server of HTTP/1.1.
func http1Upstream(t *testing.T, address string) l7.Upstream {
	t.Helper()
	pool := l7.NewPool(l7.PoolConfig{Dial: func(ctx context.Context) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", address)
	}})
	t.Cleanup(pool.CloseIdle)
	return pool
}

// http2Upstream forwards to a server of HTTP/2.
func http2Upstream(t *testing.T, address string) l7.Upstream {
	t.Helper()
	pool := http2.NewPool(http2.PoolConfig{Dial: func(ctx context.Context) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", address)
	}})
	t.Cleanup(pool.CloseIdle)
	return pool
}

var h2specSummary = regexp.MustCompile(`(\d+) tests, (\d+) passed, (\d+) skipped, (\d+) failed`)

// TestH2spec: every case of h2spec, the strict ones too, against a plain listener
// of HTTP/2.
func TestH2spec(t *testing.T) { //nolint:tparallel // its rows take turns: they wait for timeouts
	t.Parallel()
	program := filepath.Join(tool(t, "h2spec", "."), "h2spec")
	app := plainApp(t)
	for name, to := range map[string]l7.Upstream{"before HTTP/1.1": http1Upstream(t, app), "before HTTP/2": http2Upstream(t, app)} {
		t.Run(name, func(t *testing.T) {
			address, _ := listenHTTP2(t, to, http2.Limits{})
			out, err := exec.CommandContext(t.Context(), program, address).CombinedOutput()
			got := h2specSummary.FindStringSubmatch(string(out))
			if err != nil || got == nil || got[1] != got[2] || len(got[1]) < 3 {
				t.Errorf("h2spec: %v\n%s", err, out)
				return
			}
			t.Log(got[0])
		})
	}
}
