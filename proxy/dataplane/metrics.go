package dataplane

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/intentions"
)

// direction is which side of the mesh a connection was seen from.
type direction string

const (
	inbound  direction = "inbound"  // from the mesh to a local application
	outbound direction = "outbound" // from a local application to the mesh
)

// maxEdges bounds the pairs of source and destination that get series of their own. Beyond it all are counted as "other".
const maxEdges = 2000

// durationBuckets are seconds, finer where a mesh hop lies.
func durationBuckets() []float64 {
	return []float64{0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10}
}

// classes are the values of the label "class", by status / 100; 0 is a request that got no response.
var classes = [6]string{"none", "1xx", "2xx", "3xx", "4xx", "5xx"} //nolint:gochecknoglobals // a constant table

// metrics holds every series, or how to get its handle before the hot path.
type metrics struct {
	requests   *prometheus.CounterVec
	statuses   *prometheus.CounterVec
	duration   *prometheus.HistogramVec
	failures   *prometheus.CounterVec
	tcpConns   *prometheus.CounterVec
	tcpBytes   *prometheus.CounterVec
	denials    *prometheus.CounterVec
	decisions  *prometheus.CounterVec
	open       *prometheus.GaugeVec
	handshakes *prometheus.CounterVec
	refused    *prometheus.CounterVec
	cut        *prometheus.CounterVec
	detected   *prometheus.CounterVec
	drained    prometheus.Counter
	revision   prometheus.Gauge
	applied    prometheus.Gauge
	expiry     *prometheus.GaugeVec

	allowed, denied map[intentions.Reason]prometheus.Counter

	mu    sync.RWMutex
	edges map[edgeKey]*edge
}

type edgeKey struct {
	direction   direction
	source      spiffe.ID
	destination catalog.Name
}

// edge holds the handles of one pair of source and destination, seen from one direction.
type edge struct {
	labels                   [3]string
	grpc                     [numStatuses + 1]atomic.Pointer[counter] // made when they are needed: most edges have none
	requests                 [len(classes)]prometheus.Counter
	duration                 prometheus.Observer
	conns                    prometheus.Counter
	bytesSent, bytesReceived prometheus.Counter
	denied                   prometheus.Counter

	// For those who watch: how many of denied were requests, how many requests were sent nowhere, and how many TCP sessions are open.
	deniedRequests, unsent atomic.Uint64
	open                   atomic.Int64
}

func newMetrics(r prometheus.Registerer, age func() float64) (*metrics, error) {
	vec := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
	}
	m := &metrics{
		requests: vec("mesh_requests_total", "HTTP requests that ended, by class of status; none is a request without a response.",
			"source", "destination", "direction", "class"),
		statuses: vec("mesh_grpc_requests_total", "Requests of gRPC that ended, by its status; none is a request without one.",
			"source", "destination", "direction", "grpc_status"),
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "mesh_request_duration_seconds", Buckets: durationBuckets(),
			Help: "From the first byte of a request's head to the last byte of its response.",
		}, []string{"source", "destination", "direction"}),
		failures: vec("mesh_request_failures_total", "HTTP requests that the proxy itself failed, by reason.", "direction", "reason"),
		tcpConns: vec("mesh_tcp_connections_total", "TCP sessions that were allowed and connected.", "source", "destination", "direction"),
		tcpBytes: vec("mesh_tcp_bytes_total", "Bytes of TCP sessions; sent is from source to destination.",
			"source", "destination", "direction", "way"),
		denials: vec("mesh_denials_total", "Requests and connections that policy denied, those of callers without an intention included.",
			"source", "destination", "direction"),
		decisions:  vec("mesh_intention_decisions_total", "Decisions about connections and requests.", "decision", "reason"),
		handshakes: vec("mesh_handshake_errors_total", "TLS handshakes on the mesh port that failed.", "reason"),
		refused:    vec("mesh_connections_refused_total", "Connections that were closed before they carried anything.", "direction", "reason"),
		cut:        vec("mesh_connections_cut_total", "Live connections that the proxy ended.", "direction", "reason"),
		detected: vec("mesh_protocol_detections_total", "Connections of applications to ports without a declared protocol, by what they turned out to speak.",
			"protocol"),
		drained: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "mesh_connections_drained_total",
			Help: "Connections that were open when a process stopped or was replaced, and ended in good order; others are cut.",
		}),
		open: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "mesh_connections_open", Help: "Connections that are open, by the side that opened them.",
		}, []string{"direction"}),
		revision: prometheus.NewGauge(prometheus.GaugeOpts{Name: "mesh_plan_revision", Help: "Revision of the plan in force."}),
		applied: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "mesh_plan_applied_timestamp_seconds", Help: "When the plan in force was applied.",
		}),
		expiry: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "mesh_certificate_expiry_timestamp_seconds", Help: "When the certificate of a local service ends.",
		}, []string{"identity"}),
		allowed: map[intentions.Reason]prometheus.Counter{}, denied: map[intentions.Reason]prometheus.Counter{},
		edges: map[edgeKey]*edge{},
	}
	for _, reason := range []intentions.Reason{
		intentions.ReasonNone, intentions.ReasonAction, intentions.ReasonRule, intentions.ReasonNoRule, intentions.ReasonNoIntention,
		intentions.ReasonExpired, intentions.ReasonPort, intentions.ReasonNotHTTP, intentions.ReasonNoPolicy,
		intentions.ReasonSource, intentions.ReasonDestination, intentions.ReasonPath,
	} {
		m.allowed[reason] = m.decisions.WithLabelValues("allow", string(reason))
		m.denied[reason] = m.decisions.WithLabelValues("deny", string(reason))
	}
	planAge := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "mesh_plan_age_seconds", Help: "Time since the plan in force was applied; 0 if there is none.",
	}, age)
	var errs []error
	for _, c := range []prometheus.Collector{
		m.requests, m.statuses, m.duration, m.failures, m.tcpConns, m.tcpBytes, m.denials, m.decisions, m.open, m.handshakes, m.refused, m.cut, m.drained, m.detected,
		m.revision, m.applied, m.expiry, planAge,
	} {
		errs = append(errs, r.Register(c))
	}
	if err := errors.Join(errs...); err != nil {
		return nil, fmt.Errorf("register metrics: %w", err)
	}
	return m, nil
}

// edge returns the handles of a pair. It takes a lock: ask once per connection.
func (m *metrics) edge(key edgeKey) *edge {
	m.mu.RLock()
	e := m.edges[key]
	m.mu.RUnlock()
	if e != nil {
		return e
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if e := m.edges[key]; e != nil {
		return e
	}
	source, destination := sourceLabel(key.source), key.destination.String()
	if len(m.edges) >= maxEdges {
		key = edgeKey{direction: key.direction}
		if e := m.edges[key]; e != nil {
			return e
		}
		source, destination = "other", "other"
	}
	e = &edge{
		labels:        [3]string{source, destination, string(key.direction)},
		duration:      m.duration.WithLabelValues(source, destination, string(key.direction)),
		conns:         m.tcpConns.WithLabelValues(source, destination, string(key.direction)),
		bytesSent:     m.tcpBytes.WithLabelValues(source, destination, string(key.direction), "sent"),
		bytesReceived: m.tcpBytes.WithLabelValues(source, destination, string(key.direction), "received"),
		denied:        m.denials.WithLabelValues(source, destination, string(key.direction)),
	}
	for i, class := range classes {
		e.requests[i] = m.requests.WithLabelValues(source, destination, string(key.direction), class)
	}
	m.edges[key] = e
	return e
}

// counter is one, so that it can be pointed to.
type counter struct{ prometheus.Counter }

// grpc counts a request of gRPC.
func (m *metrics) grpc(e *edge, status int) {
	if status < 0 || status >= numStatuses {
		status = numStatuses
	}
	c := e.grpc[status].Load()
	if c == nil {
		c = &counter{m.statuses.WithLabelValues(e.labels[0], e.labels[1], e.labels[2], statusName(status))}
		e.grpc[status].Store(c)
	}
	c.Inc()
}

// sourceLabel is short for services, of which there are most.
func sourceLabel(id spiffe.ID) string {
	if id.Kind == spiffe.KindService {
		return id.Namespace + "/" + id.Name
	}
	return id.String()
}

func (m *metrics) decided(d intentions.Decision) {
	table := m.denied
	if d.Allowed {
		table = m.allowed
	}
	if c := table[d.Reason]; c != nil {
		c.Inc()
	}
}

// planApplied tells of the plan that is in force now.
func (m *metrics) planApplied(revision uint64, now time.Time, leaves map[spiffe.ID]*ca.Leaf) {
	m.revision.Set(float64(revision))
	m.applied.Set(float64(now.UnixMilli()) / 1000)
	m.expiry.Reset()
	for id, leaf := range leaves {
		m.expiry.WithLabelValues(id.String()).Set(float64(leaf.NotAfter().Unix()))
	}
}
