package flow

import (
	"cmp"
	"slices"
	"time"

	"github.com/meshd/meshd/ca/spiffe"
)

// Board turns samples of counters into what happens per second. It shows each
// request once: as the destination's proxy saw it, and from the caller's only what
// that proxy did not send on. Where no destination's proxy is heard of a pair, the
// caller's stands in for it. It is not safe for concurrent use; the zero Board is
// ready.
type Board struct {
	processes map[string]*process
}

// process is one proxy's newest sample and the one before.
type process struct {
	before, now Sample
	twice       bool
	heard       time.Time
}

// Row is one line of a Board, of the time between the last two samples. Rates are
// per second.
type Row struct {
	// Source is zero in a row of a destination.
	Source      spiffe.ID `json:"source,omitzero"`
	Destination spiffe.ID `json:"destination,omitzero"`
	// Requests are HTTP requests, the denied included.
	Requests float64 `json:"requests_per_second"`
	// Success is the share of requests that were neither denied nor answered with
	// 5xx nor left without a response; absent without requests.
	Success *float64 `json:"success,omitempty"`
	// The quantiles are in milliseconds, interpolated in the buckets of a
	// histogram; absent without requests.
	P50 *float64 `json:"p50_ms,omitempty"`
	P95 *float64 `json:"p95_ms,omitempty"`
	P99 *float64 `json:"p99_ms,omitempty"`
	// Denied are requests and connections.
	Denied float64 `json:"denied_per_second"`
	// Sessions are TCP sessions that began, Open those that are open now.
	Sessions float64 `json:"tcp_sessions_per_second"`
	Open     int64   `json:"tcp_open"`
	// Sent and Received are bytes of TCP sessions.
	Sent     float64 `json:"bytes_sent_per_second"`
	Received float64 `json:"bytes_received_per_second"`
}

// Add takes note of a sample that arrived now.
func (b *Board) Add(s Sample, now time.Time) {
	key := s.Node + "\x00" + s.Session
	p := b.processes[key]
	if p == nil {
		if b.processes == nil {
			b.processes = map[string]*process{}
		}
		b.processes[key] = &process{now: s, heard: now}
		return
	}
	if !s.Time.After(p.now.Time) {
		return
	}
	p.before, p.now, p.twice, p.heard = p.now, s, true, now
}

// Forget drops the processes that were not heard since a time.
func (b *Board) Forget(since time.Time) {
	for key, p := range b.processes {
		if p.heard.Before(since) {
			delete(b.processes, key)
		}
	}
}

// Ready reports whether every process that is heard has been heard twice, so that
// there are rates of all.
func (b *Board) Ready() bool {
	for _, p := range b.processes {
		if !p.twice {
			return false
		}
	}
	return len(b.processes) > 0
}

type pair struct{ source, destination spiffe.ID }

// tally sums up what one side saw of a pair.
type tally struct {
	seen                           bool
	requests                       [Classes]float64
	denied, deniedRequests, unsent float64
	sessions, sent, received       float64
	open                           int64
	durations                      []float64
	requestsTotal, requestsBad     float64
}

// Rows returns the board, the busiest first: by pair of source and destination, or
// by destination alone.
func (b *Board) Rows(byPair bool) []Row {
	var bounds []float64
	sides := map[pair]*[2]tally{}
	for _, p := range b.processes {
		if !p.twice {
			continue
		}
		bounds = p.now.Bounds
		p.tally(sides)
	}
	rows := map[pair]*tally{}
	for key, both := range sides {
		if !byPair {
			key.source = spiffe.ID{}
		}
		sum := rows[key]
		if sum == nil {
			sum = &tally{}
			rows[key] = sum
		}
		sum.add(once(both))
	}
	out := make([]Row, 0, len(rows))
	for key, sum := range rows {
		out = append(out, sum.row(key, bounds))
	}
	slices.SortFunc(out, func(a, b Row) int {
		return cmp.Or(cmp.Compare(b.Requests+b.Denied, a.Requests+a.Denied), cmp.Compare(b.Open, a.Open),
			cmp.Compare(a.Destination.String(), b.Destination.String()), cmp.Compare(a.Source.String(), b.Source.String()))
	})
	return out
}

// tally adds the rates of a process to the sides of each pair: 0 is the caller's.
func (p *process) tally(sides map[pair]*[2]tally) {
	type key struct {
		pair
		direction Direction
	}
	before := make(map[key]*Edge, len(p.before.Edges))
	for i := range p.before.Edges {
		e := &p.before.Edges[i]
		before[key{pair{e.Source, e.Destination}, e.Direction}] = e
	}
	seconds := p.now.Time.Sub(p.before.Time).Seconds()
	for i := range p.now.Edges {
		e := &p.now.Edges[i]
		at := pair{e.Source, e.Destination}
		old := before[key{at, e.Direction}]
		if old == nil {
			old = &Edge{}
		}
		if sides[at] == nil {
			sides[at] = &[2]tally{}
		}
		side := 0
		if e.Direction == Inbound {
			side = 1
		}
		sides[at][side].difference(e, old, seconds)
	}
}

// difference adds what was counted between two samples.
func (t *tally) difference(now, before *Edge, seconds float64) {
	rate := func(a, b uint64) float64 {
		if a < b { // a counter only rises; whoever sends such a sample is not believed
			return 0
		}
		return float64(a-b) / seconds
	}
	t.seen = true
	for i := range now.Requests {
		t.requests[i] += rate(now.Requests[i], before.Requests[i])
	}
	t.denied += rate(now.Denied, before.Denied)
	t.deniedRequests += rate(now.DeniedRequests, before.DeniedRequests)
	t.unsent += rate(now.Unsent, before.Unsent)
	t.sessions += rate(now.Sessions, before.Sessions)
	t.sent += rate(now.Sent, before.Sent)
	t.received += rate(now.Received, before.Received)
	t.open += now.Open
	if len(t.durations) < len(now.Durations) {
		t.durations = append(t.durations, make([]float64, len(now.Durations)-len(t.durations))...)
	}
	for i, n := range now.Durations {
		old := uint64(0)
		if i < len(before.Durations) {
			old = before.Durations[i]
		}
		t.durations[i] += rate(n, old)
	}
}

// once returns what was seen of a pair without counting a request twice.
func once(both *[2]tally) *tally {
	caller, callee := &both[0], &both[1]
	sum := callee
	if !callee.seen {
		sum = caller
	}
	for _, n := range sum.requests {
		sum.requestsTotal += n
	}
	sum.requestsBad = sum.requests[0] + sum.requests[5] + sum.deniedRequests
	if callee.seen && caller.seen {
		sum.denied += caller.denied
		sum.requestsTotal += caller.deniedRequests + caller.unsent
		sum.requestsBad += caller.deniedRequests + caller.unsent
	}
	return sum
}

func (t *tally) add(o *tally) {
	t.requestsTotal += o.requestsTotal
	t.requestsBad += o.requestsBad
	t.denied += o.denied
	t.sessions += o.sessions
	t.sent += o.sent
	t.received += o.received
	t.open += o.open
	if len(t.durations) < len(o.durations) {
		t.durations = append(t.durations, make([]float64, len(o.durations)-len(t.durations))...)
	}
	for i, n := range o.durations {
		t.durations[i] += n
	}
}

func (t *tally) row(key pair, bounds []float64) Row {
	r := Row{
		Source: key.source, Destination: key.destination, Requests: t.requestsTotal, Denied: t.denied, Sessions: t.sessions,
		Open: t.open, Sent: t.sent, Received: t.received,
	}
	if t.requestsTotal > 0 {
		success := max(0, 1-t.requestsBad/t.requestsTotal)
		r.Success = &success
	}
	for _, one := range []struct {
		q  float64
		to **float64
	}{{0.5, &r.P50}, {0.95, &r.P95}, {0.99, &r.P99}} {
		if v, ok := Quantile(one.q, bounds, t.durations); ok {
			ms := v * 1000
			*one.to = &ms
		}
	}
	return r
}

// Quantile estimates a quantile of a histogram by linear interpolation in its
// bucket, as histogram_quantile of Prometheus does: counts are of the buckets by
// themselves, one more than there are bounds, and what is beyond the last bound
// counts as being there. ok is false without counts.
func Quantile(q float64, bounds, counts []float64) (v float64, ok bool) {
	if len(bounds) == 0 || len(counts) != len(bounds)+1 {
		return 0, false
	}
	total := 0.0
	for _, n := range counts {
		total += n
	}
	if total <= 0 {
		return 0, false
	}
	rank, below := q*total, 0.0
	for i, n := range counts[:len(bounds)] {
		if below+n >= rank && n > 0 {
			low := 0.0
			if i > 0 {
				low = bounds[i-1]
			}
			return low + (bounds[i]-low)*(rank-below)/n, true
		}
		below += n
	}
	return bounds[len(bounds)-1], true
}
