package record_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
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

	"golang.org/x/sync/errgroup"

	"github.com/meshd/meshd/proxy/record"
	"github.com/meshd/meshd/proxy/sock"
)

// tcpPair returns both ends of a connection over loopback.
func tcpPair(tb testing.TB) (near, far *sock.Conn) {
	tb.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	var d net.Dialer
	a, err := d.DialContext(context.Background(), "tcp4", l.Addr().String())
	if err != nil {
		tb.Fatal(err)
	}
	b, err := l.Accept()
	if err != nil {
		tb.Fatal(err)
	}
	ends := [2]*sock.Conn{}
	for i, nc := range []net.Conn{a, b} {
		tc, ok := nc.(*net.TCPConn)
		if !ok {
			tb.Fatal("not TCP")
		}
		if err := tc.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
			tb.Fatal(err)
		}
		ends[i] = sock.New(tc)
		tb.Cleanup(func() { _ = tc.Close() })
	}
	return ends[0], ends[1]
}

// configs returns what both sides of a mutual handshake use.
func configs(tb testing.TB) (server, client *tls.Config) {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), DNSNames: []string{"peer"},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	raw, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		tb.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(raw)
	if err != nil {
		tb.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(leaf)
	certs := []tls.Certificate{{Certificate: [][]byte{raw}, PrivateKey: key}}
	server = &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: certs, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert, NextProtos: []string{"x"},
	}
	client = &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: certs, RootCAs: pool, ServerName: "peer", NextProtos: []string{"x"},
	}
	return server, client
}

// session is what both implementations offer.
type session interface {
	net.Conn
	CloseWrite() error
}

// sides are the ways in which the two ends of a session may be made.
var sides = []struct {
	name                 string
	ourServer, ourClient bool
}{
	{"both ours", true, true},
	{"our server, crypto/tls's client", true, false},
	{"crypto/tls's server, our client", false, true},
}

// sessions makes both ends of a session.
func sessions(tb testing.TB, ourServer, ourClient bool) (server, client session) {
	tb.Helper()
	near, far := tcpPair(tb)
	serverConfig, clientConfig := configs(tb)
	var g errgroup.Group
	make := func(
		t *sock.Conn, c *tls.Config, ours bool, out *session,
		our func(context.Context, record.Transport, *tls.Config) (*record.Conn, tls.ConnectionState, error), theirs func(net.Conn, *tls.Config) *tls.Conn,
	) {
		g.Go(func() error {
			if !ours {
				conn := theirs(t, c)
				*out = conn
				return conn.Handshake()
			}
			conn, state, err := our(tb.Context(), t, c)
			if err == nil && (state.NegotiatedProtocol != "x" || len(state.PeerCertificates) != 1) {
				err = errors.New("the state of the handshake lacks protocol or peer")
			}
			*out = conn
			return err
		})
	}
	make(far, serverConfig, ourServer, &server, record.Server, tls.Server)
	make(near, clientConfig, ourClient, &client, record.Client, tls.Client)
	if err := g.Wait(); err != nil {
		tb.Fatal(err)
	}
	return server, client
}

// transport returns what a session of ours was made of.
func transport(tb testing.TB, s session) *sock.Conn {
	tb.Helper()
	ours, ok := s.(*record.Conn)
	if !ok {
		tb.Fatal("not ours")
	}
	under, ok := ours.NetConn().(*sock.Conn)
	if !ok {
		tb.Fatal("NetConn is not what the session was made of")
	}
	return under
}

// TestBulk moves more than any buffer holds, both ways at the same time, in writes of many sizes.
func TestBulk(t *testing.T) {
	for _, s := range sides {
		t.Run(s.name, func(t *testing.T) {
			server, client := sessions(t, s.ourServer, s.ourClient)
			var g errgroup.Group
			sent, got := [2][32]byte{}, [2][32]byte{}
			for i, end := range []session{server, client} {
				g.Go(func() error {
					sum := sha256.New()
					block := make([]byte, 300<<10)
					if _, err := rand.Read(block); err != nil {
						return err
					}
					for size := 1; size < len(block); size = size*5/4 + 1 {
						for range 3 {
							sum.Write(block[:size])
							if n, err := end.Write(block[:size]); n != size || err != nil {
								return errors.Join(err, io.ErrShortWrite)
							}
						}
					}
					sum.Sum(sent[i][:0])
					return end.CloseWrite()
				})
				g.Go(func() error {
					sum := sha256.New()
					_, err := io.CopyBuffer(struct{ io.Writer }{sum}, struct{ io.Reader }{end}, make([]byte, 1000+i*70_000))
					sum.Sum(got[1-i][:0])
					return err
				})
			}
			if err := g.Wait(); err != nil {
				t.Fatal(err)
			}
			if sent != got {
				t.Error("what was read is not what was written")
			}
		})
	}
}

// TestParts writes three parts as one record.
func TestParts(t *testing.T) {
	server, client := sessions(t, true, false)
	ours, ok := server.(*record.Conn)
	if !ok {
		t.Fatal("not ours")
	}
	n, err := ours.WriteAll([]byte("head "), []byte("body"), []byte(" tail"))
	if n != 14 || err != nil {
		t.Fatalf("WriteAll is %d, %v", n, err)
	}
	buf := make([]byte, 100)
	if n, err := client.Read(buf); string(buf[:n]) != "head body tail" || err != nil {
		t.Errorf("one read has %q, %v", buf[:n], err)
	}
}

func TestEnds(t *testing.T) {
	read := func(s session) error {
		_, err := s.Read(make([]byte, 10))
		return err
	}
	for _, s := range sides {
		t.Run(s.name, func(t *testing.T) {
			server, client := sessions(t, s.ourServer, s.ourClient)
			if err := client.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			if err := read(server); err != io.EOF { //nolint:errorlint // io.Reader's own
				t.Errorf("after a half-close, read is %v", err)
			}
			if _, err := server.Write([]byte("still")); err != nil {
				t.Errorf("the other half: %v", err)
			}
			if err := read(client); err != nil {
				t.Errorf("the other half: %v", err)
			}
			if _, err := client.Write([]byte("x")); err == nil {
				t.Error("a write after the half-close was taken")
			}
			if err := server.Close(); err != nil {
				t.Fatal(err)
			}
			if err := read(client); err != io.EOF { //nolint:errorlint // io.Reader's own
				t.Errorf("after a close, read is %v", err)
			}
		})
	}
}

// TestCut holds that an end of TCP is not the session's: whoever is on the way could make one.
func TestCut(t *testing.T) {
	server, client := sessions(t, true, true)
	if _, err := client.Write([]byte("half")); err != nil {
		t.Fatal(err)
	}
	if err := transport(t, client).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(server); string(got) != "half" || !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("read %q, %v", got, err)
	}
}

// TestReadDeadline goes on after one, in the middle of a record too.
func TestReadDeadline(t *testing.T) {
	near, far := tcpPair(t)
	server, client := pair(t, near, far, tls.TLS_AES_128_GCM_SHA256)
	tap, wire := tcpPair(t)
	writer, err := record.Open(tap, true, tls.TLS_AES_128_GCM_SHA256, secret(0, 32), secret(1, 32))
	if err != nil {
		t.Fatal(err)
	}
	_ = client
	if _, err := writer.Write([]byte("resumed")); err != nil {
		t.Fatal(err)
	}
	raw := make([]byte, 100)
	n, err := wire.Read(raw)
	if err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 10)
	for _, part := range [][]byte{nil, raw[:3], raw[3:20], raw[20:n]} {
		if _, err := near.Write(part); err != nil {
			t.Fatal(err)
		}
		if len(part) == n-20 {
			break
		}
		if err := server.SetReadDeadline(time.Now().Add(30 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		if n, err := server.Read(buf); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("Read is %d, %v", n, err)
		}
	}
	if err := server.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if n, err := server.Read(buf); string(buf[:n]) != "resumed" || err != nil {
		t.Errorf("Read is %q, %v", buf[:n], err)
	}
}

// TestBrokenWrite counts whole records only, and writes nothing behind half a one.
func TestBrokenWrite(t *testing.T) {
	server, client := sessions(t, true, true)
	if err := server.SetWriteDeadline(time.Now().Add(500 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	n, err := server.Write(make([]byte, 64<<20))
	if n == 0 || n == 64<<20 || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("Write is %d, %v", n, err)
	}
	if err := server.SetWriteDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}
	if n, err := server.Write([]byte("more")); n != 0 || err == nil {
		t.Errorf("behind half a record Write is %d, %v", n, err)
	}
	if err := server.Close(); err != nil {
		t.Fatal(err)
	}
	got, err := io.Copy(io.Discard, client)
	if got != int64(n) && !errors.Is(err, io.ErrUnexpectedEOF) || got == 0 {
		t.Errorf("the peer got %d bytes, %v", got, err)
	}
}

// TestReset tells a reset from an end.
func TestReset(t *testing.T) {
	server, client := sessions(t, true, true)
	under := transport(t, client)
	if err := errors.Join(under.SetLinger(0), under.Close()); err != nil {
		t.Fatal(err)
	}
	if _, err := server.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("Read is %v", err)
	}
}

// TestIdleHoldsNothing looks at a connection that waits and at one that has been read empty.
func TestIdleHoldsNothing(t *testing.T) {
	server, client := sessions(t, true, true)
	ours, ok := server.(*record.Conn)
	if !ok {
		t.Fatal("not ours")
	}
	buf := make([]byte, 200<<10)
	for _, size := range []int{1, 100, 16 << 10, 200 << 10} {
		go func() { _, _ = client.Write(buf[:size]) }() // the read tells
		if _, err := io.ReadFull(server, make([]byte, size)); err != nil {
			t.Fatal(err)
		}
		if ours.Holds() {
			t.Errorf("after %d bytes, all of them read, a buffer is held", size)
		}
	}
}

func TestNoAllocations(t *testing.T) {
	server, client := sessions(t, true, true)
	for _, size := range []int{100, 10 << 10, 100 << 10} {
		out, in := make([]byte, size), make([]byte, size)
		trip := func() {
			if _, err := client.Write(out); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(server, in); err != nil {
				t.Fatal(err)
			}
		}
		for range 20 {
			trip()
		}
		if per := testing.AllocsPerRun(500, trip); per > 0.01 && !raced {
			t.Errorf("%v allocations per %d bytes", per, size)
		}
	}
}

func TestHandshakeFails(t *testing.T) {
	for _, c := range []struct {
		name string
		peer func(net.Conn, *tls.Config) error
	}{
		{"plaintext", func(w net.Conn, _ *tls.Config) error {
			_, err := w.Write([]byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n"))
			return err
		}},
		{"no certificate", func(w net.Conn, config *tls.Config) error {
			config.Certificates = nil
			conn := tls.Client(w, config)
			_ = conn.Handshake() // the server's verdict comes after it
			return nil
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			near, far := tcpPair(t)
			serverConfig, clientConfig := configs(t)
			told := make(chan error, 1)
			go func() { told <- c.peer(near, clientConfig) }()
			conn, _, err := record.Server(t.Context(), far, serverConfig)
			if conn != nil || err == nil {
				t.Errorf("Server is %v, %v", conn, err)
			}
			if err := <-told; err != nil {
				t.Error(err)
			}
		})
	}
	t.Run("the context ends", func(t *testing.T) {
		_, far := tcpPair(t)
		serverConfig, _ := configs(t)
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
		defer cancel()
		if _, _, err := record.Server(ctx, far, serverConfig); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Server is %v", err)
		}
	})
	t.Run("the peer's refusal is told", func(t *testing.T) {
		near, far := tcpPair(t)
		serverConfig, clientConfig := configs(t)
		serverConfig.ClientCAs = x509.NewCertPool()
		go func() { _, _, _ = record.Server(context.Background(), far, serverConfig) }() // refuses
		conn, _, err := record.Client(t.Context(), near, clientConfig)
		if err == nil {
			_, err = conn.Read(make([]byte, 1))
		}
		if alert, ok := errors.AsType[tls.AlertError](err); !ok || alert != 48 { // unknown_ca
			t.Errorf("the client learns %v", err)
		}
	})
}

func BenchmarkRoundTrip(b *testing.B) {
	for _, ours := range []bool{true, false} {
		name := "crypto_tls"
		if ours {
			name = "record"
		}
		b.Run(name, func(b *testing.B) {
			server, client := sessions(b, ours, ours)
			go func() {
				buf := make([]byte, 1000)
				for {
					n, err := server.Read(buf)
					if err != nil {
						return
					}
					if _, err := server.Write(buf[:n]); err != nil {
						return
					}
				}
			}()
			out, in := bytes.Repeat([]byte("x"), 200), make([]byte, 200)
			b.ReportAllocs()
			for b.Loop() {
				if _, err := client.Write(out); err != nil {
					b.Fatal(err)
				}
				if _, err := io.ReadFull(client, in); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
