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
	"github.com/meshd/meshd/server/rpc"
	"github.com/meshd/meshd/server/state"
	"github.com/meshd/meshd/server/store/raftstore"
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
	agents  *rpc.Server
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
	gauge("nodes_held", "Nodes that fell silent with more than half of all, and are not declared lost until they are back or released.", float64(len(c.agents.HeldNodes())), nil)
	proxies, refusing := c.agents.Proxies(), 0
	for _, p := range proxies {
		if p.Refused != "" {
			refusing++
		}
	}
	gauge("proxies", "Proxies that have reported to this server.", float64(len(proxies)), nil)
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

	account := c.audit.Stats()
	broken := 0.0
	if account.Broken != nil {
		broken = 1
	}
	gauge("audit_sequence", "Number of the newest record of this server's audit log.", float64(account.Seq), nil)
	gauge("audit_waiting", "Records of the audit log that are not on the disk yet.", float64(account.Waiting), nil)
	gauge("audit_broken", "1 if the audit log can't be written: changes are refused until it can.", broken, nil)
	counter("audit_suppressed_total", "Denials that came too fast to be recorded.", float64(account.Suppressed))

	stats := c.engine.Stats()
	leading := 0.0
	if stats.Leading {
		leading = 1
	}
	gauge("raft_leading", "1 if this server leads.", leading, nil)
	servers, voters := c.engine.Servers(), 0
	for _, server := range servers {
		if server.Voter {
			voters++
		}
	}
	gauge("raft_servers", "Members of the cluster.", float64(len(servers)), nil)
	gauge("raft_voters", "Members of the cluster with a vote.", float64(voters), nil)
	gauge("raft_leader_contact_seconds", "For how long no leader with a majority was known; 0 on the leader.", c.engine.Contact().Seconds(), nil)
	gauge("raft_servers_apart", "Servers whose state differs from the leader's; told by the leader.", float64(c.apart.Load()), nil)
	gauge("raft_term", "Term of the replicated log.", float64(stats.Term), nil)
	gauge("raft_last_index", "Newest entry of the replicated log.", float64(stats.Last), nil)
	gauge("raft_committed_index", "Newest entry that is durable on a majority.", float64(stats.Committed), nil)
	gauge("raft_applied_index", "Newest entry that is part of the state.", float64(stats.Applied), nil)
	collectDisk(out, stats, gauge)

	c.collectStreams(out, gauge)

	if p := c.own.now.Load(); p != nil && p.leaf != nil {
		gauge("certificate_expiry_timestamp_seconds", "When this server's own certificate ends.", float64(p.leaf.NotAfter().Unix()), nil)
	}
	if end := lastRoot(c.authority.Bundle(), c.config.TrustDomain); end > 0 {
		gauge("root_expiry_timestamp_seconds", "When the newest root of the mesh ends.", float64(end), nil)
	}
}

// collectDisk tells of the disk that the replicated log is on.
func collectDisk(out chan<- prometheus.Metric, stats raftstore.Stats, gauge func(name, help string, value float64, labels prometheus.Labels)) {
	flag := func(name, help string, on bool) {
		value := 0.0
		if on {
			value = 1
		}
		gauge(name, help, value, nil)
	}
	gauge("disk_room_bytes", "Room that the state directory has left.", float64(stats.RoomBytes), nil)
	flag("disk_full", "1 if there is too little room for writes.", stats.DiskFull)
	flag("disk_hung", "1 while a write to the state directory does not end.", stats.DiskHung)
	gauge("raft_snapshot_bytes", "Size of the newest state that was saved to cut the log.", float64(stats.SnapshotBytes), nil)
	count := func(name, help string, value uint64) {
		out <- prometheus.MustNewConstMetric(prometheus.NewDesc("mesh_server_"+name, help, nil, nil), prometheus.CounterValue, float64(value))
	}
	count("raft_snapshots_saved_total", "States that were saved to cut the log.", stats.SnapshotsSaved)
	count("raft_snapshots_installed_total", "States that the leader has sent, as the log was too far behind.", stats.SnapshotsInstalled)
	out <- prometheus.MustNewConstHistogram(prometheus.NewDesc("mesh_server_raft_sync_seconds",
		"How long syncs of the replicated log to the disk took.", nil, nil), stats.Syncs.Count, stats.Syncs.Sum.Seconds(), stats.Syncs.Buckets)
}

// collectStreams tells of the agents that are connected to this server.
func (c memberCollector) collectStreams(out chan<- prometheus.Metric, gauge func(name, help string, value float64, labels prometheus.Labels)) {
	s := c.agents.Metrics()
	isolated := 0.0
	if s.Isolated {
		isolated = 1
	}
	gauge("agent_streams", "Agents that are connected to this server.", float64(s.Streams), nil)
	gauge("agent_streams_waiting", "Connected agents that wait for their turn to be sent what concerns them.", float64(s.Waiting), nil)
	gauge("agent_streams_syncing", "Agents that are being sent for the first time what concerns them.", float64(s.Syncing), nil)
	gauge("isolated", "1 if agents are turned away, as no majority of servers is in reach.", isolated, nil)
	gauge("watch_lag_seconds", "For how long the agent waits that is furthest behind; 0 when each was sent all that concerns it.", s.Lag.Seconds(), nil)
	gauge("watch_lag_revisions", "How many revisions that agent is behind.", float64(s.Behind), nil)
	buckets := make(map[float64]uint64, len(s.Delays))
	for bound, count := range s.Delays {
		buckets[bound.Seconds()] = count
	}
	out <- prometheus.MustNewConstHistogram(prometheus.NewDesc("mesh_server_watch_delay_seconds",
		"From a change, as this server saw it, until it was sent to an agent.", nil, nil), s.Sent, s.Took.Seconds(), buckets)
}

// lastRoot returns when the root that lives longest ends, in unix seconds.
func lastRoot(bundle ca.Bundle, trustDomain string) int64 {
	var end int64
	for _, root := range bundle.Roots(trustDomain) {
		end = max(end, root.NotAfter.Unix())
	}
	return end
}
