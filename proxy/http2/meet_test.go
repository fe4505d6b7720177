package http2_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/meshd/meshd/proxy/http2"
	"github.com/meshd/meshd/proxy/l7"
)

type (
	writer = http.ResponseWriter
	reader = http.Request
)

// netHTTP runs net/http as the application, over HTTP/1 and HTTP/2.
func netHTTP(tb testing.TB, h http.HandlerFunc) string {
	tb.Helper()
	ln, err := (&net.ListenConfig{}).Listen(tb.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	var both http.Protocols
	both.SetHTTP1(true)
	both.SetUnencryptedHTTP2(true)
	srv := &http.Server{
		Handler: h, Protocols: &both, ReadHeaderTimeout: time.Minute,
		ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelError),
	}
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

// netClient is net/http as the client, over one version.
func netClient(tb testing.TB, version int) *http.Client {
	tb.Helper()
	var one http.Protocols
	one.SetHTTP1(version == 1)
	one.SetUnencryptedHTTP2(version == 2)
	tr := &http.Transport{Protocols: &one, DisableCompression: true}
	tb.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: time.Minute}
}

// hop is a proxy that serves one version of HTTP and forwards by another.
func hop(tb testing.TB, serves, forwards int, to string) string {
	tb.Helper()
	var up l7.Upstream
	if forwards == 1 {
		p := l7.NewPool(l7.PoolConfig{Dial: dialTo(to)})
		tb.Cleanup(p.CloseIdle)
		up = p
	} else {
		up = newPool(tb, to, nil)
	}
	h := handler(up.Forward)
	ln, err := (&net.ListenConfig{}).Listen(tb.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	one := l7.NewServer(l7.ServerConfig{Handler: h})
	two := http2.NewServer(http2.ServerConfig{ServerConfig: l7.ServerConfig{Handler: h}})
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			nc, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				if serves == 1 {
					_ = one.NewConn(nc, l7.ConnInfo{}).Serve(ctx) // tests look at what clients get
				} else {
					_ = two.NewConn(nc, l7.ConnInfo{}).Serve(ctx)
				}
			})
		}
	})
	tb.Cleanup(func() {
		if err := ln.Close(); err != nil {
			tb.Error(err)
		}
		cancel()
		wg.Wait()
	})
	return ln.Addr().String()
}

// chains are the versions of HTTP from the client to the application.
func chains() map[string][]int {
	return map[string][]int{
		"1 1": {1, 1}, "1 2": {1, 2}, "2 1": {2, 1}, "2 2": {2, 2},
		"1 2 1": {1, 2, 1}, "2 1 2": {2, 1, 2}, "2 2 2": {2, 2, 2},
	}
}

// through returns the address of a chain's first proxy.
func through(tb testing.TB, versions []int, app string) string {
	tb.Helper()
	for i := len(versions) - 1; i > 0; i-- {
		app = hop(tb, versions[i-1], versions[i], app)
	}
	return app
}

// TestVersionsMeet sends the same messages through proxies that translate every
// way: bodies both ways at once, trailers, interim heads.
func TestVersionsMeet(t *testing.T) {
	t.Parallel()
	for name, versions := range chains() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			app := netHTTP(t, func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Link", "</a>")
				w.WriteHeader(http.StatusEarlyHints)
				w.Header().Del("Link")
				_ = http.NewResponseController(w).EnableFullDuplex() // HTTP/2 always is
				w.Header().Set("Trailer", "X-Sum")
				_, _ = io.Copy(w, r.Body)
				w.Header().Set("X-Sum", r.Trailer.Get("X-In"))
			})
			addr := through(t, versions, app)
			client := netClient(t, versions[0])
			var wg sync.WaitGroup
			for i := range 20 {
				wg.Go(func() {
					body := bytes.Repeat([]byte{byte('a' + i)}, 10_000*(i+1))
					ctx := httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{
						Got1xxResponse: func(int, textproto.MIMEHeader) error { return nil },
					})
					req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+addr+"/p?q=1", io.MultiReader(bytes.NewReader(body)))
					if err != nil {
						t.Error(err)
						return
					}
					req.Trailer = http.Header{"X-In": {fmt.Sprint(i)}}
					resp, err := client.Do(req)
					if err != nil {
						t.Errorf("exchange %d: %v", i, err)
						return
					}
					defer func() { _ = resp.Body.Close() }() // read to its end
					got, err := io.ReadAll(resp.Body)
					if err != nil || !bytes.Equal(got, body) || resp.Trailer.Get("X-Sum") != fmt.Sprint(i) {
						t.Errorf("exchange %d: %d bytes of %d, %v, trailers %v", i, len(got), len(body), err, resp.Trailer)
					}
				})
			}
			wg.Wait()
		})
	}
}

// TestAnswersMeet sends what has no body, or must not have one, every way.
func TestAnswersMeet(t *testing.T) {
	t.Parallel()
	for name, versions := range chains() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			app := netHTTP(t, func(w http.ResponseWriter, r *http.Request) {
				switch r.URL.Path {
				case "/204":
					w.WriteHeader(204)
				case "/304":
					w.Header().Set("Etag", `"1"`)
					w.WriteHeader(304)
				case "/early":
					w.Header().Set("Connection", "close")
					w.WriteHeader(413)
					_, _ = io.WriteString(w, "no")
				case "/breaks":
					w.Header().Set("Content-Length", "100")
					_, _ = io.WriteString(w, "half")
					_ = http.NewResponseController(w).Flush()
					panic(http.ErrAbortHandler)
				default:
					w.Header().Set("Content-Length", "3")
					_, _ = io.WriteString(w, "yes")
				}
			})
			addr := through(t, versions, app)
			client := netClient(t, versions[0])
			for _, c := range []struct {
				method, path, body string
				status             int
				want               string
				length             int64
				breaks             bool
			}{
				{method: "GET", path: "/", status: 200, want: "yes", length: 3},
				{method: "HEAD", path: "/", status: 200, length: 3},
				{method: "GET", path: "/204", status: 204},
				{method: "GET", path: "/304", status: 304, length: -2},
				{method: "POST", path: "/", body: "x", status: 200, want: "yes", length: 3},
				{method: "POST", path: "/early", body: string(make([]byte, 1<<20)), status: 413, want: "no", length: 2},
				{method: "GET", path: "/breaks", status: 200, breaks: true, length: 100},
				{method: "GET", path: "/", status: 200, want: "yes", length: 3},
			} {
				req, err := http.NewRequestWithContext(t.Context(), c.method, "http://"+addr+c.path, bytes.NewReader([]byte(c.body)))
				if err != nil {
					t.Fatal(err)
				}
				resp, err := client.Do(req)
				if c.breaks {
					// What was on its way before the end may be lost by it.
					if err == nil {
						_, err = io.ReadAll(resp.Body)
						_ = resp.Body.Close() // broke off
					}
					if err == nil && resp.StatusCode != 502 {
						t.Errorf("%s %s: a half answer looks whole", c.method, c.path)
					}
					continue
				}
				if err != nil {
					t.Errorf("%s %s: %v", c.method, c.path, err)
					continue
				}
				got, err := io.ReadAll(resp.Body)
				_ = resp.Body.Close() // read to its end
				if err != nil || resp.StatusCode != c.status || string(got) != c.want || c.length >= -1 && resp.ContentLength != c.length {
					t.Errorf("%s %s: %d, %q, length %d, %v", c.method, c.path, resp.StatusCode, got, resp.ContentLength, err)
				}
			}
		})
	}
}

// TestClientsVanish holds that an application hears of it when its client goes.
func TestClientsVanish(t *testing.T) {
	t.Parallel()
	for name, versions := range chains() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			inside, heard := make(chan struct{}), make(chan struct{})
			app := netHTTP(t, func(w http.ResponseWriter, r *http.Request) {
				w.WriteHeader(200)
				_ = http.NewResponseController(w).Flush()
				close(inside)
				<-r.Context().Done()
				close(heard)
			})
			addr := through(t, versions, app)
			ctx, cancel := context.WithCancel(t.Context())
			req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+"/", nil)
			if err != nil {
				t.Fatal(err)
			}
			resp, err := netClient(t, versions[0]).Do(req)
			if err != nil {
				t.Fatal(err)
			}
			<-inside
			cancel()
			_ = resp.Body.Close() // was cancelled
			select {
			case <-heard:
			case <-time.After(20 * time.Second):
				t.Error("the application was not told within 20 s")
			}
		})
	}
}

// TestThousandStreams has as many exchanges under way at once, through a proxy
// whose peers allow 100 and 250 streams per connection.
func TestThousandStreams(t *testing.T) {
	t.Parallel()
	const n = 1000
	var arrived atomic.Int32
	all := make(chan struct{})
	app := netHTTP(t, func(w http.ResponseWriter, r *http.Request) {
		if arrived.Add(1) == n {
			close(all)
		}
		select {
		case <-all:
			_, _ = io.WriteString(w, "together")
		case <-r.Context().Done():
		case <-time.After(30 * time.Second):
			_, _ = io.WriteString(w, fmt.Sprint("alone with ", arrived.Load()))
		}
	})
	pool := newPool(t, hop(t, 2, 2, app), func(c *http2.PoolConfig) { c.ConnectTimeout = 20 * time.Second })
	var wg sync.WaitGroup
	for range n {
		wg.Go(func() {
			if g := pull(pool.Forward(newExchange("GET /", nil)), true); g.Body != "together" {
				t.Errorf("got %+v", g)
			}
		})
	}
	wg.Wait()
}
