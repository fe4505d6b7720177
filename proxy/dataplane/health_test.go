package dataplane_test

import (
	"net"
	"net/http"
	"sync/atomic"
	"testing"
	"time"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/proxy"
)

// ok answers 200.
func ok(http.ResponseWriter, *http.Request) {}

// door is a mesh address that can be shut and opened: what comes is carried to another address while it is open. Shut, its port
// refuses connections.
type door struct {
	t       *testing.T
	address string
	to      string
	taken   atomic.Int64 // connections
	ln      net.Listener
}

func newDoor(t *testing.T, to string) *door {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	d := &door{t: t, address: ln.Addr().String(), to: to}
	if err := ln.Close(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.shut)
	return d
}

func (d *door) open() {
	d.t.Helper()
	ln, err := net.Listen("tcp", d.address)
	if err != nil {
		d.t.Fatal(err)
	}
	d.ln = ln
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			d.taken.Add(1)
			far, err := net.Dial("tcp", d.to)
			if err != nil {
				_ = c.Close()
				continue
			}
			go carry(c, far)
			go carry(far, c)
		}
	}()
}

func carry(to, from net.Conn) {
	buf := make([]byte, 4096)
	for {
		n, err := from.Read(buf)
		if n > 0 {
			if _, err := to.Write(buf[:n]); err != nil {
				break
			}
		}
		if err != nil {
			break
		}
	}
	_ = to.Close()
	_ = from.Close()
}

func (d *door) shut() {
	if d.ln != nil {
		_ = d.ln.Close()
		d.ln = nil
	}
}

// behind puts a door before a further endpoint of the only cluster, with the same instance behind it.
func (m *mesh) behind(d *door, instance string) {
	cluster := &m.a.plan.Clusters[0]
	ep := cluster.Endpoints[0]
	ep.Instance, ep.Address = instance, d.address
	cluster.Endpoints = append(cluster.Endpoints, ep)
}

func TestADeadEndpointIsEjectedAndComesBack(t *testing.T) {
	for _, protocol := range []catalog.Protocol{catalog.ProtocolTCP, catalog.ProtocolHTTP} {
		t.Run(string(protocol), func(t *testing.T) {
			app := serveTCP(t, echo)
			if protocol == catalog.ProtocolHTTP {
				app = serveHTTP(t, ok)
			}
			m := newMesh(t, options{protocol: protocol, apps: []string{app}, intention: allow()})
			d := newDoor(t, m.port)
			m.behind(d, "api-door")
			m.a.apply()
			once := func() {
				if protocol == catalog.ProtocolTCP {
					if got := exchange(t, dial(t, m.upstream), "x"); got != "x" {
						t.Fatalf("echoed %q", got)
					}
				} else if got := get(t, client(t), "GET", "http://"+m.upstream+"/", ""); got.status != 200 {
					t.Fatalf("got %d %s", got.status, got.body)
				}
			}
			ejected := func() bool { return m.a.metric("mesh_endpoint_ejected", "instance", "api-door", "node", "vm-b") == 1 }
			for n := 0; !ejected(); n++ {
				if once(); n > 3000 {
					t.Fatal("an endpoint that refuses every connection is still used")
				}
			}
			if n := m.a.metric("mesh_ejections_total", "source", "default/web", "destination", "default/api", "port", "main"); n != 1 {
				t.Errorf("%v ejections are counted, want 1", n)
			}
			// The state outlives a change of plan.
			m.a.apply()
			if !ejected() {
				t.Error("a change of plan brought the endpoint back")
			}
			d.open()
			eventually(t, "a request brings it back", func() bool { once(); return !ejected() })
			if d.taken.Load() == 0 {
				t.Error("it is back although nothing was sent there")
			}
			if n := m.a.metric("mesh_panic_attempts_total"); n != 0 {
				t.Errorf("%v attempts in panic while one endpoint was fine", n)
			}
		})
	}
}

func TestTheLastEndpointIsNotEjectedSilently(t *testing.T) {
	app := serveHTTP(t, ok)
	m := newMesh(t, options{protocol: catalog.ProtocolHTTP, apps: []string{app}, intention: allow()})
	d, e := newDoor(t, m.port), newDoor(t, m.port)
	m.behind(d, "api-d")
	m.behind(e, "api-e")
	cluster := &m.a.plan.Clusters[0]
	cluster.Endpoints = append([]proxy.Endpoint(nil), cluster.Endpoints[1:]...)
	m.a.apply()
	c := client(t)
	for range 20 {
		if got := get(t, c, "GET", "http://"+m.upstream+"/", ""); got.status != 503 || got.header.Get("Mesh-Error") != "connect-failed" {
			t.Fatalf("got %d %s", got.status, got.header.Get("Mesh-Error"))
		}
	}
	if n := m.a.metric("mesh_endpoint_ejected"); n != 2 {
		t.Errorf("%v endpoints are ejected, want both", n)
	}
	if n := m.a.metric("mesh_panic_attempts_total", "source", "default/web", "destination", "default/api"); n < 10 {
		t.Errorf("%v attempts in panic are counted, want those of most of 20 requests", n)
	}
	// All are used: the first request after one of them opens is answered, without waiting for any back-off.
	e.open()
	started := time.Now()
	if got := get(t, c, "GET", "http://"+m.upstream+"/", ""); got.status != 200 {
		t.Errorf("got %d %s, %v after an endpoint opened", got.status, got.header.Get("Mesh-Error"), time.Since(started))
	}
	if n := m.a.metric("mesh_endpoint_ejected", "instance", "api-e"); n != 0 {
		t.Error("the endpoint that answered is still ejected")
	}
}

// TestOurOwnFaultsEjectNobody takes the certificate away.
func TestOurOwnFaultsEjectNobody(t *testing.T) {
	m := newMesh(t, options{protocol: catalog.ProtocolTCP, apps: []string{serveTCP(t, echo)}, intention: allow()})
	keys := m.a.keys
	m.a.keys = nil
	m.a.apply()
	for range 10 {
		wantRefused(t, m.upstream)
	}
	if n := m.a.metric("mesh_ejections_total"); n != 0 {
		t.Errorf("%v ejections for want of our own certificate", n)
	}
	m.a.keys = keys
	m.a.apply()
	if got := exchange(t, dial(t, m.upstream), "x"); got != "x" {
		t.Errorf("echoed %q", got)
	}
}
