package dataplane

import (
	"cmp"
	"errors"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/meshd/meshd/proxy"
	"github.com/meshd/meshd/proxy/http1"
	"github.com/meshd/meshd/proxy/http2"
)

// with returns l with what a plan sets.
func (l Limits) with(plan proxy.Limits) Limits {
	set := func(v *int, planned int) { *v = cmp.Or(planned, *v) }
	set(&l.Connections, plan.Connections)
	set(&l.Head.HeadBytes, plan.HeadBytes)
	set(&l.Head.LineBytes, plan.LineBytes)
	set(&l.Head.Fields, plan.Fields)
	l.Head.AllowUnderscore = l.Head.AllowUnderscore || plan.AllowUnderscore
	l.Head = l.Head.WithDefaults()
	l.Head.LineBytes = min(l.Head.LineBytes, l.Head.HeadBytes)
	set(&l.HTTP2.Streams, plan.HTTP2.Streams)
	set(&l.HTTP2.StreamWindow, plan.HTTP2.StreamWindow)
	set(&l.HTTP2.Window, plan.HTTP2.Window)
	set(&l.HTTP2.Resets, plan.HTTP2.Resets)
	set(&l.HTTP2.Control, plan.HTTP2.Control)
	set(&l.HTTP2.Continuations, plan.HTTP2.Continuations)
	set(&l.HTTP2.Answers, plan.HTTP2.Answers)
	return l
}

// The least limits of a connection that carries the streams of many clients, each of which was held to the limits of a client
// before: one that gives up what it asked for must not end the streams of the others.
const (
	sharedStreams = 1000
	sharedWindow  = 16 << 20
	sharedResets  = 10_000
)

// mesh are the limits of HTTP/2 for other proxies.
func (l Limits) mesh() http2.Limits {
	h := l.HTTP2
	h.Streams, h.Window, h.Resets = max(h.Streams, sharedStreams), max(h.Window, sharedWindow), max(h.Resets, sharedResets)
	return h
}

// upstream are the limits of HTTP/2 for endpoints and applications. How many streams they get is for them to say.
func (l Limits) upstream() http2.Limits {
	h := l.HTTP2
	h.Streams, h.Resets = 0, max(h.Resets, sharedResets)
	return h
}

// http2Limits are the counters of what HTTP/2's limits refused, by the label of the metric.
func http2Limits(c *http2.Counters) map[string]func() uint64 {
	return map[string]func() uint64{
		"streams":       c.Refused.Load,
		"resets":        c.Resets.Load,
		"control":       c.Control.Load,
		"continuations": c.Continuations.Load,
		"answers":       c.Answers.Load,
		"head-timeout":  c.HeadTimeouts.Load,
		"stalled":       c.Stalled.Load,
		"head-size":     c.HeadTooLarge.Load,
		"malformed":     c.Malformed.Load,
		"protocol":      c.Violations.Load,
		"idle":          c.Idle.Load,
		"waiting":       c.Waiting.Load,
	}
}

// limitMetrics are what the limits of HTTP refused.
func (p *Plane) limitMetrics(r prometheus.Registerer) error {
	var errs []error
	for limit, read := range http2Limits(&p.http2) {
		errs = append(errs, r.Register(prometheus.NewCounterFunc(prometheus.CounterOpts{
			Name: "mesh_http2_refusals_total", ConstLabels: prometheus.Labels{"limit": limit},
			Help: "What HTTP/2's limits refused: a stream, or a whole connection.",
		}, func() float64 { return float64(read()) })))
	}
	p.http1 = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "mesh_http1_refusals_total", Help: "Requests and responses of HTTP/1 that a limit of heads refused.",
	}, []string{"limit"})
	for _, limit := range http1.AllLimits() {
		p.http1.WithLabelValues(string(limit))
	}
	return errors.Join(append(errs, r.Register(p.http1))...)
}
