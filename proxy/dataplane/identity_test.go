package dataplane_test

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"syscall"
	"testing"
	"time"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/proxy"
)

// reach opens a TLS connection to a mesh port as any client would, sends a line, and returns what comes back.
func reach(t *testing.T, address, sni string, alpn []string, leaf *ca.Leaf) (string, error) {
	t.Helper()
	config := &tls.Config{ServerName: sni, NextProtos: alpn, InsecureSkipVerify: true, MinVersion: tls.VersionTLS12}
	if leaf != nil {
		config.Certificates = []tls.Certificate{*leaf.TLS()}
	}
	c := tls.Client(dial(t, address), config)
	if _, err := io.WriteString(c, "hello"); err != nil {
		return "", err
	}
	buf := make([]byte, 5)
	_, err := io.ReadFull(c, buf)
	return string(buf), err
}

func TestMeshPortTakesOnlyProvenIdentities(t *testing.T) {
	reached := make(chan struct{}, 16)
	app := serveTCP(t, func(c *net.TCPConn) {
		reached <- struct{}{}
		echo(c)
	})
	m := newMesh(t, options{protocol: catalog.ProtocolTCP, apps: []string{app}, intention: allow()})
	sni := m.b.plan.Inbounds[0].ServerName
	foreign := newAuthority(t, "evil.example.com")
	mint := newAuthority(t, trustDomain) // another root that calls itself ours
	tcp := []string{"mesh-tcp"}
	tests := map[string]struct {
		sni    string
		alpn   []string
		leaf   *ca.Leaf
		metric string
		reason string
	}{
		"no certificate":                    {sni, tcp, nil, "mesh_handshake_errors_total", "no-certificate"},
		"a foreign trust domain":            {sni, tcp, foreign.leaf(t, spiffe.Service("evil.example.com", "default", "web"), time.Hour), "mesh_handshake_errors_total", "untrusted"},
		"a foreign CA mints our ID":         {sni, tcp, foreign.leaf(t, service("web"), time.Hour), "mesh_handshake_errors_total", "untrusted"},
		"a CA of our name":                  {sni, tcp, mint.leaf(t, service("web"), time.Hour), "mesh_handshake_errors_total", "untrusted"},
		"an expired certificate":            {sni, tcp, m.ca.leaf(t, service("web"), -time.Second), "mesh_handshake_errors_total", "certificate-expired"},
		"an unknown server name":            {"main.no-such.api.default.mesh", tcp, m.ca.leaf(t, service("web"), time.Hour), "mesh_handshake_errors_total", "unknown-name"},
		"no server name":                    {"", tcp, m.ca.leaf(t, service("web"), time.Hour), "mesh_handshake_errors_total", "unknown-name"},
		"no protocol that we have":          {sni, []string{"h3"}, m.ca.leaf(t, service("web"), time.Hour), "mesh_handshake_errors_total", "protocol-mismatch"},
		"no protocol at all":                {sni, nil, m.ca.leaf(t, service("web"), time.Hour), "mesh_connections_refused_total", "protocol-mismatch"},
		"HTTP on a TCP port":                {sni, []string{"http/1.1"}, m.ca.leaf(t, service("web"), time.Hour), "mesh_connections_refused_total", "protocol-mismatch"},
		"a service that no intention names": {sni, tcp, m.ca.leaf(t, service("other"), time.Hour), "mesh_connections_refused_total", "denied"},
		"a node":                            {sni, tcp, m.ca.leaf(t, spiffe.Node(trustDomain, "vm-a"), time.Hour), "mesh_connections_refused_total", "denied"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			before := m.b.metric(tt.metric, "reason", tt.reason)
			if got, err := reach(t, m.port, tt.sni, tt.alpn, tt.leaf); err == nil {
				t.Errorf("it got %q", got)
			}
			eventually(t, tt.metric+" counts "+tt.reason, func() bool { return m.b.metric(tt.metric, "reason", tt.reason) == before+1 })
		})
	}
	t.Run("plaintext", func(t *testing.T) {
		c := dial(t, m.port)
		if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: api\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		got, _ := io.ReadAll(c)
		if bytes.Contains(got, []byte("HTTP")) {
			t.Errorf("it got %q", got)
		}
		eventually(t, "it is counted", func() bool { return m.b.metric("mesh_handshake_errors_total", "reason", "plaintext") == 1 })
	})
	if n := len(reached); n != 0 {
		t.Errorf("the application was reached %d times", n)
	}
	if got, err := reach(t, m.port, sni, tcp, m.ca.leaf(t, service("web"), time.Hour)); got != "hello" || err != nil {
		t.Errorf("the rightful caller got %q, %v", got, err)
	}
}

// A caller must not get around the rules and headers of an HTTP port by calling it TCP.
func TestAnHTTPPortTakesNoTCP(t *testing.T) {
	for _, protocol := range []catalog.Protocol{catalog.ProtocolHTTP, catalog.ProtocolGRPC} {
		m := newMesh(t, options{protocol: protocol, apps: []string{serveTCP(t, echo)}, intention: allow()})
		wrong := []string{"mesh-tcp"}
		if protocol == catalog.ProtocolGRPC { // which is TCP until HTTP/2 is spoken here
			wrong = []string{"http/1.1"}
		}
		if got, err := reach(t, m.port, m.b.plan.Inbounds[0].ServerName, wrong, m.ca.leaf(t, service("web"), time.Hour)); err == nil {
			t.Errorf("%s: %q got %q", protocol, wrong, got)
		}
		eventually(t, "it is counted", func() bool {
			return m.b.metric("mesh_connections_refused_total", "reason", "protocol-mismatch") == 1
		})
	}
}

// The client's side must find the expected service, not merely a member of the mesh.
func TestNearSideVerifiesTheService(t *testing.T) {
	tests := map[string]func(m *mesh) *ca.Leaf{
		"another service of the mesh": func(m *mesh) *ca.Leaf { return m.ca.leaf(t, service("other"), time.Hour) },
		"a foreign CA":                func(*mesh) *ca.Leaf { return newAuthority(t, "evil.example.com").leaf(t, service("api"), time.Hour) },
		"an expired certificate":      func(m *mesh) *ca.Leaf { return m.ca.leaf(t, service("api"), -time.Second) },
	}
	for name, impostor := range tests {
		t.Run(name, func(t *testing.T) {
			m := newMesh(t, options{protocol: catalog.ProtocolTCP, apps: []string{serveTCP(t, echo)}, intention: allow()})
			leaf := impostor(m)
			l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{
				Certificates: []tls.Certificate{*leaf.TLS()}, MinVersion: tls.VersionTLS13,
				NextProtos: []string{"mesh-tcp"}, ClientAuth: tls.RequireAnyClientCert,
			})
			if err != nil {
				t.Fatal(err)
			}
			leaked := make(chan []byte, 1)
			go func() {
				c, err := l.Accept()
				if err != nil {
					leaked <- nil
					return
				}
				data, _ := io.ReadAll(c)
				_ = c.Close()
				leaked <- data
			}()
			m.a.plan.Clusters[0].Endpoints[0].Address = l.Addr().String()
			m.a.apply()
			if c, err := net.Dial("tcp", m.upstream); err == nil {
				_ = c.SetDeadline(time.Now().Add(20 * time.Second))
				_, _ = io.WriteString(c, "secret")
				if _, err := io.Copy(io.Discard, c); !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("the application saw %v, want a reset", err)
				}
				_ = c.Close()
			}
			_ = l.Close()
			if data := <-leaked; len(data) > 0 {
				t.Errorf("the impostor got %q", data)
			}
		})
	}
}

func TestRotationOfLeaves(t *testing.T) {
	m := newMesh(t, options{protocol: catalog.ProtocolTCP, apps: []string{serveTCP(t, echo)}, intention: allow()})
	old := dial(t, m.upstream)
	exchange(t, old, "before")
	// What was in use ends now; new handshakes must use what is newer.
	m.a.keys = []*ca.Leaf{m.ca.leaf(t, service("web"), -time.Second)}
	m.a.apply()
	wantRefused(t, m.upstream)
	m.a.keys = []*ca.Leaf{m.ca.leaf(t, service("web"), time.Hour)}
	m.b.keys = []*ca.Leaf{m.ca.leaf(t, service("api"), time.Hour)}
	m.a.apply()
	m.b.apply()
	exchange(t, dial(t, m.upstream), "new")
	exchange(t, old, "the old session goes on")
	m.b.keys = nil
	m.b.apply()
	wantRefused(t, m.upstream)
}

func TestExpiredSessionEndsWhenItIsIdle(t *testing.T) {
	m := newMesh(t, options{protocol: catalog.ProtocolTCP, apps: []string{serveTCP(t, echo)}, intention: allow()})
	// Certificates have whole seconds.
	m.a.keys = []*ca.Leaf{m.ca.leaf(t, service("web"), 3*time.Second)}
	m.a.apply()
	until := m.a.keys[0].NotAfter()
	c := dial(t, m.upstream)
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for time.Now().Before(until.Add(500 * time.Millisecond)) {
		exchange(t, c, "busy")
		<-tick.C
	}
	if _, err := io.Copy(io.Discard, c); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("it ended with %v, want a reset", err)
	}
	if late := time.Since(until); late > 5*time.Second {
		t.Errorf("it ended %s after its certificate", late)
	}
}

func TestRemovedRootClosesLiveConnections(t *testing.T) {
	m := newMesh(t, options{protocol: catalog.ProtocolTCP, apps: []string{serveTCP(t, echo)}, intention: allow()})
	next := newAuthority(t, trustDomain)
	both := m.ca.bundle(t).Merge(next.bundle(t))
	for _, h := range []*host{m.a, m.b} {
		h.plan.Bundle = both
		h.apply()
	}
	old := dial(t, m.upstream)
	exchange(t, old, "by the old root")
	m.a.keys = []*ca.Leaf{next.leaf(t, service("web"), time.Hour)}
	m.b.keys = []*ca.Leaf{next.leaf(t, service("api"), time.Hour)}
	m.a.apply()
	m.b.apply()
	fresh := dial(t, m.upstream)
	exchange(t, fresh, "by the new root")
	m.b.plan.Bundle = next.bundle(t)
	if got := m.b.apply(); got.Closed != 1 {
		t.Errorf("Apply closed %d connections, want the one of the old root", got.Closed)
	}
	wantReset(t, old)
	exchange(t, fresh, "still there")
}

func TestApplyRefusesABadPlanAndKeepsTheOldOne(t *testing.T) {
	m := newMesh(t, options{protocol: catalog.ProtocolTCP, apps: []string{serveTCP(t, echo)}, intention: allow()})
	c := dial(t, m.upstream)
	exchange(t, c, "before")
	bad := m.b.plan
	bad.Listeners = append([]proxy.Listener{{Name: "x", Kind: "magic", Address: "nowhere"}}, bad.Listeners...)
	bad.Policies = nil
	if _, err := m.b.plane.Apply(t.Context(), bad, m.b.keys, m.b.sockets); err == nil {
		t.Error("Apply took it")
	}
	exchange(t, c, "after")
	exchange(t, dial(t, m.upstream), "and new ones")
}

func TestAnUnreadablePolicyDenies(t *testing.T) {
	m := newMesh(t, options{protocol: catalog.ProtocolTCP, apps: []string{serveTCP(t, echo)}, intention: allow()})
	c := dial(t, m.upstream)
	exchange(t, c, "before")
	m.b.plan.Policies[0].Unreadable = "unknown field"
	if got := m.b.apply(); got.Closed != 1 {
		t.Errorf("Apply closed %d", got.Closed)
	}
	wantReset(t, c)
	wantRefused(t, m.upstream)
}
