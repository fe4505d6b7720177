package dataplane

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"time"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/intentions"
	"github.com/meshd/meshd/proxy/l7"
	"github.com/meshd/meshd/proxy/record"
	"github.com/meshd/meshd/proxy/sock"
)

// serveMesh serves one connection from another proxy. The order is the point: identity, table, policy.
func (p *Plane) serveMesh(ctx context.Context, nc *sock.Conn) {
	accepted := time.Now()
	conn, cs, begun, err := p.handshake(ctx, nc)
	var id spiffe.ID
	if err == nil {
		id, err = ca.PeerID(cs)
	}
	if err != nil {
		reason := handshakeReason(err)
		p.metrics.handshakes.WithLabelValues(string(reason)).Inc()
		p.log.LogAttrs(ctx, slog.LevelDebug, "handshake failed", slog.String("peer", nc.RemoteAddr().String()),
			slog.String("reason", string(reason)), slog.Any("error", err))
		p.handshakeFailed(nc.RemoteAddr(), time.Since(accepted), reason, err, cs.ServerName)
		_ = nc.Close()
		return
	}
	l := p.newLink(inbound)
	l.name, l.source = cs.ServerName, id
	var own *ca.Leaf
	if in := begun.inbounds[cs.ServerName]; in != nil {
		own = in.leaf
	}
	l.peer = newProof(cs, own, x509.ExtKeyUsageClientAuth)
	l.hold(0, conn)
	p.links.add(l)
	defer p.links.remove(l)

	in, web, reason := p.admit(ctx, l, begun, cs.NegotiatedProtocol)
	if reason != "" {
		p.refuse(ctx, l, reason)
		reset(conn)
		return
	}
	if web != 0 {
		p.serveHTTP(ctx, l, web, conn, l7.ConnInfo{
			Source: id, ForwardedClientCert: l7.ForwardedClientCert(in.Service, id), Scheme: "http", User: l,
		})
		return
	}
	app, err := p.dialApp(ctx, in.Local, in.outside, 0)
	if err != nil {
		p.log.LogAttrs(ctx, slog.LevelDebug, "application did not accept", slog.String("address", in.Local), slog.Any("error", err))
		p.refuse(ctx, l, ReasonConnect)
		reset(conn)
		return
	}
	server := streamOf(app)
	if !l.hold(1, server) {
		reset(server)
	}
	p.splice(l, conn, server)
}

// handshake proves who the peer is. It returns the snapshot that was in force when it began, too.
func (p *Plane) handshake(ctx context.Context, nc *sock.Conn) (*record.Conn, tls.ConnectionState, *snapshot, error) {
	ctx, cancel := context.WithTimeout(ctx, p.limits.HandshakeTimeout)
	defer cancel()
	s := p.current()
	turn := &turnstile{Conn: nc, slots: p.handshakes}
	conn, cs, err := record.Server(ctx, turn, p.serverTLS)
	turn.end()
	return conn, cs, s, err
}

// admit decides about a connection that is in the table. It decides again while plans change under it.
func (p *Plane) admit(ctx context.Context, l *link, begun *snapshot, alpn string) (in *inboundRoute, web version, reason Reason) {
	for {
		s := p.current()
		in = s.inbounds[l.name]
		if in == nil {
			return nil, 0, ReasonUnknownName
		}
		if p.ended.Load() {
			return nil, 0, ReasonDraining
		}
		l.target, l.endpoint = in.Service, in.Instance
		var ok bool
		if web, ok = in.http(alpn); !ok {
			return nil, 0, ReasonProtocol
		}
		if s != begun { // the roots that the handshake trusted may be gone
			if reason := l.peer.review(time.Now(), s, map[string]error{}); reason != "" {
				return nil, 0, reason
			}
		}
		// HTTP is decided per request, which can be answered with the reason.
		if web == 0 {
			d := in.policy.Decide(intentions.Request{
				Source: l.source, Destination: in.destination, Port: in.Port, Now: time.Now(),
			})
			l.decision = d
			p.decided(ctx, l, in.destination, d)
			if d.Reason == intentions.ReasonNotHTTP {
				return nil, 0, ReasonNotHTTP
			}
			if !d.Allowed {
				return nil, 0, ReasonDenied
			}
		}
		l.mu.Lock()
		l.admitted, l.web = true, web != 0
		l.mu.Unlock()
		if s == p.current() {
			l.edge = p.metrics.edge(edgeKey{direction: inbound, source: l.source, destination: in.destination})
			return in, web, ""
		}
	}
}

// decided counts a decision and tells of it.
func (p *Plane) decided(ctx context.Context, l *link, to catalog.Name, d intentions.Decision) {
	p.metrics.decided(d)
	if !p.log.Enabled(ctx, slog.LevelDebug) {
		return
	}
	p.log.LogAttrs(ctx, slog.LevelDebug, "intention decided", slog.String("source", l.source.String()),
		slog.String("destination", to.String()), slog.Bool("allowed", d.Allowed), slog.String("reason", string(d.Reason)),
		slog.String("intention", d.Key.String()), slog.Int("rule", d.Rule))
}

// refuse counts a connection that carried nothing.
func (p *Plane) refuse(ctx context.Context, l *link, reason Reason) {
	p.metrics.refused.WithLabelValues(string(l.direction), string(reason)).Inc()
	p.log.LogAttrs(ctx, slog.LevelDebug, "connection refused", slog.String("direction", string(l.direction)),
		slog.String("source", l.source.String()), slog.String("name", l.name), slog.String("listener", l.listener),
		slog.String("reason", string(reason)))
	p.connectionRefused(l, reason)
}

func (p *Plane) logCut(ctx context.Context, l *link, reason Reason) {
	p.log.LogAttrs(ctx, slog.LevelDebug, "connection cut", slog.String("direction", string(l.direction)),
		slog.String("source", l.source.String()), slog.String("name", l.name), slog.String("listener", l.listener),
		slog.String("reason", string(reason)), slog.Duration("age", time.Since(l.started)))
}
