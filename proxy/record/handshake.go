package record

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"net"

	"github.com/meshd/meshd/proxy/sock"
)

// ErrUnsupported is a session that crypto/tls would serve and this package does not: anything but TLS 1.3.
var ErrUnsupported = errors.New("not a session of TLS 1.3 that can be taken over")

// Transport is what a Conn is carried by: a TCP connection, possibly with a life of its own around it. *sock.Conn is one.
type Transport interface {
	net.Conn
	// ReadLent, AskLent and TryWrite are those of sock.Conn.
	ReadLent(l sock.Lender) (int, error)
	AskLent(q sock.Asker) (int, error)
	TryWrite(p []byte) (int, error)
}

// Server takes t as the server of a TLS session. It blocks until the handshake is over; ctx ends it. On an error t is still the caller's to close.
// The state is what crypto/tls knows of the handshake, of one that failed too; the Conn keeps nothing of it.
func Server(ctx context.Context, t Transport, config *tls.Config) (*Conn, tls.ConnectionState, error) {
	state, agreed, err := agree(ctx, t, config, tls.Server)
	if err != nil {
		return nil, state, err
	}
	c, err := newConn(t, state, server, agreed.client, agreed.server)
	return c, state, err
}

// Client is [Server] for the other side.
func Client(ctx context.Context, t Transport, config *tls.Config) (*Conn, tls.ConnectionState, error) {
	state, agreed, err := agree(ctx, t, config, tls.Client)
	if err != nil {
		return nil, state, err
	}
	c, err := newConn(t, state, client, agreed.server, agreed.client)
	return c, state, err
}

func agree(
	ctx context.Context, t Transport, config *tls.Config, role func(net.Conn, *tls.Config) *tls.Conn,
) (tls.ConnectionState, *secrets, error) {
	agreed := &secrets{}
	config = config.Clone()
	config.KeyLogWriter = agreed
	config.SessionTicketsDisabled = true // a ticket would be a record that crypto/tls counts and we do not
	conn := role(&stepper{Transport: t}, config)
	// A handshake makes a stack grow to several times what a connection needs later; this one's goes with it.
	over := make(chan error, 1)
	go func() { over <- conn.HandshakeContext(ctx) }()
	err := <-over
	return conn.ConnectionState(), agreed, err
}

// stepper gives a handshake its records one after the other, and never a byte
// of what comes behind the record that it asks for: after its last one the
// stream stands where the records of this package begin.
type stepper struct {
	Transport
	header [headerSize]byte
	got    int // of the header
	left   int // of the payload
}

// Read implements net.Conn.
func (s *stepper) Read(p []byte) (int, error) {
	if s.left > 0 {
		n, err := s.Transport.Read(p[:min(len(p), s.left)])
		s.left -= n
		return n, err
	}
	n, err := s.Transport.Read(p[:min(len(p), headerSize-s.got)])
	s.got += copy(s.header[s.got:], p[:n])
	if s.got == headerSize {
		s.got, s.left = 0, int(binary.BigEndian.Uint16(s.header[3:]))
	}
	return n, err
}
