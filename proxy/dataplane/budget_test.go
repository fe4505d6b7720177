package dataplane_test

import (
	"io"
	"net"
	"net/http"
	"testing"
	"time"

	"github.com/meshd/meshd/catalog"
)

func TestLimitOfTCPSessions(t *testing.T) {
	m := newMesh(t, options{protocol: catalog.ProtocolTCP, apps: []string{serveTCP(t, echo)}, intention: allow()})
	m.a.plan.Clusters[0].Limits.Connections = 2
	m.a.apply()
	var open []*net.TCPConn
	for range 2 {
		c := dial(t, m.upstream)
		if _, err := c.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		open = append(open, c)
	}
	wantRefused(t, m.upstream)
	m.a.apply() // the sessions are those of the plan before
	wantRefused(t, m.upstream)
	labels := []string{"source", "default/web", "destination", "default/api", "port", "main", "limit", "connections"}
	if n := m.a.metric("mesh_overflow_total", labels...); n != 2 {
		t.Errorf("%v overflows are counted, want 2", n)
	}
	if n := m.a.metric("mesh_connections_refused_total", "reason", "overload"); n != 2 {
		t.Errorf("%v refused connections are counted, want 2", n)
	}
	_ = open[0].Close()
	eventually(t, "a session that ends makes room", func() bool { return m.a.metric("mesh_connections_open") == 1 })
	if got := exchange(t, dial(t, m.upstream), "x"); got != "x" {
		t.Errorf("echoed %q", got)
	}
}

func TestLimitOfRequests(t *testing.T) {
	for _, limit := range []string{"requests", "connections"} {
		entered, leave := make(chan struct{}), make(chan struct{})
		app := serveHTTP(t, func(_ http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/slow" {
				entered <- struct{}{}
				<-leave
			}
		})
		m := newMesh(t, options{protocol: catalog.ProtocolHTTP, apps: []string{app}, intention: allow()})
		limits := &m.a.plan.Clusters[0].Limits
		if limit == "requests" {
			limits.Requests = 2
		} else {
			limits.Connections = 2
		}
		m.a.apply()
		c := client(t)
		done := make(chan int, 2)
		for range 2 {
			go func() { done <- get(t, c, "GET", "http://"+m.upstream+"/slow", "").status }()
			<-entered
		}
		for range 3 {
			started := time.Now()
			got := get(t, c, "GET", "http://"+m.upstream+"/", "")
			if got.status != 503 || got.header.Get("Mesh-Error") != "overload" || time.Since(started) > time.Second {
				t.Errorf("%s: got %d %s after %v", limit, got.status, got.header.Get("Mesh-Error"), time.Since(started))
			}
			m.a.apply()
		}
		if n := m.a.metric("mesh_overflow_total", "limit", limit); n != 3 {
			t.Errorf("%s: %v overflows are counted, want 3", limit, n)
		}
		close(leave)
		for range 2 {
			if status := <-done; status != 200 {
				t.Errorf("%s: a request within the limit got %d", limit, status)
			}
		}
		for range 10 { // refused requests gave back what they did not get
			if got := get(t, c, "GET", "http://"+m.upstream+"/", ""); got.status != 200 {
				t.Fatalf("%s: got %d %s with nothing under way", limit, got.status, got.header.Get("Mesh-Error"))
			}
		}
	}
}

// TestLimitOfPendingConnections has an endpoint that takes connections and says nothing.
func TestLimitOfPendingConnections(t *testing.T) {
	for _, protocol := range []catalog.Protocol{catalog.ProtocolTCP, catalog.ProtocolHTTP} {
		silent, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		m := newMesh(t, options{protocol: protocol, apps: []string{"127.0.0.1:1"}, intention: allow()})
		m.a.plan.Clusters[0].Endpoints[0].Address = silent.Addr().String()
		m.a.plan.Clusters[0].Limits.Pending = 1
		m.a.apply()
		first := dial(t, m.upstream)
		if protocol == catalog.ProtocolHTTP {
			if _, err := first.Write([]byte("GET / HTTP/1.1\r\nHost: api\r\n\r\n")); err != nil {
				t.Fatal(err)
			}
		}
		conn, err := silent.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if protocol == catalog.ProtocolTCP {
			wantRefused(t, m.upstream)
		} else if got := get(t, client(t), "GET", "http://"+m.upstream+"/", ""); got.status != 503 || got.header.Get("Mesh-Error") != "overload" {
			t.Errorf("got %d %s", got.status, got.header.Get("Mesh-Error"))
		}
		if n := m.a.metric("mesh_overflow_total", "limit", "pending"); n != 1 {
			t.Errorf("%s: %v overflows are counted, want 1", protocol, n)
		}
		if n := m.a.metric("mesh_ejections_total"); n != 0 {
			t.Errorf("%s: a limit of our own ejected an endpoint", protocol)
		}
		_ = conn.Close()
		_ = silent.Close()
		_ = first.Close()
	}
}
