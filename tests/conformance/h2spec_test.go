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

	"github.com/meshd/meshd/catalog"
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
func listenHTTP2(t *testing.T, to l7.Upstream) string {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := http2.NewServer(http2.ServerConfig{
		ServerConfig: l7.ServerConfig{Handler: forwarder{to}, Log: slog.New(slog.DiscardHandler)},
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
	return l.Addr().String()
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

// TestH2spec: every case of h2spec, the strict ones too: against a plain listener of HTTP/2, a whole mesh-proxy whose
// caller speaks HTTP/2 in plain, and the mesh port, as a proxy with a valid identity.
func TestH2spec(t *testing.T) {
	t.Parallel()
	program := filepath.Join(tool(t, "h2spec", "."), "h2spec")
	app := plainApp(t)
	for name, listen := range map[string]func(t *testing.T) string{
		"a listener before HTTP/1.1": func(t *testing.T) string {
			t.Helper()
			return listenHTTP2(t, http1Upstream(t, app))
		},
		"a listener before HTTP/2": func(t *testing.T) string {
			t.Helper()
			return listenHTTP2(t, http2Upstream(t, app))
		},
		"two proxies": func(t *testing.T) string {
			t.Helper()
			return pair(t, app, catalog.ProtocolHTTP2).Upstreams["app"]
		},
		"two proxies, gRPC": func(t *testing.T) string {
			t.Helper()
			return pair(t, app, catalog.ProtocolGRPC).Upstreams["app"]
		},
		"the mesh port": func(t *testing.T) string {
			t.Helper()
			return inPlain(t, pair(t, app, catalog.ProtocolHTTP2).dialMesh)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			out, err := exec.CommandContext(t.Context(), program, listen(t)).CombinedOutput()
			got := h2specSummary.FindStringSubmatch(string(out))
			if err != nil || got == nil || got[1] != got[2] || len(got[1]) < 3 {
				t.Errorf("h2spec: %v\n%s", err, out)
				return
			}
			t.Log(got[0])
		})
	}
}

// inPlain listens on loopback until the end of the test, and carries the bytes of each connection to and from one that
// dial opens: for programs that cannot speak what dial does.
func inPlain(t *testing.T, dial func(context.Context) (net.Conn, error)) string {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() {
		for {
			near, err := l.Accept()
			if err != nil {
				return
			}
			running.Go(func() {
				far, err := dial(ctx)
				if err != nil {
					t.Error(err)
					_ = near.Close()
					return
				}
				defer context.AfterFunc(ctx, func() { _, _ = near.Close(), far.Close() })()
				running.Go(func() {
					_, _ = io.Copy(far, near) // most connections here are broken off
					_ = far.Close()
				})
				_, _ = io.Copy(near, far)
				_ = near.Close()
			})
		}
	})
	t.Cleanup(func() {
		stop()
		_ = l.Close()
		running.Wait()
	})
	return l.Addr().String()
}
