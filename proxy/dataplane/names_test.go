package dataplane_test

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/proxy/dataplane"
)

// dns answers lookups.
type dns struct {
	mu      sync.Mutex
	answers map[string][]string
	asked   int
}

func (d *dns) set(host string, addresses ...string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.answers[host] = addresses
}

func (d *dns) lookup(_ context.Context, host string) ([]netip.Addr, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.asked++
	var found []netip.Addr
	for _, a := range d.answers[host] {
		found = append(found, netip.MustParseAddr(a))
	}
	if found == nil {
		return nil, errors.New("no such host")
	}
	return found, nil
}

// external returns a mesh whose service api is a destination outside of it.
func external(t *testing.T, protocol catalog.Protocol, local string, answers map[string][]string) (*mesh, *dns) {
	t.Helper()
	d := &dns{answers: answers}
	m := newMesh(t, options{protocol: protocol, apps: []string{"127.0.0.1:1"}, intention: allow()})
	dataplane.SetLookup(m.b.plane, d.lookup)
	m.b.plan.Inbounds[0].Local = local
	m.b.apply()
	return m, d
}

func portOf(t *testing.T, address string) string {
	t.Helper()
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		t.Fatal(err)
	}
	return port
}

func TestExternalByName(t *testing.T) {
	app := serveTCP(t, echo)
	m, d := external(t, catalog.ProtocolTCP, "db.localhost:"+portOf(t, app), map[string][]string{"db.localhost": {"127.0.0.9", "127.0.0.1"}})
	c := dial(t, m.upstream)
	if got := exchange(t, c, "hello"); got != "hello" {
		t.Fatalf("echoed %q", got)
	}
	// An answer serves many connections, beginning with another address each time; a dead one is passed over.
	for range 4 {
		if got := exchange(t, dial(t, m.upstream), "again"); got != "again" {
			t.Errorf("echoed %q", got)
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.asked != 1 {
		t.Errorf("%d lookups", d.asked)
	}
}

func TestExternalFollowsItsName(t *testing.T) {
	m, d := external(t, catalog.ProtocolTCP, "db.localhost:"+portOf(t, serveTCP(t, echo)), map[string][]string{"db.localhost": {"127.0.0.1"}})
	kept := dial(t, m.upstream)
	exchange(t, kept, "x")
	// The name leads elsewhere, where nobody is: new connections go there, the old one stays.
	d.set("db.localhost", "127.0.0.8")
	dataplane.AgeNames(m.b.plane)
	eventually(t, "the new address is used", func() bool {
		return strings.Contains(ask(t, m.upstream), "reset")
	})
	if got := exchange(t, kept, "still"); got != "still" {
		t.Errorf("echoed %q", got)
	}
	// A lookup that fails takes nothing away.
	d.set("db.localhost", "127.0.0.1")
	dataplane.AgeNames(m.b.plane)
	eventually(t, "it is back", func() bool {
		return ask(t, m.upstream) == "x"
	})
	d.set("db.localhost")
	dataplane.AgeNames(m.b.plane)
	for range 3 {
		if got := exchange(t, dial(t, m.upstream), "known"); got != "known" {
			t.Errorf("echoed %q", got)
		}
	}
}

// ask sends a byte on a new connection and returns what comes back: it, or an
// error's text.
func ask(t *testing.T, address string) string {
	t.Helper()
	var d net.Dialer
	c, err := d.DialContext(t.Context(), "tcp", address)
	if err != nil {
		return err.Error()
	}
	defer func() { _ = c.Close() }()
	if _, err := c.Write([]byte("x")); err != nil {
		return err.Error()
	}
	var b [1]byte
	if _, err := c.Read(b[:]); err != nil {
		return "reset: " + err.Error()
	}
	return string(b[:])
}

func TestExternalHTTP(t *testing.T) {
	app := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) { _, _ = w.Write([]byte("from " + r.Host)) })
	m, d := external(t, catalog.ProtocolHTTP, "saas.localhost:"+portOf(t, app), map[string][]string{"saas.localhost": {"127.0.0.1"}})
	if got := get(t, client(t), "GET", "http://"+m.upstream+"/", ""); got.status != http.StatusOK || !strings.HasPrefix(got.body, "from ") {
		t.Errorf("%d %q", got.status, got.body)
	}
	for name, host := range map[string]struct {
		host      string
		addresses []string
	}{
		"nobody":            {"gone.example.com", nil},
		"this host, forged": {"forged.example.com", []string{"127.0.0.1"}},
		"metadata, forged":  {"cloud.example.com", []string{"169.254.169.254", "fe80::1"}},
	} {
		if host.addresses != nil {
			d.set(host.host, host.addresses...)
		}
		m.b.plan.Inbounds[0].Local = host.host + ":" + portOf(t, app)
		m.b.apply()
		got := get(t, client(t), "GET", "http://"+m.upstream+"/", "")
		if got.status != http.StatusBadGateway && got.status != http.StatusServiceUnavailable || got.header.Get("mesh-error") != "connect-failed" {
			t.Errorf("%s: %d %v %q", name, got.status, got.header, got.body)
		}
	}
}
