package l7

import (
	"context"
	"log/slog"
	"net"
	"time"

	"github.com/meshd/meshd/proxy/http1"
)

// ServerConfig is what the connections of one listener share. Zero durations
// and limits take the defaults; a negative duration is off.
type ServerConfig struct {
	// Handler is asked for each request. Required.
	Handler Handler
	// Sink, if not nil, is called once per exchange, on the goroutine that
	// served it, after its last byte. It must not block, and must copy what it
	// keeps.
	Sink func(*Record)
	// Log gets faults of this proxy itself, with their error id. nil logs none.
	Log *slog.Logger
	// HeadTimeout is from a head's first byte to its last; 10 s.
	HeadTimeout time.Duration
	// IdleTimeout is how long a connection may wait for its next request; 5 min.
	IdleTimeout time.Duration
	// StreamIdle is how long a body or a tunnel may be silent; 5 min.
	StreamIdle time.Duration
	// BodyGrace is how long a client may keep us waiting for a body of declared
	// length before it must have come at 1 KiB/s; 10 s.
	BodyGrace time.Duration
	// Limits bound a request's head.
	Limits http1.Limits
}

// PoolConfig is the connections to one endpoint. Zero values take the
// defaults; a negative duration is off.
type PoolConfig struct {
	// Dial opens a connection, with TLS and the check of the peer's identity
	// done. ctx carries ConnectTimeout. Required.
	Dial func(ctx context.Context) (net.Conn, error)
	// ConnectTimeout bounds Dial; 1 s.
	ConnectTimeout time.Duration
	// IdleTimeout is how long an unused connection is kept; 60 s.
	IdleTimeout time.Duration
	// MaxIdle is how many unused connections are kept; 256.
	MaxIdle int
	// StreamIdle is how long the upstream may be silent in mid-exchange; 5 min.
	StreamIdle time.Duration
	// Limits bound a response's head.
	Limits http1.Limits
}
