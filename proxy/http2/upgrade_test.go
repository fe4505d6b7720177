package http2_test

import (
	"bufio"
	"context"
	"crypto/sha1"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	xhttp2 "golang.org/x/net/http2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/meshd/meshd/proxy/l7"
)

const key = "dGhlIHNhbXBsZSBub25jZQ=="

func accept(key string) string {
	sum := sha1.Sum([]byte(key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
	return base64.StdEncoding.EncodeToString(sum[:])
}

// switching is an application over HTTP/1 that switches to an echo of lines,
// which ends when its client has ended.
func switching(tb testing.TB) string {
	tb.Helper()
	ln, err := (&net.ListenConfig{}).Listen(tb.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			nc, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer func() { _ = nc.Close() }() // the test looks at the client's end
				_ = nc.SetDeadline(time.Now().Add(20 * time.Second))
				r := bufio.NewReader(nc)
				req, err := http.ReadRequest(r)
				if err != nil || req.Header.Get("Upgrade") != "websocket" {
					_, _ = io.WriteString(nc, "HTTP/1.1 426 No\r\nContent-Length: 0\r\n\r\n")
					return
				}
				_, _ = fmt.Fprintf(nc, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: %s\r\n\r\n",
					accept(req.Header.Get("Sec-Websocket-Key")))
				for {
					line, err := r.ReadString('\n')
					if err != nil {
						_, _ = io.WriteString(nc, "bye\n")
						return
					}
					_, _ = io.WriteString(nc, strings.ToUpper(line))
				}
			})
		}
	})
	tb.Cleanup(func() {
		_ = ln.Close() // nothing to lose
		wg.Wait()
	})
	return ln.Addr().String()
}

// A WebSocket of HTTP/1 passes connections of HTTP/2 as an extended CONNECT.
func TestWebSocketsMeet(t *testing.T) {
	t.Parallel()
	app := switching(t)
	for _, versions := range [][]int{{1, 1}, {1, 2, 1}, {1, 2, 2, 1}} {
		t.Run(fmt.Sprint(versions), func(t *testing.T) {
			t.Parallel()
			var d net.Dialer
			nc, err := d.DialContext(t.Context(), "tcp", through(t, versions, app))
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = nc.Close() }() // read to its end
			_ = nc.SetDeadline(time.Now().Add(20 * time.Second))
			_, _ = fmt.Fprintf(nc, "GET /ws HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: %s\r\n\r\n", key)
			r := bufio.NewReader(nc)
			resp, err := http.ReadResponse(r, nil)
			if err != nil {
				t.Fatal(err)
			}
			_ = resp.Body.Close() // has none
			if resp.StatusCode != 101 || resp.Header.Get("Sec-Websocket-Accept") != accept(key) {
				t.Fatalf("got %d %v", resp.StatusCode, resp.Header)
			}
			for i := range 3 {
				_, _ = fmt.Fprintf(nc, "line %d\n", i)
				if got, err := r.ReadString('\n'); got != fmt.Sprintf("LINE %d\n", i) {
					t.Fatalf("got %q, %v", got, err)
				}
			}
			if tcp, ok := nc.(*net.TCPConn); !ok || tcp.CloseWrite() != nil {
				t.Fatal("no half-close")
			}
			if got, err := r.ReadString('\n'); got != "bye\n" {
				t.Errorf("after the half-close: got %q, %v", got, err)
			}
		})
	}
}

// Peers that take an extended CONNECT, refuse it, or do not know it.
func TestExtendedConnect(t *testing.T) {
	t.Parallel()
	allows := []xhttp2.Setting{{ID: xhttp2.SettingEnableConnectProtocol, Val: 1}}
	for name, c := range map[string]struct {
		settings []xhttp2.Setting
		status   string
		want     got
	}{
		"taken":                      {allows, "200", got{Status: 101, Length: -1, Fields: map[string]string{"sec-websocket-accept": accept(key)}, Body: "hello"}},
		"refused":                    {allows, "403", got{Status: 403, Length: -1, Fields: map[string]string{}, Body: "hello"}},
		"another 2xx":                {allows, "204", got{Reason: l7.UpstreamProtocol}},
		"not in the peer's settings": {nil, "200", got{Reason: l7.UpgradeRefused}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			addr := serveFrames(t, c.settings, func(p *rawPeer) {
				r := p.request()
				if r == nil {
					return
				}
				if r.PseudoValue("method") != "CONNECT" || r.PseudoValue("protocol") != "websocket" || r.PseudoValue("path") != "/ws" {
					t.Errorf("got %v", r.Fields)
				}
				for _, f := range r.Fields {
					if f.Name == "sec-websocket-key" {
						t.Error("the key was sent")
					}
				}
				p.head(r.StreamID, false, ":status: "+c.status)
				if c.status == "200" {
					if f, ok := p.next(xhttp2.FrameData).(*xhttp2.DataFrame); !ok || string(f.Data()) != "ping" {
						t.Errorf("got %v, want the client's bytes", f)
					}
				}
				_ = p.WriteData(r.StreamID, true, []byte("hello"))
				p.next(xhttp2.FrameGoAway)
			})
			ex := newExchange("GET /ws", &textBody{parts: []string{"ping"}}, "Sec-WebSocket-Key: "+key)
			ex.Upgrade = "websocket"
			g := pull(newPool(t, addr, nil).Forward(ex), true)
			g.Detail = ""
			if fmt.Sprint(g) != fmt.Sprint(c.want) {
				t.Errorf("got %+v, want %+v", g, c.want)
			}
		})
	}
}

// grpc-go's server and client, through one proxy and two.
func TestGRPCMeets(t *testing.T) {
	ln, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv, app := grpc.NewServer(), health.NewServer()
	healthpb.RegisterHealthServer(srv, app)
	done := make(chan error, 1)
	go func() { done <- srv.Serve(ln) }()
	t.Cleanup(func() {
		srv.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	for _, versions := range [][]int{{2, 2}, {2, 2, 2}} {
		t.Run(fmt.Sprint(versions), func(t *testing.T) {
			cc, err := grpc.NewClient("passthrough:///"+through(t, versions, ln.Addr().String()), grpc.WithTransportCredentials(insecure.NewCredentials()))
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = cc.Close() }() // nothing to lose
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			defer cancel()
			c := healthpb.NewHealthClient(cc)
			var wg sync.WaitGroup
			for range 200 {
				wg.Go(func() {
					if r, err := c.Check(ctx, &healthpb.HealthCheckRequest{}); err != nil || r.GetStatus() != healthpb.HealthCheckResponse_SERVING {
						t.Errorf("got %v, %v", r, err)
					}
				})
			}
			wg.Wait()
			if _, err := c.Check(ctx, &healthpb.HealthCheckRequest{Service: "none"}); status.Code(err) != codes.NotFound {
				t.Errorf("a trailers-only error: got %v", err)
			}
			if _, err := healthpb.NewHealthClient(cc).List(ctx, &healthpb.HealthListRequest{}); err != nil {
				t.Errorf("got %v", err)
			}
			watching, stop := context.WithCancel(ctx)
			stream, err := c.Watch(watching, &healthpb.HealthCheckRequest{Service: "a"})
			if err != nil {
				t.Fatal(err)
			}
			for _, want := range []healthpb.HealthCheckResponse_ServingStatus{
				healthpb.HealthCheckResponse_SERVICE_UNKNOWN, healthpb.HealthCheckResponse_SERVING, healthpb.HealthCheckResponse_NOT_SERVING,
			} {
				if want != healthpb.HealthCheckResponse_SERVICE_UNKNOWN {
					app.SetServingStatus("a", want)
				}
				if r, err := stream.Recv(); err != nil || r.GetStatus() != want && want != healthpb.HealthCheckResponse_SERVICE_UNKNOWN {
					t.Errorf("got %v, %v, want %v", r, err, want)
				}
			}
			stop()
			if _, err := stream.Recv(); status.Code(err) != codes.Canceled || errors.Is(err, io.EOF) {
				t.Errorf("after the cancel: got %v", err)
			}
		})
	}
}
