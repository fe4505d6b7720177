package main_test

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	server "github.com/meshd/meshd/tests/bench/server"
	"github.com/meshd/meshd/tests/bench/server/drive"
)

func result(acked int, p99 time.Duration) drive.Result {
	return drive.Result{Acked: acked, Window: 2 * time.Second, P50: p99 / 4, P99: p99, ServerCPU: time.Second}
}

func lines(r *server.Report) map[string][3]string {
	out := map[string][3]string{}
	for _, b := range server.Bars(r) {
		l := b.Line()
		out[l[0]] = [3]string{l[1], l[2], l[3]}
	}
	return out
}

func TestBars(t *testing.T) {
	r := server.Of(16)
	r.Writes = []server.Writes{
		// Ratios of neighbours: 2, 0.5 and 1.5, whatever the rates.
		{Name: "meshd", Round: 0, Clients: 16, Result: result(2000, 40*time.Millisecond)},
		{Name: "etcd", Round: 0, Clients: 16, Result: result(1000, 90*time.Millisecond)},
		{Name: "etcd", Round: 1, Clients: 16, Result: result(8000, 90*time.Millisecond)},
		{Name: "meshd", Round: 1, Clients: 16, Result: result(4000, 51*time.Millisecond)},
		{Name: "meshd", Round: 2, Clients: 16, Result: result(3000, 60*time.Millisecond)},
		{Name: "etcd", Round: 2, Clients: 16, Result: result(2000, 90*time.Millisecond)},
		{Name: "meshd", Round: 3, Clients: 16, Result: result(9000, 50*time.Millisecond)}, // etcd's failed
		{Name: "etcd", Round: 0, Clients: 3, Result: result(1, time.Millisecond)},
	}
	r.Busy = []server.Overload{{Name: "raft", Elections: 3}, {Name: "meshd", Elections: 1}}
	for i := range 10 {
		r.Kills = append(r.Kills,
			server.Recovery{Name: "meshd", Run: i, Took: time.Duration(1000+10*i) * time.Millisecond},
			server.Recovery{Name: "raft", Run: i, Took: time.Duration(800+10*(9-i)) * time.Millisecond})
	}
	got := lines(r)
	want := map[string][3]string{
		"acknowledged writes ÷ etcd's":     {"1.50 × (0.50 to 2.00)", "≥ 1.00 ×", "met"},
		"p99 of writes":                    {"50 ms (40 to 60)", "≤ 50 ms", "missed"}, // 50.5
		"leader killed: p50 ÷ bare Raft's": {"1.24 × (1040 ms ÷ 840 ms)", "≤ 1.20 ×", "missed"},
		"leader killed: p90 ÷ bare Raft's": {"1.23 × (1080 ms ÷ 880 ms)", "≤ 1.30 ×", "met"},
		"leader stopped: slowest":          {"–", "≤ 2000 ms", "not measured"},
		"false elections under busy loops": {"1", "≤ 0", "missed"},
	}
	for what, line := range want {
		if diff := cmp.Diff(line, got[what]); diff != "" {
			t.Errorf("%s (-want +got):\n%s", what, diff)
		}
	}
}

func TestNothingMeasured(t *testing.T) {
	for what, line := range lines(&server.Report{}) {
		if line[0] != "–" || line[2] != "not measured" {
			t.Errorf("%s: %v", what, line)
		}
	}
}

func TestPage(t *testing.T) {
	r := server.Of(16)
	r.Writes = []server.Writes{{Name: "meshd", Clients: 16, Result: result(2000, 40*time.Millisecond)}}
	page := r.Page()
	for _, want := range []string{
		"| 16 | meshd | 1000 (1000 to 1000) | 10.0 (10.0 to 10.0) | 40.0 (40.0 to 40.0) | 500 (500 to 500) |",
		"| p99 of writes | 40 ms (40 to 40) | ≤ 50 ms | met |",
		"| leader stopped: slowest | – | ≤ 2000 ms | not measured |",
		"make bench-server",
	} {
		if !strings.Contains(page, want) {
			t.Errorf("the page lacks %q:\n%s", want, page)
		}
	}
}

func TestParse(t *testing.T) {
	var out bytes.Buffer
	for _, args := range [][]string{
		{"-only", "cpu"}, {"-stores", "zookeeper"}, {"-rounds", "0"}, {"-bytes", "10"}, {"argument"}, {"-meshd", "/does/not/exist"},
	} {
		if _, err := server.Parse(args, &out); err == nil {
			t.Errorf("%v is accepted", args)
		}
	}
}

func TestGauge(t *testing.T) {
	text := []byte("# HELP up x\nraft_term_total 9\nraft_term 17\nraft_big 1.5e+06\nraft_bad x\n")
	for name, want := range map[string]float64{"raft_term": 17, "raft_big": 1.5e6, "raft_bad": -1, "none": -1} {
		got, err := server.Gauge(text, name)
		if (err != nil) != (want < 0) || err == nil && got != want {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
}
