package main

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"sync"
	"time"
	"unsafe"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/intentions"
	"github.com/meshd/meshd/proxy/balance"
	"github.com/meshd/meshd/proxy/http1"
	"github.com/meshd/meshd/proxy/http2"
	"github.com/meshd/meshd/proxy/l7"
	"github.com/meshd/meshd/tests/conformance/rig"
)

// meshHop starts this program, or another build of it, as a plain hop made of
// the mesh's parts.
func (f *field) meshHop(name, program string) error {
	if program == "" {
		return nil // only one of the two kinds of versus
	}
	addresses, files, err := f.listen(3)
	if err != nil {
		return err
	}
	pid, err := f.started(rig.Start(program, []string{hopCommand, f.backend, f.backend2}, rig.Options{Files: files}))
	parts := []part{{role: "proxy", pids: []int{pid}, metrics: "http://" + addresses[1] + "/metrics"}}
	f.lanes = append(f.lanes, lane{scenario: plain, name: name, address: addresses[0], parts: parts},
		lane{scenario: plain2, name: name, address: addresses[2], parts: parts})
	return err
}

// hop is a proxy between two plain sockets, which mesh-proxy is not: whatever
// leaves it is mutual TLS. It does with the mesh's own packages what the data
// plane does per request: normalize, ask the policy, pick an endpoint, forward
// with the caller's identity, count, and time; and knows the caller by the
// listener, as there is no certificate.
type hop struct {
	policy  *intentions.Policy
	to      catalog.Name
	picker  balance.Picker
	states  []*balance.State
	pools   []l7.Upstream
	allowed prometheus.Counter
	denied  prometheus.Counter
	classes [6]prometheus.Counter
	seconds prometheus.Observer
	spare   sync.Pool
}

// passage is what the hop knows of an exchange, and the response to it. One
// serves all exchanges of a connection of HTTP/1.1; those of HTTP/2 come from
// spare and go back there.
type passage struct {
	hop     *hop
	pooled  bool
	request intentions.HTTPRequest

	mu    sync.Mutex // as in the data plane: plans may change under an exchange
	inner l7.Response
	state *balance.State
}

// newHop returns a hop in front of what makes upstreams, which counts in the
// registry.
func newHop(registry *prometheus.Registry, upstream func() l7.Upstream) (*hop, error) {
	h := &hop{to: catalog.Name{Namespace: catalog.DefaultNamespace, Name: "api"}}
	var err error
	if h.policy, err = intentions.Compile(trustDomain, h.to, meshIntentions(httpCluster)); err != nil {
		return nil, err
	}
	candidates := make([]balance.Candidate, endpoints)
	for i := range candidates {
		state := new(balance.State)
		candidates[i].State = state
		h.states = append(h.states, state)
		h.pools = append(h.pools, upstream())
	}
	if h.picker, err = balance.New("", candidates, 0); err != nil {
		return nil, err
	}
	requests := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "mesh_requests_total", Help: "As mesh-proxy's."},
		[]string{"source", "destination", "direction", "class"})
	seconds := prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "mesh_request_duration_seconds", Help: "As mesh-proxy's.",
		Buckets: []float64{0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10},
	}, []string{"source", "destination", "direction"})
	decisions := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "mesh_intention_decisions_total", Help: "As mesh-proxy's."},
		[]string{"decision", "reason"})
	registry.MustRegister(collectors.NewGoCollector(), requests, seconds, decisions)
	for i, class := range []string{"none", "1xx", "2xx", "3xx", "4xx", "5xx"} {
		h.classes[i] = requests.WithLabelValues(web().String(), h.to.String(), "inbound", class)
	}
	h.seconds = seconds.WithLabelValues(web().String(), h.to.String(), "inbound")
	h.allowed, h.denied = decisions.WithLabelValues("allow", "rule"), decisions.WithLabelValues("deny", "rule")
	return h, nil
}

// Handle implements l7.Handler.
func (h *hop) Handle(ex *l7.Exchange) l7.Response {
	p, ok := ex.Conn.User.(*passage)
	if !ok {
		if p, ok = h.spare.Get().(*passage); !ok {
			p = &passage{hop: h, pooled: true}
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.request = intentions.HTTPRequest{Method: view(ex.Request.Method), Path: view(ex.Request.Path), Headers: &ex.Request}
	ex.Record.User, ex.Record.Destination = p, h.to
	d := h.policy.Decide(intentions.Request{
		Source: ex.Conn.Source, Destination: h.to, Port: meshPort, Now: time.Now(), HTTP: &p.request,
	})
	ex.Record.Rule = d.Rule
	if !d.Allowed {
		h.denied.Inc()
		p.state, p.inner = nil, ex.Fail(&l7.Error{Reason: l7.Denied, Detail: string(d.Reason)})
		return p
	}
	h.allowed.Inc()
	i := h.picker.Pick(nil)
	p.state = h.states[i]
	p.state.Begin()
	p.inner = h.pools[i].Forward(ex)
	return p
}

// view is a string on bytes that outlive it.
func view(b []byte) string {
	return unsafe.String(unsafe.SliceData(b), len(b))
}

// Head implements l7.Response.
func (p *passage) Head(w l7.Waker) (*l7.ResponseHead, error) { return p.inner.Head(w) }

// Next implements l7.Body.
func (p *passage) Next(limit int, w l7.Waker) ([]byte, error) { return p.inner.Next(limit, w) }

// Trailers implements l7.Body.
func (p *passage) Trailers() http1.Fields { return p.inner.Trailers() }

// Blocking implements l7.Body.
func (p *passage) Blocking() bool { return p.inner.Blocking() }

// Cancel implements l7.Body.
func (p *passage) Cancel(r l7.Reason) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.inner != nil {
		p.inner.Cancel(r)
	}
}

// Close implements l7.Response.
func (p *passage) Close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.inner.Close()
	if p.state != nil {
		p.state.End()
	}
	p.inner, p.state, p.request = nil, nil, intentions.HTTPRequest{}
}

// record counts a finished exchange.
func (h *hop) record(r *l7.Record) {
	class := r.Status / 100
	if class < 0 || class >= len(h.classes) {
		class = 0
	}
	h.classes[class].Inc()
	h.seconds.Observe(r.Duration.Seconds())
	if p, ok := r.User.(*passage); ok && p.pooled {
		h.spare.Put(p)
	}
}

// serveHop serves the sockets that it was started with, 3 for HTTP/1.1, 4 for its
// metrics and 5 for HTTP/2, until it is killed.
func serveHop(backend, backend2 string) error {
	var listeners [3]net.Listener
	for i := range listeners {
		var err error
		if listeners[i], err = net.FileListener(os.NewFile(uintptr(3+i), "listener")); err != nil {
			return fmt.Errorf("take the listening socket %d: %w", i, err)
		}
	}
	d := net.Dialer{Timeout: time.Second}
	dial := func(address string) func(ctx context.Context) (net.Conn, error) {
		return func(ctx context.Context) (net.Conn, error) { return d.DialContext(ctx, "tcp", address) }
	}
	registry := prometheus.NewRegistry()
	h, err := newHop(registry, func() l7.Upstream { return l7.NewPool(l7.PoolConfig{Dial: dial(backend)}) })
	if err != nil {
		return err
	}
	registry2 := prometheus.NewRegistry() // the same metrics again, which nobody asks for
	h2, err := newHop(registry2, func() l7.Upstream { return http2.NewPool(http2.PoolConfig{Dial: dial(backend2)}) })
	if err != nil {
		return err
	}
	page := &http.Server{Handler: promhttp.HandlerFor(registry, promhttp.HandlerOpts{}), ReadHeaderTimeout: 5 * time.Second}
	go func() { _ = page.Serve(listeners[1]) }() // for the life of the process
	config := l7.ServerConfig{Log: slog.New(slog.DiscardHandler), Handler: h2, Sink: h2.record}
	srv2 := http2.NewServer(http2.ServerConfig{ServerConfig: config})
	config.Handler, config.Sink = h, h.record
	srv := l7.NewServer(config)
	cert := l7.ForwardedClientCert(api(), web())
	failed := make(chan error, 1)
	go func() {
		failed <- accept(listeners[2], func(nc net.Conn) {
			_ = srv2.NewConn(nc, l7.ConnInfo{Source: web(), ForwardedClientCert: cert}).Serve(context.Background()) // a client that goes is no news here
		})
	}()
	go func() {
		failed <- accept(listeners[0], func(nc net.Conn) {
			info := l7.ConnInfo{Source: web(), ForwardedClientCert: cert, User: &passage{hop: h}}
			_ = srv.NewConn(nc, info).Serve(context.Background())
		})
	}()
	return <-failed
}

// accept serves what connects, until that fails.
func accept(l net.Listener, serve func(net.Conn)) error {
	for {
		nc, err := l.Accept()
		if err != nil {
			return fmt.Errorf("accept: %w", err)
		}
		go serve(nc)
	}
}
