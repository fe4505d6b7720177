package sock_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"math/big"
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/meshd/meshd/proxy/sock"
)

// tapped hands the bytes of a TLS connection to the test.
type tapped struct {
	net.Conn
	write func(p []byte) (int, error)
}

func (t *tapped) Write(p []byte) (int, error) {
	if t.write != nil {
		return t.write(p)
	}
	return t.Conn.Write(p)
}

// secure returns a TLS connection: near is under test, far is crypto/tls's
// own, and wire what far writes to.
func secure(tb testing.TB) (near *sock.TLS, far *tls.Conn, wire *tapped) {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"far"}, NotAfter: time.Now().Add(time.Hour)}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		tb.Fatal(err)
	}
	c, s := pair(tb)
	wire = &tapped{Conn: s}
	far = tls.Server(wire, &tls.Config{
		Certificates: []tls.Certificate{{Certificate: [][]byte{cert}, PrivateKey: key}}, MinVersion: tls.VersionTLS13,
	})
	shaken := make(chan error, 1)
	go func() { shaken <- far.HandshakeContext(context.Background()) }()
	client := tls.Client(c, &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13})
	if err := errors.Join(client.HandshakeContext(context.Background()), <-shaken); err != nil {
		tb.Fatal(err)
	}
	return sock.NewTLS(client), far, wire
}

func send(tb testing.TB, w io.Writer, p []byte) {
	tb.Helper()
	if _, err := w.Write(p); err != nil {
		tb.Fatal(err)
	}
}

func expect(tb testing.TB, r io.Reader, want []byte) {
	tb.Helper()
	got := make([]byte, len(want))
	if n, err := io.ReadFull(r, got); err != nil || !bytes.Equal(got, want) {
		tb.Fatalf("got %d bytes, %v; want %d others or an end", n, err, len(want))
	}
}

// TestTLSAllocatesNothing is also what finds out that crypto/tls keeps its
// input elsewhere: there would be one allocation per record then.
func TestTLSAllocatesNothing(t *testing.T) {
	near, far, wire := secure(t)
	// The records of far are made beforehand: its own writes are not measured.
	const runs = 200
	var records [][]byte
	wire.write = func(p []byte) (int, error) {
		records = append(records, bytes.Clone(p))
		return len(p), nil
	}
	for range runs + 1 {
		send(t, far, []byte("hello"))
	}
	buf := make([]byte, 100)
	next := 0
	per := testing.AllocsPerRun(runs, func() {
		if _, err := wire.Conn.Write(records[next]); err != nil {
			t.Fatal(err)
		}
		next++
		if err := near.Await(); err != nil {
			t.Fatal(err)
		}
		if n, err := near.Read(buf); n != 5 || err != nil {
			t.Fatal(n, err)
		}
	})
	if per > allocationsPerRecord {
		t.Errorf("%v allocations per record", per)
	}
}

// TestTLSRecords reads records that come in pieces and in heaps.
func TestTLSRecords(t *testing.T) {
	long := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	for _, c := range []struct {
		name   string
		pieces func(w io.Writer, p []byte) error
		data   []byte
	}{
		{"whole", func(w io.Writer, p []byte) error {
			_, err := w.Write(p)
			return err
		}, long},
		{"byte by byte", func(w io.Writer, p []byte) error {
			for i := range p {
				if _, err := w.Write(p[i : i+1]); err != nil {
					return err
				}
			}
			return nil
		}, long[:3000]},
		{"in odd pieces", func(w io.Writer, p []byte) error {
			for len(p) > 0 {
				n := min(len(p), 777)
				if _, err := w.Write(p[:n]); err != nil {
					return err
				}
				p = p[n:]
			}
			return nil
		}, long[:200_000]},
	} {
		t.Run(c.name, func(t *testing.T) {
			near, far, wire := secure(t)
			wire.write = func(p []byte) (int, error) { return len(p), c.pieces(wire.Conn, p) }
			sent := make(chan error, 1)
			go func() {
				_, err := far.Write(c.data)
				sent <- errors.Join(err, far.CloseWrite())
			}()
			got, err := io.ReadAll(near)
			if err := errors.Join(err, <-sent); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, c.data) {
				t.Errorf("got %d bytes, and not the %d that were sent", len(got), len(c.data))
			}
			if n, err := near.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
				t.Errorf("after the end Read is %d, %v", n, err)
			}
		})
	}
}

func TestTLSRestOfRecord(t *testing.T) {
	near, far, _ := secure(t)
	send(t, far, []byte("first"))
	send(t, far, []byte("second"))
	for _, want := range []string{"fi", "rst", "se", "cond"} {
		expect(t, near, []byte(want))
	}
	send(t, near, []byte("answer"))
	expect(t, far, []byte("answer"))
}

// TestTLSDeadline goes on after a deadline that came in the middle of a record.
func TestTLSDeadline(t *testing.T) {
	near, far, wire := secure(t)
	var record []byte
	wire.write = func(p []byte) (int, error) {
		record = bytes.Clone(p)
		return len(p), nil
	}
	send(t, far, []byte("hello"))
	for i := range 3 {
		if i > 0 {
			send(t, wire.Conn, record[:2])
			record = record[2:]
		}
		if err := near.SetReadDeadline(time.Now().Add(20 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		if n, err := near.Read(make([]byte, 10)); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("Read is %d, %v", n, err)
		}
	}
	if err := near.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	send(t, wire.Conn, record)
	expect(t, near, []byte("hello"))
}

func TestTLSEnds(t *testing.T) {
	for _, c := range []struct {
		name string
		end  func(near *sock.TLS, far *tls.Conn, tcp net.Conn) error
		want error
	}{
		{"close_notify", func(_ *sock.TLS, far *tls.Conn, _ net.Conn) error { return far.CloseWrite() }, io.EOF},
		{"cut within a record", func(_ *sock.TLS, _ *tls.Conn, tcp net.Conn) error {
			_, err := tcp.Write([]byte{23, 3, 3, 0, 100, 1})
			return errors.Join(err, tcp.Close())
		}, io.ErrUnexpectedEOF},
		{"cut within a record's head", func(_ *sock.TLS, _ *tls.Conn, tcp net.Conn) error {
			_, err := tcp.Write([]byte{23, 3})
			return errors.Join(err, tcp.Close())
		}, io.ErrUnexpectedEOF},
		{"reset", func(_ *sock.TLS, _ *tls.Conn, tcp net.Conn) error {
			lingerer, ok := tcp.(interface{ SetLinger(sec int) error })
			if !ok {
				return errors.New("not TCP")
			}
			return errors.Join(lingerer.SetLinger(0), tcp.Close())
		}, syscall.ECONNRESET},
		{"we close", func(near *sock.TLS, _ *tls.Conn, _ net.Conn) error { return near.Close() }, net.ErrClosed},
	} {
		t.Run(c.name, func(t *testing.T) {
			near, far, wire := secure(t)
			ended := make(chan error, 1)
			go func() { ended <- c.end(near, far, wire.Conn) }()
			for range 2 { // it stays what it is
				if n, err := near.Read(make([]byte, 10)); n != 0 || !errors.Is(err, c.want) {
					t.Errorf("Read is %d, %v; want 0, %v", n, err, c.want)
				}
			}
			if err := <-ended; err != nil {
				t.Fatal(err)
			}
		})
	}
}

// TestTLSForged never delivers a byte of what the peer did not write.
func TestTLSForged(t *testing.T) {
	for _, c := range []struct {
		name  string
		forge func(record []byte) []byte
	}{
		{"a flipped bit", func(r []byte) []byte {
			r[len(r)-1] ^= 1
			return r
		}},
		{"too long", func([]byte) []byte { return append([]byte{23, 3, 3, 0xff, 0xff}, make([]byte, 1<<16)...) }},
		{"no TLS", func([]byte) []byte { return []byte("GET / HTTP/1.1\r\nHost: a\r\n\r\n") }},
	} {
		t.Run(c.name, func(t *testing.T) {
			near, far, wire := secure(t)
			wire.write = func(p []byte) (int, error) {
				_, err := wire.Conn.Write(c.forge(bytes.Clone(p)))
				return len(p), err
			}
			send(t, far, []byte("hello"))
			for range 2 {
				if n, err := near.Read(make([]byte, 10)); n != 0 || err == nil {
					t.Errorf("Read is %d, %v", n, err)
				}
			}
		})
	}
}
