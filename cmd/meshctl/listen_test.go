package main_test

import (
	"context"
	"net"
)

// loopback listens on a free port of the loopback address.
func loopback(ctx context.Context) (net.Listener, error) {
	return (&net.ListenConfig{}).Listen(ctx, "tcp", "127.0.0.1:0")
}
