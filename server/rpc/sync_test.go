package rpc_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/intentions"
	"github.com/meshd/meshd/server/meshpb"
	"github.com/meshd/meshd/server/rpc"
	"github.com/meshd/meshd/server/state"
	"github.com/meshd/meshd/server/store"
)

// agent is a client of Sync that keeps what it is sent, as real agents do.
type agent struct {
	tb     testing.TB
	stream interface {
		Send(*meshpb.SyncRequest) error
		Recv() (*meshpb.SyncResponse, error)
	}
	held map[string]map[string]string // topic, key, JSON
	at   catalog.Position
	// resets counts the topics that were reset.
	resets int
}

// connect opens a stream, says hello, and checks the welcome.
func (c *cluster) connect(leaf *ca.Leaf, session string, topics ...*meshpb.Topic) *agent {
	c.tb.Helper()
	stream, err := c.dial(leaf).Sync(c.tb.Context())
	if err != nil {
		c.tb.Fatal(err)
	}
	a := &agent{tb: c.tb, stream: stream, held: make(map[string]map[string]string)}
	a.hello(session)
	a.subscribe(topics...)
	return a
}

func (a *agent) send(m *meshpb.SyncRequest) {
	a.tb.Helper()
	if err := a.stream.Send(m); err != nil {
		a.tb.Fatal(err)
	}
}

func (a *agent) hello(session string) {
	a.tb.Helper()
	a.send(&meshpb.SyncRequest{Message: &meshpb.SyncRequest_Hello{Hello: &meshpb.Hello{Session: session, Version: "test", Address: "10.0.0.9"}}})
	m, err := a.stream.Recv()
	if err != nil || m.GetWelcome() == nil {
		a.tb.Fatalf("instead of a welcome: %v, %v", m, err)
	}
}

func (a *agent) subscribe(topics ...*meshpb.Topic) {
	a.tb.Helper()
	a.send(&meshpb.SyncRequest{Message: &meshpb.SyncRequest_Subscribe{Subscribe: &meshpb.Subscribe{Topics: topics}}})
}

func (a *agent) heartbeat() {
	a.tb.Helper()
	a.send(&meshpb.SyncRequest{Message: &meshpb.SyncRequest_Heartbeat{Heartbeat: &meshpb.Heartbeat{}}})
}

func topicName(t *meshpb.Topic) string {
	return strings.TrimRight(t.GetKind()+" "+t.GetName()+" "+t.GetSource(), " ")
}

// next takes one message.
func (a *agent) next() error {
	m, err := a.stream.Recv()
	if err != nil {
		return err
	}
	a.take(m)
	return nil
}

func (a *agent) take(m *meshpb.SyncResponse) {
	if alive := m.GetAlive(); alive != nil {
		a.at = catalog.Position{Generation: alive.GetPosition().GetGeneration(), Revision: alive.GetPosition().GetRevision()}
	}
	b := m.GetBatch()
	if b == nil {
		return
	}
	for _, t := range b.GetReset_() {
		a.resets++
		a.held[topicName(t)] = make(map[string]string)
	}
	for _, i := range b.GetItems() {
		if i.GetJson() == nil {
			delete(a.held[topicName(i.GetTopic())], i.GetKey())
			continue
		}
		a.held[topicName(i.GetTopic())][i.GetKey()] = string(i.GetJson())
	}
	a.at = catalog.Position{Generation: b.GetPosition().GetGeneration(), Revision: b.GetPosition().GetRevision()}
}

// reach reads until the agent has all up to a position.
func (a *agent) reach(at catalog.Position) {
	a.tb.Helper()
	for a.at != at && !a.at.After(at) {
		a.heartbeat()
		if err := a.next(); err != nil {
			a.tb.Fatalf("on the way to %v: %v", at, err)
		}
	}
}

func (a *agent) keys(topic string) []string { return slices.Sorted(maps.Keys(a.held[topic])) }

func topicUpstream(source, destination string) *meshpb.Topic {
	return &meshpb.Topic{Kind: "upstream", Name: "default/" + destination, Source: "default/" + source}
}

func topicIntentions(destination string) *meshpb.Topic {
	return &meshpb.Topic{Kind: "intentions", Name: "default/" + destination}
}

func TestSyncFollowsTheCatalog(t *testing.T) {
	t.Parallel()
	c := start(t, rpc.Config{})
	c.listen()
	leafA, leafB := c.join("vm-a", "web"), c.join("vm-b", "api")
	b := c.dial(leafB)
	register(t, b, definition(t, "vm-b", api("api-1"), catalog.HealthPassing))
	a := c.connect(leafA, "s1", topicUpstream("web", "api"), &meshpb.Topic{Kind: "roots"}, &meshpb.Topic{Kind: "node"}, topicIntentions("web"))
	upstream := "upstream default/api default/web"
	steps := []struct {
		name string
		do   func() catalog.Position
		want []string
	}{
		{"denied", func() catalog.Position { return c.state.Snapshot().Position() }, []string{"denied", "service"}},
		{
			"allowed", func() catalog.Position { return c.intention("web", "api", intentions.Allow) },
			[]string{"instance/vm-b/api-1", "service", "status/vm-b/api-1"},
		},
		{"a second instance, by the same ID on another node", func() catalog.Position {
			leafC := c.join("vm-c", "api")
			return position(register(t, c.dial(leafC), definition(t, "vm-c", api("api-1"), catalog.HealthPassing)))
		}, []string{"instance/vm-b/api-1", "instance/vm-c/api-1", "service", "status/vm-b/api-1", "status/vm-c/api-1"}},
		{"its agent connects", func() catalog.Position {
			c.connect(leafB, "sb")
			return c.state.Snapshot().Position()
		}, []string{"instance/vm-b/api-1", "instance/vm-c/api-1", "lease/vm-b", "service", "status/vm-b/api-1", "status/vm-c/api-1"}},
		{
			"the first is gone, its lease too", func() catalog.Position { return position(register(t, b)) },
			[]string{"instance/vm-c/api-1", "service", "status/vm-c/api-1"},
		},
		{"denied again", func() catalog.Position { return c.intention("web", "api", intentions.Deny) }, []string{"denied", "service"}},
	}
	for _, step := range steps {
		a.reach(step.do())
		if diff := cmp.Diff(step.want, a.keys(upstream)); diff != "" {
			t.Fatalf("%s (-want +got):\n%s", step.name, diff)
		}
	}
	if diff := cmp.Diff([]string{trustDomain}, a.keys("roots")); diff != "" || !strings.Contains(a.held["roots"][trustDomain], "BEGIN CERTIFICATE") {
		t.Errorf("roots: %v", a.held["roots"])
	}
	if !strings.Contains(a.held["node"]["spec"], `"vm-a"`) {
		t.Errorf("node: %v", a.held["node"])
	}
	if a.resets != 6 { // four topics, and two turns of the gate of one
		t.Errorf("%d topics were reset, want 6", a.resets)
	}
}

func position(r *meshpb.RegisterResponse) catalog.Position {
	return catalog.Position{Generation: r.GetPosition().GetGeneration(), Revision: r.GetPosition().GetRevision()}
}

// A node sees what its services need, and nothing for the asking.
func TestSyncScope(t *testing.T) {
	t.Parallel()
	c := start(t, rpc.Config{})
	c.listen()
	leafA, leafB := c.join("vm-a", "web"), c.join("vm-b", "api", "db")
	register(t, c.dial(leafB), definition(t, "vm-b", api(""), catalog.HealthPassing))
	c.intention("*", "*", intentions.Allow)
	c.intention("web", "db", intentions.Deny)
	a := c.connect(leafA, "s1", topicUpstream("api", "api"), topicUpstream("web", "db"), topicUpstream("web", "api"), topicIntentions("api"), topicIntentions("web"),
		&meshpb.Topic{Kind: "of-the-future", Name: "x"})
	a.reach(c.state.Snapshot().Position())
	want := map[string][]string{
		"upstream default/api default/api": nil, // it may not be api
		"upstream default/db default/web":  {"denied"},
		"upstream default/api default/web": {"instance/vm-b/api", "service", "status/vm-b/api"},
		"intentions default/api":           nil, // it may not run api
		"intentions default/web":           {"%2A/%2A/_/%2A/%2A"},
		"of-the-future x":                  nil,
	}
	got := make(map[string][]string)
	for topic := range a.held {
		got[topic] = a.keys(topic)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	// The permission comes, and goes, while the stream runs.
	a.reach(c.update(func(tx *state.Tx) error {
		return state.Nodes.Put(tx, "vm-a", catalog.Node{Name: "vm-a", Services: []string{"web", "api"}})
	}))
	if len(a.keys("upstream default/api default/api")) == 0 || len(a.keys("intentions default/api")) == 0 {
		t.Errorf("after the permission came: %v", a.held)
	}
	a.reach(c.update(func(tx *state.Tx) error { return state.Nodes.Put(tx, "vm-a", catalog.Node{Name: "vm-a"}) }))
	for topic := range a.held {
		if len(a.keys(topic)) != 0 {
			t.Errorf("after all permissions went, %s has %v", topic, a.keys(topic))
		}
	}
	if _, err := c.dial(leafA).Sync(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// An intention that can't be read reaches the destination's agent as one that can't
// be read, and denies callers.
func TestSyncUnreadableIntention(t *testing.T) {
	t.Parallel()
	c := start(t, rpc.Config{})
	c.listen()
	leaf := c.join("vm-a", "web", "api")
	c.intention("web", "api", intentions.Allow)
	a := c.connect(leaf, "s1", topicUpstream("web", "api"), topicIntentions("api"))
	at, err := c.engine.Commit(t.Context(), store.Txn{Ops: []store.Op{{Key: "intention/default/api/_/default/batch", Value: []byte(`{"source":"batch","destination":"api","action":"maybe"`)}}})
	if err != nil {
		t.Fatal(err)
	}
	a.reach(catalog.Position(at))
	if diff := cmp.Diff([]string{"denied"}, a.keys("upstream default/api default/web")); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if len(a.keys("intentions default/api")) != 3 { // the good one, the raw bad one, and the mark
		t.Errorf("intentions: %v", a.held["intentions default/api"])
	}
}

// A restored older state under a live stream: everything is sent anew.
func TestSyncGenerationFlip(t *testing.T) {
	t.Parallel()
	c := start(t, rpc.Config{})
	c.listen()
	leaf := c.join("vm-a", "web", "api")
	register(t, c.dial(leaf), definition(t, "vm-a", api(""), catalog.HealthPassing))
	old, err := c.engine.List(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	c.intention("web", "api", intentions.Allow)
	for i := range 50 {
		c.update(func(tx *state.Tx) error {
			return state.Namespaces.Put(tx, fmt.Sprintf("ns-%d", i), catalog.Namespace{Name: fmt.Sprintf("ns-%d", i)})
		})
	}
	a := c.connect(leaf, "s1", topicUpstream("web", "api"))
	a.reach(c.state.Snapshot().Position())
	before := a.at
	if len(a.keys("upstream default/api default/web")) != 4 {
		t.Fatalf("before: %v", a.held)
	}
	to, err := store.Replace(t.Context(), c.engine, store.Position{}, func(yield func(store.Pair, error) bool) {
		for _, p := range old.Pairs {
			if !yield(p, nil) {
				return
			}
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	a.reach(catalog.Position(to))
	if a.at.Generation == before.Generation {
		t.Errorf("from %v to %v: want a new generation", before, a.at)
	}
	if diff := cmp.Diff([]string{"denied", "service"}, a.keys("upstream default/api default/web")); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	a.reach(c.intention("web", "api", intentions.Allow))
	if len(a.keys("upstream default/api default/web")) < 3 {
		t.Errorf("the next intention: %v", a.held)
	}
}

// end reads until the stream ends and returns why.
func (a *agent) end() error {
	for {
		if err := a.next(); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
	}
}

func TestSyncEnds(t *testing.T) {
	t.Parallel()
	c := start(t, rpc.Config{})
	c.listen()
	for _, row := range []struct {
		name   string
		do     func(node string, leaf *ca.Leaf, a *agent)
		reason meshpb.Reason
	}{
		{"a newer stream", func(_ string, leaf *ca.Leaf, _ *agent) { c.connect(leaf, "s2") }, meshpb.ReasonSuperseded},
		{"the node was deleted", func(node string, _ *ca.Leaf, _ *agent) {
			c.update(func(tx *state.Tx) error { state.Nodes.Delete(tx, node); return nil })
		}, meshpb.ReasonNodeUnknown},
		{"the name was taken", func(node string, _ *ca.Leaf, _ *agent) {
			_, err := c.rpc.Join(context.Background(), &meshpb.JoinRequest{Secret: c.token(node, true), Csr: newIdentity(t).csr, Node: node})
			if err != nil {
				t.Fatal(err)
			}
		}, meshpb.ReasonNodeReplaced},
		{"it left", func(_ string, leaf *ca.Leaf, _ *agent) {
			if _, err := c.dial(leaf).Leave(t.Context(), &meshpb.LeaveRequest{}); err != nil {
				t.Fatal(err)
			}
		}, meshpb.ReasonLeft},
		{"a second hello", func(_ string, _ *ca.Leaf, a *agent) {
			a.send(&meshpb.SyncRequest{Message: &meshpb.SyncRequest_Hello{Hello: &meshpb.Hello{}}})
		}, meshpb.ReasonBadRequest},
		{"a malformed topic", func(_ string, _ *ca.Leaf, a *agent) { a.subscribe(&meshpb.Topic{Kind: "upstream", Name: "a/b/c"}) }, meshpb.ReasonBadRequest},
	} {
		node := "vm-" + strings.ReplaceAll(row.name, " ", "-")
		leaf := c.join(node, "web")
		a := c.connect(leaf, "s1")
		row.do(node, leaf, a)
		err := a.end()
		if reason, _ := meshpb.ReasonOf(err); reason != row.reason {
			t.Errorf("%s: %v, want %s", row.name, err, row.reason)
		}
	}
	stream, err := c.dial(c.join("vm-rude", "web")).Sync(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&meshpb.SyncRequest{Message: &meshpb.SyncRequest_Heartbeat{}}); err != nil {
		t.Fatal(err)
	}
	_, err = stream.Recv()
	if reason, _ := meshpb.ReasonOf(err); reason != meshpb.ReasonBadRequest {
		t.Errorf("without a hello: %v", err)
	}
}

func TestRollout(t *testing.T) {
	t.Parallel()
	c := start(t, rpc.Config{})
	c.listen()
	leafA, leafB := c.join("vm-a", "web"), c.join("vm-b", "api")
	register(t, c.dial(leafA), definition(t, "vm-a", web(""), catalog.HealthPassing))
	register(t, c.dial(leafB), definition(t, "vm-b", api(""), catalog.HealthPassing))
	a, b := c.connect(leafA, "sa", topicUpstream("web", "api")), c.connect(leafB, "sb")
	at := c.intention("web", "api", intentions.Allow)
	a.reach(at)
	b.reach(at)
	names := []catalog.Name{{Namespace: "default", Name: "api"}, {Namespace: "default", Name: "web"}}
	report := func(who *agent, applied, refusedAt catalog.Position, refused string, closed uint64) {
		who.send(&meshpb.SyncRequest{Message: &meshpb.SyncRequest_Applied{Applied: &meshpb.Applied{
			Proxy: "main", Position: &meshpb.Position{Generation: applied.Generation, Revision: applied.Revision},
			Refused: refused, RefusedPosition: &meshpb.Position{Generation: refusedAt.Generation, Revision: refusedAt.Revision}, Closed: closed,
		}}})
		for {
			changed := c.rpc.FleetChanged()
			if slices.ContainsFunc(c.rpc.Proxies(), func(p rpc.Proxy) bool {
				return p.Position == applied && p.RefusedPosition == refusedAt && p.Closed == closed
			}) {
				return
			}
			<-changed
		}
	}
	check := func(name string, api, web rpc.Rollout) {
		t.Helper()
		api.Service, web.Service = names[0], names[1]
		got := c.rpc.Rollout(at, names)
		for i := range got {
			got[i].Refusals = nil
		}
		if diff := cmp.Diff([]rpc.Rollout{api, web}, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
	check("nothing reported", rpc.Rollout{Proxies: 1}, rpc.Rollout{Proxies: 1})
	report(a, catalog.Position{Generation: at.Generation, Revision: at.Revision - 1}, catalog.Position{}, "", 0)
	check("an older one", rpc.Rollout{Proxies: 1}, rpc.Rollout{Proxies: 1})
	report(a, at, catalog.Position{}, "", 3)
	check("one", rpc.Rollout{Proxies: 1}, rpc.Rollout{Proxies: 1, Applied: 1, Closed: 3})
	report(b, catalog.Position{Generation: at.Generation, Revision: 1}, at, "no such part", 0)
	check("one refused", rpc.Rollout{Proxies: 1, Refused: 1}, rpc.Rollout{Proxies: 1, Applied: 1, Closed: 3})
	report(b, catalog.Position{Generation: "another", Revision: 1 << 40}, catalog.Position{}, "", 0)
	check("another generation", rpc.Rollout{Proxies: 1}, rpc.Rollout{Proxies: 1, Applied: 1, Closed: 3})
	// A change that concerns neither node is not sent to them, and yet both are
	// as new as it.
	before := at
	at = c.intention("cron", "db", intentions.Allow)
	for {
		changed := c.rpc.FleetChanged()
		if r := c.rpc.Rollout(at, names[1:]); r[0].Applied == 1 {
			break
		}
		<-changed
	}
	if p := c.rpc.Proxies()[0].Position; p != before {
		t.Errorf("the proxy of vm-a reported %v, nothing new was for it after %v", p, before)
	}
	if diff := cmp.Diff([]catalog.Name{names[1]}, c.rpc.Callers(names[0])); diff != "" {
		t.Errorf("callers (-want +got):\n%s", diff)
	}
	var connected []string
	for _, n := range c.rpc.Nodes() {
		connected = append(connected, n.Name+" "+n.Session)
	}
	if diff := cmp.Diff([]string{"vm-a sa", "vm-b sb"}, connected); diff != "" {
		t.Errorf("connected (-want +got):\n%s", diff)
	}
	if p := c.rpc.Proxies(); len(p) != 2 || !p[0].Connected || p[0].Node != "vm-a" {
		t.Errorf("proxies: %+v", p)
	}
}
