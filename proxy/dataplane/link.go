package dataplane

import (
	"context"
	"net"
	"sync"
	"sync/atomic"
	"time"

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
	// Only the goroutine that serves the link touches the account and destination. They are set before the first byte; of HTTP,
	// each exchange has an account of its own.
	account
	destination catalog.Name
	endpoint    string // of a TCP session
	// speaks is what was detected, and asked the name that a TLS client asks for; empty if nothing was.
	speaks, asked string

	mu       sync.Mutex
	cut      bool
	ended    Reason // why it was cut
	drained  bool
	cluster  string // outbound: of the route that was taken last; empty if it was refused
	sides    [2]net.Conn
	spliced  bool // its bytes are carried by pumps
	http     served
	arrival  *arrival // while nobody knows what it speaks
	running  *attempt // the exchanges that run; their heads may be read while mu is held
	admitted bool     // inbound: the policy was asked
	web      bool     // it is HTTP, decided per request
	shared   bool     // HTTP/2: many exchanges run at a time, and each may be cut alone
}

// served is a connection of any version of HTTP.
type served interface {
	Serve(ctx context.Context) error
	Drain()
	Abort(r l7.Reason)
}

// account is whom a connection or an exchange is for, and what the policy said.
type account struct {
	edge     *edge
	target   spiffe.ID
	decision intentions.Decision
}

func (p *Plane) newLink(side direction) *link {
	l := &link{plane: p, direction: side, started: time.Now()}
	l.touch(l.started)
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
	retire(l.http)
}

// retire asks a connection, if it is HTTP, to end after the next request. On HTTP/2 the client is told, and is heard as long as it
// may not know: there the same is a drain.
func retire(conn served) {
	switch conn := conn.(type) {
	case nil:
	case interface{ Retire() }:
		conn.Retire()
	default:
		conn.Drain()
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

// review tells why the connection must be cut under a snapshot, or "". Where that would be too much it cuts single exchanges, and
// tells how many.
func (l *link) review(now time.Time, s *snapshot) (reason Reason, streams int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.cut {
		return "", 0
	}
	if l.direction == inbound {
		if reason, streams = l.reviewInbound(now, s); reason != "" {
			return reason, 0
		}
	} else if reason := l.reviewOutbound(s); reason != "" {
		return reason, 0
	}
	if l.http != nil {
		return l.reviewHTTP(now), streams
	}
	return l.reviewTCP(now), 0
}

// reviewInbound asks the policy of the snapshot again.
func (l *link) reviewInbound(now time.Time, s *snapshot) (reason Reason, streams int) {
	in := s.inbounds[l.name]
	if in == nil {
		return ReasonRemoved, 0
	}
	if !l.admitted { // it is about to ask, and asks again if the plan changes meanwhile
		return "", 0
	}
	if !l.web {
		d := in.policy.Decide(intentions.Request{Source: l.source, Destination: in.destination, Port: in.Port, Now: now})
		if !d.Allowed {
			return ReasonPolicyChanged, 0
		}
		return "", 0
	}
	if !in.policy.MayAllow(l.source) {
		return ReasonPolicyChanged, 0
	}
	for a := l.running; a != nil; a = a.after {
		if a.refused || a.decide(in, now).Allowed {
			continue
		}
		if !l.shared {
			return ReasonPolicyChanged, 0
		}
		if a.Cancel(l7.PolicyChanged); !a.cut {
			a.cut = true
			streams++
		}
	}
	return "", streams
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
