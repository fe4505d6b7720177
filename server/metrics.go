package server

import (
	"cmp"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/server/state"
)

// metricsHandler returns what GET /v1/metrics answers with. The API has decided
// by then that the caller may.
func (m *member) metricsHandler(own memberCollector, requests *requestMetrics) (http.Handler, error) {
	registry := prometheus.NewRegistry()
	err := errors.Join(registry.Register(own), registry.Register(requests.count), registry.Register(requests.seconds),
		registry.Register(collectors.NewGoCollector()),
		registry.Register(collectors.NewProcessCollector(collectors.ProcessCollectorOpts{})))
	if err != nil {
		return nil, fmt.Errorf("register metrics: %w", err)
	}
	return promhttp.HandlerFor(registry, promhttp.HandlerOpts{MaxRequestsInFlight: 4}), nil
}

// requestMetrics count what the API answers.
type requestMetrics struct {
	count   *prometheus.CounterVec
	seconds *prometheus.HistogramVec
}

func newRequestMetrics() *requestMetrics {
	return &requestMetrics{
		count: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "mesh_server_requests_total", Help: "Answered requests of the API, by route and status.",
		}, []string{"method", "route", "code"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "mesh_server_request_duration_seconds", Help: "How long requests of the API took, waits and watches included.",
			Buckets: []float64{0.005, 0.025, 0.1, 0.5, 2.5, 10},
		}, []string{"method", "route"}),
	}
}

func (r *requestMetrics) observe(method, pattern string, status int, took time.Duration) {
	r.count.WithLabelValues(method, pattern, strconv.Itoa(status)).Inc()
	r.seconds.WithLabelValues(method, pattern).Observe(took.Seconds())
}

// memberCollector tells the state of a server at the moment of a scrape. It is
// unchecked, as prometheus calls a collector that describes nothing.
type memberCollector struct {
	*member
	agents  fleet
	own     *leaf
	watches func() int
}

// Describe implements prometheus.Collector.
func (memberCollector) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (c memberCollector) Collect(out chan<- prometheus.Metric) {
	gauge := func(name, help string, value float64, labels prometheus.Labels) {
		out <- prometheus.MustNewConstMetric(prometheus.NewDesc("mesh_server_"+name, help, nil, labels), prometheus.GaugeValue, value)
	}
	counter := func(name, help string, value float64) {
		out <- prometheus.MustNewConstMetric(prometheus.NewDesc("mesh_server_"+name, help, nil, nil), prometheus.CounterValue, value)
	}
	gauge("info", "This server; always 1.", 1, prometheus.Labels{"server": c.name, "version": cmp.Or(c.config.Version, "devel")})

	s := c.state.Snapshot()
	gauge("state_revision", "Revision of the newest state.", float64(s.Position().Revision), nil)
	for kind, n := range map[string]int{
		"namespace": state.Namespaces.Len(s), "node": state.Nodes.Len(s), "service": state.Services.Len(s),
		"instance": state.Instances.Len(s), "intention": state.Intentions.Len(s),
	} {
		gauge("resources", "Resources, by kind.", float64(n), prometheus.Labels{"kind": kind})
	}
	unreadable := 0
	for range s.Problems() {
		unreadable++
	}
	gauge("state_unreadable", "Stored records that this version can't read.", float64(unreadable), nil)
	connected, lost := 0, 0
	for _, lease := range state.Leases.All(s) {
		if lease.Err == nil && lease.Value.Lost {
			lost++
		} else if lease.Err == nil {
			connected++
		}
	}
	gauge("nodes_connected", "Nodes whose agent holds its lease.", float64(connected), nil)
	gauge("nodes_lost", "Nodes whose lease is over: their instances are used last.", float64(lost), nil)
	gauge("nodes_held", "Nodes that fell silent with more than half of all, and are not declared lost until they are back or released.", float64(len(c.agents.Held())), nil)
	proxies, refusing := c.agents.Proxies(), 0
	for _, p := range proxies {
		if p.Refused != "" {
			refusing++
		}
	}
	gauge("proxies", "Proxies that have reported.", float64(len(proxies)), nil)
	gauge("proxies_refusing", "Proxies that refuse their newest plan.", float64(refusing), nil)
	gauge("watches", "Watches of the API that are open.", float64(c.watches()), nil)

	snapshots := c.keeper.Stats()
	if !snapshots.Last.IsZero() {
		gauge("snapshot_last_timestamp_seconds", "When the newest snapshot in this server's folder was taken, in unix time.", float64(snapshots.Last.Unix()), nil)
		gauge("snapshot_last_bytes", "Size of the newest snapshot.", float64(snapshots.Size), nil)
	}
	gauge("snapshots_kept", "Snapshots in this server's folder.", float64(snapshots.Kept), nil)
	counter("snapshots_taken_total", "Snapshots that this server has taken by schedule.", float64(snapshots.Taken))
	counter("snapshot_failures_total", "Attempts to take a snapshot that failed.", float64(snapshots.Failed))

	stats := c.engine.Stats()
	leading := 0.0
	if stats.Leading {
		leading = 1
	}
	gauge("raft_leading", "1 if this server leads.", leading, nil)
	gauge("raft_term", "Term of the replicated log.", float64(stats.Term), nil)
	gauge("raft_last_index", "Newest entry of the replicated log.", float64(stats.Last), nil)
	gauge("raft_committed_index", "Newest entry that is durable on a majority.", float64(stats.Committed), nil)
	gauge("raft_applied_index", "Newest entry that is part of the state.", float64(stats.Applied), nil)

	if p := c.own.now.Load(); p != nil && p.leaf != nil {
		gauge("certificate_expiry_timestamp_seconds", "When this server's own certificate ends.", float64(p.leaf.NotAfter().Unix()), nil)
	}
	if end := lastRoot(c.authority.Bundle(), c.config.TrustDomain); end > 0 {
		gauge("root_expiry_timestamp_seconds", "When the newest root of the mesh ends.", float64(end), nil)
	}
}

// lastRoot returns when the root that lives longest ends, in unix seconds.
func lastRoot(bundle ca.Bundle, trustDomain string) int64 {
	var end int64
	for _, root := range bundle.Roots(trustDomain) {
		end = max(end, root.NotAfter.Unix())
	}
	return end
}
