package dataplane

import (
	"context"
	"net"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/intentions"
	"github.com/meshd/meshd/proxy/l7"
)

const (
	// expiryGrace is how long a TCP session may outlive the certificates that began it while it is never idle.
	expiryGrace = time.Hour
)

// link is one live connection with an application or another proxy: a TCP session with both its sides, or the client's side of
// HTTP. What does not change is set before it enters the table.
type link struct {
	plane     *Plane
	direction direction
	listener  string    // outbound: the name of the listener
	name      string    // inbound: the server name
	source    spiffe.ID // inbound: the peer
	peer      proof
	started   time.Time

	// active is when the last byte of a TCP session passed, in unix nanoseconds.
	active atomic.Int64
	// edge is that of destination, and set before the first byte; only the goroutine that serves the link touches both.
	edge        *edge
	destination catalog.Name
	// For the access log: whom the bytes are for, which instance, and what the policy said last.
	target   spiffe.ID
	endpoint string
	decision intentions.Decision
	// speaks is what was detected, and asked the name that a TLS client asks for; empty if nothing was.
	speaks, asked string

	mu      sync.Mutex
	cut     bool
	ended   Reason // why it was cut
	drained bool
	cluster string // outbound: of the route that was taken last; empty if it was refused
	sides   [2]net.Conn
	spliced bool // its bytes are carried by pumps
	http    *l7.Conn
	arrival *arrival // while nobody knows what it speaks
	// exchange is the one that runs; its head may be read while mu is held.
	exchange *l7.Exchange
	admitted bool // inbound: the policy was asked
	web      bool // it is HTTP, decided per request
	request  intentions.HTTPRequest

	attempt attempt // of the exchange that runs; one at a time on HTTP/1
}

func (p *Plane) newLink(side direction) *link {
	l := &link{plane: p, direction: side, started: time.Now()}
	l.touch(l.started)
	l.attempt.link = l
	l.decision.Rule = -1
	return l
}

// lead takes note of where an outbound link goes. One that is refused anyway
// leads nowhere: there is nothing of it to cut when policy is looked at again.
func (l *link) lead(route *upstreamRoute) {
	l.mu.Lock()
	l.source, l.cluster = route.source, ""
	if route.cluster.Denied == "" {
		l.cluster = route.cluster.Name
	}
	l.mu.Unlock()
	l.destination, l.target = route.destination, route.cluster.Service
	l.edge = l.plane.metrics.edge(edgeKey{direction: outbound, source: route.source, destination: route.destination})
}

func (l *link) touch(now time.Time) { l.active.Store(now.UnixNano()) }

// hold gives the link what abort has to reset. It reports false if the link was cut already; then the caller resets it.
func (l *link) hold(i int, nc net.Conn) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.sides[i] = nc
	return !l.cut
}

// abort cuts the connection with both its sides, and reports whether this call did it.
func (l *link) abort(ctx context.Context, reason Reason) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.cut {
		return false
	}
	l.cut, l.ended = true, reason
	if l.http != nil {
		l.http.Abort(abortReason(reason))
	}
	for _, side := range l.sides {
		if side != nil {
			reset(side)
		}
	}
	l.plane.metrics.cut.WithLabelValues(string(l.direction), string(reason)).Inc()
	l.plane.logCut(ctx, l, reason)
	return true
}

// abortReason translates for HTTP.
func abortReason(r Reason) l7.Reason {
	switch r {
	case ReasonDraining:
		return l7.Draining
	case ReasonLost:
		return l7.ClientGone
	default:
		return l7.PolicyChanged
	}
}

// retire asks HTTP to end after what runs, or after the next request. TCP sessions end by themselves.
func (l *link) retire() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.http != nil {
		l.http.Retire()
	}
}

// drain asks HTTP to end after what runs.
func (l *link) drain() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.drainLocked()
}

func (l *link) drainLocked() {
	if l.arrival != nil {
		l.arrival.claim(isLeaving)
	}
	if l.http != nil && !l.drained {
		l.http.Drain()
	}
	l.drained = true
}

// lost reports whether the peer on either side has gone.
func (l *link) lost() bool {
	l.mu.Lock()
	sides := l.sides
	l.mu.Unlock()
	for _, side := range sides {
		if side == nil {
			continue
		}
		if tcp, ok := under(side).(unanswered); ok && tcp.Unanswered() > lostAfter {
			return true
		}
	}
	return false
}

// review tells why the connection must be cut under a snapshot, or "".
func (l *link) review(now time.Time, s *snapshot) Reason {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.cut {
		return ""
	}
	if l.direction == inbound {
		if reason := l.reviewInbound(now, s); reason != "" {
			return reason
		}
	} else if reason := l.reviewOutbound(s); reason != "" {
		return reason
	}
	if l.http != nil {
		return l.reviewHTTP(now)
	}
	return l.reviewTCP(now)
}

// reviewInbound asks the policy of the snapshot again.
func (l *link) reviewInbound(now time.Time, s *snapshot) Reason {
	in := s.inbounds[l.name]
	if in == nil {
		return ReasonRemoved
	}
	if !l.admitted { // it is about to ask, and asks again if the plan changes meanwhile
		return ""
	}
	if !l.web {
		d := in.policy.Decide(intentions.Request{Source: l.source, Destination: in.destination, Port: in.Port, Now: now})
		if !d.Allowed {
			return ReasonPolicyChanged
		}
		return ""
	}
	if !in.policy.MayAllow(l.source) {
		return ReasonPolicyChanged
	}
	if l.exchange != nil && !l.decide(in, now).Allowed {
		return ReasonPolicyChanged
	}
	return ""
}

func (l *link) reviewOutbound(s *snapshot) Reason {
	cluster := l.cluster
	if route := s.upstreams[l.listener]; route != nil {
		cluster = route.cluster.Name
	}
	if _, denied := s.denied[cluster]; denied && l.cluster != "" {
		return ReasonPolicyChanged
	}
	return ""
}

// reviewHTTP ends a connection when a certificate of it runs out. The caller's proxy has moved to another one long before, see
// renewMargin; asking it to end only now is for callers that did not.
func (l *link) reviewHTTP(now time.Time) Reason {
	if l.peer.expired(now) {
		return ReasonExpired
	}
	if l.peer.expired(now.Add(drainMargin)) {
		l.drainLocked()
	}
	return ""
}

// reviewTCP ends a session that is idle for too long, or that is idle at all once a certificate of it ran out.
func (l *link) reviewTCP(now time.Time) Reason {
	idle := now.Sub(time.Unix(0, l.active.Load()))
	switch {
	case l.peer.expired(now) && (idle >= sweepInterval || l.peer.expired(now.Add(-expiryGrace))):
		return ReasonExpired
	case l.spliced && idle > l.plane.limits.IdleTimeout:
		return ReasonIdle
	default:
		return ""
	}
}

// begin notes that an exchange runs, before its policy is asked: a change of plan in between must find it.
func (l *link) begin(ex *l7.Exchange) {
	l.mu.Lock()
	l.exchange = ex
	l.decision = intentions.Decision{Rule: -1}
	l.request = intentions.HTTPRequest{
		// Views of the head, which outlives the exchange. Decide keeps nothing.
		Method:  unsafe.String(unsafe.SliceData(ex.Request.Method), len(ex.Request.Method)), //nolint:gosec // see above
		Path:    unsafe.String(unsafe.SliceData(ex.Request.Path), len(ex.Request.Path)),     //nolint:gosec // see above
		Headers: (*headers)(&ex.Request.Fields),
	}
	l.mu.Unlock()
}

// end notes that the exchange is over, before its head is used for the next.
func (l *link) end() {
	l.mu.Lock()
	l.exchange = nil
	l.request = intentions.HTTPRequest{}
	l.mu.Unlock()
}

// decide asks the policy about the exchange that runs. l.mu is held, or the caller is the one that runs it.
func (l *link) decide(in *inboundRoute, now time.Time) intentions.Decision {
	return in.policy.Decide(intentions.Request{
		Source: l.source, Destination: in.destination, Port: in.Port, Now: now, HTTP: &l.request,
	})
}
