package dataplane

import (
	"cmp"
	"log/slog"
	"runtime"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/meshd/meshd/proxy/http1"
	"github.com/meshd/meshd/proxy/http2"
)

// Config configures a Plane.
type Config struct {
	// Log is required. Every decision is told at debug level.
	Log *slog.Logger
	// Registerer gets the metrics; required.
	Registerer prometheus.Registerer
	Limits     Limits
}

// Limits bound what peers and applications can make the proxy hold. Zero fields take the defaults.
type Limits struct {
	// Connections is how many may be open per listener; 10,000. One more is reset at once.
	Connections int
	// Handshakes is how many may begin at a time; 4 per CPU. Those that wait for their peer, and those that were answered, do not count.
	Handshakes int
	// HandshakeTimeout is for a TLS handshake of either side; 5 s.
	HandshakeTimeout time.Duration
	// ConnectTimeout is for a TCP connection to an endpoint or to a local application; 1 s.
	ConnectTimeout time.Duration
	// IdleTimeout is how long a TCP session may pass no byte either way, and an HTTP connection may wait for a request; 5 min.
	IdleTimeout time.Duration
	// Attempts is how many endpoints are tried for one request or connection, as long as it is safe; 3.
	Attempts int
	// Head bounds HTTP heads.
	Head http1.Limits
	// HTTP2 bounds what else a peer may do on HTTP/2.
	HTTP2 http2.Limits
}

func (l Limits) withDefaults() Limits {
	l.Connections = cmp.Or(l.Connections, 10_000)
	l.Handshakes = cmp.Or(l.Handshakes, 4*runtime.GOMAXPROCS(0))
	l.HandshakeTimeout = cmp.Or(l.HandshakeTimeout, 5*time.Second)
	l.ConnectTimeout = cmp.Or(l.ConnectTimeout, time.Second)
	l.IdleTimeout = cmp.Or(l.IdleTimeout, 5*time.Minute)
	l.Attempts = min(cmp.Or(l.Attempts, 3), maxAttempts)
	return l
}

// maxAttempts bounds Limits.Attempts: each request keeps its attempts in an array.
const maxAttempts = 4
