package main

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"google.golang.org/protobuf/encoding/protodelim"
)

// counters gathers what this process has counted, on top of what the processes counted whose place it took: to Prometheus they are
// one that never restarted. Some of those may still drain, and count.
type counters struct {
	own prometheus.Gatherer

	mu sync.Mutex
	// before is as another process told it last: decoded only to answer, it is a tenth of the size.
	before []byte
	// draining is how many processes before this one live.
	draining int
}

// set takes what the process before this one, and those before that, have counted up to now, and how many of them live.
func (c *counters) set(families []byte, draining int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.before, c.draining = families, draining
}

// alone notes that no earlier process lives.
func (c *counters) alone() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.draining = 0
}

// earlier returns how many earlier processes live.
func (c *counters) earlier() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.draining
}

// Gather implements prometheus.Gatherer.
func (c *counters) Gather() ([]*dto.MetricFamily, error) {
	own, err := c.own.Gather()
	if err != nil {
		return own, err
	}
	c.mu.Lock()
	data, alive := c.before, c.draining > 0
	c.mu.Unlock()
	before, err := decodeFamilies(data)
	if err != nil {
		return own, err
	}
	return addFamilies(own, before, alive), nil
}

// encode returns what a successor is to count on.
func (c *counters) encode() ([]byte, error) {
	families, err := c.Gather()
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	for _, f := range families {
		if !counts(f, true) {
			continue
		}
		if _, err := protodelim.MarshalTo(&out, f); err != nil {
			return nil, fmt.Errorf("write the counters down: %w", err)
		}
	}
	return out.Bytes(), nil
}

// maxFamily bounds one family of another process.
const maxFamily = 64 << 20

func decodeFamilies(data []byte) ([]*dto.MetricFamily, error) {
	var out []*dto.MetricFamily
	in := bytes.NewReader(data)
	for {
		var f dto.MetricFamily
		err := protodelim.UnmarshalOptions{MaxSize: maxFamily}.UnmarshalFrom(in, &f)
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			return nil, fmt.Errorf("read the counters of an earlier process: %w", err)
		}
		out = append(out, &f)
	}
}

// counts reports whether a family goes on over processes: what is counted, and, while they live, what they have open. What a
// process uses of the machine is its own.
func counts(f *dto.MetricFamily, alive bool) bool {
	if !strings.HasPrefix(f.GetName(), "mesh_") {
		return false
	}
	switch f.GetType() {
	case dto.MetricType_COUNTER, dto.MetricType_HISTOGRAM:
		return true
	case dto.MetricType_GAUGE:
		return alive && strings.HasSuffix(f.GetName(), "_open")
	default:
		return false
	}
}

// addFamilies adds what was counted before to own, which it changes.
func addFamilies(own, before []*dto.MetricFamily, alive bool) []*dto.MetricFamily {
	byName := make(map[string]*dto.MetricFamily, len(own))
	for _, f := range own {
		byName[f.GetName()] = f
	}
	for _, old := range before {
		if !counts(old, alive) {
			continue
		}
		f := byName[old.GetName()]
		if f == nil {
			own = append(own, old)
			continue
		}
		if f.GetType() == old.GetType() {
			addMetrics(f, old.GetMetric())
		}
	}
	slices.SortFunc(own, func(a, b *dto.MetricFamily) int { return cmp.Compare(a.GetName(), b.GetName()) })
	return own
}

func addMetrics(f *dto.MetricFamily, before []*dto.Metric) {
	byLabels := make(map[string]*dto.Metric, len(f.GetMetric()))
	for _, m := range f.GetMetric() {
		byLabels[labelKey(m)] = m
	}
	for _, old := range before {
		m := byLabels[labelKey(old)]
		if m == nil {
			f.Metric = append(f.Metric, old)
			continue
		}
		addMetric(m, old)
	}
}

// labelKey is one string per set of labels; a registry sorts them.
func labelKey(m *dto.Metric) string {
	var key strings.Builder
	for _, l := range m.GetLabel() {
		key.WriteString(l.GetName())
		key.WriteByte(0xff)
		key.WriteString(l.GetValue())
		key.WriteByte(0xff)
	}
	return key.String()
}

func addMetric(m, old *dto.Metric) {
	switch {
	case m.GetCounter() != nil && old.GetCounter() != nil:
		m.Counter.Value = new(m.Counter.GetValue() + old.Counter.GetValue())
		m.Counter.CreatedTimestamp = old.Counter.CreatedTimestamp
	case m.GetGauge() != nil && old.GetGauge() != nil:
		m.Gauge.Value = new(m.Gauge.GetValue() + old.Gauge.GetValue())
	case m.GetHistogram() != nil && old.GetHistogram() != nil:
		addHistogram(m.Histogram, old.Histogram)
	}
}

// addHistogram adds histograms of the same buckets. Another version's that differ start over, as after any restart.
func addHistogram(h, old *dto.Histogram) {
	if !slices.EqualFunc(h.GetBucket(), old.GetBucket(), func(a, b *dto.Bucket) bool { return a.GetUpperBound() == b.GetUpperBound() }) {
		return
	}
	for i, b := range h.GetBucket() {
		b.CumulativeCount = new(b.GetCumulativeCount() + old.Bucket[i].GetCumulativeCount())
	}
	h.SampleCount = new(h.GetSampleCount() + old.GetSampleCount())
	h.SampleSum = new(h.GetSampleSum() + old.GetSampleSum())
	h.CreatedTimestamp = old.CreatedTimestamp
}
