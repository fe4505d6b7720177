package flow_test

import (
	"math"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/meshd/meshd/proxy/flow"
)

func sample(node string, second int, edges ...flow.Edge) flow.Sample {
	return flow.Sample{Time: time.Unix(int64(second), 0), Node: node, Session: "s", Bounds: []float64{0.01, 0.1, 1}, Edges: edges}
}

func TestBoardShowsEachRequestOnce(t *testing.T) {
	web, api, db := service("default", "web"), service("default", "api"), service("default", "db")
	caller := func(n uint64) flow.Edge { // of which some were denied, and some went nowhere
		return flow.Edge{
			Direction: flow.Outbound, Source: web, Destination: api, Requests: [flow.Classes]uint64{2: 80 * n, 4: 10 * n, 5: 10 * n},
			Denied: 10 * n, DeniedRequests: 10 * n, Unsent: 10 * n, Durations: []uint64{100 * n, 0, 0, 0},
		}
	}
	callee := func(n uint64) flow.Edge {
		return flow.Edge{
			Direction: flow.Inbound, Source: web, Destination: api, Requests: [flow.Classes]uint64{2: 70 * n, 4: 6 * n, 5: 4 * n},
			Denied: 6 * n, DeniedRequests: 6 * n, Durations: []uint64{40 * n, 40 * n, 0, 0},
		}
	}
	alone := func(n uint64) flow.Edge { // whose destination's proxy is not heard
		return flow.Edge{Direction: flow.Outbound, Source: api, Destination: db, Sessions: 2 * n, Open: 3, Sent: 10 * n, Received: 30 * n}
	}
	var b flow.Board
	now := time.Unix(1000, 0)
	b.Add(sample("vm-a", 10, caller(1)), now)
	b.Add(sample("vm-b", 10, callee(1)), now)
	if b.Ready() || len(b.Rows(true)) != 0 {
		t.Error("there are rates of one sample")
	}
	b.Add(sample("vm-a", 12, caller(2)), now)
	b.Add(sample("vm-b", 12, callee(2), alone(1)), now)
	b.Add(sample("vm-b", 12, callee(9)), now) // the same again
	if !b.Ready() {
		t.Error("it is not ready after two samples of each")
	}
	want := []flow.Row{
		{
			Source: web, Destination: api, Requests: 50, Success: new(1 - 15.0/50), P50: new(10.0), P95: new(91.0), P99: new(98.2), Denied: 8,
		},
		{Source: api, Destination: db, Sessions: 1, Open: 3, Sent: 5, Received: 15},
	}
	near := cmpopts.EquateApprox(0, 1e-9)
	if diff := cmp.Diff(want, b.Rows(true), near); diff != "" {
		t.Errorf("by pair: %s", diff)
	}
	for i := range want {
		want[i].Source = flow.Row{}.Source
	}
	if diff := cmp.Diff(want, b.Rows(false), near); diff != "" {
		t.Errorf("by destination: %s", diff)
	}
	b.Forget(now.Add(time.Second))
	if rows := b.Rows(true); len(rows) != 0 {
		t.Errorf("processes that are gone still show %+v", rows)
	}
}

func TestBoardDoesNotBelieveCountersThatFall(t *testing.T) {
	e := flow.Edge{Direction: flow.Inbound, Source: service("a", "b"), Destination: service("a", "c"), Requests: [flow.Classes]uint64{2: 100}}
	var b flow.Board
	b.Add(sample("vm-a", 1, e), time.Unix(1, 0))
	e.Requests[2] = 5
	b.Add(sample("vm-a", 2, e), time.Unix(2, 0))
	if rows := b.Rows(true); len(rows) != 1 || rows[0].Requests != 0 {
		t.Errorf("%+v", rows)
	}
}

func TestQuantile(t *testing.T) {
	bounds := []float64{1, 2, 4}
	for _, row := range []struct {
		q      float64
		counts []float64
		want   float64
		ok     bool
	}{
		{0.5, []float64{0, 10, 0, 0}, 1.5, true},
		{0.5, []float64{10, 10, 0, 0}, 1, true},
		{0.99, []float64{0, 0, 0, 10}, 4, true},
		{1, []float64{1, 1, 2, 0}, 4, true},
		{0.5, []float64{0, 0, 0, 0}, 0, false},
		{0.5, []float64{1, 2}, 0, false},
		{0.5, nil, 0, false},
	} {
		if got, ok := flow.Quantile(row.q, bounds, row.counts); ok != row.ok || math.Abs(got-row.want) > 1e-9 {
			t.Errorf("%v of %v: %v, %v, want %v, %v", row.q, row.counts, got, ok, row.want, row.ok)
		}
	}
}
