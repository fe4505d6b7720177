package agent_test

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/meshd/meshd/agent"
	"github.com/meshd/meshd/agent/agenttest"
	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/proxy/feed"
	"github.com/meshd/meshd/proxy/flow"
	"github.com/meshd/meshd/server/client"
)

// seer is a mesh-proxy that has seen one denial, and sees it again and again while somebody watches.
type seer struct{ denial flow.Record }

func (s seer) Watch(ctx context.Context, q flow.Query, emit func(flow.Answer) error) error {
	a := flow.Answer{Caught: true, Kept: flow.Kept{Records: 1024}}
	if q.Want == flow.Find && q.ID != s.denial.ErrorID {
		return emit(a)
	}
	a.Records = []flow.Record{s.denial}
	if q.Want == flow.Edges {
		a = flow.Answer{Sample: &flow.Sample{Session: "s", Edges: []flow.Edge{}}}
	}
	if err := emit(a); err != nil || !q.Lasting() {
		return err
	}
	<-ctx.Done()
	return nil
}

func (b *bench) seer() flow.Record {
	b.t.Helper()
	denial := flow.Record{
		Time: time.Now().UTC().Truncate(time.Second), Kind: flow.HTTP, Direction: flow.Outbound, Verdict: flow.Denied, ErrorID: "7f3a91",
		Source:      spiffe.Service(agenttest.TrustDomain, "default", "web"),
		Destination: spiffe.Service(agenttest.TrustDomain, "default", "api"),
		Method:      "GET", Path: "/v1", Status: 403, Reason: "denied", Cause: "no intention allows web to call api",
	}
	c := feed.NewClient(feed.ClientConfig{
		Socket: b.cfg.Proxy.Socket, Proxy: "p1", Log: slog.New(slog.DiscardHandler), Watcher: seer{denial},
		Cache: feed.NewDiskCache(filepath.Join(b.dir, "proxy")),
	})
	ctx, cancel := context.WithCancel(b.t.Context())
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx, &recorder{changed: make(chan struct{})}) }()
	b.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			b.t.Errorf("feed client: %v", err)
		}
	})
	b.status("the proxy is attached", func(s agent.Status) bool { return len(s.Proxies) == 1 })
	denial.Node = "vm-a"
	return denial
}

// The host answers for itself, in the form of a server's API, with every server dead.
func TestWatchOverTheSocket(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	stop := b.start()
	b.status("the agent has joined", func(s agent.Status) bool { return s.TrustDomain != "" && s.Server.Server != "" })
	c, err := client.New(client.Config{Address: "unix://" + b.cfg.Socket})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Denials(t.Context(), flow.Query{}); client.CodeOf(err) != client.CodeUnavailable || !strings.Contains(err.Error(), "no mesh-proxy") {
		t.Errorf("without a proxy: %v", err)
	}
	denial := b.seer()
	b.seen("the server is there", func(s agenttest.Seen) bool { return s.Streams == 1 })
	b.stop() // every server

	got, err := c.Denials(t.Context(), flow.Query{Source: "web"})
	if err != nil {
		t.Fatal(err)
	}
	want := flow.Answer{Records: []flow.Record{denial}, Caught: true, Kept: flow.Kept{Records: 1024}, Hosts: 1}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("denials: %s", diff)
	}
	e, err := c.ExplainID(t.Context(), "7f3a91")
	if err != nil {
		t.Fatal(err)
	}
	if e.Verdict != "DENIED by policy" || e.Works || len(e.Facts) != 4 || e.Facts[3].Text != "no intention allows web to call api" ||
		!cmp.Equal(e.Next, []string{`meshctl intention allow web api --http "GET /v1"`}) {
		t.Errorf("explained: %+v", e)
	}
	if _, err := c.ExplainID(t.Context(), "000000"); client.CodeOf(err) != client.CodeNotFound || !strings.Contains(err.Error(), "newest 1024") {
		t.Errorf("an unknown id: %v", err)
	}
	for _, path := range []string{"/v1/tap?src=a/b/c", "/v1/denials?sorce=web", "/v1/top?interval=1ms", "/v1/explain/nonsense"} {
		if code, body, err := b.call(http.MethodGet, path, ""); err != nil || code != http.StatusBadRequest || !strings.Contains(string(body), `"code":"invalid"`) {
			t.Errorf("%s: %d %s %v", path, code, body, err)
		}
	}

	errSeen := errors.New("seen")
	watch := func(pieces func(func(flow.Answer, error) bool), ok func(flow.Answer) bool) error {
		for a, err := range pieces {
			if err != nil {
				return err
			}
			if ok(a) {
				return errSeen
			}
		}
		return nil
	}
	sampled := func(a flow.Answer) bool { return a.Sample != nil && a.Sample.Node == "vm-a" }
	if err := watch(c.Top(t.Context(), flow.Query{}), sampled); !errors.Is(err, errSeen) {
		t.Errorf("top: %v", err)
	}
	begun := false
	err = watch(c.Tap(t.Context(), flow.Query{}), func(a flow.Answer) bool {
		if begun = begun || len(a.Records) == 1 && cmp.Equal(a.Records[0], denial); begun {
			go stop() // ends what streams, and is not held up by it
		}
		return false
	})
	if !begun || client.CodeOf(err) != client.CodeUnavailable && client.CodeOf(err) != client.CodeUnreachable {
		t.Errorf("tap: begun %v, %v", begun, err)
	}
}

// What a server asks is answered over the second stream.
func TestWatchOverTheSecondStream(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.start()
	denial := b.seer()
	w := b.server.Watched(b.deadline())
	if w == nil {
		t.Fatal("the agent opened no second stream")
	}
	ask := func(id uint64, q string) flow.Answer {
		t.Helper()
		if err := w.Ask(id, []byte(q)); err != nil {
			t.Fatal(err)
		}
		data, err := w.Answer(id)
		if err != nil {
			t.Fatal(err)
		}
		var a flow.Answer
		if err := json.Unmarshal(data, &a); err != nil {
			t.Fatal(err)
		}
		return a
	}
	kept := flow.Kept{Records: 1024}
	if diff := cmp.Diff(flow.Answer{Records: []flow.Record{denial}, Caught: true, Kept: kept}, ask(1, `{"want":"find","id":"7f3a91"}`)); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(flow.Answer{Records: []flow.Record{denial}, Caught: true, Kept: kept}, ask(2, `{"want":"records"}`)); diff != "" {
		t.Error(diff)
	}
	if a := ask(3, `{"want":"nonsense"}`); !a.Done || a.Error == "" {
		t.Errorf("nonsense is answered with %+v", a)
	}
	if a := ask(4, `}{`); !a.Done || a.Error == "" {
		t.Errorf("what is no JSON is answered with %+v", a)
	}
	if err := w.Ask(2, nil); err != nil { // taken back
		t.Fatal(err)
	}
	for {
		data, err := w.Answer(2)
		if err != nil {
			t.Fatal(err)
		}
		var a flow.Answer
		if err := json.Unmarshal(data, &a); err != nil {
			t.Fatal(err)
		}
		if a.Done {
			break
		}
	}
}
