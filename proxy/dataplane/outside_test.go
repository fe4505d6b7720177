package dataplane_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/proxy"
)

// stranger is a certificate of somebody outside the mesh, and the file of the root
// that signed it: itself.
func stranger(t *testing.T, name string) (cert tls.Certificate, root string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name}, NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	root = filepath.Join(t.TempDir(), "root.pem")
	if err := os.WriteFile(root, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, root
}

func TestOutsideByTLS(t *testing.T) {
	cert, root := stranger(t, "saas.localhost")
	app := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, r.Host+" "+r.TLS.ServerName+" "+r.Proto+" xfcc="+r.Header.Get("X-Forwarded-Client-Cert")+" client="+r.Header.Get("X-Own"))
	}))
	app.TLS = &tls.Config{Certificates: []tls.Certificate{cert}, MaxVersion: tls.VersionTLS12}
	app.StartTLS()
	t.Cleanup(app.Close)
	local := "saas.localhost:" + portOf(t, app.Listener.Addr().String())
	m, _ := external(t, catalog.ProtocolHTTP, local, map[string][]string{"saas.localhost": {"127.0.0.1"}})
	speak := func(o *proxy.Outside) answer {
		t.Helper()
		m.b.plan.Inbounds[0].Outside = o
		m.b.apply()
		return get(t, client(t), "GET", "http://"+m.upstream+"/v1", "")
	}
	good := &proxy.Outside{Authority: "saas.localhost", TLS: &proxy.OutsideTLS{ServerName: "saas.localhost", CAFile: root}}
	for range 2 { // the second on a connection that was kept
		if got := speak(good); got.body != "saas.localhost saas.localhost HTTP/1.1 xfcc= client=" {
			t.Errorf("%d %q", got.status, got.body)
		}
	}
	for name, bad := range map[string]proxy.OutsideTLS{
		"another name":    {ServerName: "other.localhost", CAFile: root},
		"unknown root":    {ServerName: "saas.localhost"},
		"no file":         {ServerName: "saas.localhost", CAFile: root + ".gone"},
		"no root in file": {ServerName: "saas.localhost", CAFile: "/etc/hostname"},
	} {
		if got := speak(&proxy.Outside{Authority: "x", TLS: &bad}); got.status != http.StatusServiceUnavailable || got.header.Get("mesh-error") != "connect-failed" {
			t.Errorf("%s: %d %q", name, got.status, got.body)
		}
	}
	// Plain HTTP to a port of TLS is not understood there, and never falls back.
	if got := speak(&proxy.Outside{Authority: "saas.localhost"}); got.status != http.StatusBadRequest || strings.Contains(got.body, "xfcc") {
		t.Errorf("plain: %d %q", got.status, got.body)
	}
}

func TestOutsideTCPByTLS(t *testing.T) {
	cert, root := stranger(t, "db.localhost")
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12})
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() {
		c, err := l.Accept()
		if err == nil {
			_, err = io.Copy(c, c) // until the caller's end, which is passed on
		}
		if err == nil {
			err = c.Close()
		}
		ended <- err
	}()
	t.Cleanup(func() { _ = l.Close() })
	m, _ := external(t, catalog.ProtocolTCP, "db.localhost:"+portOf(t, l.Addr().String()), map[string][]string{"db.localhost": {"127.0.0.1"}})
	m.b.plan.Inbounds[0].Outside = &proxy.Outside{Authority: "db.localhost", TLS: &proxy.OutsideTLS{ServerName: "db.localhost", CAFile: root}}
	m.b.apply()
	c := dial(t, m.upstream)
	if got := exchange(t, c, strings.Repeat("hello ", 30_000)); len(got) != 180_000 {
		t.Errorf("echoed %d bytes", len(got))
	}
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if rest, err := io.ReadAll(c); err != nil || len(rest) != 0 {
		t.Errorf("after the end: %q, %v", rest, err)
	}
	if err := <-ended; err != nil {
		t.Errorf("the far side: %v", err)
	}
	// Where the far side speaks no TLS, nothing of the caller's is sent in the clear.
	plain := make(chan string, 1)
	app := serveTCP(t, func(c *net.TCPConn) {
		b := make([]byte, 16)
		n, _ := c.Read(b)
		plain <- string(b[:n])
		_ = c.Close()
	})
	m.b.plan.Inbounds[0].Local = "db.localhost:" + portOf(t, app)
	m.b.apply()
	if got := ask(t, m.upstream); got == "x" {
		t.Errorf("carried without TLS: %q", got)
	}
	if first := <-plain; !strings.HasPrefix(first, "\x16\x03") {
		t.Errorf("it began with %q, no TLS", first)
	}
}
