package dataplane

import (
	"context"
	"errors"
	"net"
	"time"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/proxy/http2"
	"github.com/meshd/meshd/proxy/l7"
)

// errOtherVersion is that a proxy speaks another version of HTTP than it did before.
var errOtherVersion = errors.New("the proxy there speaks another version of HTTP")

// pools are the connections to one endpoint or application by version of HTTP. Those that are never needed are nil.
type pools struct {
	one *l7.Pool
	two *http2.Pool
}

// newPools makes those that a protocol needs.
func (p *Plane) newPools(limits Limits, protocol catalog.Protocol, upgrade bool, limit time.Duration, dial func(context.Context, version) (net.Conn, error)) (ps pools) {
	protocol = protocol.OrAuto()
	if protocol == catalog.ProtocolHTTP || protocol == catalog.ProtocolAuto {
		ps.one = l7.NewPool(l7.PoolConfig{
			Dial:           func(ctx context.Context) (net.Conn, error) { return dial(ctx, one) },
			ConnectTimeout: limit, Limits: limits.Head,
		})
	}
	if protocol == catalog.ProtocolHTTP2 || protocol == catalog.ProtocolGRPC || protocol == catalog.ProtocolAuto || upgrade {
		ps.two = http2.NewPool(http2.PoolConfig{
			Dial:           func(ctx context.Context) (net.Conn, error) { return dial(ctx, two) },
			ConnectTimeout: limit, Limits: limits.Head, HTTP2: limits.upstream(), Counters: &p.http2,
		})
	}
	return ps
}

// web reports whether it is HTTP at all.
func (ps *pools) web() bool { return ps.one != nil || ps.two != nil }

// retire closes what is idle, and the rest when it is.
func (ps *pools) retire() {
	if ps.one != nil {
		ps.one.CloseIdle()
	}
	if ps.two != nil {
		ps.two.CloseIdle()
	}
}

// upstream returns the connections to an endpoint for what came by a version.
func (e *endpoint) upstream(v version) l7.Upstream {
	switch {
	case e.one == nil:
		return e.two
	case e.key.upgrade && e.old.Load():
		return e.one
	case e.key.upgrade, e.two != nil && v == two:
		return e.two
	default:
		return e.one
	}
}

// shares reports whether what came by a version is sent on connections that carry many requests at a time.
func (r *upstreamRoute) shares(v version) bool {
	switch r.cluster.Protocol.OrAuto() {
	case catalog.ProtocolHTTP:
		return r.cluster.Upgrade
	case catalog.ProtocolAuto:
		return v == two
	default:
		return true
	}
}

// dialHTTP connects to an endpoint to speak a version of HTTP. A proxy that is too old for HTTP/2 carries it as the bytes that
// it is, to the application, where its policy allows that.
func (p *Plane) dialHTTP(ctx context.Context, e *endpoint, v version) (net.Conn, error) {
	alpn := []string{alpnHTTP1}
	switch {
	case e.key.upgrade:
		alpn = []string{alpnHTTP2, alpnHTTP1}
	case v == two:
		alpn = []string{alpnHTTP2, alpnTCP}
	}
	conn, agreed, err := p.dialEndpoint(ctx, e, alpn...)
	if err != nil {
		return nil, err // not a nil *record.Conn
	}
	if e.key.upgrade {
		e.old.Store(agreed == alpnHTTP1)
		if webOf(agreed) != v {
			_ = conn.Close()
			return nil, errOtherVersion
		}
	}
	return conn, nil
}

// servers serve the connections of one direction by version of HTTP.
type servers struct {
	one *l7.Server
	two *http2.Server
}

func (p *Plane) newServers(limits Limits, side direction, handler func(version) l7.Handler) servers {
	common := l7.ServerConfig{
		Log: p.log, IdleTimeout: limits.IdleTimeout, StreamIdle: limits.IdleTimeout, Limits: limits.Head,
		Sink: func(r *l7.Record) { p.record(side, r) },
	}
	first, second := common, common
	first.Handler, second.Handler = handler(one), handler(two)
	bounds := limits.HTTP2
	if side == inbound {
		bounds = limits.mesh()
	}
	return servers{
		one: l7.NewServer(first),
		two: http2.NewServer(http2.ServerConfig{ServerConfig: second, Bounds: bounds, Counters: &p.http2}),
	}
}
