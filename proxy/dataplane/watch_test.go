package dataplane_test

import (
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/intentions"
	"github.com/meshd/meshd/proxy/flow"
)

// watcher collects what a plane answers.
type watcher struct {
	mu     sync.Mutex
	answer flow.Answer // all of them in one
	err    error
}

// watches asks a plane, and waits until it has begun to answer.
func (h *host) watches(q flow.Query) *watcher {
	h.t.Helper()
	w := &watcher{}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		err := h.plane.Watch(ctx, q, w.take)
		w.mu.Lock()
		defer w.mu.Unlock()
		w.err = err
	}()
	h.t.Cleanup(func() {
		cancel()
		<-done
	})
	eventually(h.t, "the plane answers", func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		return w.answer.Caught || w.err != nil
	})
	return w
}

func (w *watcher) take(a flow.Answer) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.answer.Records = append(w.answer.Records, a.Records...)
	w.answer.Dropped += a.Dropped
	w.answer.Caught = w.answer.Caught || a.Caught
	w.answer.Kept = w.answer.Kept.Worse(a.Kept)
	if a.Sample != nil {
		w.answer.Sample = a.Sample
	}
	return nil
}

func (w *watcher) all() flow.Answer {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.answer
}

// wantRecords waits for as many records as are wanted, and compares what does not depend on the moment.
func (w *watcher) wantRecords(t *testing.T, want ...flow.Record) []flow.Record {
	t.Helper()
	var got []flow.Record
	eventually(t, "all records are there", func() bool {
		got = w.all().Records
		return len(got) >= len(want)
	})
	ignored := cmpopts.IgnoreFields(flow.Record{}, "Time", "DurationMS", "ErrorID", "Peer", "Plan", "Cause")
	if diff := cmp.Diff(want, got, ignored); diff != "" {
		t.Errorf("records (-want +got):\n%s", diff)
	}
	return got
}

func TestWatchHTTP(t *testing.T) {
	app := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		_, _ = io.WriteString(w, "four")
	})
	i := allow()
	i.Action, i.Rules = "", []intentions.Rule{{Action: intentions.Allow, Methods: []string{"POST"}}}
	m := newMesh(t, options{protocol: catalog.ProtocolHTTP, apps: []string{app}, intention: i})
	c := client(t)
	get(t, c, "POST", "http://"+m.upstream+"/before", "") // nobody watches
	for _, h := range []*host{m.a, m.b} {
		eventually(t, "it is over", func() bool { return h.metric("mesh_requests_total") == 1 })
	}
	far, near := m.b.watches(flow.Query{Want: flow.Records}), m.a.watches(flow.Query{Want: flow.Records, Both: true, Path: "/v1"})
	once := m.a.watches(flow.Query{Want: flow.Records})
	get(t, c, "POST", "http://"+m.upstream+"/v1/jobs?secret=1", "abc")
	refusal := get(t, c, "GET", "http://"+m.upstream+"/v1/jobs", "")

	rule := 0
	passed := flow.Record{
		Kind: flow.HTTP, Direction: flow.Inbound, Verdict: flow.Passed, Source: service("web"), Destination: service("api"), Port: "main",
		Endpoint: "api-a", Method: "POST", Authority: m.upstream, Path: "/v1/jobs", Status: 200, Sent: 3, Received: 4,
		Decision: "rule", Intention: "web → api", Rule: &rule,
	}
	denied := passed
	denied.Verdict, denied.Method, denied.Status, denied.Sent, denied.Received = flow.Denied, "GET", 403, 0, int64(len(refusal.body))
	denied.Reason, denied.Decision, denied.Rule = "denied", "no-rule-matched", nil
	got := far.wantRecords(t, passed, denied)
	if id := refusal.header.Get("Mesh-Error-Id"); got[1].ErrorID != id || got[1].Plan != m.b.plan.Position || got[1].Peer == "" {
		t.Errorf("the record has id %q (want %q), plan %s, peer %q", got[1].ErrorID, id, got[1].Plan, got[1].Peer)
	}
	sent, refused := passed, denied
	sent.Direction, sent.Decision, sent.Intention, sent.Rule = flow.Outbound, "", "", nil
	refused.Direction, refused.Verdict, refused.Decision, refused.Intention = flow.Outbound, flow.Passed, "", ""
	if answered := near.wantRecords(t, sent, refused)[1]; answered.ErrorID != got[1].ErrorID || answered.Cause != "answered by the destination's proxy: denied" {
		t.Errorf("the caller's side has id %q, because %q", answered.ErrorID, answered.Cause)
	}
	m.a.watches(flow.Query{Want: flow.Find, ID: got[1].ErrorID}).wantRecords(t, refused) // it knows, too
	m.a.watches(flow.Query{Want: flow.Denials}).wantRecords(t)                           // but it was not its denial
	if n := len(once.all().Records); n != 0 {
		t.Errorf("the caller's side shows %d requests that it sent on, want none", n)
	}

	found := m.b.watches(flow.Query{Want: flow.Find, ID: got[1].ErrorID})
	found.wantRecords(t, denied)
	m.b.watches(flow.Query{Want: flow.Denials, Source: "web", Destination: "api"}).wantRecords(t, denied)
	m.b.watches(flow.Query{Want: flow.Denials, Source: "other"}).wantRecords(t)
	if n := m.b.metric("mesh_denials_total", "source", "default/web", "destination", "default/api", "direction", "inbound"); n != 1 {
		t.Errorf("%v denials are counted, want 1", n)
	}
}

func TestWatchACallerWithoutAnIntention(t *testing.T) {
	for _, protocol := range []catalog.Protocol{catalog.ProtocolHTTP, catalog.ProtocolTCP} {
		t.Run(string(protocol), func(t *testing.T) {
			m := newMesh(t, options{protocol: protocol})
			m.a.plan.Clusters[0].Denied = "no intention allows web to call api"
			m.a.apply()
			want := flow.Record{
				Kind: flow.TCP, Direction: flow.Outbound, Verdict: flow.Denied, Source: service("web"), Destination: service("api"),
				Port: "main", Reason: "denied",
			}
			if protocol.HTTP() {
				answer := get(t, client(t), "GET", "http://"+m.upstream+"/", "")
				want.Kind, want.Method, want.Authority, want.Path, want.Status = flow.HTTP, "GET", m.upstream, "/", 403
				want.Received = int64(len(answer.body))
			} else {
				wantRefused(t, m.upstream)
			}
			var w *watcher
			eventually(t, "the denial is kept", func() bool {
				w = m.a.watches(flow.Query{Want: flow.Denials, Destination: "api"})
				return len(w.all().Records) == 1
			})
			got := w.wantRecords(t, want)
			if got[0].Cause != "no intention allows web to call api" || !flow.ValidID(got[0].ErrorID) {
				t.Errorf("the record has cause %q and id %q", got[0].Cause, got[0].ErrorID)
			}
			if n := m.a.metric("mesh_denials_total", "source", "default/web", "direction", "outbound"); n != 1 {
				t.Errorf("%v denials are counted, want 1", n)
			}
		})
	}
}

func TestWatchTCP(t *testing.T) {
	m := newMesh(t, options{protocol: catalog.ProtocolTCP, apps: []string{serveTCP(t, echo)}, intention: allow()})
	w := m.b.watches(flow.Query{Want: flow.Records})
	c := dial(t, m.upstream)
	exchange(t, c, "hello")
	open := flow.Record{
		Kind: flow.TCP, Direction: flow.Inbound, Verdict: flow.Passed, Opened: true, Source: service("web"), Destination: service("api"),
		Port: "main", Endpoint: "api-a", Decision: "action", Intention: "web → api",
	}
	w.wantRecords(t, open)
	edges := m.b.watches(flow.Query{Want: flow.Edges})
	wantEdge(t, edges, flow.Edge{
		Direction: flow.Inbound, Source: service("web"), Destination: service("api"), Sessions: 1, Open: 1, Sent: 5, Received: 5,
	})
	m.intend(deny())
	m.b.apply()
	cut := open
	cut.Opened, cut.Verdict, cut.Reason, cut.Sent, cut.Received = false, flow.Denied, "policy-changed", 5, 5
	w.wantRecords(t, open, cut)
	wantRefused(t, m.upstream)
	refused := cut
	refused.Reason, refused.Sent, refused.Received = "denied", 0, 0
	w.wantRecords(t, open, cut, refused)
	wantEdge(t, m.b.watches(flow.Query{Want: flow.Edges, Source: "web"}), flow.Edge{
		Direction: flow.Inbound, Source: service("web"), Destination: service("api"), Sessions: 1, Denied: 2, Sent: 5, Received: 5,
	})

	stranger := dial(t, m.port)
	if _, err := io.WriteString(stranger, "GET / HTTP/1.1\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	plain := flow.Record{Kind: flow.TCP, Direction: flow.Inbound, Verdict: flow.Refused, Reason: "plaintext"}
	got := w.wantRecords(t, open, cut, refused, plain)
	if got[3].Peer != stranger.LocalAddr().String() || !strings.Contains(got[3].Cause, "TLS") {
		t.Errorf("the stranger is %q, because %q", got[3].Peer, got[3].Cause)
	}
	_, err := reach(t, m.port, m.b.plan.Inbounds[0].ServerName, []string{"mesh-tcp"}, newAuthority(t, "evil.example.com").leaf(t, service("web"), 1e9))
	if err == nil {
		t.Error("a foreign certificate was let in")
	}
	foreign := flow.Record{
		Kind: flow.TCP, Direction: flow.Inbound, Verdict: flow.Refused, Destination: service("api"), Endpoint: "api-a", Port: "main",
		Reason: "untrusted",
	}
	w.wantRecords(t, open, cut, refused, plain, foreign)
}

// wantEdge waits for a sample to have one edge, with these counters.
func wantEdge(t *testing.T, w *watcher, want flow.Edge) {
	t.Helper()
	eventually(t, "a sample is there", func() bool { return w.all().Sample != nil })
	if diff := cmp.Diff([]flow.Edge{want}, w.all().Sample.Edges); diff != "" {
		t.Errorf("edges (-want +got):\n%s", diff)
	}
}

func TestWatchEdgesOfHTTP(t *testing.T) {
	app := serveHTTP(t, func(http.ResponseWriter, *http.Request) {})
	m := newMesh(t, options{protocol: catalog.ProtocolHTTP, apps: []string{app}, intention: allow()})
	c := client(t)
	for range 3 {
		get(t, c, "GET", "http://"+m.upstream+"/", "")
	}
	m.a.plan.Clusters[0].Endpoints = nil
	m.a.apply()
	if got := get(t, c, "GET", "http://"+m.upstream+"/", ""); got.status != 503 {
		t.Fatalf("got %d", got.status)
	}
	eventually(t, "all requests are counted", func() bool { return m.a.metric("mesh_requests_total") == 4 })
	sample := m.a.watches(flow.Query{Want: flow.Edges}).all().Sample
	if sample == nil || len(sample.Edges) != 1 || sample.Session == "" {
		t.Fatalf("the sample is %+v", sample)
	}
	e := sample.Edges[0]
	var total uint64
	for _, n := range e.Durations {
		total += n
	}
	if e.Requests[2] != 3 || e.Requests[5] != 1 || e.Unsent != 1 || total != 4 || len(e.Durations) != len(sample.Bounds)+1 {
		t.Errorf("the edge is %+v", e)
	}
}

// One who does not read costs nothing but a queue, and is told what was dropped.
func TestWatchThatDoesNotRead(t *testing.T) {
	app := serveHTTP(t, func(http.ResponseWriter, *http.Request) {})
	m := newMesh(t, options{protocol: catalog.ProtocolHTTP, apps: []string{app}, intention: allow()})
	begun, read, done := make(chan struct{}, 100), make(chan struct{}), make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())
	var records, dropped uint64
	stuck := errors.New("enough")
	go func() {
		done <- m.b.plane.Watch(ctx, flow.Query{Want: flow.Records}, func(a flow.Answer) error {
			begun <- struct{}{}
			<-read
			records, dropped = records+uint64(len(a.Records)), dropped+a.Dropped
			if dropped > 0 {
				return stuck
			}
			return nil
		})
	}()
	<-begun
	const requests = 400
	c := client(t)
	for range requests {
		if got := get(t, c, "GET", "http://"+m.upstream+"/", ""); got.status != 200 {
			t.Fatalf("got %d", got.status)
		}
	}
	eventually(t, "all requests are over", func() bool { return m.b.metric("mesh_requests_total") == requests })
	close(read)
	if err := <-done; !errors.Is(err, stuck) {
		t.Error(err)
	}
	cancel()
	if records+dropped != requests || dropped == 0 {
		t.Errorf("%d records and %d dropped, want %d in all, and some dropped", records, dropped, requests)
	}
}

func TestDenialsAreBounded(t *testing.T) {
	m := newMesh(t, options{protocol: catalog.ProtocolHTTP})
	m.a.plan.Clusters[0].Denied = "no intention allows web to call api"
	m.a.apply()
	c := client(t)
	first := get(t, c, "GET", "http://"+m.upstream+"/", "").header.Get("Mesh-Error-Id")
	for range 1024 {
		get(t, c, "GET", "http://"+m.upstream+"/", "")
	}
	var all flow.Answer
	eventually(t, "all are counted", func() bool { return m.a.metric("mesh_denials_total") == 1025 })
	all = m.a.watches(flow.Query{Want: flow.Denials}).all()
	if len(all.Records) != 1024 || all.Kept.Records != 1024 || !all.Kept.Since.Equal(all.Records[1023].Time) {
		t.Errorf("%d records are kept, of %+v", len(all.Records), all.Kept)
	}
	for i := 1; i < len(all.Records); i++ {
		if all.Records[i].Time.After(all.Records[i-1].Time) {
			t.Fatal("the newest are not first")
		}
	}
	if all := m.a.watches(flow.Query{Want: flow.Find, ID: first}).all(); len(all.Records) != 0 && all.Records[0].Time.Before(all.Kept.Since) {
		t.Error("the oldest is still there")
	}
	if all := m.a.watches(flow.Query{Want: flow.Denials, Limit: 3}).all(); len(all.Records) != 3 {
		t.Errorf("%d records with a limit of 3", len(all.Records))
	}
}

// BenchmarkWatched tells what a request over two mTLS hops costs while somebody watches both, who reads or does not.
func BenchmarkWatched(b *testing.B) {
	for _, how := range []string{"nobody", "who reads", "who does not read"} {
		b.Run(how, func(b *testing.B) {
			m := newMesh(b, options{protocol: catalog.ProtocolHTTP, apps: []string{benchApp(b)}, intention: allow()})
			ctx, cancel := context.WithCancel(b.Context())
			var watchers sync.WaitGroup
			begun := make(chan struct{}, 2)
			for _, h := range []*host{m.a, m.b} {
				if how == "nobody" {
					break
				}
				first := true
				watchers.Go(func() {
					_ = h.plane.Watch(ctx, flow.Query{Want: flow.Records, Both: true}, func(flow.Answer) error {
						if first {
							first = false
							begun <- struct{}{}
						} else if how == "who does not read" {
							<-ctx.Done()
						}
						return ctx.Err()
					})
				})
				<-begun
			}
			c := newBenchClient(b, m.upstream)
			for range 1000 {
				c.do()
			}
			started := cpu(b)
			for b.Loop() {
				c.do()
			}
			b.ReportMetric(float64((cpu(b)-started).Nanoseconds())/float64(b.N)/1000, "cpu-µs/req")
			cancel()
			watchers.Wait()
		})
	}
}
