package rpc_test

import (
	"context"
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/intentions"
	"github.com/meshd/meshd/proxy/flow"
	"github.com/meshd/meshd/server/meshpb"
	"github.com/meshd/meshd/server/rpc"
	"github.com/meshd/meshd/server/state"
)

func name(service string) catalog.Name {
	return catalog.Name{Namespace: catalog.DefaultNamespace, Name: service}
}

// The word of the server that a node is connected to counts, by the newest lease; of a
// node that is connected nowhere, the newest word.
func TestMergedRollout(t *testing.T) {
	t.Parallel()
	t0 := time.Unix(1000, 0)
	refusing := rpc.Proxy{Node: "b", ID: "p", Refused: "no key"}
	f := rpc.Fleet{Replies: []rpc.FleetReply{
		{Server: "s1", Rollout: map[string]rpc.NodeRollout{
			"a": {Epoch: 3, Proxies: 1, Closed: 1}, // half open: it has moved to s2
			"b": {Epoch: 1, Proxies: 1, Refused: 1, Refusals: []rpc.Proxy{refusing}},
			"c": {Proxies: 1, Offline: 1, Reported: t0},
			"z": {Epoch: 1, Proxies: 1, Applied: 1}, // of another service
		}},
		{Server: "s2", Rollout: map[string]rpc.NodeRollout{
			"a": {Epoch: 4, Proxies: 2, Applied: 2, Closed: 5},
			"b": {Proxies: 1, Applied: 1, Reported: t0},
			"c": {Proxies: 2, Offline: 1, Applied: 1, Reported: t0.Add(time.Second)},
		}},
	}}
	got := f.Rollout([]catalog.Name{name("web")}, func(catalog.Name) []string { return []string{"a", "b", "c", "d"} })
	want := []rpc.Rollout{{
		Service: name("web"), Proxies: 6, Applied: 3, Refused: 1, Offline: 2, Closed: 5, Refusals: []rpc.Proxy{refusing},
	}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestMergedProxiesCallersAndHeld(t *testing.T) {
	t.Parallel()
	t0 := time.Unix(1000, 0)
	f := rpc.Fleet{Replies: []rpc.FleetReply{
		{
			Callers: []catalog.Name{name("web"), name("cron")}, Held: []string{"b", "a"},
			Proxies: []rpc.Proxy{{Node: "a", ID: "p", Reported: t0.Add(time.Hour)}, {Node: "b", ID: "p", Reported: t0}},
		},
		{
			Callers: []catalog.Name{name("web")}, Held: []string{"c"},
			Proxies: []rpc.Proxy{
				{Node: "b", ID: "p", Reported: t0.Add(time.Second), Closed: 7},
				{Node: "a", ID: "p", Reported: t0, Connected: true, Epoch: 2},
			},
		},
	}}
	if diff := cmp.Diff([]catalog.Name{name("cron"), name("web")}, f.Callers()); diff != "" {
		t.Errorf("callers (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{"a", "b", "c"}, f.Held()); diff != "" {
		t.Errorf("held (-want +got):\n%s", diff)
	}
	want := []rpc.Proxy{{Node: "a", ID: "p", Reported: t0, Connected: true, Epoch: 2}, {Node: "b", ID: "p", Reported: t0.Add(time.Second), Closed: 7}}
	if diff := cmp.Diff(want, f.Proxies()); diff != "" {
		t.Errorf("proxies (-want +got):\n%s", diff)
	}
}

// A rollout counts the proxies at all servers. One that can't be asked is named as long
// as some node holds its lease there.
func TestRolloutOverSeveralServers(t *testing.T) {
	t.Parallel()
	cluster3(t, func(t *testing.T, c *several) { //nolint:thelper // the body of the test
		var sessions []*session
		for i, leaf := range c.nodes(2) {
			node := leaf.ID().Name
			register(t, direct{c.servers["s1"], leaf}, definition(t, node, api(""), catalog.HealthPassing))
			s := c.servers[[]string{"s2", "s3"}[i]].dialPipe(leaf, "a")
			s.beat(t.Context())
			sessions = append(sessions, s)
		}
		sessions[0].up <- &meshpb.SyncRequest{Message: &meshpb.SyncRequest_Subscribe{Subscribe: &meshpb.Subscribe{
			Topics: []*meshpb.Topic{topicUpstream("cron", "api")},
		}}}
		at := c.servers["s1"].intention("web", "api", intentions.Allow)
		report := func(s *session, at catalog.Position) {
			s.up <- &meshpb.SyncRequest{Message: &meshpb.SyncRequest_Applied{Applied: &meshpb.Applied{
				Proxy: "p", Position: &meshpb.Position{Generation: at.Generation, Revision: at.Revision}, Closed: 2,
			}}}
			wait(0)
		}
		report(sessions[0], at)
		look := func() (rpc.Rollout, []string) {
			all, unasked := c.servers["s1"].rpc.ClusterRollout(t.Context(), at, []catalog.Name{name("api")})
			return all[0], unasked
		}
		if r, unasked := look(); r.Done() || r.Applied != 1 || r.Proxies != 2 || unasked != nil {
			t.Errorf("one of two: %+v, not asked %v", r, unasked)
		}
		report(sessions[1], at)
		if r, unasked := look(); !r.Done() || r.Closed != 4 || unasked != nil {
			t.Errorf("both: %+v, not asked %v", r, unasked)
		}
		if callers := c.servers["s3"].rpc.AskFleet(t.Context(), rpc.FleetRequest{Callers: []catalog.Name{name("api")}}).Callers(); !slices.Equal(callers, []catalog.Name{name("cron")}) {
			t.Errorf("callers: %v", callers)
		}
		c.deaf("s3")
		if r, unasked := look(); r.Done() || r.Offline != 1 || !slices.Equal(unasked, []string{"s3"}) {
			t.Errorf("s3 can't be asked: %+v, not asked %v", r, unasked)
		}
		sessions[1].hangUp()
		wait(2 * rpc.DefaultLease)
		if r, unasked := look(); r.Done() || unasked != nil {
			t.Errorf("s3 has nobody any more: %+v, not asked %v", r, unasked)
		}
		sessions[0].hangUp()
		wait(0)
	})
}

var errRefused = errors.New("refused")

// hosts answer as those of one server do.
func hosts(server string, pieces ...flow.Answer) rpc.Asker {
	return rpc.Asker{Server: server, Ask: func(_ context.Context, emit func(flow.Answer) error) error {
		for _, p := range pieces {
			if err := emit(p); err != nil {
				return err
			}
		}
		return nil
	}}
}

func record(id string, at int64) flow.Record {
	return flow.Record{
		ErrorID: id, Time: time.Unix(at, 0), Verdict: flow.Denied,
		Source: spiffe.Service(trustDomain, "default", "web"), Destination: spiffe.Service(trustDomain, "default", "api"),
	}
}

func TestMergedAnswers(t *testing.T) {
	t.Parallel()
	stuck := rpc.Asker{Server: "s2", Ask: func(ctx context.Context, _ func(flow.Answer) error) error { <-ctx.Done(); return nil }}
	failing := rpc.Asker{Server: "s2", Ask: func(context.Context, func(flow.Answer) error) error { return errRefused }}
	own := hosts("s1", flow.Answer{Records: []flow.Record{record("a", 1)}, Caught: true, Hosts: 2, Silent: []string{"vm-9: no answer"}})
	for _, row := range []struct {
		name   string
		query  flow.Query
		others []rpc.Asker
		want   flow.Answer
		within time.Duration
	}{
		{
			"denials of two",
			flow.Query{Want: flow.Denials, Limit: 10},
			[]rpc.Asker{hosts("s2", flow.Answer{Records: []flow.Record{record("c", 3)}}, flow.Answer{Records: []flow.Record{record("b", 2)}, Caught: true, Hosts: 3})},
			flow.Answer{Records: []flow.Record{record("c", 3), record("b", 2), record("a", 1)}, Caught: true, Hosts: 5, Silent: []string{"vm-9: no answer"}},
			0,
		},
		{
			"one can't be asked",
			flow.Query{Want: flow.Denials, Limit: 10},
			[]rpc.Asker{failing},
			flow.Answer{Records: []flow.Record{record("a", 1)}, Caught: true, Hosts: 2, Silent: []string{"server s2: could not be asked", "vm-9: no answer"}},
			0,
		},
		{
			"one is stuck",
			flow.Query{Want: flow.Denials, Limit: 10},
			[]rpc.Asker{stuck},
			flow.Answer{Records: []flow.Record{record("a", 1)}, Caught: true, Hosts: 2, Silent: []string{"server s2: did not answer", "vm-9: no answer"}},
			5 * time.Second,
		},
		{
			"found: the stuck one is not missed",
			flow.Query{Want: flow.Find, ID: "a1b2c3"},
			[]rpc.Asker{stuck},
			flow.Answer{Records: []flow.Record{record("a", 1)}, Caught: true, Hosts: 2, Silent: []string{"vm-9: no answer"}},
			time.Second,
		},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				began := time.Now()
				var got flow.Answer
				err := rpc.MergeAnswers(t.Context(), row.query, own, func() []rpc.Asker { return row.others }, func(a flow.Answer) error {
					got = a
					return nil
				})
				if err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(row.want, got); diff != "" {
					t.Errorf("(-want +got):\n%s", diff)
				}
				if took := time.Since(began); took > row.within {
					t.Errorf("it took %s", took)
				}
			})
		})
	}
}

// A lasting question is put again to a server that has failed, and the answer tells when
// it is missing and when it is back.
func TestLastingQuestionReachesAServerThatReturns(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		lasting := func(hosts int) func(context.Context, func(flow.Answer) error) error {
			return func(ctx context.Context, emit func(flow.Answer) error) error {
				if err := emit(flow.Answer{Caught: true, Hosts: hosts}); err != nil {
					return err
				}
				<-ctx.Done()
				return nil
			}
		}
		tries := 0
		flaky := rpc.Asker{Server: "s2", Ask: func(ctx context.Context, emit func(flow.Answer) error) error {
			if tries++; tries < 3 {
				return errRefused
			}
			return lasting(4)(ctx, emit)
		}}
		var got []flow.Answer
		done := make(chan error, 1)
		go func() {
			done <- rpc.MergeAnswers(ctx, flow.Query{Want: flow.Records}, rpc.Asker{Server: "s1", Ask: lasting(1)},
				func() []rpc.Asker { return []rpc.Asker{flaky} }, func(a flow.Answer) error {
					got = append(got, a)
					return nil
				})
		}()
		wait(10 * time.Second)
		cancel()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		want := []flow.Answer{{Caught: true, Hosts: 1, Silent: []string{"server s2: could not be asked"}}, {Caught: true, Hosts: 5}}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	})
}

// What fails here fails the question.
func TestAskFailsAsItsOwnServer(t *testing.T) {
	t.Parallel()
	own := rpc.Asker{Server: "s1", Ask: func(context.Context, func(flow.Answer) error) error { return rpc.ErrAsks }}
	err := rpc.MergeAnswers(t.Context(), flow.Query{Want: flow.Records}, own, func() []rpc.Asker { return nil }, func(flow.Answer) error { return nil })
	if !errors.Is(err, rpc.ErrAsks) {
		t.Errorf("got %v", err)
	}
	if err := rpc.MergeAnswers(t.Context(), flow.Query{Want: "?"}, own, nil, nil); !errors.Is(err, flow.ErrQuery) {
		t.Errorf("a bad query: %v", err)
	}
}

// Each server forgets a node that was deleted; its stream ends wherever it is.
func TestDeletedNodeAtAnotherServer(t *testing.T) {
	t.Parallel()
	cluster3(t, func(t *testing.T, c *several) { //nolint:thelper // the body of the test
		leaf := c.nodes(1)[0]
		s := c.servers["s3"].dialPipe(leaf, "a")
		s.beat(t.Context())
		c.servers["s2"].update(func(tx *state.Tx) error { state.Nodes.Delete(tx, "vm-0"); return nil })
		if reason := reasonOf(<-s.done); reason != meshpb.ReasonNodeUnknown {
			t.Errorf("the stream ended by %q", reason)
		}
		wait(5 * time.Second)
		if n := state.NodeIdentities.Len(c.servers["s1"].state.Snapshot()); n != 0 {
			t.Errorf("%d identities are left", n)
		}
	})
}
