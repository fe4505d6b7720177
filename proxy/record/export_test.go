package record

import (
	"crypto/tls"
	"encoding/binary"
)

// Open makes a session of which both secrets and the suite are known.
func Open(t Transport, isClient bool, suite uint16, read, write []byte) (*Conn, error) {
	r := server
	if isClient {
		r = client
	}
	state := tls.ConnectionState{Version: tls.VersionTLS13, CipherSuite: suite}
	return newConn(t, state, r, append([]byte(nil), read...), append([]byte(nil), write...))
}

// KeyAndIV derives them of a secret.
func KeyAndIV(suite uint16, secret []byte) (key, iv []byte, err error) {
	s, err := suiteOf(suite)
	if err != nil {
		return nil, nil, err
	}
	if key, err = expandLabel(s, secret, "key", s.key); err != nil {
		return nil, nil, err
	}
	iv, err = expandLabel(s, secret, "iv", nonceSize)
	return key, iv, err
}

// RenewAfter makes c change its key after n records.
func (c *Conn) RenewAfter(n uint64) { c.out.renewAfter = n }

// Holds reports whether c holds a buffer of what came in.
func (c *Conn) Holds() bool { return c.in.buf != nil }

// Send writes one record of any content, type and padding included.
func (c *Conn) Send(inner []byte) error {
	b := make([]byte, headerSize+len(inner)+tagSize)
	header := append(b[:0], typeData, 3, 3)
	header = binary.BigEndian.AppendUint16(header, uint16(len(inner)+tagSize))
	copy(b[headerSize:], inner)
	c.out.keys.aead.Seal(b[headerSize:headerSize], c.out.keys.next(), b[headerSize:headerSize+len(inner)], header)
	_, err := c.t.Write(b)
	return err
}

// AskForKey makes the peer change its key, after changing ours.
func (c *Conn) AskForKey() error {
	c.out.message(c.t.Write, typeHandshake, messageKeyUpdate, 0, 0, 1, 1)
	if c.out.err != nil {
		return c.out.err
	}
	return c.out.keys.update()
}
