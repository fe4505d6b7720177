package dataplane_test

import (
	"fmt"
	"net"
	"net/http"
	"os"
	"testing"

	"github.com/meshd/meshd/catalog"
)

// listenAt opens a listening socket at the address for the host's listener of a name, and returns it with its port.
func (h *host) listenAt(name, address string) string {
	h.t.Helper()
	ln, err := net.Listen("tcp", address)
	if err != nil {
		h.t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	var file *os.File
	if tl, ok := ln.(*net.TCPListener); ok {
		file, err = tl.File()
	}
	if err != nil || file == nil {
		h.t.Fatalf("duplicate the socket at %s: %v", address, err)
	}
	_ = h.sockets[name].Close()
	h.sockets[name] = file
	return ln.Addr().String()
}

// TestAddresses carries both protocols over other addresses than 127.0.0.1, at every place where one is written.
func TestAddresses(t *testing.T) {
	tests := map[string]struct{ app, mesh, upstream string }{
		"IPv6 everywhere":                     {"[::1]:0", "[::1]:0", "[::1]:0"},
		"IPv6 between hosts, IPv4 inside":     {"127.0.0.1:0", "[::1]:0", "127.0.0.1:0"},
		"IPv4 between hosts, IPv6 inside":     {"[::1]:0", "127.0.0.1:0", "[::1]:0"},
		"another IPv4 address for each":       {"127.0.7.1:0", "127.0.7.2:0", "127.0.7.3:0"},
		"an application in a bridge, IPv6 in": {"127.0.7.1:0", "[::1]:0", "[::1]:0"},
	}
	for name, tt := range tests {
		for _, protocol := range []catalog.Protocol{catalog.ProtocolHTTP, catalog.ProtocolTCP} {
			t.Run(name+" "+string(protocol), func(t *testing.T) {
				app, err := net.Listen("tcp", tt.app)
				if err != nil {
					t.Fatal(err)
				}
				srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = fmt.Fprint(w, r.Host) })}
				done := make(chan struct{})
				go func() {
					defer close(done)
					_ = srv.Serve(app)
				}()
				t.Cleanup(func() {
					_ = srv.Close()
					<-done
				})
				m := newMesh(t, options{protocol: protocol, apps: []string{app.Addr().String()}, intention: allow()})
				// Other sockets need other names: a listener keeps the socket that it has.
				m.b.plan.Listeners[0].Name = "mesh-at-" + tt.mesh
				m.b.plan.Listeners[0].Address = m.b.listenAt(m.b.plan.Listeners[0].Name, tt.mesh)
				m.a.plan.Clusters[0].Endpoints[0].Address = m.b.plan.Listeners[0].Address
				m.a.plan.Listeners[0].Name = "upstream-at-" + tt.upstream
				m.a.plan.Listeners[0].Address = m.a.listenAt(m.a.plan.Listeners[0].Name, tt.upstream)
				m.b.apply()
				m.a.apply()
				upstream := m.a.plan.Listeners[0].Address
				if got := get(t, client(t), "GET", "http://"+upstream+"/", ""); got.status != 200 || got.body != upstream {
					t.Errorf("got %d %q, want the host %s", got.status, got.body, upstream)
				}
			})
		}
	}
}
