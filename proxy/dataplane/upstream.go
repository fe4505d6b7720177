package dataplane

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"time"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/proxy/l7"
	"github.com/meshd/meshd/proxy/sock"
)

// errNoEndpoint is that nothing is left to connect to.
var errNoEndpoint = errors.New("no instance is left to try")

// serveUpstream serves one connection of a local application.
func (p *Plane) serveUpstream(ctx context.Context, nc *sock.Conn, name string) {
	l := p.newLink(outbound)
	l.listener = name
	l.hold(0, nc)
	p.links.add(l)
	defer p.links.remove(l)

	route, reason := p.route(l)
	if reason != "" {
		p.refuse(ctx, l, reason)
		reset(nc)
		return
	}
	switch {
	case route.auto:
		p.serveAuto(ctx, l, nc, route)
	case route.http:
		p.serveDeclared(ctx, l, nc, route)
	default:
		p.serveTCP(ctx, l, nc, route)
	}
}

// serveWeb serves a connection that speaks HTTP.
func (p *Plane) serveWeb(ctx context.Context, l *link, nc *sock.Conn, route *upstreamRoute, v version) {
	p.serveHTTP(ctx, l, v, nc, l7.ConnInfo{Source: route.source, User: l})
}

// serveTCP carries a connection as it is.
func (p *Plane) serveTCP(ctx context.Context, l *link, nc *sock.Conn, route *upstreamRoute) {
	server, done, reason := p.connect(ctx, l, route)
	if reason != "" {
		p.refuse(ctx, l, reason)
		reset(nc)
		return
	}
	defer done()
	if !l.hold(1, server) {
		reset(server)
	}
	p.splice(l, nc, server)
}

// route finds where a connection that is in the table goes, and refuses the denied. What is HTTP, or may be, is not refused here: it can be answered.
func (p *Plane) route(l *link) (*upstreamRoute, Reason) {
	for {
		s := p.current()
		route := s.upstreams[l.listener]
		switch {
		case route == nil:
			return nil, ReasonRemoved
		case p.ended.Load():
			return nil, ReasonDraining
		}
		l.lead(route)
		if s != p.current() {
			continue
		}
		if route.cluster.Denied != "" && !route.http && !route.auto {
			return nil, ReasonDenied
		}
		return route, ""
	}
}

// connect opens the far side of a TCP session, and tries further endpoints as long as none took it: nothing was sent yet. done
// must be called when the session is over.
func (p *Plane) connect(ctx context.Context, l *link, route *upstreamRoute) (server stream, done func(), reason Reason) {
	budget := route.budget
	if !take(&budget.sessions, budget.limits.Connections) {
		p.health.overflow(route, "connections")
		return nil, nil, ReasonOverload
	}
	defer func() {
		if reason != "" {
			budget.sessions.Add(-1)
		}
	}()
	var tried [maxAttempts]int
	reason = ReasonNoInstance
	for n := range p.limits.Attempts {
		i := route.picker.Pick(tried[:n])
		if i < 0 {
			break
		}
		tried[n] = i
		l.endpoint = route.endpoints[i].instance
		e, state := route.endpoints[i], route.states[i]
		state.Begin()
		p.health.picked(route, state)
		conn, _, err := p.dialEndpoint(ctx, e, alpnTCP)
		if err == nil {
			l.adopt(conn)
			return conn, func() { state.End(); budget.sessions.Add(-1) }, ""
		}
		state.End()
		if errors.Is(err, errOverflow) {
			p.health.overflow(route, "pending")
			return nil, nil, ReasonOverload
		}
		if errors.Is(err, ca.ErrNoLeaf) {
			return nil, nil, ReasonNoLeaf // ours: another endpoint would not help
		}
		reason = ReasonConnect
		p.log.LogAttrs(ctx, slog.LevelDebug, "endpoint could not be used", slog.String("cluster", route.cluster.Name),
			slog.String("instance", e.instance), slog.Any("error", err))
	}
	return nil, nil, reason
}

// adopt takes over the proof of the connection that a TCP session uses.
func (l *link) adopt(conn interface{ NetConn() net.Conn }) {
	if d, ok := conn.NetConn().(*dialedConn); ok {
		l.mu.Lock()
		l.peer = d.proof
		l.mu.Unlock()
	}
}

// serveHTTP serves a connection's requests until it ends.
func (p *Plane) serveHTTP(ctx context.Context, l *link, v version, nc net.Conn, info l7.ConnInfo) {
	s := p.current()
	servers := &s.egress
	if l.direction == inbound {
		servers = &s.ingress
	}
	var conn served
	if v == two {
		conn = servers.two.NewConn(nc, info)
	} else {
		conn = servers.one.NewConn(nc, info)
	}
	l.mu.Lock()
	l.http, l.shared = conn, v == two
	cut, drained, retired := l.cut, l.drained || p.impatient.Load(), p.draining.Load()
	l.mu.Unlock()
	if cut {
		conn.Abort(l7.PolicyChanged)
	}
	if retired {
		retire(conn)
	}
	if drained {
		conn.Drain()
	}
	started := time.Now()
	if err := conn.Serve(ctx); err != nil && p.log.Enabled(ctx, slog.LevelDebug) {
		p.log.LogAttrs(ctx, slog.LevelDebug, "HTTP connection broke", slog.String("source", l.source.String()),
			slog.Duration("age", time.Since(started)), slog.Any("error", err))
	}
}
