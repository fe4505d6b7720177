package main

import (
	"fmt"

	"github.com/meshd/meshd/tests/bench/figure"
	"github.com/meshd/meshd/tests/bench/server/drive"
)

// verdict is what a figure means for its bar.
type verdict string

// The verdicts.
const (
	met        verdict = "met"
	missed     verdict = "missed"
	unmeasured verdict = "not measured"
)

// bar is a figure and what it is to be.
type bar struct {
	what   string
	format string // of value and limit
	value  float64
	// known says that there is a value.
	known bool
	limit float64
	// least says that the limit is the least that is good enough; else it is the
	// most.
	least bool
	note  string // beside the figure
}

func (b bar) verdict() verdict {
	switch {
	case !b.known:
		return unmeasured
	case b.least && b.value >= b.limit, !b.least && b.value <= b.limit:
		return met
	default:
		return missed
	}
}

func (b bar) figure() string {
	if !b.known {
		return "–"
	}
	out := fmt.Sprintf(b.format, b.value)
	if b.note != "" {
		out += " (" + b.note + ")"
	}
	return out
}

func (b bar) bar() string {
	sign := "≤ "
	if b.least {
		sign = "≥ "
	}
	return sign + fmt.Sprintf(b.format, b.limit)
}

// bars are all figures that matter.
func (r *report) bars() []bar {
	rate := figure.Of(r.ratios(meshName, etcdName, r.options.clients, perSecond))
	slow := figure.Of(r.values(meshName, r.options.clients, p99))
	out := []bar{
		{
			what: "acknowledged writes ÷ etcd's", format: "%.2f ×", value: rate.Median, known: rate.N > 0, limit: 1, least: true,
			note: fmt.Sprintf("%.2f to %.2f", rate.Low, rate.High),
		},
		{what: "p99 of writes", format: "%.0f ms", value: slow.Median, known: slow.N > 0, limit: 50, note: fmt.Sprintf("%.0f to %.0f", slow.Low, slow.High)},
	}
	for _, q := range []struct {
		what     string
		quantile float64
		limit    float64
	}{{"p50", 0.5, 1.2}, {"p90", 0.9, 1.3}} {
		ours, bare := took(r.Kills, meshName), took(r.Kills, bareName)
		b := bar{what: "leader killed: " + q.what + " ÷ bare Raft's", format: "%.2f ×", limit: q.limit}
		if len(ours) > 0 && len(bare) > 0 {
			x, y := drive.Quantile(ours, q.quantile), drive.Quantile(bare, q.quantile)
			b.known, b.value, b.note = true, x/y, fmt.Sprintf("%.0f ms ÷ %.0f ms", x, y)
		}
		out = append(out, b)
	}
	stops := took(r.Stops, meshName)
	out = append(out, bar{
		what: "leader stopped: slowest", format: "%.0f ms", value: drive.Quantile(stops, 1), known: len(stops) > 0, limit: 2000,
		note: fmt.Sprintf("%d runs", len(stops)),
	})
	busy := bar{what: "false elections under busy loops", format: "%.0f"}
	for _, b := range r.Busy {
		if b.Name == meshName {
			busy.known, busy.value = true, float64(b.Elections)
		}
	}
	return append(append(out, busy), r.loadBars()...)
}
