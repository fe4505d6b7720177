package main

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// counting is a process that has counted: requests by status, the seconds that they took, connections that are open, and what it
// uses itself.
func counting(buckets []float64, open float64, requests map[string]float64) *counters {
	r := prometheus.NewRegistry()
	total := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "mesh_requests_total", Help: "Requests."}, []string{"class"})
	seconds := prometheus.NewHistogram(prometheus.HistogramOpts{Name: "mesh_request_duration_seconds", Help: "Seconds.", Buckets: buckets})
	live := prometheus.NewGauge(prometheus.GaugeOpts{Name: "mesh_connections_open", Help: "Connections."})
	revision := prometheus.NewGauge(prometheus.GaugeOpts{Name: "mesh_plan_revision", Help: "Revision."})
	own := prometheus.NewCounter(prometheus.CounterOpts{Name: "process_ticks_total", Help: "Ticks."})
	r.MustRegister(total, seconds, live, revision, own)
	for class, n := range requests {
		total.WithLabelValues(class).Add(n)
		seconds.Observe(n)
	}
	live.Set(open)
	revision.Set(open)
	own.Add(open)
	return &counters{own: r}
}

// told is what a scrape is told, of some families if there are any.
func told(t *testing.T, c *counters, families ...string) string {
	t.Helper()
	w := httptest.NewRecorder()
	promhttp.HandlerFor(c, promhttp.HandlerOpts{}).ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/metrics", nil))
	if len(families) == 0 {
		return w.Body.String()
	}
	var out strings.Builder
	for line := range strings.Lines(w.Body.String()) {
		for _, f := range families {
			if strings.HasPrefix(strings.TrimPrefix(strings.TrimPrefix(line, "# HELP "), "# TYPE "), f) {
				out.WriteString(line)
			}
		}
	}
	return out.String()
}

func TestCountersGoOn(t *testing.T) {
	buckets := []float64{1, 10}
	first := counting(buckets, 7, map[string]float64{"2xx": 5, "4xx": 20})
	second := counting(buckets, 2, map[string]float64{"2xx": 1, "5xx": 3})
	third := counting([]float64{1, 2}, 1, map[string]float64{"2xx": 1})
	pass := func(from, to *counters) {
		t.Helper()
		data, err := from.encode()
		if err != nil {
			t.Fatal(err)
		}
		to.set(data, from.earlier()+1)
	}
	pass(first, second)
	// What comes again stands for all before.
	pass(first, second)
	const families = `# HELP mesh_connections_open Connections.
# TYPE mesh_connections_open gauge
mesh_connections_open 9
# HELP mesh_plan_revision Revision.
# TYPE mesh_plan_revision gauge
mesh_plan_revision 2
# HELP mesh_request_duration_seconds Seconds.
# TYPE mesh_request_duration_seconds histogram
mesh_request_duration_seconds_bucket{le="1"} 1
mesh_request_duration_seconds_bucket{le="10"} 3
mesh_request_duration_seconds_bucket{le="+Inf"} 4
mesh_request_duration_seconds_sum 29
mesh_request_duration_seconds_count 4
# HELP mesh_requests_total Requests.
# TYPE mesh_requests_total counter
mesh_requests_total{class="2xx"} 6
mesh_requests_total{class="5xx"} 3
mesh_requests_total{class="4xx"} 20
# HELP process_ticks_total Ticks.
# TYPE process_ticks_total counter
process_ticks_total 2
`
	if diff := cmp.Diff(families, told(t, second)); diff != "" {
		t.Error(diff)
	}
	second.alone()
	if diff := cmp.Diff(strings.Replace(families, "open 9", "open 2", 1), told(t, second)); diff != "" {
		t.Errorf("the first process is gone:\n%s", diff)
	}
	// Another version may have other buckets: those of before can't be told apart by them.
	pass(second, third)
	if third.earlier() != 1 {
		t.Errorf("%d earlier processes", third.earlier())
	}
	const other = `# HELP mesh_request_duration_seconds Seconds.
# TYPE mesh_request_duration_seconds histogram
mesh_request_duration_seconds_bucket{le="1"} 1
mesh_request_duration_seconds_bucket{le="2"} 1
mesh_request_duration_seconds_bucket{le="+Inf"} 1
mesh_request_duration_seconds_sum 1
mesh_request_duration_seconds_count 1
# HELP mesh_requests_total Requests.
# TYPE mesh_requests_total counter
mesh_requests_total{class="2xx"} 7
mesh_requests_total{class="5xx"} 3
mesh_requests_total{class="4xx"} 20
`
	if diff := cmp.Diff(other, told(t, third, "mesh_request_duration_seconds", "mesh_requests_total")); diff != "" {
		t.Error(diff)
	}
}

// FuzzCounters: no bytes of another process do harm.
func FuzzCounters(f *testing.F) {
	data, err := counting([]float64{1}, 1, map[string]float64{"2xx": 1}).encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add([]byte{5, 1})
	f.Fuzz(func(t *testing.T, data []byte) {
		c := counting([]float64{1}, 1, map[string]float64{"2xx": 1})
		c.set(data, 1)
		families, err := c.Gather()
		if err == nil {
			_, err = c.encode()
		}
		if len(families) == 0 {
			t.Errorf("not even its own counters are told: %v", err)
		}
	})
}
