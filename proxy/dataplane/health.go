package dataplane

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/proxy/balance"
	"github.com/meshd/meshd/proxy/record"
)

// maxEjected bounds the ejected endpoints that get series of their own. Those beyond it are counted in one that is "other".
const maxEjected = 100

// dialEndpoint connects to an endpoint for a request or session that was given to it, and takes note of what that tells about
// the endpoint.
func (p *Plane) dialEndpoint(ctx context.Context, e *endpoint, alpn ...string) (conn *record.Conn, agreed string, err error) {
	// A cluster that the plan lost has no limit any more: its last requests end.
	if b := p.current().budgets[balance.Key{Generation: e.key.Generation, Cluster: e.key.Cluster}]; b.load != nil {
		if !take(&b.pending, b.limits.Pending) {
			return nil, "", errOverflow
		}
		defer b.pending.Add(-1)
	}
	conn, agreed, err = p.dialMesh(ctx, e, alpn)
	if err != nil {
		if blames(err) {
			p.failed(ctx, e, err)
		}
		return nil, "", err
	}
	p.succeeded(ctx, e)
	return conn, agreed, nil
}

// blames reports whether an error of connecting is the endpoint's, and not that of the caller who gave up, or of this host.
func blames(err error) bool {
	for _, own := range []error{
		context.Canceled, ca.ErrNoLeaf, errOverflow,
		syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.EADDRNOTAVAIL,
	} {
		if errors.Is(err, own) {
			return false
		}
	}
	return true
}

// failed counts against an endpoint, and tells when that ejects it.
func (p *Plane) failed(ctx context.Context, e *endpoint, cause error) {
	backoff, ejected := e.state.Fail(time.Now())
	if !ejected {
		return
	}
	p.health.ejections.WithLabelValues(e.labels()...).Inc()
	p.log.LogAttrs(ctx, slog.LevelWarn, "endpoint ejected", slog.String("cluster", e.key.Cluster), slog.String("node", e.key.Node),
		slog.String("instance", e.instance), slog.Duration("backoff", backoff), slog.Any("error", cause))
	for _, route := range p.current().upstreams {
		if route.cluster.Name == e.key.Cluster && allEjected(route.states) {
			p.log.LogAttrs(ctx, slog.LevelWarn, "every endpoint is ejected: all are used again, in hope",
				slog.String("cluster", e.key.Cluster), slog.Int("endpoints", len(route.states)))
			return
		}
	}
}

// succeeded counts for an endpoint, and tells when that ends its ejection.
func (p *Plane) succeeded(ctx context.Context, e *endpoint) {
	if e.state.Succeed(time.Now()) {
		p.log.LogAttrs(ctx, slog.LevelInfo, "endpoint is back", slog.String("cluster", e.key.Cluster),
			slog.String("node", e.key.Node), slog.String("instance", e.instance))
	}
}

func allEjected(states []*balance.State) bool {
	for _, s := range states {
		if !s.Ejected() {
			return false
		}
	}
	return true
}

// labels are the values of source, destination and port.
func (e *endpoint) labels() []string {
	return []string{sourceLabel(e.key.source), sourceLabel(e.key.service), e.port}
}

// healthMetrics are the series about which endpoints are in use.
type healthMetrics struct {
	ejections *prometheus.CounterVec
	panics    *prometheus.CounterVec
	overflows *prometheus.CounterVec
	ejected   *prometheus.Desc
	current   func() *snapshot
}

func newHealthMetrics(r prometheus.Registerer, current func() *snapshot) (*healthMetrics, error) {
	labels := []string{"source", "destination", "port"}
	m := &healthMetrics{
		ejections: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "mesh_ejections_total", Help: "How often an endpoint was taken out of use, failed probes included.",
		}, labels),
		panics: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "mesh_panic_attempts_total", Help: "Attempts that were given to an ejected endpoint because every one was.",
		}, labels),
		ejected: prometheus.NewDesc("mesh_endpoint_ejected", "1 for each endpoint that is out of use now.",
			append(labels, "node", "instance"), nil),
		overflows: newOverflow(), current: current,
	}
	for _, c := range []prometheus.Collector{m.ejections, m.panics, m.overflows, m} {
		if err := r.Register(c); err != nil {
			return nil, fmt.Errorf("register metrics: %w", err)
		}
	}
	return m, nil
}

// picked counts an attempt on an endpoint that is ejected like all the others.
func (m *healthMetrics) picked(route *upstreamRoute, state *balance.State) {
	if state.Ejected() && allEjected(route.states) {
		m.panics.WithLabelValues(route.endpoints[0].labels()...).Inc()
	}
}

// Describe implements prometheus.Collector.
func (m *healthMetrics) Describe(out chan<- *prometheus.Desc) { out <- m.ejected }

// Collect implements prometheus.Collector.
func (m *healthMetrics) Collect(out chan<- prometheus.Metric) {
	seen, more := map[string]bool{}, 0
	for _, e := range m.current().endpoints {
		if !e.state.Ejected() {
			continue
		}
		labels := append(e.labels(), e.key.Node, e.instance)
		if name := strings.Join(labels, "\x00"); seen[name] {
			continue // the same instance in another cluster of the plan
		} else if len(seen) == maxEjected {
			more++
			continue
		} else {
			seen[name] = true
		}
		out <- prometheus.MustNewConstMetric(m.ejected, prometheus.GaugeValue, 1, labels...)
	}
	if more > 0 {
		out <- prometheus.MustNewConstMetric(m.ejected, prometheus.GaugeValue, float64(more), "other", "other", "other", "other", "other")
	}
}
