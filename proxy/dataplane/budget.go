package dataplane

import (
	"cmp"
	"errors"
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/proxy/balance"
)

// defaultLimit is how many connections, requests, and connections being made a cluster has at most unless the plan says
// otherwise. It is Envoy's figure: high enough for what is well, low enough to notice in time what is not.
const defaultLimit = 1024

// errOverflow is that a connection is not made because as many as there may be are being made already.
var errOverflow = errors.New("too many connections are being made to the service")

// load is what a cluster has under way. Plans leave it alone.
type load struct {
	sessions, pending, requests atomic.Int64
	// Every request writes here: keep other clusters' off the cache line.
	_ [40]byte
}

// budget is a cluster's load and its limits under one plan.
type budget struct {
	*load
	limits catalog.Limits
}

// budgetsFor makes those of a plan's clusters.
func (s *snapshot) budgetsFor(before *snapshot) {
	s.budgets = make(map[balance.Key]budget, len(s.config.Clusters))
	for _, cl := range s.config.Clusters {
		key := balance.Key{Generation: s.config.Position.Generation, Cluster: cl.Name}
		b := budget{load: before.budgets[key].load, limits: catalog.Limits{
			Connections: cmp.Or(cl.Limits.Connections, defaultLimit),
			Pending:     cmp.Or(cl.Limits.Pending, defaultLimit),
			Requests:    cmp.Or(cl.Limits.Requests, defaultLimit),
		}}
		if b.load == nil {
			b.load = &load{}
		}
		s.budgets[key] = b
	}
}

// take adds one to what is under way, unless that is too much. Whoever got it gives it back with n.Add(-1).
func take(n *atomic.Int64, limit int) bool {
	if n.Add(1) > int64(limit) {
		n.Add(-1)
		return false
	}
	return true
}

// takeRequest is for an HTTP request. Unless it shares a connection, it has one of its own while it runs. over names the limit that
// is reached.
func (b budget) takeRequest(shares bool) (over string) {
	limit, over := b.limits.Requests, "requests"
	if !shares && b.limits.Connections < limit {
		limit, over = b.limits.Connections, "connections"
	}
	if take(&b.requests, limit) {
		return ""
	}
	return over
}

// newOverflow returns the counter of what the limits refused.
func newOverflow() *prometheus.CounterVec {
	return prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "mesh_overflow_total", Help: "Requests and connections that were refused because a limit of their upstream was reached.",
	}, []string{"source", "destination", "port", "limit"})
}

// overflow counts a refusal.
func (m *healthMetrics) overflow(route *upstreamRoute, limit string) {
	m.overflows.WithLabelValues(sourceLabel(route.source), route.destination.String(), route.cluster.Port, limit).Inc()
}
