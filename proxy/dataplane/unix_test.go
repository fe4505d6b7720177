package dataplane_test

import (
	"context"
	"net"
	"net/http"
	"path/filepath"
	"testing"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/proxy"
	"github.com/meshd/meshd/proxy/feed"
)

// onUnix moves the upstream of a mesh to a unix socket, and returns its path.
func onUnix(t *testing.T, m *mesh) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "api.sock")
	l := &m.a.plan.Listeners[0]
	l.Name, l.Address = "upstream/web/api/unix", proxy.UnixAddress(path)
	file, err := feed.Listen(t.Context(), *l)
	if err != nil {
		t.Fatal(err)
	}
	m.a.sockets[l.Name] = file
	m.a.apply()
	return path
}

func TestHTTPOverAUnixSocket(t *testing.T) {
	m := newMesh(t, options{protocol: catalog.ProtocolHTTP, apps: []string{serveHTTP(t, ok)}, intention: allow()})
	path := onUnix(t, m)
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", path)
	}}
	t.Cleanup(transport.CloseIdleConnections)
	c := &http.Client{Transport: transport}
	for range 10 {
		if got := get(t, c, "POST", "http://api/", "body"); got.status != 200 {
			t.Fatalf("got %d %s", got.status, got.header.Get("Mesh-Error"))
		}
	}
	m.intend(deny())
	m.b.apply()
	if got := get(t, c, "GET", "http://api/", ""); got.status != 403 || got.header.Get("Mesh-Error") != "denied" {
		t.Errorf("got %d %s", got.status, got.header.Get("Mesh-Error"))
	}
}

func TestTCPOverAUnixSocket(t *testing.T) {
	m := newMesh(t, options{protocol: catalog.ProtocolTCP, apps: []string{serveTCP(t, echo)}, intention: allow()})
	path := onUnix(t, m)
	connect := func() *net.UnixConn {
		t.Helper()
		c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		return c
	}
	if got := exchange(t, connect(), "x"); got != "x" {
		t.Errorf("echoed %q", got)
	}
	m.intend(deny())
	m.b.apply()
	c := connect()
	if n, err := c.Read(make([]byte, 1)); err == nil {
		t.Errorf("%d bytes came over a connection that is denied", n)
	}
}
