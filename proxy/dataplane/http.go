package dataplane

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/meshd/meshd/proxy/http1"
	"github.com/meshd/meshd/proxy/l7"
)

// headers lets intentions look at a request's fields.
type headers http1.Fields

// HeaderValue implements intentions.HeaderLookup.
func (h *headers) HeaderValue(name string, i int) ([]byte, bool) {
	for f := range *h {
		if field := &(*h)[f]; equalFold(field.Name, name) {
			if i == 0 {
				return field.Value, true
			}
			i--
		}
	}
	return nil, false
}

// equalFold compares ASCII; lower is in lower case already.
func equalFold(b []byte, lower string) bool {
	if len(b) != len(lower) {
		return false
	}
	for i, c := range b {
		if 'A' <= c && c <= 'Z' {
			c |= 0x20
		}
		if c != lower[i] {
			return false
		}
	}
	return true
}

// version is the version of HTTP that a client speaks.
type version uint8

const (
	one version = 1
	two version = 2
)

// ingress answers the requests of other proxies: the local application does, if the policy allows.
type ingress struct {
	p *Plane
	version
}

// Handle implements l7.Handler.
func (h ingress) Handle(ex *l7.Exchange) l7.Response {
	l, ok := ex.Conn.User.(*link)
	if !ok {
		return ex.Fail(&l7.Error{Reason: l7.Internal, Err: errNoLink})
	}
	a := h.p.begin(l, ex, h.version)
	in := h.p.current().inbounds[l.name]
	if in == nil {
		return a.fail(&l7.Error{Reason: l7.NoRoute, Err: errUnknownName})
	}
	a.edge, a.target = l.edge, in.Service
	ex.Record.Destination, ex.Record.Endpoint = in.destination, in.Instance
	a.decision = a.decide(in, time.Now())
	ex.Record.Rule = a.decision.Rule
	h.p.decided(context.Background(), l, in.destination, a.decision)
	if !a.decision.Allowed {
		return a.fail(&l7.Error{Reason: l7.Denied, Detail: string(a.decision.Reason)})
	}
	return a.local(in)
}

// egress sends the requests of a local application to the mesh.
type egress struct {
	p *Plane
	version
}

var errNoLink = errors.New("the connection is not in the table")

// Handle implements l7.Handler.
func (h egress) Handle(ex *l7.Exchange) l7.Response {
	l, ok := ex.Conn.User.(*link)
	if !ok {
		return ex.Fail(&l7.Error{Reason: l7.Internal, Err: errNoLink})
	}
	a := h.p.begin(l, ex, h.version)
	route := h.p.current().upstreams[l.listener]
	if route == nil || !route.http && !route.auto || route.source != ex.Conn.Source {
		// The listener became another one: the connection must, too.
		l.drain()
		return a.fail(&l7.Error{Reason: l7.NoRoute, Detail: "the upstream was changed; connect again"})
	}
	ex.Record.Destination = route.destination
	if l.destination != route.destination { // the listener leads elsewhere since this connection was accepted
		l.lead(route)
	}
	a.edge, a.target = l.edge, l.target
	if route.cluster.Denied != "" {
		return a.fail(&l7.Error{Reason: l7.Denied, Detail: route.cluster.Denied})
	}
	if l.cluster != route.cluster.Name { // it was refused until now
		l.lead(route)
	}
	return a.remote(route)
}

// record counts a finished exchange.
func (p *Plane) record(side direction, r *l7.Record) {
	if r.Reason != l7.None {
		p.metrics.failures.WithLabelValues(string(side), r.Reason.String()).Inc()
	}
	if refused, isRefused := errors.AsType[*http1.Error](r.Err); isRefused && refused.Limit != "" {
		p.http1.WithLabelValues(string(refused.Limit)).Inc()
	}
	a, ok := r.User.(*attempt)
	if ok {
		a.settle(r)
		defer p.release(a)
	}
	if p.access.on.Load() {
		p.access.request(side, r, a)
	}
	if r.Reason != l7.None || r.ErrorID != "" || !p.watch.idle() {
		p.requestEnded(side, r, a)
	}
	if !ok {
		return // refused before the handler was asked: no HTTP as this mesh accepts it
	}
	if a.edge == nil {
		return // it led nowhere
	}
	a.edge.requests[a.class(r.Status)].Inc()
	a.edge.duration.Observe(r.Duration.Seconds())
	if a.grpc {
		p.metrics.grpc(a.edge, a.status)
	}
	if r.Err != nil && p.log.Enabled(context.Background(), slog.LevelDebug) {
		p.log.LogAttrs(context.Background(), slog.LevelDebug, "request failed", slog.String("error_id", r.ErrorID),
			slog.String("source", a.link.source.String()), slog.String("destination", r.Destination.String()),
			slog.String("reason", r.Reason.String()), slog.Int("status", r.Status), slog.Any("error", r.Err))
	}
}
