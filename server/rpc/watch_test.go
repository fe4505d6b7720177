package rpc_test

import (
	"context"
	"encoding/json"
	"errors"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/proxy/flow"
	"github.com/meshd/meshd/server/meshpb"
	"github.com/meshd/meshd/server/rpc"
	"github.com/meshd/meshd/server/state"
)

// watched is an agent's second stream, which answers as its test says.
type watched struct {
	t      *testing.T
	stream interface {
		Send(*meshpb.WatchAnswer) error
		Recv() (*meshpb.WatchQuery, error)
	}
}

func (c *cluster) watch(t *testing.T, leaf *ca.Leaf) *watched {
	t.Helper()
	stream, err := c.dial(leaf).Watch(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return &watched{t: t, stream: stream}
}

// asked returns the next question; its query is zero if one was taken back.
func (w *watched) asked() (id uint64, q flow.Query) {
	w.t.Helper()
	m, err := w.stream.Recv()
	if err != nil {
		w.t.Fatal(err)
	}
	if len(m.GetQuery()) > 0 {
		if err := json.Unmarshal(m.GetQuery(), &q); err != nil {
			w.t.Fatal(err)
		}
	}
	return m.GetId(), q
}

func (w *watched) answer(id uint64, a flow.Answer) {
	w.t.Helper()
	if err := w.stream.Send(&meshpb.WatchAnswer{Id: id, Answer: encode(w.t, a)}); err != nil {
		w.t.Fatal(err)
	}
}

// question is what somebody asks of the server.
type question struct {
	mu     sync.Mutex
	pieces []flow.Answer
	done   chan error
	cancel context.CancelFunc
}

func (c *cluster) ask(t *testing.T, q flow.Query) *question {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	one := &question{done: make(chan error, 1), cancel: cancel}
	go func() {
		one.done <- c.rpc.Ask(ctx, q, func(a flow.Answer) error {
			one.mu.Lock()
			defer one.mu.Unlock()
			one.pieces = append(one.pieces, a)
			return nil
		})
	}()
	t.Cleanup(cancel)
	return one
}

func (q *question) all() []flow.Answer {
	q.mu.Lock()
	defer q.mu.Unlock()
	return slices.Clone(q.pieces)
}

func (q *question) records() (out []flow.Record) {
	for _, a := range q.all() {
		out = append(out, a.Records...)
	}
	return out
}

func soon(t *testing.T, what string, ok func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("waited 10 s in vain: %s", what)
		}
	}
}

func named(name string) spiffe.ID { return spiffe.Service(trustDomain, catalog.DefaultNamespace, name) }

// pair is a cluster in which web runs on vm-a and api on vm-b, and web calls api.
func pair(t *testing.T) (c *cluster, a, b *watched) {
	t.Helper()
	c = start(t, rpc.Config{})
	c.listen()
	leafA, leafB := c.join("vm-a", "web"), c.join("vm-b", "api")
	register(t, c.dial(leafA), definition(t, "vm-a", web("web"), catalog.HealthPassing))
	register(t, c.dial(leafB), definition(t, "vm-b", api("api"), catalog.HealthPassing))
	c.connect(leafA, "a", &meshpb.Topic{Kind: "upstream", Name: "default/api", Source: "default/web"})
	c.connect(leafB, "b")
	return c, c.watch(t, leafA), c.watch(t, leafB)
}

func TestAskOnce(t *testing.T) {
	c, a, b := pair(t)
	q := c.untilAsked(t, flow.Query{Want: flow.Denials, Destination: "api", Limit: 2}, 2)
	at := time.Now().UTC().Truncate(time.Second)
	denied := func(second int, id string, change func(*flow.Record)) flow.Record {
		r := flow.Record{
			Time: at.Add(time.Duration(second) * time.Second), Kind: flow.HTTP, Direction: flow.Inbound, Verdict: flow.Denied, Node: "forged",
			Source: named("web"), Destination: named("api"), ErrorID: id,
		}
		if change != nil {
			change(&r)
		}
		return r
	}
	id, _ := a.asked()
	a.answer(id, flow.Answer{Records: []flow.Record{
		denied(1, "a00001", func(r *flow.Record) { r.Direction = flow.Outbound }),
		denied(9, "a00002", nil), // as if api were its own
		denied(9, "a00003", func(r *flow.Record) { r.Direction, r.Source = flow.Outbound, named("payments") }),
	}, Caught: true, Kept: flow.Kept{Records: 1024}})
	a.answer(id, flow.Answer{Done: true})
	id, asked := b.asked()
	if asked.Destination != "api" || asked.Limit != 2 {
		t.Errorf("the node was asked %+v", asked)
	}
	b.answer(id, flow.Answer{Records: []flow.Record{
		denied(3, "b00001", nil), denied(2, "b00002", nil),
		denied(9, "b00003", func(r *flow.Record) { r.Destination = named("web") }),                                     // not its own
		denied(9, "b00004", func(r *flow.Record) { r.Verdict = flow.Passed }),                                          // not asked for
		denied(9, "b00005", func(r *flow.Record) { r.Destination = spiffe.ID{} }),                                      // nobody's
		denied(9, "b00006", func(r *flow.Record) { r.Destination.TrustDomain = "other.example.com" }),                  // another mesh's
		denied(8, "b00007", func(r *flow.Record) { r.Path = string(make([]byte, 9000)); r.Time = at.Add(-time.Hour) }), // too long
	}, Dropped: 4})
	b.answer(id, flow.Answer{Done: true, Error: "tired"})
	if err := <-q.done; err != nil {
		t.Fatal(err)
	}
	want := []flow.Answer{{
		Records: []flow.Record{
			denied(3, "b00001", func(r *flow.Record) { r.Node = "vm-b" }), denied(2, "b00002", func(r *flow.Record) { r.Node = "vm-b" }),
		},
		Dropped: 4, Caught: true, Kept: flow.Kept{Records: 1024}, Hosts: 2, Silent: []string{"vm-b: tired"},
	}}
	if diff := cmp.Diff(want, q.all()); diff != "" {
		t.Error(diff)
	}
}

// untilAsked asks as often as it takes for the nodes to have opened their streams.
func (c *cluster) untilAsked(t *testing.T, q flow.Query, hosts int) *question {
	t.Helper()
	soon(t, "the streams are open", func() bool { return c.rpc.Watchable() == hosts })
	return c.ask(t, q)
}

func TestAskOnAndOn(t *testing.T) {
	c, a, b := pair(t)
	q := c.untilAsked(t, flow.Query{Want: flow.Records, Source: "web"}, 2)
	idA, _ := a.asked()
	idB, _ := b.asked()
	a.answer(idA, flow.Answer{Caught: true})
	if got := q.all(); len(got) != 0 {
		t.Errorf("it has begun before all have: %+v", got)
	}
	b.answer(idB, flow.Answer{Caught: true})
	soon(t, "it has begun", func() bool { return len(q.all()) == 1 })
	if diff := cmp.Diff([]flow.Answer{{Caught: true, Hosts: 2}}, q.all()); diff != "" {
		t.Error(diff)
	}
	for range 3 {
		b.answer(idB, flow.Answer{Records: []flow.Record{
			{Kind: flow.HTTP, Direction: flow.Inbound, Verdict: flow.Passed, Source: named("web"), Destination: named("api"), Status: 200},
			{Kind: flow.HTTP, Direction: flow.Inbound, Verdict: flow.Passed, Source: named("other"), Destination: named("api"), Status: 200},
		}})
	}
	soon(t, "records come", func() bool { return len(q.records()) == 3 })

	// A node that is deleted is heard no more.
	c.update(func(tx *state.Tx) error {
		state.Nodes.Delete(tx, "vm-b")
		return nil
	})
	b.answer(idB, flow.Answer{Records: []flow.Record{{Direction: flow.Inbound, Source: named("web"), Destination: named("api")}}})
	if _, err := b.stream.Recv(); status.Code(err) != codes.PermissionDenied {
		t.Errorf("got %v, want PermissionDenied", err)
	}
	q.cancel()
	if err := <-q.done; err != nil {
		t.Error(err)
	}
	if id, taken := a.asked(); id != idA || taken.Want != "" {
		t.Errorf("question %d, %+v, want %d to be taken back", id, taken, idA)
	}
	if n := len(q.records()); n != 3 {
		t.Errorf("%d records, want 3", n)
	}
}

// Nobody learns of questions that do not concern what he runs.
func TestAskWhomItConcerns(t *testing.T) {
	c, a, b := pair(t)
	leaf := c.join("vm-c", "db")
	register(t, c.dial(leaf), definition(t, "vm-c", catalog.Definition{Name: "db", Port: 5432}, catalog.HealthPassing))
	c.connect(leaf, "c")
	other := c.watch(t, leaf)
	soon(t, "the streams are open", func() bool { return c.rpc.Watchable() == 3 })
	for _, row := range []struct {
		query  flow.Query
		nodes  []*watched
		silent int
	}{
		{flow.Query{Want: flow.Denials, Source: "web", Destination: "api"}, []*watched{a, b}, 0},
		{flow.Query{Want: flow.Denials, Destination: "api"}, []*watched{a, b}, 0},
		{flow.Query{Want: flow.Denials, Source: "web"}, []*watched{a, b}, 0},
		{flow.Query{Want: flow.Denials, Destination: "web"}, []*watched{a}, 0},
		{flow.Query{Want: flow.Denials, Source: "db"}, []*watched{other}, 0},
		{flow.Query{Want: flow.Denials, Destination: "default/*"}, []*watched{a, b, other}, 0},
		{flow.Query{Want: flow.Denials}, []*watched{a, b, other}, 0},
		{flow.Query{Want: flow.Denials, Destination: "nobody"}, nil, 0},
	} {
		q := c.ask(t, row.query)
		for _, w := range row.nodes {
			id, got := w.asked()
			if diff := cmp.Diff(row.query, got, cmpopts.EquateEmpty()); diff != "" {
				t.Errorf("%+v: a node was asked something else: %s", row.query, diff)
			}
			w.answer(id, flow.Answer{Done: true})
		}
		if err := <-q.done; err != nil {
			t.Fatal(err)
		}
		if got := q.all(); len(got) != 1 || got[0].Hosts != len(row.nodes) || len(got[0].Silent) != 0 {
			t.Errorf("%+v: %+v, want %d hosts", row.query, got, len(row.nodes))
		}
	}
}

// A host that does not answer is named, and holds up the others for a short while only.
func TestAskASilentHost(t *testing.T) {
	c, a, b := pair(t)
	q := c.untilAsked(t, flow.Query{Want: flow.Find, ID: "7f3a91"}, 2)
	id, _ := a.asked()
	a.answer(id, flow.Answer{Done: true})
	b.asked()
	if err := <-q.done; err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]flow.Answer{{Caught: true, Hosts: 2, Silent: []string{"vm-b: no answer"}}}, q.all()); diff != "" {
		t.Error(diff)
	}

	// Once it is found nobody waits for him.
	began := time.Now()
	q = c.ask(t, flow.Query{Want: flow.Find, ID: "7f3a91"})
	id, _ = a.asked()
	b.asked()
	found := flow.Record{Direction: flow.Outbound, Verdict: flow.Denied, Source: named("web"), Destination: named("api"), ErrorID: "7f3a91", Node: "vm-a"}
	a.answer(id, flow.Answer{Records: []flow.Record{found}})
	a.answer(id, flow.Answer{Done: true})
	if err := <-q.done; err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]flow.Answer{{Records: []flow.Record{found}, Caught: true, Hosts: 2}}, q.all()); diff != "" {
		t.Error(diff)
	}
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("it took %s", took)
	}
}

func TestWatchNeedsANode(t *testing.T) {
	c := start(t, rpc.Config{})
	c.listen()
	stream, err := c.dial(nil).Watch(t.Context())
	if err == nil {
		_, err = stream.Recv()
	}
	if status.Code(err) != codes.Unauthenticated {
		t.Errorf("got %v, want Unauthenticated", err)
	}
	if err := c.rpc.Ask(t.Context(), flow.Query{Want: "nonsense"}, nil); !errors.Is(err, flow.ErrQuery) {
		t.Errorf("got %v, want ErrQuery", err)
	}
}

// FuzzAnswer holds the vetting of what nodes send to never passing on what is not theirs.
func FuzzAnswer(f *testing.F) {
	f.Add([]byte(`{"records":[{"direction":"inbound","destination":"spiffe://mesh.example.com/ns/default/svc/api"}],"done":true}`))
	f.Add([]byte(`{"sample":{"edges":[{"direction":"outbound","source":"spiffe://mesh.example.com/ns/default/svc/web"}]}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var a flow.Answer
		if json.Unmarshal(data, &a) != nil {
			return
		}
		for i := range a.Records {
			r := &a.Records[i]
			r.Bound()
			if len(r.Path) > flow.MaxPath || len(r.ErrorID) > 6 {
				t.Errorf("%+v is out of bounds", r)
			}
			if own := r.Own(); own != r.Source && own != r.Destination {
				t.Errorf("%s is neither side", own)
			}
		}
	})
}
