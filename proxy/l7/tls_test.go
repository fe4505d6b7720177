package l7_test

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"io"
	"math/big"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/meshd/meshd/proxy/l7"
)

func tlsConfigs(tb testing.TB) (server, client *tls.Config) {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		DNSNames: []string{"x.mesh"}, IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		tb.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		tb.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(cert)
	server = &tls.Config{
		MinVersion: tls.VersionTLS13, SessionTicketsDisabled: true, DynamicRecordSizingDisabled: true,
		Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}},
	}
	client = &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: roots, ServerName: "x.mesh", DynamicRecordSizingDisabled: true}
	return server, client
}

// twoHops is client → proxy → TLS → proxy → upstream, as between two hosts.
func twoHops(tb testing.TB, upstream string, quiet func(*l7.ServerConfig)) *proxy {
	tb.Helper()
	server, client := tlsConfigs(tb)
	far := start(tb, options{upstream: upstream, server: quiet, wrap: func(nc net.Conn) (net.Conn, error) {
		c := tls.Server(nc, server)
		return c, c.HandshakeContext(tb.Context())
	}})
	return start(tb, options{upstream: far.addr, server: quiet, pool: func(cfg *l7.PoolConfig) {
		cfg.ConnectTimeout = 20 * time.Second
		cfg.Dial = func(ctx context.Context) (net.Conn, error) {
			nc, err := dialer(far.addr)(ctx)
			if err != nil {
				return nil, err
			}
			c := tls.Client(nc, client)
			return c, c.HandshakeContext(ctx)
		}
	}})
}

func TestTwoHopsOverTLS(t *testing.T) {
	upstream := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) {
		if err := http.NewResponseController(w).EnableFullDuplex(); err != nil {
			t.Error(err)
		}
		_, _ = io.Copy(w, r.Body)
	})
	near := twoHops(t, upstream, nil)
	client := httpClient(t)
	for _, size := range []int{0, 1, 100, 16 << 10, 16<<10 + 1, 200_000, 20 << 20} {
		for _, chunked := range []bool{false, true} {
			body := strings.Repeat("0123456789abcdef", size/16+1)[:size]
			var r io.Reader = strings.NewReader(body)
			if chunked {
				r = io.MultiReader(r)
			}
			resp, got := do(t, client, newRequest(t, "POST", "http://"+near.addr+"/", r))
			if resp.StatusCode != 200 || got != body {
				t.Errorf("%d bytes, chunked %v: got %d and %d bytes", size, chunked, resp.StatusCode, len(got))
			}
			if r := near.next(t); r.In != int64(size) || r.Out != int64(size) {
				t.Errorf("record %+v, want %d bytes both ways", r, size)
			}
		}
	}
	if n := near.pool.Idle(); n != 1 {
		t.Errorf("%d connections kept between the proxies, want 1", n)
	}
}

// TestAbortCrossesTLS holds that a client that goes is a reset two hops away.
func TestAbortCrossesTLS(t *testing.T) {
	seen, inside := make(chan error, 1), make(chan struct{})
	upstream := serveRaw(t, func(_ *net.TCPConn, r *bufio.Reader) {
		_, err := readHead(r)
		close(inside)
		if err != nil {
			seen <- err
			return
		}
		seen <- resetSeen(r)
	})
	near := twoHops(t, upstream, nil)
	c := connect(t, near.addr)
	c.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n")
	<-inside
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-seen; err != nil {
		t.Error(err)
	}
}

// TestUntilCloseOverTLS: whoever is between could cut such a body unseen.
func TestUntilCloseOverTLS(t *testing.T) {
	server, client := tlsConfigs(t)
	upstream := serveRaw(t, func(nc *net.TCPConn, _ *bufio.Reader) {
		c := tls.Server(nc, server)
		if _, err := readHead(bufio.NewReader(c)); err == nil {
			say(c, "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhalf")
		}
	})
	p := start(t, options{upstream: upstream, pool: func(cfg *l7.PoolConfig) {
		cfg.Dial = func(ctx context.Context) (net.Conn, error) {
			nc, err := dialer(upstream)(ctx)
			if err != nil {
				return nil, err
			}
			return tls.Client(nc, client), nil
		}
	}})
	c := connect(t, p.addr)
	c.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n")
	if resp, _ := c.response("GET"); resp.StatusCode != 502 || resp.Header.Get("mesh-error") != "upstream-protocol" {
		t.Errorf("got %d %s", resp.StatusCode, resp.Header.Get("mesh-error"))
	}
}
