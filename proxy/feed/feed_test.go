package feed_test

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/proxy"
	"github.com/meshd/meshd/proxy/feed"
)

const trustDomain = "mesh.example.com"

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// signer makes leaves that chain to its root.
type signer struct {
	key  ca.Bundle
	root *x509.Certificate
	priv any
}

func newSigner(tb testing.TB) *signer {
	tb.Helper()
	key, err := ca.GenerateKey()
	if err != nil {
		tb.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		tb.Fatal(err)
	}
	root, err := x509.ParseCertificate(der)
	if err != nil {
		tb.Fatal(err)
	}
	b, err := ca.NewBundle(trustDomain, root)
	if err != nil {
		tb.Fatal(err)
	}
	return &signer{key: b, root: root, priv: key}
}

func (s *signer) leaf(tb testing.TB, name string) *ca.Leaf {
	tb.Helper()
	key, err := ca.GenerateKey()
	if err != nil {
		tb.Fatal(err)
	}
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		tb.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: serial, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		URIs: []*url.URL{spiffe.Service(trustDomain, "default", name).URL()},
	}, s.root, key.Public(), s.priv)
	if err != nil {
		tb.Fatal(err)
	}
	chain, err := ca.ParseChain([][]byte{der})
	if err != nil {
		tb.Fatal(err)
	}
	leaf, err := ca.NewLeaf(chain, key)
	if err != nil {
		tb.Fatal(err)
	}
	return leaf
}

// plan has one mesh listener and n clusters.
func (s *signer) plan(revision uint64, n int) proxy.Config {
	c := proxy.Config{
		Position: catalog.Position{Generation: "g1", Revision: revision}, TrustDomain: trustDomain, Bundle: s.key,
		Listeners: []proxy.Listener{{Name: "mesh", Kind: proxy.ListenMesh, Address: "127.0.0.1:0"}},
	}
	for i := range n {
		c.Clusters = append(c.Clusters, proxy.Cluster{
			Name: fmt.Sprintf("default/s%d:http", i), Service: spiffe.Service(trustDomain, "default", fmt.Sprintf("s%d", i)), Port: "http",
		})
	}
	return c
}

// handler notes updates and answers as it is told.
type handler struct {
	mu      sync.Mutex
	updates []feed.Update
	cookies []map[string]bool // names of usable sockets, per update
	refuse  error
	block   chan struct{}
	states  []feed.State
	changed chan struct{}
}

func newHandler() *handler { return &handler{changed: make(chan struct{}, 1)} }

func (h *handler) Apply(ctx context.Context, u feed.Update) (feed.Result, error) {
	h.mu.Lock()
	block := h.block
	h.mu.Unlock()
	if block != nil {
		select {
		case <-block:
		case <-ctx.Done():
		}
	}
	names := map[string]bool{}
	for name, file := range u.Sockets {
		if l, err := net.FileListener(file); err == nil {
			names[name] = true
			_ = l.Close()
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	defer h.announce()
	if h.refuse != nil {
		return feed.Result{}, h.refuse
	}
	h.updates = append(h.updates, u)
	h.cookies = append(h.cookies, names)
	return feed.Result{Closed: 1, Open: 7}, nil
}

func (h *handler) SetState(to feed.State) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.states = append(h.states, to)
	h.announce()
}

func (h *handler) announce() {
	select {
	case h.changed <- struct{}{}:
	default:
	}
}

func (h *handler) set(change func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	change()
}

// wait returns the newest update that satisfies ok.
func (h *handler) wait(t *testing.T, what string, ok func(feed.Update, map[string]bool) bool) feed.Update {
	t.Helper()
	var got feed.Update
	eventually(t, what, func() bool {
		h.mu.Lock()
		defer h.mu.Unlock()
		n := len(h.updates)
		if n == 0 || !ok(h.updates[n-1], h.cookies[n-1]) {
			return false
		}
		got = h.updates[n-1]
		return true
	})
	return got
}

func at(revision uint64) func(feed.Update, map[string]bool) bool {
	return func(u feed.Update, _ map[string]bool) bool { return u.Config.Position.Revision == revision }
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-ctx.Done():
			t.Fatalf("waited 10 s in vain: %s", what)
		case <-tick.C:
		}
	}
}

// run runs something until the test ends or the returned function is called.
func run(t *testing.T, what string, f func(context.Context) error) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f(ctx) }()
	var once sync.Once
	stop = func() {
		once.Do(func() {
			cancel()
			if err := <-done; err != nil {
				t.Errorf("%s: %v", what, err)
			}
		})
	}
	t.Cleanup(stop)
	return stop
}

// agent is a server on a socket of its own.
type agent struct {
	*feed.Server
	path string
	stop func()
}

func startAgent(t *testing.T, path string) *agent {
	t.Helper()
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	a := &agent{Server: feed.NewServer(feed.ServerConfig{Log: slog.New(slog.DiscardHandler)}), path: path}
	stop := run(t, "agent", func(ctx context.Context) error { return a.Run(ctx, l) })
	a.stop = func() {
		stop()
		if err := a.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	}
	t.Cleanup(func() { _ = a.Close() })
	return a
}

func socketPath(t *testing.T) string {
	t.Helper()
	return filepath.Join(t.TempDir(), "proxy.sock")
}

// startProxy attaches a client with a cache directory, none if it is empty.
func startProxy(t *testing.T, path, cache string) (*feed.Client, *handler, func()) {
	t.Helper()
	cfg := feed.ClientConfig{Socket: path, Proxy: "vm-a", Version: "v1", FeatureLevel: 3, Log: slog.New(slog.DiscardHandler)}
	if cache != "" {
		cfg.Cache = feed.NewDiskCache(cache)
	}
	c, h := feed.NewClient(cfg), newHandler()
	return c, h, run(t, "proxy", func(ctx context.Context) error { return c.Run(ctx, h) })
}

func (a *agent) waitStatus(t *testing.T, what string, ok func([]feed.ProxyStatus) bool) []feed.ProxyStatus {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	for {
		changed := a.Changed()
		status := a.Status()
		if ok(status) {
			return status
		}
		select {
		case <-changed:
		case <-ctx.Done():
			t.Fatalf("waited 10 s in vain: %s; status is %+v", what, status)
		}
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestPlanKeysAndSocketsArrive(t *testing.T) {
	s, a := newSigner(t), startAgent(t, socketPath(t))
	leaf := s.leaf(t, "web")
	must(t, a.SetKeys("vm-a", []*ca.Leaf{leaf}))
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	must(t, err)
	defer func() { _ = l.Close() }()
	file, err := l.File()
	must(t, err)
	must(t, a.SetSockets("vm-a", map[string]*os.File{"mesh": file}))
	must(t, file.Close()) // the server has its own
	must(t, a.SetPlan("vm-a", s.plan(1, 2)))
	must(t, a.SetPlan("vm-b", s.plan(77, 0)))

	_, h, _ := startProxy(t, a.path, "")
	u := h.wait(t, "the plan with its socket", func(u feed.Update, sockets map[string]bool) bool { return sockets["mesh"] })
	if u.Config.Position.Revision != 1 || len(u.Config.Clusters) != 2 || u.Alone {
		t.Errorf("got plan %v with %d clusters, alone %v", u.Config.Position, len(u.Config.Clusters), u.Alone)
	}
	if len(u.Keys) != 1 || u.Keys[0].ID() != leaf.ID() || !u.Keys[0].PublicKey().Equal(leaf.PublicKey()) {
		t.Errorf("got keys %v", u.Keys)
	}
	status := a.waitStatus(t, "the plan is applied", func(s []feed.ProxyStatus) bool { return len(s) == 1 && s[0].Applied == s[0].Wanted })
	want := feed.ProxyStatus{
		Proxy: "vm-a", Version: "v1", FeatureLevel: 3, State: feed.Active, PID: os.Getpid(), UID: uint32(os.Getuid()),
		Wanted: u.Config.Position, Applied: u.Config.Position, Closed: 1, Open: 7, Sockets: []string{"mesh"},
	}
	got := status[0]
	got.Session, got.Since = "", time.Time{}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("status:\n%s", diff)
	}

	// What is taken away goes.
	must(t, a.SetKeys("vm-a", nil))
	must(t, a.SetSockets("vm-a", nil))
	h.wait(t, "keys and sockets are gone", func(u feed.Update, sockets map[string]bool) bool { return len(u.Keys) == 0 && len(sockets) == 0 })
}

func TestASlowProxyGetsTheNewestPlan(t *testing.T) {
	s, a := newSigner(t), startAgent(t, socketPath(t))
	must(t, a.SetPlan("vm-a", s.plan(1, 1)))
	_, h, _ := startProxy(t, a.path, "")
	h.wait(t, "the first plan", at(1))
	block := make(chan struct{})
	h.set(func() { h.block = block })
	for revision := uint64(2); revision <= 500; revision++ {
		must(t, a.SetPlan("vm-a", s.plan(revision, int(revision%7))))
	}
	h.set(func() { h.block = nil })
	close(block)
	u := h.wait(t, "the newest plan", at(500))
	if len(u.Config.Clusters) != 500%7 {
		t.Errorf("it has %d clusters", len(u.Config.Clusters))
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if n := len(h.updates); n > 10 {
		t.Errorf("the proxy ran %d plans of 500, want a few", n)
	}
}

func TestARefusedPlanIsReportedAndReplaced(t *testing.T) {
	s, a := newSigner(t), startAgent(t, socketPath(t))
	must(t, a.SetPlan("vm-a", s.plan(1, 1)))
	_, h, _ := startProxy(t, a.path, "")
	h.wait(t, "the first plan", at(1))
	t.Run("by validation", func(t *testing.T) {
		bad := s.plan(2, 1)
		bad.Clusters[0].Service = spiffe.ID{}
		must(t, a.SetPlan("vm-a", bad))
		st := a.waitStatus(t, "the refusal", func(s []feed.ProxyStatus) bool { return s[0].RefusedPosition.Revision == 2 })[0]
		if !strings.Contains(st.Refused, "clusters[0].service") || st.Applied.Revision != 1 {
			t.Errorf("status %+v", st)
		}
	})
	t.Run("by the handler", func(t *testing.T) {
		h.set(func() { h.refuse = errors.New("not on Sundays") })
		must(t, a.SetPlan("vm-a", s.plan(3, 2)))
		st := a.waitStatus(t, "the refusal", func(s []feed.ProxyStatus) bool { return s[0].RefusedPosition.Revision == 3 })[0]
		if !strings.Contains(st.Refused, "not on Sundays") || st.Applied.Revision != 1 {
			t.Errorf("status %+v", st)
		}
	})
	t.Run("then a good one", func(t *testing.T) {
		h.set(func() { h.refuse = nil })
		must(t, a.SetPlan("vm-a", s.plan(4, 3)))
		u := h.wait(t, "the good plan", at(4))
		if len(u.Config.Clusters) != 3 {
			t.Errorf("it has %d clusters", len(u.Config.Clusters))
		}
		st := a.waitStatus(t, "it is applied", func(s []feed.ProxyStatus) bool { return s[0].Applied.Revision == 4 })[0]
		if st.Refused != "" {
			t.Errorf("status still says %q", st.Refused)
		}
	})
}

func TestAPlanLargerThanAFrame(t *testing.T) {
	s, a := newSigner(t), startAgent(t, socketPath(t))
	c := s.plan(1, 0)
	for i := range 100 {
		cl := proxy.Cluster{Name: fmt.Sprintf("c%d", i), Service: spiffe.Service(trustDomain, "default", "s"), Port: "http"}
		for j := range 600 {
			cl.Endpoints = append(cl.Endpoints, proxy.Endpoint{
				Instance: fmt.Sprintf("i%d", j), Node: "vm", Address: "10.0.0.1:7443", ServerName: "http.i.s.default.mesh",
			})
		}
		c.Clusters = append(c.Clusters, cl)
	}
	must(t, a.SetPlan("vm-a", c))
	_, h, _ := startProxy(t, a.path, "")
	u := h.wait(t, "the plan", at(1))
	if len(u.Config.Clusters) != 100 || len(u.Config.Clusters[99].Endpoints) != 600 {
		t.Errorf("got %d clusters", len(u.Config.Clusters))
	}
	huge := c
	huge.Clusters[0].Denied = strings.Repeat("x", feed.MaxFrame)
	if err := a.SetPlan("vm-a", huge); err == nil {
		t.Error("SetPlan took a part that fits no frame")
	}
}

func TestTwoProcessesOfOneProxy(t *testing.T) {
	s, a := newSigner(t), startAgent(t, socketPath(t))
	must(t, a.SetPlan("vm-a", s.plan(1, 1)))
	old, oldHandler, stopOld := startProxy(t, a.path, "")
	oldHandler.wait(t, "the plan", at(1))
	_, newHandler, _ := startProxy(t, a.path, "")
	newHandler.wait(t, "the plan", at(1))
	a.SetState("vm-a", old.Session(), feed.Draining)
	eventually(t, "the old one is told", func() bool {
		oldHandler.mu.Lock()
		defer oldHandler.mu.Unlock()
		return cmp.Equal(oldHandler.states, []feed.State{feed.Draining})
	})
	must(t, a.SetPlan("vm-a", s.plan(2, 2)))
	oldHandler.wait(t, "a draining proxy gets plans", at(2))
	newHandler.wait(t, "and the new one", at(2))
	status := a.waitStatus(t, "both are there", func(s []feed.ProxyStatus) bool { return len(s) == 2 })
	states := map[string]feed.State{status[0].Session: status[0].State, status[1].Session: status[1].State}
	if states[old.Session()] != feed.Draining || len(states) != 2 {
		t.Errorf("states %v", states)
	}
	stopOld()
	a.waitStatus(t, "the old one is gone", func(s []feed.ProxyStatus) bool { return len(s) == 1 && s[0].State == feed.Active })
	newHandler.mu.Lock()
	defer newHandler.mu.Unlock()
	if len(newHandler.states) != 0 {
		t.Errorf("the new one was told %v", newHandler.states)
	}
}

func TestAProxyReportsThatItDrains(t *testing.T) {
	s, a := newSigner(t), startAgent(t, socketPath(t))
	must(t, a.SetPlan("vm-a", s.plan(1, 0)))
	c, h, _ := startProxy(t, a.path, "")
	h.wait(t, "the plan", at(1))
	c.Report(feed.SetTo{To: feed.Draining})
	a.waitStatus(t, "the agent knows", func(s []feed.ProxyStatus) bool { return s[0].State == feed.Draining })
}

func TestAgentRestart(t *testing.T) {
	s, path := newSigner(t), socketPath(t)
	first := startAgent(t, path)
	must(t, first.SetPlan("vm-a", s.plan(1, 1)))
	must(t, first.SetKeys("vm-a", []*ca.Leaf{s.leaf(t, "web")}))
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	must(t, err)
	file, err := l.File()
	must(t, errors.Join(err, first.SetSockets("vm-a", map[string]*os.File{"mesh": file})))
	must(t, errors.Join(file.Close(), l.Close())) // the proxy's is the last one when the agent is gone
	_, h, _ := startProxy(t, path, "")
	h.wait(t, "the plan", func(_ feed.Update, sockets map[string]bool) bool { return sockets["mesh"] })
	first.stop()
	second := startAgent(t, path)
	must(t, second.SetPlan("vm-a", s.plan(2, 2)))
	u := h.wait(t, "the plan of the second agent", at(2))
	if len(u.Keys) != 1 || u.Sockets["mesh"] == nil {
		t.Errorf("keys %v, sockets %v, while the second agent has not set any", u.Keys, u.Sockets)
	}
	second.waitStatus(t, "the second agent is offered the socket", func(s []feed.ProxyStatus) bool {
		return len(s) == 1 && cmp.Equal(s[0].Sockets, []string{"mesh"})
	})
	sockets, err := second.Sockets("vm-a")
	must(t, err)
	taken, err := net.FileListener(sockets["mesh"])
	must(t, errors.Join(err, second.SetSockets("vm-a", sockets), sockets["mesh"].Close()))
	if taken.Addr().String() != l.Addr().String() {
		t.Errorf("it is bound to %s, want %s", taken.Addr(), l.Addr())
	}
	must(t, taken.Close())
	// A listener that the plan loses is closed everywhere, so that another program can have its port.
	without := s.plan(3, 0)
	without.Listeners = nil
	must(t, second.SetSockets("vm-a", nil))
	must(t, second.SetPlan("vm-a", without))
	eventually(t, "the port is free", func() bool {
		again, err := net.Listen("tcp", l.Addr().String())
		if err == nil {
			_ = again.Close()
		}
		return err == nil
	})
}

func TestBootAloneAndAttachLater(t *testing.T) {
	s, path, dir := newSigner(t), socketPath(t), filepath.Join(t.TempDir(), "state")
	a := startAgent(t, path)
	leaf := s.leaf(t, "web")
	must(t, a.SetKeys("vm-a", []*ca.Leaf{leaf}))
	must(t, a.SetPlan("vm-a", s.plan(5, 3)))
	_, h, stop := startProxy(t, path, dir)
	h.wait(t, "the plan", at(5))
	a.waitStatus(t, "it is applied", func(s []feed.ProxyStatus) bool { return s[0].Applied.Revision == 5 })
	eventually(t, "it is on disk", func() bool {
		_, err := feed.NewDiskCache(dir).Plan()
		return err == nil
	})
	stop()
	a.stop()

	_, alone, _ := startProxy(t, path, dir)
	u := alone.wait(t, "the plan from disk, with a socket of its own", func(_ feed.Update, sockets map[string]bool) bool { return sockets["mesh"] })
	if !u.Alone || u.Config.Position.Revision != 5 || len(u.Config.Clusters) != 3 || len(u.Keys) != 1 {
		t.Errorf("alone %v with plan %v, %d clusters, keys %v", u.Alone, u.Config.Position, len(u.Config.Clusters), u.Keys)
	}

	// The agent that comes back takes the socket over, and need not open it.
	b := startAgent(t, path)
	b.waitStatus(t, "the socket is offered", func(s []feed.ProxyStatus) bool { return len(s) == 1 && cmp.Equal(s[0].Sockets, []string{"mesh"}) })
	sockets, err := b.Sockets("vm-a")
	must(t, err)
	if sockets["mesh"] == nil {
		t.Fatalf("got %v", sockets)
	}
	defer func() { _ = sockets["mesh"].Close() }()
	must(t, b.SetSockets("vm-a", sockets))
	must(t, b.SetPlan("vm-a", s.plan(6, 3)))
	u = alone.wait(t, "the agent's plan", at(6))
	if u.Alone {
		t.Error("it passes for alone")
	}
}

func TestKeysDoNotPrint(t *testing.T) {
	k := feed.Key{ID: spiffe.Service(trustDomain, "default", "web"), Key: []byte("canary-key")}
	f := feed.Keys{Put: []feed.Key{k}}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x"} {
		for _, v := range []any{k, f, []feed.Key{k}} {
			text := fmt.Sprintf(verb, v)
			if strings.Contains(text, "canary") || strings.Contains(text, fmt.Sprintf("%x", "canary")) || strings.Contains(text, "99, 97, 110") {
				t.Errorf("%s prints the key: %s", verb, text)
			}
		}
	}
}
