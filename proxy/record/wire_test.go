package record_test

import (
	"bytes"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"io"
	"testing"

	"github.com/meshd/meshd/proxy/record"
	"github.com/meshd/meshd/proxy/sock"
)

// secret returns a traffic secret for tests.
func secret(seed byte, size int) []byte { return bytes.Repeat([]byte{seed + 1}, size) }

// pair makes a session without a handshake, far's side first.
func pair(tb testing.TB, near, far *sock.Conn, suite uint16) (server, client *record.Conn) {
	tb.Helper()
	size := 32
	if suite == tls.TLS_AES_256_GCM_SHA384 {
		size = 48
	}
	server, err := record.Open(far, false, suite, secret(1, size), secret(0, size))
	if err != nil {
		tb.Fatal(err)
	}
	client, err = record.Open(near, true, suite, secret(0, size), secret(1, size))
	if err != nil {
		tb.Fatal(err)
	}
	return server, client
}

// TestDerivation has the application traffic secrets, keys and IVs of RFC 8448 section 3.
func TestDerivation(t *testing.T) {
	for _, c := range []struct{ secret, key, iv string }{
		{"9e40646ce79a7f9dc05af8889bce6552875afa0b06df0087f792ebb7c17504a5", "17422dda596ed5d9acd890e3c63f5051", "5b78923dee08579033e523d9"},
		{"a11af9f05531f856ad47116b45a950328204b4f44bfb6b3a4b4f1f3fcb631643", "9f02283b6c9c07efc26bb9f2ac92e356", "cf782b88dd83549aadf1e984"},
	} {
		raw, err := hex.DecodeString(c.secret)
		if err != nil {
			t.Fatal(err)
		}
		key, iv, err := record.KeyAndIV(tls.TLS_AES_128_GCM_SHA256, raw)
		if err != nil || hex.EncodeToString(key) != c.key || hex.EncodeToString(iv) != c.iv {
			t.Errorf("of %s: %x %x, %v; want %s %s", c.secret, key, iv, err, c.key, c.iv)
		}
	}
}

// TestSuites carries data, and changes keys, under each.
func TestSuites(t *testing.T) {
	for _, suite := range []uint16{tls.TLS_AES_128_GCM_SHA256, tls.TLS_AES_256_GCM_SHA384, tls.TLS_CHACHA20_POLY1305_SHA256} {
		t.Run(tls.CipherSuiteName(suite), func(t *testing.T) {
			near, far := tcpPair(t)
			server, client := pair(t, near, far, suite)
			client.RenewAfter(3)
			buf := make([]byte, 10)
			for i := range 20 {
				if i%7 == 0 {
					if err := server.AskForKey(); err != nil {
						t.Fatal(err)
					}
				}
				for _, way := range [][2]*record.Conn{{client, server}, {server, client}} {
					if _, err := way[0].Write([]byte("content")); err != nil {
						t.Fatal(err)
					}
					if n, err := way[1].Read(buf); string(buf[:n]) != "content" || err != nil {
						t.Fatalf("round %d: read %q, %v", i, buf[:n], err)
					}
				}
			}
		})
	}
}

// TestHostile has records that no peer may send, and what becomes of the session. None gives data.
func TestHostile(t *testing.T) {
	data := func(n int) []byte { return append(make([]byte, n), 23) }
	long := make([]byte, 1<<14)
	for _, c := range []struct {
		name string
		send func(*record.Conn, io.Writer) error
		want error
	}{
		{"not TLS", func(_ *record.Conn, w io.Writer) error { return write(w, []byte("HTTP/1.1 200 OK\r\n\r\n")) }, record.ErrRecord},
		{"an alert without protection", func(_ *record.Conn, w io.Writer) error { return write(w, []byte{21, 3, 3, 0, 2, 1, 0}) }, record.ErrRecord},
		{"a change of cipher", func(_ *record.Conn, w io.Writer) error { return write(w, []byte{20, 3, 3, 0, 1, 1}) }, record.ErrRecord},
		{"empty on the wire", func(_ *record.Conn, w io.Writer) error { return write(w, []byte{23, 3, 3, 0, 0}) }, record.ErrRecord},
		{"shorter than a tag", func(_ *record.Conn, w io.Writer) error { return write(w, []byte{23, 3, 3, 0, 3, 1, 2, 3}) }, record.ErrRecord},
		{"too long on the wire", func(_ *record.Conn, w io.Writer) error { return write(w, []byte{23, 3, 3, 0x41, 1}) }, record.ErrRecord},
		{"forged", func(_ *record.Conn, w io.Writer) error {
			return write(w, append([]byte{23, 3, 3, 0, 20}, make([]byte, 20)...))
		}, record.ErrRecord},
		{"too much content", func(c *record.Conn, _ io.Writer) error { return c.Send(data(1<<14 + 1)) }, record.ErrRecord},
		{"no type", func(c *record.Conn, _ io.Writer) error { return c.Send(make([]byte, 100)) }, record.ErrRecord},
		{"unknown type", func(c *record.Conn, _ io.Writer) error { return c.Send([]byte{1, 2, 99}) }, record.ErrRecord},
		{"empty for ever", func(c *record.Conn, _ io.Writer) error { return repeat(17, func() error { return c.Send(data(0)) }) }, record.ErrRecord},
		{"key updates for ever", func(c *record.Conn, _ io.Writer) error { return repeat(17, c.AskForKey) }, record.ErrRecord},
		{"a ticket from the client", func(c *record.Conn, _ io.Writer) error { return c.Send([]byte{4, 0, 0, 1, 0, 22}) }, record.ErrRecord},
		{"half a key update, then data", func(c *record.Conn, _ io.Writer) error {
			return errors.Join(c.Send([]byte{24, 0, 0, 22}), c.Send(data(5)))
		}, record.ErrRecord},
		{"something behind a key update", func(c *record.Conn, _ io.Writer) error {
			return c.Send([]byte{24, 0, 0, 1, 0, 24, 22})
		}, record.ErrRecord},
		{"a key update that wants 2", func(c *record.Conn, _ io.Writer) error { return c.Send([]byte{24, 0, 0, 1, 2, 22}) }, record.ErrRecord},
		{"an endless message", func(c *record.Conn, _ io.Writer) error {
			return c.Send(append([]byte{4, 255, 255, 255}, append(long[:100:100], 22)...))
		}, record.ErrRecord},
		{"an empty handshake record", func(c *record.Conn, _ io.Writer) error { return c.Send([]byte{22}) }, record.ErrRecord},
		{"a long alert", func(c *record.Conn, _ io.Writer) error { return c.Send([]byte{1, 0, 0, 21}) }, record.ErrRecord},
		{"a fatal alert", func(c *record.Conn, _ io.Writer) error { return c.Send([]byte{2, 40, 21}) }, tls.AlertError(40)},
		{"a goodbye", func(c *record.Conn, _ io.Writer) error { return c.Send([]byte{1, 0, 21}) }, io.EOF},
	} {
		t.Run(c.name, func(t *testing.T) {
			near, far := tcpPair(t)
			server, client := pair(t, near, far, tls.TLS_AES_128_GCM_SHA256)
			if err := c.send(client, near); err != nil {
				t.Fatal(err)
			}
			for range 2 { // it stays so
				if n, err := server.Read(make([]byte, 100)); n != 0 || !errors.Is(err, c.want) {
					t.Errorf("Read is %d, %v; want 0, %v", n, err, c.want)
				}
			}
			if server.Holds() && errors.Is(c.want, io.EOF) {
				t.Error("a buffer is held after the end")
			}
		})
	}
}

// TestAllowed has what is odd and allowed.
func TestAllowed(t *testing.T) {
	near, far := tcpPair(t)
	server, client := pair(t, near, far, tls.TLS_AES_128_GCM_SHA256)
	for _, inner := range [][]byte{
		append([]byte("padded"), append([]byte{23}, make([]byte, 200)...)...),
		{23},        // nothing
		{1, 90, 21}, // user_canceled
		append([]byte("zeros\x00\x00"), 23),
	} {
		if err := client.Send(inner); err != nil {
			t.Fatal(err)
		}
	}
	if err := client.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(server); string(got) != "paddedzeros\x00\x00" || err != nil {
		t.Errorf("read %q, %v", got, err)
	}
	ticket := append([]byte{4, 0, 3, 232}, make([]byte, 1000)...)
	if err := errors.Join(server.Send(append(ticket[:500:500], 22)), server.Send(append(ticket[500:], 22)), server.Send([]byte{'y', 23})); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 10)
	if n, err := client.Read(buf); string(buf[:n]) != "y" || err != nil {
		t.Errorf("behind a ticket in two records: %q, %v", buf[:n], err)
	}
}

func write(w io.Writer, p []byte) error {
	_, err := w.Write(p)
	return err
}

func repeat(n int, f func() error) error {
	for range n {
		if err := f(); err != nil {
			return err
		}
	}
	return nil
}
