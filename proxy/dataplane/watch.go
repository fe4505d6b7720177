package dataplane

import (
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/intentions"
	"github.com/meshd/meshd/proxy/flow"
	"github.com/meshd/meshd/proxy/l7"
)

const (
	// keptDenials, keptFailures, keptHandshakes and keptAnswers are how many records are kept of what was not carried. Each has a ring of its
	// own: strangers on the mesh port must not push out what an operator looks for.
	keptDenials    = 1024
	keptFailures   = 1024
	keptHandshakes = 256
	keptAnswers    = 256 // of destinations' proxies, to the callers on this host
	// maxTaps bounds those who watch at a time.
	maxTaps = 64
	// tapQueue is how many records wait for one who watches; what does not fit is dropped and counted. With tapGap it bounds what
	// watching costs: 2,560 records a second.
	tapQueue = 256
	tapGap   = 100 * time.Millisecond
)

// errTaps is that too many watch already.
var errTaps = errors.New("too many watch this proxy already")

// watch keeps what was not carried, and shows records to those who watch. While nobody does, and all goes well, it costs one
// atomic load per request.
type watch struct {
	taps atomic.Pointer[[]*tap] // nil while nobody watches

	mu    sync.Mutex // guards the rings, and changes of taps
	rings [4]ring
}

func newWatch() *watch {
	w := &watch{}
	for i, size := range []int{keptDenials, keptFailures, keptHandshakes, keptAnswers} {
		w.rings[i].size = size
	}
	return w
}

// idle reports that nobody watches.
func (w *watch) idle() bool { return w.taps.Load() == nil }

// ring keeps the newest records. It grows to its size and then stays there.
type ring struct {
	size    int
	records []flow.Record
	next    int // of a full ring: the oldest
}

func (r *ring) add(rec flow.Record) {
	if len(r.records) < r.size {
		r.records = append(r.records, rec)
		return
	}
	r.records[r.next] = rec
	r.next = (r.next + 1) % r.size
}

// kept tells how far the ring reaches back.
func (r *ring) kept() flow.Kept {
	k := flow.Kept{Records: r.size}
	if len(r.records) == r.size {
		k.Since = r.records[r.next].Time
	}
	return k
}

// tap is one who watches.
type tap struct {
	filter *flow.Filter
	wake   chan struct{}

	mu      sync.Mutex
	queue   []flow.Record
	dropped uint64
}

// offer queues a record, which is made only if there is room.
func (t *tap) offer(build func() flow.Record) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.queue) >= tapQueue {
		t.dropped++
		return
	}
	t.queue = append(t.queue, build())
	select {
	case t.wake <- struct{}{}:
	default:
	}
}

func (t *tap) take() flow.Answer {
	t.mu.Lock()
	defer t.mu.Unlock()
	a := flow.Answer{Records: t.queue, Dropped: t.dropped}
	t.queue, t.dropped = nil, 0
	return a
}

// tell keeps a record of what did not pass, or was answered by the far proxy itself, and shows it.
func (w *watch) tell(seen *flow.Seen, build func() flow.Record) {
	taps := w.taps.Load()
	if seen.Verdict != flow.Passed || seen.Told {
		rec := build()
		w.mu.Lock()
		w.ring(seen.Verdict).add(rec)
		taps = w.taps.Load() // one that begins now has the record from the ring, or is here
		w.mu.Unlock()
		build = func() flow.Record { return rec }
	}
	if taps == nil {
		return
	}
	for _, t := range *taps {
		if t.filter.Match(seen) {
			t.offer(build)
		}
	}
}

func (w *watch) ring(v flow.Verdict) *ring {
	switch v {
	case flow.Denied:
		return &w.rings[0]
	case flow.Refused:
		return &w.rings[2]
	case flow.Passed:
		return &w.rings[3]
	default:
		return &w.rings[1]
	}
}

// change makes the list of taps another one. w.mu is held.
func (w *watch) change(f func([]*tap) []*tap) {
	var next []*tap
	if old := w.taps.Load(); old != nil {
		next = slices.Clone(*old)
	}
	if next = f(next); len(next) == 0 {
		w.taps.Store(nil)
		return
	}
	w.taps.Store(&next)
}

// begin returns what is kept and selected, the newest first, and unless t is nil shows it all that comes after that.
func (w *watch) begin(keep func(*flow.Record) bool, t *tap) (past []flow.Record, kept flow.Kept, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if t != nil {
		w.change(func(taps []*tap) []*tap {
			if len(taps) >= maxTaps {
				err = errTaps
				return taps
			}
			return append(taps, t)
		})
	}
	if keep != nil {
		for i := range w.rings {
			r := &w.rings[i]
			for n := range r.records {
				if keep(&r.records[n]) {
					past = append(past, r.records[n])
				}
			}
		}
	}
	return past, w.rings[0].kept(), err
}

func (w *watch) end(t *tap) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.change(func(taps []*tap) []*tap { return slices.DeleteFunc(taps, func(o *tap) bool { return o == t }) })
}

// Watch answers a query: it hands emit what the plane has seen, and what it will see until ctx ends or emit fails. It returns nil
// when the query is answered, or ctx has ended. However slow emit is, traffic never waits: what does not fit into a queue is
// dropped and counted in the answer.
func (p *Plane) Watch(ctx context.Context, q flow.Query, emit func(flow.Answer) error) error {
	filter, err := q.Filter()
	if err != nil {
		return err
	}
	switch q.Want {
	case flow.Edges:
		return p.watchEdges(ctx, q, filter, emit)
	case flow.Stacks:
		return tellStacks(emit)
	case flow.Find, flow.Denials, flow.Records:
	default:
		return errors.New("this proxy knows no such query: " + string(q.Want))
	}
	var t *tap
	if q.Want == flow.Records {
		t = &tap{filter: filter, wake: make(chan struct{}, 1)}
		defer p.watch.end(t)
	}
	var keep func(*flow.Record) bool
	if q.Want != flow.Records {
		keep = func(r *flow.Record) bool {
			return filter.MatchRecord(r) && !r.Time.Before(q.Since)
		}
	}
	past, kept, err := p.watch.begin(keep, t)
	if err != nil {
		return err
	}
	past = flow.Newest(past, q.Limit)
	for chunk := range slices.Chunk(past, tapQueue) {
		if err := emit(flow.Answer{Records: chunk}); err != nil {
			return err
		}
	}
	if err := emit(flow.Answer{Caught: true, Kept: kept}); err != nil || t == nil {
		return err
	}
	return t.follow(ctx, emit)
}

// follow emits what is queued until ctx ends: the first record at once, and then what came within tapGap.
func (t *tap) follow(ctx context.Context, emit func(flow.Answer) error) error {
	gap := time.NewTicker(tapGap)
	defer gap.Stop()
	for {
		select {
		case <-t.wake:
		case <-ctx.Done():
			return nil
		}
		if err := emit(t.take()); err != nil {
			return err
		}
		gap.Reset(tapGap)
		select {
		case <-gap.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// requestEnded tells of an HTTP request that failed, or that somebody may watch.
func (p *Plane) requestEnded(side direction, r *l7.Record, a *attempt) {
	seen := flow.Seen{
		Direction: flow.Direction(side), Verdict: requestVerdict(r), Source: r.Source, Method: r.Method, Path: r.Path, Status: r.Status,
		Told: r.ErrorID != "",
	}
	if a != nil {
		seen.Destination = a.target
		if a.edge != nil {
			a.edge.count(side, r.Reason, seen.Verdict)
		}
	}
	p.watch.tell(&seen, func() flow.Record {
		rec := newRecord(flow.HTTP, &seen, time.Now().Add(-r.Duration), r.Duration)
		rec.Endpoint, rec.Sent, rec.Received, rec.Reason, rec.ErrorID = r.Endpoint, r.RequestBytes, r.ResponseBytes, r.Reason.String(), r.ErrorID
		rec.Method, rec.Authority, rec.Path = cut(r.Method, flow.MaxMethod), cut(r.Authority, flow.MaxHost), cut(r.Path, flow.MaxPath)
		if e, ok := errors.AsType[*l7.Error](r.Err); ok {
			switch {
			case e.Detail != "" && (e.Reason != l7.Denied || a != nil && a.decision.Reason == intentions.ReasonNone):
				rec.Cause = cut(e.Detail, flow.MaxCause)
			case e.Err != nil:
				rec.Cause = cut(e.Err.Error(), flow.MaxCause)
			}
		}
		if far, ok := errors.AsType[*farAnswer](r.Err); ok {
			rec.Reason, rec.Cause = far.reason, far.Error()
		}
		if a == nil {
			p.finish(&rec, nil, nil)
		} else {
			if a.grpc {
				rec.GRPC = statusName(a.status)
			}
			p.finish(&rec, a.link, &a.account)
		}
		return rec
	})
}

// farAnswer is that the destination's proxy answered, and not its application.
type farAnswer struct{ reason string }

// Error says what it answered.
func (e *farAnswer) Error() string { return "answered by the destination's proxy: " + e.reason }

// noteFar takes note of an answer of the destination's proxy: the caller's host then knows the id that its client was told.
func noteFar(r *l7.Record, head *l7.ResponseHead, grpc bool) {
	if r.ErrorID != "" { // of an answer that another try has replaced
		r.ErrorID, r.Err = "", nil
	}
	if head.Status < 400 && !grpc {
		return
	}
	if id, ok := head.Fields.Value(l7.FieldErrorID, 0); ok && flow.ValidID(string(id)) {
		reason, _ := head.Fields.Value(l7.FieldError, 0)
		r.ErrorID, r.Err = string(id), &farAnswer{reason: cut(reason, flow.MaxMethod)}
	}
}

// requestVerdict sorts a request. One whose response had begun before it failed has no error id.
func requestVerdict(r *l7.Record) flow.Verdict {
	switch r.Reason {
	case l7.Denied, l7.PolicyChanged:
		return flow.Denied
	case l7.None, l7.ClientGone, l7.EarlyResponse, l7.Superseded:
		return flow.Passed
	default:
		return flow.Failed
	}
}

// count adds a request that was not simply carried.
func (e *edge) count(side direction, reason l7.Reason, v flow.Verdict) {
	if v == flow.Denied {
		e.denied.Inc()
		e.deniedRequests.Add(1)
		return
	}
	switch reason {
	case l7.NoHealthyInstance, l7.ConnectFailed, l7.NoLeaf, l7.Overload, l7.Draining, l7.NoRoute:
		if side == outbound {
			e.unsent.Add(1)
		}
	default:
	}
}

// connectionRefused tells of a connection that carried nothing.
func (p *Plane) connectionRefused(l *link, reason Reason) {
	p.access.connection(l, 0, 0, reason)
	verdict := flow.Failed
	if reason == ReasonDenied || reason == ReasonUntrusted || reason == ReasonNotHTTP {
		verdict = flow.Denied
		if !l.target.IsZero() {
			key := edgeKey{direction: l.direction, source: l.source, destination: flow.Service(l.target)}
			p.metrics.edge(key).denied.Inc()
		}
	}
	p.tellSession(l, verdict, reason, 0, 0, false)
}

// sessionOpened tells of a TCP session that begins to carry bytes.
func (p *Plane) sessionOpened(l *link) {
	l.edge.conns.Inc()
	l.edge.open.Add(1)
	if !p.watch.idle() {
		p.tellSession(l, flow.Passed, "", 0, 0, true)
	}
}

// sessionEnded tells of a TCP session that carried bytes.
func (p *Plane) sessionEnded(l *link, sent, received int64, reason Reason) {
	l.edge.open.Add(-1)
	p.access.connection(l, sent, received, reason)
	verdict := flow.Passed
	if reason == ReasonPolicyChanged || reason == ReasonUntrusted {
		verdict = flow.Denied
		l.edge.denied.Inc()
	} else if p.watch.idle() {
		return
	}
	p.tellSession(l, verdict, reason, sent, received, false)
}

func (p *Plane) tellSession(l *link, verdict flow.Verdict, reason Reason, sent, received int64, opened bool) {
	seen := flow.Seen{Direction: flow.Direction(l.direction), Verdict: verdict, Source: l.source, Destination: l.target}
	p.watch.tell(&seen, func() flow.Record {
		rec := newRecord(flow.TCP, &seen, l.started, time.Since(l.started))
		rec.Endpoint, rec.Sent, rec.Received, rec.Reason, rec.Opened = l.endpoint, sent, received, string(reason), opened
		if route := p.current().upstreams[l.listener]; route != nil && reason == ReasonDenied {
			rec.Cause = cut(route.cluster.Denied, flow.MaxCause)
		}
		p.finish(&rec, l, &l.account)
		return rec
	})
}

// handshakeFailed tells of a connection on the mesh port whose caller did not prove who it is. name is the server name that it
// asked for, if it came that far.
func (p *Plane) handshakeFailed(peer net.Addr, took time.Duration, reason Reason, cause error, name string) {
	p.access.handshake(peer, took, reason)
	verdict := flow.Refused
	switch reason {
	case ReasonClosed: // a probe of the port
		return
	case ReasonNoLeaf, ReasonHandshakeTimeout:
		verdict = flow.Failed
	default:
	}
	seen := flow.Seen{Direction: flow.Inbound, Verdict: verdict}
	s := p.current()
	in := s.inbounds[name]
	if in != nil {
		seen.Destination = in.Service
	}
	p.watch.tell(&seen, func() flow.Record {
		rec := newRecord(flow.TCP, &seen, time.Now().Add(-took), took)
		rec.Peer, rec.Reason, rec.Cause, rec.Plan = peer.String(), string(reason), cut(cause.Error(), flow.MaxCause), s.config.Position
		rec.ErrorID = newErrorID()
		if in != nil {
			rec.Endpoint, rec.Port = in.Instance, in.Port
		}
		return rec
	})
}

func newRecord(kind flow.Kind, seen *flow.Seen, began time.Time, took time.Duration) flow.Record {
	return flow.Record{
		Time: began.UTC(), Kind: kind, Direction: seen.Direction, Verdict: seen.Verdict, Source: seen.Source, Destination: seen.Destination,
		Status: seen.Status, DurationMS: float64(took.Microseconds()) / 1000,
	}
}

// finish adds what the link, if there is one, and the plan in force tell.
func (p *Plane) finish(rec *flow.Record, l *link, of *account) {
	s := p.current()
	rec.Plan = s.config.Position
	if rec.ErrorID == "" && rec.Verdict != flow.Passed {
		rec.ErrorID = newErrorID()
	}
	if l == nil {
		return
	}
	rec.Peer = l.remote()
	if in := s.inbounds[l.name]; in != nil {
		rec.Port = in.Port
	} else if route := s.upstreams[l.listener]; route != nil {
		rec.Port = route.cluster.Port
	}
	d := of.decision
	rec.Decision = string(d.Reason)
	if !d.Key.IsZero() {
		rec.Intention = d.Key.String()
	}
	if d.Reason == intentions.ReasonRule {
		rule := d.Rule
		rec.Rule = &rule
	}
}

// newErrorID makes a name for a record whose client was told none.
func newErrorID() string {
	const hex = "0123456789abcdef"
	n := rand.Uint32() //nolint:gosec // a name, not a secret
	var id [6]byte
	for i := range id {
		id[i] = hex[n&15]
		n >>= 4
	}
	return string(id[:])
}

func cut[T string | []byte](s T, limit int) string { return string(s[:min(len(s), limit)]) }

// service is the identity of a service of the plan's mesh.
func (s *snapshot) service(key edgeKey) spiffe.ID {
	if key.destination.IsZero() {
		return spiffe.ID{}
	}
	return spiffe.Service(s.config.TrustDomain, key.destination.Namespace, key.destination.Name)
}
