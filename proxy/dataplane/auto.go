package dataplane

import (
	"context"
	"errors"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/proxy/detect"
	"github.com/meshd/meshd/proxy/sock"
)

const (
	// headStart is how long a client of a port that is not known yet may take to speak before the far side is opened: one that speaks
	// first mostly has by then, and then nothing was opened in vain.
	headStart = 10 * time.Millisecond
	// patience bounds what a connection may be kept waiting for: the rest of something that began like HTTP; a client that is silent
	// where others spoke HTTP; or one whose far side can't be reached.
	patience = 2 * time.Second
	// probeEvery is how often a silent client of a port that speaks HTTP makes us ask whether that is still so.
	probeEvery = 10 * time.Second
)

// habit is what the clients of a port were seen to speak.
type habit uint32

const (
	unknown  habit = iota
	speaks         // HTTP: the client begins
	anything       // not HTTP: the far side is opened at once, in case it begins
)

// learnt is what is known of a port of a destination. A port that changes its habits is learnt anew: nothing is decided by it but
// when the far side is opened.
type learnt struct {
	habit  atomic.Uint32
	probed atomic.Int64 // when it was asked last whether it still speaks HTTP, in unix nanoseconds
}

func (k *learnt) is() habit { return habit(k.habit.Load()) }

func (k *learnt) learn(h habit) {
	if k.is() != h {
		k.habit.Store(uint32(h))
	}
}

// probe reports whether it is time to ask again.
func (k *learnt) probe(now time.Time) bool {
	last := k.probed.Load()
	return now.UnixNano()-last > int64(probeEvery) && k.probed.CompareAndSwap(last, now.UnixNano())
}

// learntKey names a port of a destination.
type learntKey struct {
	service spiffe.ID
	port    string
}

// verdict is who said what a connection is.
type verdict uint8

const (
	open      verdict = iota
	isWeb             // the client speaks HTTP
	isOther           // the client speaks something else, or will not speak at all
	farSpoke          // the far side spoke first, or both had their time
	isLeaving         // nobody has spoken, and nobody waits any longer
)

// arrival is a connection of an application while nobody knows what it speaks. Nothing of it is read: the bytes are looked at
// where the kernel holds them.
type arrival struct {
	plane  *Plane
	link   *link
	client *sock.Conn
	route  *upstreamRoute
	wants  func(detect.Protocol) verdict // what bytes of a protocol make of the connection
	glance glance
	began  time.Time // when the first bytes were seen
	capped bool      // what began like HTTP did not go on in time

	mu      sync.Mutex
	said    verdict
	decided chan struct{} // closed with the verdict

	// Of the far side. Whoever waited for known may read them.
	server stream
	done   func()
	reason Reason        // why it is not open
	known  chan struct{} // closed once it is open, or can't be opened
	over   chan struct{} // closed once nothing comes from there any more
}

// serveAuto serves a connection to a port for which no protocol was declared.
func (p *Plane) serveAuto(ctx context.Context, l *link, nc *sock.Conn, route *upstreamRoute) {
	a := p.arrive(l, nc, route, func(found detect.Protocol) verdict {
		switch {
		case found.HTTP():
			return isWeb
		case found != detect.Undecided:
			return isOther
		default:
			return open
		}
	})
	denied := route.cluster.Denied != ""
	wait := headStart
	switch known := route.learnt.is(); {
	case known == speaks, denied && known == unknown: // HTTP can be told that it is denied
		wait = patience
	case known == anything && !denied:
		wait = 0
	default:
	}
	said := a.look(wait)
	for !denied && said == open && route.learnt.is() == speaks && !route.learnt.probe(time.Now()) {
		said = a.look(patience)
	}
	switch {
	case said == isWeb:
		a.web(ctx)
	case said == isLeaving:
		_ = nc.Close()
	case denied:
		p.refuse(ctx, l, ReasonDenied)
		reset(nc)
	case said == isOther:
		a.tell(a.glance.protocol.String())
		p.serveTCP(ctx, l, nc, route)
	default:
		a.race(ctx)
	}
}

func (p *Plane) arrive(l *link, nc *sock.Conn, route *upstreamRoute, wants func(detect.Protocol) verdict) *arrival {
	a := &arrival{plane: p, link: l, client: nc, route: route, wants: wants, decided: make(chan struct{})}
	a.glance.init(nc)
	l.mu.Lock()
	l.arrival, l.spliced = a, true // silence counts from now on
	l.mu.Unlock()
	l.touch(time.Now())
	if p.impatient.Load() {
		a.claim(isLeaving)
	}
	return a
}

// serveDeclared serves a connection to a port that is declared to be HTTP. Which version the client speaks is its own choice; what
// is none is refused by the server for the version that was declared.
func (p *Plane) serveDeclared(ctx context.Context, l *link, nc *sock.Conn, route *upstreamRoute) {
	a := p.arrive(l, nc, route, func(found detect.Protocol) verdict {
		if found == detect.Undecided {
			return open
		}
		return isWeb
	})
	said := a.look(-1)
	l.mu.Lock()
	l.arrival = nil
	l.mu.Unlock()
	if said == isLeaving {
		_ = nc.Close()
		return
	}
	v := a.version()
	switch a.glance.protocol {
	case detect.TLS, detect.Opaque:
		if declared := route.cluster.Protocol; declared == catalog.ProtocolHTTP2 || declared == catalog.ProtocolGRPC {
			v = two // RFC 9113 section 3.4: a wrong preface ends the connection, and is not answered over HTTP/1
		}
	default:
	}
	p.serveWeb(ctx, l, nc, route, v)
}

// version is that of HTTP which the client speaks.
func (a *arrival) version() version {
	if a.glance.protocol == detect.HTTP2 {
		return two
	}
	return one
}

// tell counts what a connection turned out to be, and learns from it.
func (a *arrival) tell(what string) {
	l := a.link
	l.mu.Lock()
	l.arrival = nil
	l.mu.Unlock()
	l.speaks, l.asked = what, a.glance.name
	a.plane.metrics.detected.WithLabelValues(what).Inc()
	switch {
	case a.said == isWeb:
		a.route.learnt.learn(speaks)
	case what == serverFirst, a.glance.protocol != detect.Undecided && !a.capped:
		a.route.learnt.learn(anything)
	default: // it told nothing
	}
}

// serverFirst is what a connection is called whose far side spoke first.
const serverFirst = "server-first"

// web serves HTTP.
func (a *arrival) web(ctx context.Context) {
	a.tell(a.glance.protocol.String())
	a.plane.serveWeb(ctx, a.link, a.client, a.route, a.version())
}

// look waits for the client, and claims the connection for what it speaks. A negative wait is without an end; a client that spoke
// in part gets its time to go on in any case.
func (a *arrival) look(wait time.Duration) verdict {
	var by time.Time
	if wait >= 0 {
		by = time.Now().Add(wait)
	}
	for {
		_ = a.client.SetReadDeadline(by) // the error is that of a closed connection, which a look at it finds, too
		if a.verdict() != open {
			break
		}
		err := a.glance.see()
		late := errors.Is(err, os.ErrDeadlineExceeded)
		switch said := a.wants(a.glance.protocol); {
		case said != open:
			a.claim(said)
		case a.glance.ended, err != nil && !late:
			a.claim(isOther) // what is broken is found to be so by who carries it
		case err == nil: // a part of what may be HTTP
			if a.began.IsZero() {
				a.began = time.Now()
			}
			by = a.began.Add(patience)
			continue
		case late && !a.began.IsZero() && time.Since(a.began) >= patience:
			a.capped = true
			a.claim(isOther)
		default:
		}
		break
	}
	said := a.verdict()
	_ = a.client.SetReadDeadline(time.Time{}) // after the verdict: it may have interrupted us
	return said
}

func (a *arrival) verdict() verdict {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.said
}

// claim says what the connection is, unless somebody else has, and returns what holds. Who looks at the client looks up.
func (a *arrival) claim(v verdict) verdict {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.said == open {
		a.said = v
		close(a.decided)
		_ = a.client.SetReadDeadline(time.Unix(1, 0))
	}
	return a.said
}

// claimLate is claim when the other side has had its time.
func (a *arrival) claimLate(ctx context.Context, v verdict) verdict {
	late := time.NewTimer(patience)
	defer late.Stop()
	select {
	case <-late.C:
	case <-a.decided:
	case <-ctx.Done():
	}
	return a.claim(v)
}

// race opens the far side while the client is silent. Whoever speaks first tells what the connection is.
func (a *arrival) race(ctx context.Context) {
	dialing, cancel := context.WithCancel(ctx)
	defer cancel()
	a.known, a.over = make(chan struct{}), make(chan struct{})
	s := a.plane.newSession(a.link, a.client)
	a.plane.tasks.Go(func() {
		defer close(a.over)
		a.far(dialing, s)
	})
	said := a.look(-1)
	switch said {
	case isWeb:
		cancel()
		a.retreat()
		a.web(ctx)
		return
	case isLeaving:
		cancel()
		a.retreat()
		_ = a.client.Close()
		return
	default:
	}
	<-a.known
	what := a.glance.protocol.String()
	if said == farSpoke && a.reason == "" {
		what = serverFirst
	}
	a.tell(what)
	if a.reason != "" {
		<-a.over
		a.plane.refuse(ctx, a.link, a.reason)
		reset(a.client)
		return
	}
	defer a.done()
	s.begin()
	s.finish(&s.up)
	s.end(a.over)
}

// retreat gives the far side up, as the connection is HTTP. The application there sees one that was closed in good order.
func (a *arrival) retreat() {
	<-a.known
	if a.server != nil {
		_ = a.server.Close()
	}
	<-a.over
	if a.done != nil {
		a.done()
	}
	l := a.link
	l.hold(1, nil)
	l.mu.Lock()
	l.peer = proof{}
	l.mu.Unlock()
	l.endpoint = ""
}

// far opens the far side, and carries what comes from there unless the client speaks HTTP before that.
func (a *arrival) far(ctx context.Context, s *session) {
	server, done, reason := a.plane.connect(ctx, a.link, a.route)
	if reason != "" {
		a.reason = reason
		close(a.known)
		a.claimLate(ctx, farSpoke)
		return
	}
	if !a.link.hold(1, server) {
		reset(server)
	}
	s.open(server)
	a.server, a.done = server, done
	s.down.first = func(n int, err error) bool {
		var said verdict
		if n > 0 || ended(err) {
			said = a.claim(farSpoke)
		} else { // broken off, as by a policy that wants HTTP: no word of what the client will speak
			said = a.claimLate(ctx, farSpoke)
		}
		return said != isWeb && said != isLeaving
	}
	close(a.known)
	s.finish(&s.down)
}
