package flow_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/meshd/meshd/proxy/flow"
)

func records(from, to int) []flow.Record {
	var out []flow.Record
	for i := from; i < to; i++ {
		out = append(out, flow.Record{Time: time.Unix(int64(i), 0), ErrorID: fmt.Sprintf("%06x", i)})
	}
	return out
}

func TestMailboxDropsWhatDoesNotFit(t *testing.T) {
	m := flow.NewMailbox(flow.Query{Want: flow.Records})
	m.Put(flow.Answer{Records: records(0, 2000), Dropped: 5})
	m.Put(flow.Answer{Records: records(2000, 3000)})
	got := m.Take()
	if len(got) != 1 || len(got[0].Records) != 2048 || got[0].Dropped != 957 {
		t.Fatalf("%d pieces, the first with %d records, %d dropped", len(got), len(got[0].Records), got[0].Dropped)
	}
	if diff := cmp.Diff(records(0, 2048), got[0].Records); diff != "" {
		t.Error(diff)
	}
	if got := m.Take(); got != nil {
		t.Errorf("something is left: %+v", got)
	}
}

func TestMailboxKeepsTheNewestOfThePast(t *testing.T) {
	m := flow.NewMailbox(flow.Query{Want: flow.Denials, Limit: 3})
	for i := range 50 {
		m.Put(flow.Answer{Records: records(i*10, i*10+10), Caught: true, Kept: flow.Kept{Records: 1024, Since: time.Unix(int64(i), 0)}})
	}
	got := m.Take()
	want := []flow.Answer{{
		Records: []flow.Record{records(499, 500)[0], records(498, 499)[0], records(497, 498)[0]}, Caught: true,
		Kept: flow.Kept{Records: 1024, Since: time.Unix(49, 0)},
	}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestMailboxKeepsTheNewestSample(t *testing.T) {
	m := flow.NewMailbox(flow.Query{Want: flow.Edges})
	for i := range 5 {
		for _, node := range []string{"vm-b", "vm-a"} {
			m.Put(flow.Answer{Sample: &flow.Sample{Node: node, Session: "s", Time: time.Unix(int64(i), 0)}})
		}
	}
	want := []flow.Answer{
		{Sample: &flow.Sample{Node: "vm-b", Session: "s", Time: time.Unix(4, 0)}},
		{Sample: &flow.Sample{Node: "vm-a", Session: "s", Time: time.Unix(4, 0)}},
	}
	if diff := cmp.Diff(want, m.Take()); diff != "" {
		t.Error(diff)
	}
}

func TestMailboxDrain(t *testing.T) {
	m := flow.NewMailbox(flow.Query{Want: flow.Records})
	ended := make(chan struct{})
	m.Put(flow.Answer{Records: records(0, 1)})
	n := 0
	err := m.Drain(t.Context(), ended, func(a flow.Answer) error {
		if n += len(a.Records); n > 1 {
			m.Put(flow.Answer{Records: records(2, 3)})
			close(ended)
			return errEnough
		}
		m.Put(flow.Answer{Records: records(1, 2)})
		return nil
	})
	if !errors.Is(err, errEnough) || n != 2 {
		t.Errorf("%v after %d records", err, n)
	}
	n = 0
	if err := m.Drain(t.Context(), ended, func(a flow.Answer) error { n += len(a.Records); return nil }); err != nil || n != 1 {
		t.Errorf("%v after %d records, want what was left", err, n)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := m.Drain(ctx, nil, func(flow.Answer) error { return errEnough }); err != nil {
		t.Error(err)
	}
}

var errEnough = errors.New("enough")
