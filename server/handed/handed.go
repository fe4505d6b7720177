// Package handed lets one TLS port feed several servers: whoever accepts makes the
// handshake, looks at what was agreed, and hands the connection on. It knows nothing
// of what the servers are.
package handed

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"sync"

	"google.golang.org/grpc/credentials"
)

// ErrNoTLS says that a connection has not come through a TLS port.
var ErrNoTLS = errors.New("the connection did not come through the TLS port")

// Queue is a net.Listener that is fed connections. It is safe for concurrent use.
type Queue struct {
	addr  net.Addr
	conns chan net.Conn
	once  sync.Once
	done  chan struct{}
}

var _ net.Listener = (*Queue)(nil)

// NewQueue returns a queue whose Addr is addr.
func NewQueue(addr net.Addr) *Queue {
	return &Queue{addr: addr, conns: make(chan net.Conn), done: make(chan struct{})}
}

// Put waits until somebody accepts c. It reports false, and c stays the caller's,
// when the queue was closed or ctx has ended.
func (q *Queue) Put(ctx context.Context, c net.Conn) bool {
	select {
	case q.conns <- c:
		return true
	case <-q.done:
	case <-ctx.Done():
	}
	return false
}

// Accept implements net.Listener.
func (q *Queue) Accept() (net.Conn, error) {
	select {
	case c := <-q.conns:
		return c, nil
	case <-q.done:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener. It may be called more than once.
func (q *Queue) Close() error {
	q.once.Do(func() { close(q.done) })
	return nil
}

// Addr implements net.Listener.
func (q *Queue) Addr() net.Addr { return q.addr }

// Credentials are gRPC's, on both sides, for connections whose handshake was made
// before gRPC got them. They refuse every connection that is not TLS.
type Credentials struct{}

var _ credentials.TransportCredentials = Credentials{}

// ServerHandshake implements credentials.TransportCredentials.
func (Credentials) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return secured(conn)
}

// ClientHandshake implements credentials.TransportCredentials.
func (Credentials) ClientHandshake(_ context.Context, _ string, conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return secured(conn)
}

func secured(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	secure, ok := conn.(interface{ ConnectionState() tls.ConnectionState })
	if !ok {
		return nil, nil, ErrNoTLS
	}
	return conn, credentials.TLSInfo{
		State:          secure.ConnectionState(),
		CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity},
	}, nil
}

// Info implements credentials.TransportCredentials.
func (Credentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}

// Clone implements credentials.TransportCredentials.
func (c Credentials) Clone() credentials.TransportCredentials { return c }

// OverrideServerName implements credentials.TransportCredentials.
func (Credentials) OverrideServerName(string) error { return ErrNoTLS }
