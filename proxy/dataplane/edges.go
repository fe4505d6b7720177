package dataplane

import (
	"cmp"
	"context"
	"maps"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"github.com/meshd/meshd/proxy/flow"
)

// edgesEvery is how often counters are sampled unless the query says otherwise.
const edgesEvery = 2 * time.Second

// watchEdges emits samples until ctx ends.
func (p *Plane) watchEdges(ctx context.Context, q flow.Query, filter *flow.Filter, emit func(flow.Answer) error) error {
	tick := time.NewTicker(cmp.Or(time.Duration(q.Interval), edgesEvery))
	defer tick.Stop()
	for {
		sample, err := p.sample(filter)
		if err != nil {
			return err
		}
		if err := emit(flow.Answer{Sample: sample, Caught: true}); err != nil {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// sample reads the counters of the edges that are selected.
func (p *Plane) sample(filter *flow.Filter) (*flow.Sample, error) {
	s := p.current()
	out := &flow.Sample{Time: time.Now().UTC(), Session: p.session, Bounds: durationBuckets(), Edges: []flow.Edge{}}
	m := p.metrics
	m.mu.RLock()
	edges := maps.Clone(m.edges)
	m.mu.RUnlock()
	for key, e := range edges {
		destination := s.service(key)
		if !filter.Between(key.source, destination) {
			continue
		}
		one := flow.Edge{Direction: flow.Direction(key.direction), Source: key.source, Destination: destination}
		if err := e.read(&one); err != nil {
			return nil, err
		}
		out.Edges = append(out.Edges, one)
	}
	return out, nil
}

// read fills what is counted.
func (e *edge) read(out *flow.Edge) error {
	var err error
	counter := func(c prometheus.Counter) uint64 {
		var m dto.Metric
		if failed := c.Write(&m); failed != nil {
			err = failed
		}
		return uint64(m.GetCounter().GetValue())
	}
	for i, c := range e.requests {
		out.Requests[i] = counter(c)
	}
	out.Denied, out.DeniedRequests, out.Unsent = counter(e.denied), e.deniedRequests.Load(), e.unsent.Load()
	out.Sessions, out.Open = counter(e.conns), e.open.Load()
	out.Sent, out.Received = counter(e.bytesSent), counter(e.bytesReceived)
	histogram, ok := e.duration.(prometheus.Metric)
	if !ok {
		return err
	}
	var m dto.Metric
	if failed := histogram.Write(&m); failed != nil {
		return failed
	}
	h, before := m.GetHistogram(), uint64(0)
	if h.GetSampleCount() == 0 {
		return err
	}
	for _, b := range h.GetBucket() {
		out.Durations = append(out.Durations, b.GetCumulativeCount()-before)
		before = b.GetCumulativeCount()
	}
	out.Durations = append(out.Durations, h.GetSampleCount()-before)
	return err
}
