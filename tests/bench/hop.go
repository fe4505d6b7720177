package main

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"time"

	"github.com/meshd/meshd/proxy/l7"
)

// hopCommand makes this program a plain reverse proxy made of proxy/l7.
const hopCommand = "plain-hop"

// forwarder sends every request to one backend.
type forwarder struct{ to *l7.Pool }

// Handle implements l7.Handler.
func (f forwarder) Handle(ex *l7.Exchange) l7.Response { return f.to.Forward(ex) }

// hop serves the socket that it was started with as descriptor 3, until it is
// killed.
func hop(backend string) error {
	l, err := net.FileListener(os.NewFile(3, "listener"))
	if err != nil {
		return fmt.Errorf("take the listening socket: %w", err)
	}
	d := net.Dialer{Timeout: time.Second}
	srv := l7.NewServer(l7.ServerConfig{
		Log: slog.New(slog.DiscardHandler),
		Handler: forwarder{l7.NewPool(l7.PoolConfig{
			Dial: func(ctx context.Context) (net.Conn, error) { return d.DialContext(ctx, "tcp", backend) },
		})},
	})
	for {
		nc, err := l.Accept()
		if err != nil {
			return fmt.Errorf("accept: %w", err)
		}
		go func() {
			_ = srv.NewConn(nc, l7.ConnInfo{}).Serve(context.Background()) // a client that goes is no news here
		}()
	}
}
