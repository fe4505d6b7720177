package agent

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sync/errgroup"

	"github.com/meshd/meshd/agent/registry"
	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/proxy/feed"
)

const (
	// metricsOff as Metrics.Address serves none.
	metricsOff = "off"
	// metricsRetry is the wait before an address that is taken is tried again.
	metricsRetry = time.Second
	// scrapeTimeout bounds a scrape of the proxy, relayTimeout one of another
	// host, which may wait for its proxy as long. Prometheus waits ten seconds by
	// default.
	scrapeTimeout = 3 * time.Second
	relayTimeout  = 8 * time.Second
	// maxScrape bounds what is taken from them.
	maxScrape = 64 << 20
	// metricsText is the one format in which two expositions can be put one
	// behind the other.
	metricsText = "text/plain; version=0.0.4; charset=utf-8"
)

// serveMetrics answers for the whole host until ctx ends: its own metrics and
// the proxy's. On loopback everyone may ask; elsewhere the nodes of the mesh.
func (h *host) serveMetrics(ctx context.Context) error {
	address := h.cfg.Metrics.Address
	if address == metricsOff {
		return nil
	}
	hostPart, port, err := net.SplitHostPort(address)
	if err != nil {
		return fmt.Errorf("metrics.address %q: %w", address, err) // Validate has seen to it
	}
	scrape, err := h.scrape()
	if err != nil {
		return err
	}
	local := http.NewServeMux()
	local.Handle("GET /metrics", scrape)
	local.HandleFunc("GET /metrics/node", func(w http.ResponseWriter, r *http.Request) {
		if r.FormValue("node") == h.cfg.NodeName { // here, wherever the others are asked
			scrape.ServeHTTP(w, r)
			return
		}
		h.relay(w, r)
	})
	g, ctx := errgroup.WithContext(ctx)
	if ip, err := netip.ParseAddr(hostPart); err == nil && ip.IsLoopback() {
		g.Go(func() error { return h.listenMetrics(ctx, address, local, nil) })
		return g.Wait()
	}
	remote := http.NewServeMux()
	remote.Handle("GET /metrics", scrape)
	g.Go(func() error {
		return h.listenMetrics(ctx, net.JoinHostPort("127.0.0.1", port), local, nil)
	})
	g.Go(func() error {
		return h.listenMetrics(ctx, address, remote, ca.ServerConfig(ca.ServerOptions{
			Leaf:   func(string) (*tls.Certificate, error) { return h.nodeCertificate() },
			Bundle: h.roots, ALPN: []string{"http/1.1"},
			Accept: func(id spiffe.ID) error { return ca.ExpectKind(h.trustDomain(), spiffe.KindNode)(id) },
		}))
	})
	return g.Wait()
}

// listenMetrics serves at one address until ctx ends. One that is taken is no
// reason to end: it is tried again.
func (h *host) listenMetrics(ctx context.Context, address string, handler http.Handler, secure *tls.Config) error {
	srv := &http.Server{
		Handler: handler, TLSConfig: secure, ReadHeaderTimeout: 5 * time.Second, WriteTimeout: 30 * time.Second, IdleTimeout: time.Minute,
		MaxHeaderBytes: 8 << 10, ErrorLog: slog.NewLogLogger(h.log.Handler(), slog.LevelDebug),
	}
	stop := context.AfterFunc(ctx, func() { _ = srv.Close() })
	defer stop()
	for warned := false; ; {
		var lc net.ListenConfig
		l, err := lc.Listen(ctx, "tcp", address)
		switch {
		case err != nil:
		case secure != nil:
			err = srv.ServeTLS(l, "", "")
		default:
			err = srv.Serve(l)
		}
		if ctx.Err() != nil || errors.Is(err, http.ErrServerClosed) {
			return nil
		}
		if !warned {
			h.log.ErrorContext(ctx, "metrics can't be served now; see metrics.address", slog.Any("error", err))
			warned = true
		}
		again := time.NewTimer(metricsRetry)
		select {
		case <-again.C:
		case <-ctx.Done():
			again.Stop()
			return nil
		}
	}
}

// scrape returns the handler of /metrics: the agent's own, whose names all begin
// with mesh_agent_, and behind them what the proxy serves, unchanged.
func (h *host) scrape() (http.Handler, error) {
	registry := prometheus.NewRegistry()
	up := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "mesh_agent_proxy_scrape_success", Help: "1 if the metrics of mesh-proxy are part of this answer.",
	})
	own := prometheus.WrapRegistererWithPrefix("mesh_agent_", registry)
	err := errors.Join(registry.Register(up), registry.Register(hostCollector{h}), own.Register(collectors.NewGoCollector()),
		own.Register(collectors.NewProcessCollector(collectors.ProcessCollectorOpts{})))
	if err != nil {
		return nil, fmt.Errorf("register metrics: %w", err)
	}
	client := &http.Client{Timeout: scrapeTimeout, Transport: &http.Transport{Proxy: nil, MaxIdleConns: 1}}
	ours := promhttp.HandlerFor(registry, promhttp.HandlerOpts{DisableCompression: true})
	var one sync.Mutex // a scrape is big: one at a time
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		one.Lock()
		defer one.Unlock()
		body, err := fetch(r.Context(), client, "http://"+h.cfg.Proxy.Metrics+"/metrics")
		up.Set(1)
		if err != nil {
			h.log.DebugContext(r.Context(), "the proxy's metrics can't be had", slog.Any("error", err))
			up.Set(0)
		}
		r = r.Clone(r.Context())
		r.Header.Set("Accept", metricsText)
		ours.ServeHTTP(w, r)
		_, _ = w.Write(body) // the client is gone: nobody to tell
	}), nil
}

// fetch gets metrics in the text format.
func fetch(ctx context.Context, client *http.Client, url string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil) //nolint:gosec // whoever answers must prove to be a node, or is the proxy's configured address
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", metricsText)
	res, err := client.Do(req) //nolint:gosec // see above
	if err != nil {
		return nil, err
	}
	defer func() { _ = res.Body.Close() }()
	body, err := io.ReadAll(io.LimitReader(res.Body, maxScrape+1))
	switch {
	case err != nil:
		return nil, err
	case res.StatusCode != http.StatusOK:
		return nil, fmt.Errorf("%s answers %s", url, res.Status)
	case !strings.HasPrefix(res.Header.Get("Content-Type"), "text/plain; version=0.0.4"):
		return nil, fmt.Errorf("%s answers with %q, no metrics", url, res.Header.Get("Content-Type"))
	case len(body) > maxScrape:
		return nil, fmt.Errorf("%s answers with more than %d bytes", url, maxScrape)
	case len(body) > 0 && !bytes.HasSuffix(body, []byte("\n")):
		body = append(body, '\n')
	}
	return body, nil
}

// relay fetches the metrics of another host for a Prometheus on this one, which
// has no certificate of the mesh: ?node=NAME&target=HOST:PORT. The far side must
// prove to be that node.
func (h *host) relay(w http.ResponseWriter, r *http.Request) {
	node, target := r.FormValue("node"), r.FormValue("target")
	if _, _, err := net.SplitHostPort(target); err != nil || catalog.CheckLabel(node) != nil {
		http.Error(w, "write ?node=NAME&target=HOST:PORT", http.StatusBadRequest)
		return
	}
	if h.identity.Load() == nil {
		http.Error(w, "this host has not joined yet", http.StatusServiceUnavailable)
		return
	}
	transport := &http.Transport{DisableKeepAlives: true, TLSClientConfig: ca.ClientConfig(ca.ClientOptions{
		Leaf: h.nodeCertificate, Bundle: h.roots, ALPN: []string{"http/1.1"},
		Accept: ca.Expect(spiffe.Node(h.trustDomain(), node)),
	})}
	body, err := fetch(r.Context(), &http.Client{Timeout: relayTimeout, Transport: transport}, "https://"+target+"/metrics")
	if err != nil {
		h.log.DebugContext(r.Context(), "metrics of another host can't be had", slog.String("node", node), slog.Any("error", err))
		http.Error(w, "metrics of node "+node+": "+err.Error(), http.StatusBadGateway)
		return
	}
	w.Header().Set("Content-Type", metricsText)
	w.Header().Set("X-Content-Type-Options", "nosniff")
	_, _ = w.Write(body) //nolint:gosec // it is no page; if the client is gone there is nobody to tell
}

// nodeCertificate is the one by which this host is known.
func (h *host) nodeCertificate() (*tls.Certificate, error) {
	if h.identity.Load() == nil {
		return nil, ca.ErrNoLeaf
	}
	l := h.leaves.Leaf(h.nodeID())
	if l == nil {
		return nil, ca.ErrNoLeaf
	}
	return l.TLS(), nil
}

// trustDomain is empty until the host has joined.
func (h *host) trustDomain() string {
	if identity := h.identity.Load(); identity != nil {
		return identity.TrustDomain
	}
	return ""
}

// hostCollector tells the state of a host at the moment of a scrape. It is
// unchecked: which series there are depends on what runs here.
type hostCollector struct{ h *host }

// Describe implements prometheus.Collector.
func (hostCollector) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (c hostCollector) Collect(out chan<- prometheus.Metric) {
	h := c.h
	gauge := func(name, help string, value float64, labels ...string) {
		names, values := make([]string, 0, len(labels)/2), make([]string, 0, len(labels)/2)
		for i := 0; i+1 < len(labels); i += 2 {
			names, values = append(names, labels[i]), append(values, labels[i+1])
		}
		out <- prometheus.MustNewConstMetric(prometheus.NewDesc("mesh_agent_"+name, help, names, nil), prometheus.GaugeValue, value, values...)
	}
	truth := func(b bool) float64 {
		if b {
			return 1
		}
		return 0
	}
	gauge("info", "This host's agent; always 1.", 1, "node", h.cfg.NodeName, "version", cmp.Or(h.cfg.Version, "devel"))
	gauge("joined", "1 once the host has an identity.", truth(h.identity.Load() != nil))
	server := h.view.Status()
	gauge("connected", "1 while connected to a server.", truth(server.Server != ""))
	if age, ok := h.view.Age(); ok {
		gauge("policy_age_seconds", "Time since a server confirmed that this host has the newest policy.", age.Seconds())
	}
	synced, _ := h.syncer.Status()
	gauge("registration_current", "1 if a server has what this host registered last.", truth(synced.Current))
	gauge("registration_refusals", "Instances of this host that the servers refuse.", float64(len(synced.Refusals)))
	for _, leaf := range h.leaves.Status() {
		if !leaf.NotAfter.IsZero() {
			gauge("certificate_expiry_timestamp_seconds", "When a certificate of this host ends.", float64(leaf.NotAfter.Unix()), "identity", leaf.ID.String())
		}
		gauge("certificate_alarm", "1 if a certificate is missing, or its renewal has failed for long.", truth(leaf.Alarm), "identity", leaf.ID.String())
	}
	proxies := 0
	for _, p := range h.feed.Status() {
		proxies++
		if p.State == feed.Draining {
			gauge("proxy_draining_connections", "Connections that a proxy process which was replaced, or stops, still has.", float64(p.Open), "proxy", p.Proxy, "session", p.Session)
			if !p.Until.IsZero() {
				gauge("proxy_draining_end_timestamp_seconds", "When it cuts them.", float64(p.Until.UnixMilli())/1000, "proxy", p.Proxy, "session", p.Session)
			}
		}
		gauge("proxy_plan_refused", "1 if a proxy did not take its newest plan.", truth(p.Refused != ""), "proxy", p.Proxy, "session", p.Session)
	}
	gauge("proxies", "Proxies that are fed.", float64(proxies))
	h.mu.Lock()
	refused, problems := h.planned.refused, len(h.planned.problems)
	h.mu.Unlock()
	gauge("plan_refused", "1 if the newest plan is unusable, and the one before stays in force.", truth(refused != ""))
	gauge("plan_problems", "What was left out of the plan.", float64(problems))
	waiting := 0
	for _, l := range h.listeners() {
		if l.Waiting != "" {
			waiting++
		}
	}
	gauge("listeners_waiting", "Listening sockets that can't be opened.", float64(waiting))
	broken := 0
	files, folder := h.registry.Files()
	for _, f := range files {
		if len(f.Problems) > 0 {
			broken++
		}
	}
	gauge("definition_errors", "Files of services.d whose newest version does not run.", float64(broken)+truth(folder != ""))
	for _, d := range h.registry.Definitions() {
		d = d.WithDefaults()
		key := registry.Key(d)
		gauge("instance_health", "1 for the health that an instance has.", 1, "service", d.Ref().String(), "instance", d.ID, "health", string(h.health(key).Health))
		for _, s := range h.checks.States(key) {
			gauge("check_passing", "1 while a check passes.", truth(s.Health == catalog.HealthPassing),
				"service", d.Ref().String(), "instance", d.ID, "check", s.Name)
		}
	}
}
