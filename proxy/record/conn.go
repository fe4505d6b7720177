package record

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"time"
)

// ErrRecord is a record that TLS 1.3 does not allow at its place, or that the key does not open.
var ErrRecord = errors.New("bad TLS record")

// Conn is a session of TLS 1.3 whose handshake is over. One goroutine at a time may read, and one write; Close, CloseWrite and
// the deadlines may be called from any. A read that ran into its deadline can be repeated, a write cannot.
type Conn struct {
	t   Transport
	in  input
	out output
}

// newConn takes over after a handshake that ended with state. t stands behind its last record in either direction.
func newConn(t Transport, state tls.ConnectionState, r role, read, write []byte) (*Conn, error) {
	if state.Version != tls.VersionTLS13 || len(read) == 0 || len(write) == 0 {
		return nil, fmt.Errorf("%w: %s", ErrUnsupported, tls.VersionName(state.Version))
	}
	s, err := suiteOf(state.CipherSuite)
	if err != nil {
		return nil, err
	}
	c := &Conn{t: t}
	c.in.role, c.out.renewAfter = r, maxRecords
	if err := errors.Join(c.in.keys.start(s, read), c.out.keys.start(s, write)); err != nil {
		return nil, err
	}
	return c, nil
}

// NetConn returns the connection under the session, as that of crypto/tls does.
func (c *Conn) NetConn() net.Conn { return c.t }

// LocalAddr implements net.Conn.
func (c *Conn) LocalAddr() net.Addr { return c.t.LocalAddr() }

// RemoteAddr implements net.Conn.
func (c *Conn) RemoteAddr() net.Addr { return c.t.RemoteAddr() }

// SetDeadline implements net.Conn.
func (c *Conn) SetDeadline(t time.Time) error { return c.t.SetDeadline(t) }

// SetReadDeadline implements net.Conn.
func (c *Conn) SetReadDeadline(t time.Time) error { return c.t.SetReadDeadline(t) }

// SetWriteDeadline implements net.Conn.
func (c *Conn) SetWriteDeadline(t time.Time) error { return c.t.SetWriteDeadline(t) }

// Close says goodbye, if that can be done without waiting, and closes the connection.
func (c *Conn) Close() error {
	c.out.leave(c.t)
	return c.t.Close()
}

// CloseWrite tells the peer that no more comes. It leaves the other direction, and the half of the connection below, open.
func (c *Conn) CloseWrite() error { return c.out.end(c.t) }

// Write writes all of p. It returns how many of its bytes the connection took in whole records.
func (c *Conn) Write(p []byte) (int, error) {
	n, err := c.WriteAll(p, nil, nil)
	return int(n), err
}

// WriteAll is Write of its arguments one behind the other: one record, and one system call, as long as they fit.
func (c *Conn) WriteAll(a, b, d []byte) (int64, error) {
	return c.out.write(c.t, [...][]byte{a, b, d})
}
