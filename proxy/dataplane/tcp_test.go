package dataplane_test

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"
	"testing"
	"time"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/intentions"
	"github.com/meshd/meshd/proxy/dataplane"
)

func TestTCPAllowed(t *testing.T) {
	m := newMesh(t, options{protocol: catalog.ProtocolTCP, apps: []string{serveTCP(t, echo)}, intention: allow()})
	c := dial(t, m.upstream)
	if got := exchange(t, c, "hello"); got != "hello" {
		t.Fatalf("echoed %q", got)
	}
	for _, want := range []struct {
		h      *host
		name   string
		labels []string
		value  float64
	}{
		{m.a, "mesh_tcp_connections_total", []string{"source", "default/web", "destination", "default/api", "direction", "outbound"}, 1},
		{m.b, "mesh_tcp_connections_total", []string{"source", "default/web", "destination", "default/api", "direction", "inbound"}, 1},
		{m.b, "mesh_tcp_bytes_total", []string{"way", "sent"}, 5},
		{m.b, "mesh_tcp_bytes_total", []string{"way", "received"}, 5},
		{m.b, "mesh_intention_decisions_total", []string{"decision", "allow", "reason", "action"}, 1},
		{m.b, "mesh_connections_open", []string{"direction", "inbound"}, 1},
		{m.b, "mesh_plan_revision", nil, 2},
	} {
		eventually(t, fmt.Sprint(want.name, want.labels, " is ", want.value), func() bool {
			return want.h.metric(want.name, want.labels...) == want.value
		})
	}
}

func TestTCPDeniedIsReset(t *testing.T) {
	rules := allow()
	rules.Action, rules.Rules = "", []intentions.Rule{{Action: intentions.Allow, PathPrefix: "/v1/"}}
	tests := map[string]struct {
		protocol  catalog.Protocol
		intention *intentions.Intention
		reason    intentions.Reason
	}{
		"no intention":     {catalog.ProtocolTCP, nil, intentions.ReasonNoIntention},
		"deny":             {catalog.ProtocolTCP, deny(), intentions.ReasonAction},
		"HTTP rules, auto": {catalog.ProtocolAuto, rules, intentions.ReasonNotHTTP},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			m := newMesh(t, options{protocol: tt.protocol, apps: []string{serveTCP(t, echo)}, intention: tt.intention})
			wantRefused(t, m.upstream)
			if n := m.b.metric("mesh_intention_decisions_total", "decision", "deny", "reason", string(tt.reason)); n != 1 {
				t.Errorf("%v decisions were counted for %s", n, tt.reason)
			}
		})
	}
}

// wantReset reads until the connection ends, which must be by RST.
func wantReset(t *testing.T, c net.Conn) {
	t.Helper()
	if _, err := io.Copy(io.Discard, c); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the connection ended with %v, want a reset", err)
	}
}

func TestTCPDeniedClusterIsResetNearby(t *testing.T) {
	m := newMesh(t, options{protocol: catalog.ProtocolTCP, apps: []string{serveTCP(t, echo)}, intention: allow()})
	m.a.plan.Clusters[0].Denied, m.a.plan.Clusters[0].Endpoints = "no intention allows web to call api", nil
	m.a.apply()
	wantRefused(t, m.upstream)
	if n := m.a.metric("mesh_connections_refused_total", "reason", "denied"); n != 1 {
		t.Errorf("%v refusals were counted", n)
	}
}

func TestDenyCutsLiveTCP(t *testing.T) {
	tests := map[string]func(m *mesh) dataplane.Applied{
		"by policy, on the far side": func(m *mesh) dataplane.Applied {
			m.intend(deny())
			return m.b.apply()
		},
		"by denied cluster, on the near side": func(m *mesh) dataplane.Applied {
			m.a.plan.Clusters[0].Denied, m.a.plan.Clusters[0].Endpoints = "denied", nil
			return m.a.apply()
		},
		"the instance is gone": func(m *mesh) dataplane.Applied {
			m.b.plan.Inbounds = nil
			return m.b.apply()
		},
	}
	for name, change := range tests {
		t.Run(name, func(t *testing.T) {
			m := newMesh(t, options{protocol: catalog.ProtocolTCP, apps: []string{serveTCP(t, echo)}, intention: allow()})
			c := dial(t, m.upstream)
			exchange(t, c, "before")
			started := time.Now()
			if got := change(m); got.Closed != 1 {
				t.Errorf("Apply says that %d were closed, want 1", got.Closed)
			}
			wantReset(t, c)
			if took := time.Since(started); took > 2*time.Second {
				t.Errorf("it took %s", took)
			}
		})
	}
}

func TestDenyCutsManyAtOnce(t *testing.T) {
	m := newMesh(t, options{protocol: catalog.ProtocolTCP, apps: []string{serveTCP(t, echo)}, intention: allow()})
	const n = 200
	conns := make([]*net.TCPConn, n)
	for i := range conns {
		conns[i] = dial(t, m.upstream)
		exchange(t, conns[i], "before")
	}
	m.intend(deny())
	started := time.Now()
	if got := m.b.apply(); got.Closed != n {
		t.Errorf("Apply closed %d connections, want %d", got.Closed, n)
	}
	for _, c := range conns {
		wantReset(t, c)
	}
	if took := time.Since(started); took > 2*time.Second {
		t.Errorf("it took %s", took)
	}
	for _, h := range []*host{m.a, m.b} {
		eventually(t, "nothing is left", func() bool { return h.metric("mesh_connections_open") == 0 })
	}
}

func TestExpiryOfAnIntentionCutsLiveTCP(t *testing.T) {
	soon := time.Now().Add(3 * time.Second) // the mesh is made by then
	i := allow()
	i.Expires = &soon
	m := newMesh(t, options{protocol: catalog.ProtocolTCP, apps: []string{serveTCP(t, echo)}, intention: i})
	c := dial(t, m.upstream)
	exchange(t, c, "before")
	wantReset(t, c)
	if late := time.Since(soon); late < 0 || late > 2*time.Second {
		t.Errorf("cut %s after the end of the intention", late)
	}
}

func TestPlanChangeKeepsLiveTCP(t *testing.T) {
	m := newMesh(t, options{protocol: catalog.ProtocolTCP, apps: []string{serveTCP(t, echo)}, intention: allow()})
	c := dial(t, m.upstream)
	exchange(t, c, "before")
	for range 20 {
		m.b.apply()
		m.a.apply()
	}
	// A listener that is gone takes no more, and keeps what it has.
	listeners := m.a.plan.Listeners
	m.a.plan.Listeners = nil
	if got := m.a.apply(); got.Open != 1 || got.Closed != 0 {
		t.Errorf("without its listener: %+v", got)
	}
	exchange(t, c, "after")
	m.a.plan.Listeners = listeners
	m.a.apply()
	if got := exchange(t, dial(t, m.upstream), "again"); got != "again" {
		t.Errorf("a listener that came back echoed %q", got)
	}
}

func TestHalfCloseBothWays(t *testing.T) {
	const up, down = 3 << 20, 5 << 20
	// Each application sends all it has, ends its half, and goes on with the other half.
	serverFirst := make(chan int64, 1)
	app := serveTCP(t, func(c *net.TCPConn) {
		sent := make(chan struct{})
		go func() {
			defer close(sent)
			_, _ = io.CopyN(c, rand.Reader, down)
			_ = c.CloseWrite()
		}()
		n, _ := io.Copy(io.Discard, c)
		<-sent
		serverFirst <- n
	})
	m := newMesh(t, options{protocol: catalog.ProtocolTCP, apps: []string{app}, intention: allow()})
	t.Run("client ends first", func(t *testing.T) {
		c := dial(t, m.upstream)
		go func() {
			_, _ = io.CopyN(c, rand.Reader, up)
			_ = c.CloseWrite()
		}()
		n, err := io.Copy(io.Discard, c)
		if n != down || err != nil {
			t.Errorf("the client got %d bytes, %v", n, err)
		}
		if n := <-serverFirst; n != up {
			t.Errorf("the server got %d bytes", n)
		}
	})
	t.Run("server ends first", func(t *testing.T) {
		c := dial(t, m.upstream)
		n, err := io.Copy(io.Discard, c)
		if n != down || err != nil {
			t.Fatalf("the client got %d bytes, %v", n, err)
		}
		// Half a session is left: it must still carry.
		if _, err := c.Write(bytes.Repeat([]byte("x"), up)); err != nil {
			t.Fatal(err)
		}
		if err := c.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if n := <-serverFirst; n != up {
			t.Errorf("the server got %d bytes", n)
		}
	})
}

func TestAbortBecomesReset(t *testing.T) {
	seen := make(chan error, 1)
	app := serveTCP(t, func(c *net.TCPConn) {
		buf := make([]byte, 4)
		_, _ = io.ReadFull(c, buf)
		if string(buf) == "rst!" {
			_ = c.SetLinger(0)
			return // closes
		}
		_, err := io.Copy(io.Discard, c)
		seen <- err
	})
	m := newMesh(t, options{protocol: catalog.ProtocolTCP, apps: []string{app}, intention: allow()})
	t.Run("server aborts", func(t *testing.T) {
		c := dial(t, m.upstream)
		if _, err := io.WriteString(c, "rst!"); err != nil {
			t.Fatal(err)
		}
		wantReset(t, c)
	})
	t.Run("client aborts", func(t *testing.T) {
		c := dial(t, m.upstream)
		if _, err := io.WriteString(c, "stay"); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the session is open", func() bool { return m.b.metric("mesh_tcp_bytes_total", "way", "sent") >= 8 })
		_ = c.SetLinger(0)
		_ = c.Close()
		if err := <-seen; !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the server saw %v, want a reset", err)
		}
	})
}

func TestEachInstanceIsReachedByItsName(t *testing.T) {
	var apps []string
	for i := range 3 {
		apps = append(apps, serveTCP(t, func(c *net.TCPConn) { _, _ = fmt.Fprintf(c, "%d", i) }))
	}
	m := newMesh(t, options{protocol: catalog.ProtocolTCP, apps: apps, intention: allow()})
	all := m.a.plan.Clusters[0].Endpoints
	for i := range apps {
		m.a.plan.Clusters[0].Endpoints = all[i : i+1]
		m.a.apply()
		for range 3 {
			got, err := io.ReadAll(dial(t, m.upstream))
			if string(got) != fmt.Sprint(i) || err != nil {
				t.Errorf("instance %d answered %q, %v", i, got, err)
			}
		}
	}
	m.a.plan.Clusters[0].Endpoints = all
	m.a.apply()
	seen := map[string]bool{}
	for range 60 {
		got, _ := io.ReadAll(dial(t, m.upstream))
		seen[string(got)] = true
	}
	if len(seen) != 3 {
		t.Errorf("60 connections reached %v, want all three", seen)
	}
}

func TestADeadEndpointIsPassedOver(t *testing.T) {
	m := newMesh(t, options{protocol: catalog.ProtocolTCP, apps: []string{serveTCP(t, echo)}, intention: allow()})
	dead := m.a.plan.Clusters[0].Endpoints[0]
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	dead.Instance, dead.Address = "api-dead", closed.Addr().String()
	_ = closed.Close()
	m.a.plan.Clusters[0].Endpoints = append(m.a.plan.Clusters[0].Endpoints, dead)
	m.a.apply()
	for range 20 {
		if got := exchange(t, dial(t, m.upstream), "x"); got != "x" {
			t.Fatalf("echoed %q", got)
		}
	}
}

func TestIdleTCPIsCut(t *testing.T) {
	limits := dataplane.Limits{IdleTimeout: 1200 * time.Millisecond}
	m := newMesh(t, options{protocol: catalog.ProtocolTCP, apps: []string{serveTCP(t, echo)}, intention: allow(), limits: limits})
	c := dial(t, m.upstream)
	exchange(t, c, "once")
	wantReset(t, c)
}

func TestLimitOfConnections(t *testing.T) {
	limits := dataplane.Limits{Connections: 2}
	m := newMesh(t, options{protocol: catalog.ProtocolTCP, apps: []string{serveTCP(t, echo)}, intention: allow(), limits: limits})
	first, second := dial(t, m.upstream), dial(t, m.upstream)
	exchange(t, first, "1")
	exchange(t, second, "2")
	wantRefused(t, m.upstream)
	_ = first.Close()
	eventually(t, "a place is free again", func() bool { return m.a.metric("mesh_connections_open") == 1 })
	exchange(t, dial(t, m.upstream), "3")
	if n := m.a.metric("mesh_connections_refused_total", "reason", "overload"); n != 1 {
		t.Errorf("%v were counted", n)
	}
}
