package dataplane_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"flag"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/url"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/intentions"
	"github.com/meshd/meshd/proxy"
	"github.com/meshd/meshd/proxy/dataplane"
)

var logs = flag.Bool("logs", false, "show what the data planes log, at debug level") //nolint:gochecknoglobals // a flag

const trustDomain = "mesh.example.com"

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// authority is a CA of one trust domain, made for tests.
type authority struct {
	domain string
	root   *x509.Certificate
	key    crypto.Signer
}

func newAuthority(tb testing.TB, domain string) *authority {
	tb.Helper()
	key, err := ca.GenerateKey()
	if err != nil {
		tb.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: serial(tb), Subject: pkix.Name{CommonName: "root of " + domain},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		URIs: []*url.URL{{Scheme: "spiffe", Host: domain}},
	}
	return &authority{domain: domain, key: key, root: sign(tb, template, template, key.Public(), key)}
}

func serial(tb testing.TB) *big.Int {
	tb.Helper()
	n, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		tb.Fatal(err)
	}
	return n
}

func sign(tb testing.TB, template, parent *x509.Certificate, public crypto.PublicKey, key crypto.Signer) *x509.Certificate {
	tb.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, key)
	if err != nil {
		tb.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		tb.Fatal(err)
	}
	return cert
}

// leaf signs a certificate for any identity, whether or not it is the authority's to give.
func (a *authority) leaf(tb testing.TB, id spiffe.ID, ttl time.Duration) *ca.Leaf {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	cert := sign(tb, &x509.Certificate{
		SerialNumber: serial(tb), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(ttl),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		URIs: []*url.URL{id.URL()}, BasicConstraintsValid: true,
	}, a.root, key.Public(), a.key)
	leaf, err := ca.NewLeaf(ca.Chain{cert}, key)
	if err != nil {
		tb.Fatal(err)
	}
	return leaf
}

func (a *authority) bundle(tb testing.TB) ca.Bundle {
	tb.Helper()
	b, err := ca.NewBundle(a.domain, a.root)
	if err != nil {
		tb.Fatal(err)
	}
	return b
}

func service(name string) spiffe.ID {
	return spiffe.Service(trustDomain, catalog.DefaultNamespace, name)
}

// host is one data plane with its sockets and its plan, which tests change and apply again.
type host struct {
	t        testing.TB
	plane    *dataplane.Plane
	registry *prometheus.Registry
	plan     proxy.Config
	keys     []*ca.Leaf
	sockets  map[string]*os.File
	stop     func()
}

func newHost(tb testing.TB, limits dataplane.Limits) *host {
	tb.Helper()
	registry := prometheus.NewRegistry()
	plane, err := dataplane.New(dataplane.Config{Log: testLog(tb), Registerer: registry, Limits: limits})
	if err != nil {
		tb.Fatal(err)
	}
	h := &host{t: tb, plane: plane, registry: registry, sockets: map[string]*os.File{}}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- plane.Run(ctx) }()
	stopped := false
	h.stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			tb.Errorf("Run: %v", err)
		}
		for _, f := range h.sockets {
			_ = f.Close()
		}
	}
	tb.Cleanup(h.stop)
	return h
}

func testLog(tb testing.TB) *slog.Logger {
	tb.Helper()
	if !*logs {
		return slog.New(slog.DiscardHandler)
	}
	return slog.New(slog.NewTextHandler(tb.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// socket opens a listening socket under a name and returns its address.
func (h *host) socket(name string) string {
	h.t.Helper()
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		h.t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	file, err := l.File()
	if err != nil {
		h.t.Fatal(err)
	}
	h.sockets[name] = file
	return l.Addr().String()
}

// apply puts the host's plan in force.
func (h *host) apply() dataplane.Applied {
	h.t.Helper()
	h.plan.Position.Revision++
	got, err := h.plane.Apply(h.t.Context(), h.plan, h.keys, h.sockets)
	if err != nil {
		h.t.Fatalf("Apply: %v", err)
	}
	return got
}

// metric returns the sum of the series of a name that have all the labels, which are given as name, value pairs.
func (h *host) metric(name string, labels ...string) float64 {
	h.t.Helper()
	families, err := h.registry.Gather()
	if err != nil {
		h.t.Fatal(err)
	}
	sum := 0.0
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			have := map[string]string{}
			for _, l := range m.GetLabel() {
				have[l.GetName()] = l.GetValue()
			}
			matches := true
			for i := 0; i < len(labels); i += 2 {
				matches = matches && have[labels[i]] == labels[i+1]
			}
			if matches {
				sum += m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
			}
		}
	}
	return sum
}

// mesh is two hosts: web on a, api on b.
type mesh struct {
	ca       *authority
	a, b     *host
	upstream string // where web's application reaches api
	port     string // b's mesh address
}

// options of newMesh. Zero fields are one instance, allowed.
type options struct {
	protocol  catalog.Protocol
	apps      []string // addresses of api's instances
	intention *intentions.Intention
	limits    dataplane.Limits
}

// allow is the intention web → api.
func allow() *intentions.Intention {
	return &intentions.Intention{Source: "web", Destination: "api", Action: intentions.Allow}
}

func deny() *intentions.Intention {
	return &intentions.Intention{Source: "web", Destination: "api", Action: intentions.Deny}
}

func newMesh(tb testing.TB, o options) *mesh {
	tb.Helper()
	m := &mesh{ca: newAuthority(tb, trustDomain), a: newHost(tb, o.limits), b: newHost(tb, o.limits)}
	m.port = m.b.socket("mesh")
	m.upstream = m.a.socket("upstream/web/api/main")
	position := catalog.Position{Generation: "g1", Revision: 1}
	base := proxy.Config{Position: position, TrustDomain: trustDomain, Bundle: m.ca.bundle(tb)}
	name := catalog.Name{Namespace: catalog.DefaultNamespace, Name: "api"}

	m.b.plan = base
	m.b.plan.Listeners = []proxy.Listener{{Name: "mesh", Kind: proxy.ListenMesh, Address: m.port}}
	m.b.plan.Policies = []proxy.Policy{{Service: name}}
	m.b.keys = []*ca.Leaf{m.ca.leaf(tb, service("api"), time.Hour)}

	m.a.plan = base
	m.a.plan.Listeners = []proxy.Listener{{
		Name: "upstream/web/api/main", Kind: proxy.ListenUpstream, Address: m.upstream, Source: service("web"), Cluster: "default/api:main",
	}}
	cluster := proxy.Cluster{Name: "default/api:main", Service: service("api"), Port: "main", Protocol: o.protocol}
	m.a.keys = []*ca.Leaf{m.ca.leaf(tb, service("web"), time.Hour)}

	for i, app := range o.apps {
		id := "api-" + string(rune('a'+i))
		sni := proxy.ServerName("main", id, "api", catalog.DefaultNamespace)
		m.b.plan.Inbounds = append(m.b.plan.Inbounds, proxy.Inbound{
			ServerName: sni, Service: service("api"), Instance: id, Port: "main", Protocol: o.protocol, Local: app,
		})
		cluster.Endpoints = append(cluster.Endpoints, proxy.Endpoint{Instance: id, Node: "vm-b", Address: m.port, ServerName: sni})
	}
	m.a.plan.Clusters = []proxy.Cluster{cluster}
	m.intend(o.intention)
	m.b.apply()
	m.a.apply()
	return m
}

// intend replaces the intentions of api, on b. It does not apply the plan.
func (m *mesh) intend(i *intentions.Intention) {
	m.b.plan.Policies[0].Intentions = nil
	if i != nil {
		m.b.plan.Policies[0].Intentions = []intentions.Intention{*i}
	}
}

// serveTCP runs an application that answers every connection with handle.
func serveTCP(tb testing.TB, handle func(*net.TCPConn)) string {
	tb.Helper()
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		tb.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.AcceptTCP()
			if err != nil {
				return
			}
			go func() {
				defer func() { _ = c.Close() }()
				handle(c)
			}()
		}
	}()
	tb.Cleanup(func() {
		_ = l.Close()
		<-done
	})
	return l.Addr().String()
}

// echo sends back what comes.
func echo(c *net.TCPConn) {
	_, _ = io.Copy(c, c)
	_ = c.CloseWrite()
}

func dial(tb testing.TB, address string) *net.TCPConn {
	tb.Helper()
	addr, err := net.ResolveTCPAddr("tcp", address)
	if err != nil {
		tb.Fatal(err)
	}
	c, err := net.DialTCP("tcp", nil, addr)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = c.Close() })
	if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		tb.Fatal(err)
	}
	return c
}

// wantRefused connects and expects to be reset, at once or after a while, before any byte comes back.
func wantRefused(tb testing.TB, address string) {
	tb.Helper()
	c, err := net.Dial("tcp", address)
	if err == nil {
		defer func() { _ = c.Close() }()
		_ = c.SetDeadline(time.Now().Add(20 * time.Second))
		var n int64
		if n, err = io.Copy(io.Discard, c); n > 0 {
			tb.Errorf("%d bytes came back", n)
		}
	}
	if !errors.Is(err, syscall.ECONNRESET) {
		tb.Errorf("the connection ended with %v, want a reset", err)
	}
}

// exchange sends text and reads as many bytes back.
func exchange(tb testing.TB, c net.Conn, text string) string {
	tb.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		tb.Fatalf("write: %v", err)
	}
	buf := make([]byte, len(text))
	if _, err := io.ReadFull(c, buf); err != nil {
		tb.Fatalf("read: %v", err)
	}
	return string(buf)
}

// eventually waits until ok, which is asked every few milliseconds.
func eventually(tb testing.TB, what string, ok func() bool) {
	tb.Helper()
	ctx, cancel := context.WithTimeout(tb.Context(), 10*time.Second)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-ctx.Done():
			tb.Fatalf("waited 10 s in vain: %s", what)
		case <-tick.C:
		}
	}
}
