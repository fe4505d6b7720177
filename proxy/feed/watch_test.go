package feed_test

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/meshd/meshd/proxy/feed"
	"github.com/meshd/meshd/proxy/flow"
)

// eye is a Watcher that answers as its field says, and counts those who watch.
type eye struct {
	watching atomic.Int64
	answer   func(ctx context.Context, q flow.Query, emit func(flow.Answer) error) error
}

func (e *eye) Watch(ctx context.Context, q flow.Query, emit func(flow.Answer) error) error {
	e.watching.Add(1)
	defer e.watching.Add(-1)
	return e.answer(ctx, q, emit)
}

func startWatched(t *testing.T, path string, e feed.Watcher) (*handler, func()) {
	t.Helper()
	c := feed.NewClient(feed.ClientConfig{Socket: path, Proxy: "vm-a", Log: slog.New(slog.DiscardHandler), Watcher: e})
	h := newHandler()
	return h, run(t, "proxy", func(ctx context.Context) error { return c.Run(ctx, h) })
}

// heard collects pieces of answers.
type heard struct {
	mu     sync.Mutex
	pieces []flow.Answer
}

func (h *heard) take(a flow.Answer) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.pieces = append(h.pieces, a)
}

func (h *heard) all() []flow.Answer {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.pieces
}

func attached(n int) func([]feed.ProxyStatus) bool {
	return func(s []feed.ProxyStatus) bool { return len(s) == n }
}

func TestAskOnce(t *testing.T) {
	a := startAgent(t, socketPath(t))
	records := []flow.Record{{Verdict: flow.Denied, ErrorID: "7f3a91", Path: "/v1"}}
	e := &eye{answer: func(_ context.Context, q flow.Query, emit func(flow.Answer) error) error {
		if q.ID != "7f3a91" {
			return errors.New("why not")
		}
		return emit(flow.Answer{Records: records, Caught: true})
	}}
	startWatched(t, a.path, e)
	startProxy(t, a.path, "") // is too old to be asked
	a.waitStatus(t, "both are attached", attached(2))
	var h heard
	must(t, a.Ask(t.Context(), flow.Query{Want: flow.Find, ID: "7f3a91"}, h.take))
	if diff := cmp.Diff([]flow.Answer{{Records: records, Caught: true}, {Done: true}}, h.all()); diff != "" {
		t.Error(diff)
	}

	h = heard{}
	must(t, a.Ask(t.Context(), flow.Query{Want: flow.Denials}, h.take))
	if diff := cmp.Diff([]flow.Answer{{Done: true, Error: "why not"}}, h.all()); diff != "" {
		t.Error(diff)
	}
	if err := a.Ask(t.Context(), flow.Query{Want: "nonsense"}, h.take); !errors.Is(err, flow.ErrQuery) {
		t.Errorf("got %v, want ErrQuery", err)
	}
}

func TestAskNobody(t *testing.T) {
	a := startAgent(t, socketPath(t))
	must(t, a.Ask(t.Context(), flow.Query{Want: flow.Denials}, func(flow.Answer) { t.Error("nobody was there to answer") }))
}

// A query without an end reaches proxies that attach later, and ends in the proxy when it is taken back or the agent goes.
func TestAskOnAndOn(t *testing.T) {
	a := startAgent(t, socketPath(t))
	e := &eye{answer: func(ctx context.Context, _ flow.Query, emit func(flow.Answer) error) error {
		err := emit(flow.Answer{Caught: true})
		<-ctx.Done()
		return err
	}}
	var h heard
	stop := run(t, "ask", func(ctx context.Context) error { return a.Ask(ctx, flow.Query{Want: flow.Records}, h.take) })
	startWatched(t, a.path, e)
	eventually(t, "the proxy answers", func() bool { return len(h.all()) == 1 })
	_, end := startWatched(t, a.path, e)
	eventually(t, "the second does, too", func() bool { return len(h.all()) == 2 && e.watching.Load() == 2 })
	end()
	stop()
	eventually(t, "nobody watches any more", func() bool { return e.watching.Load() == 0 })
	run(t, "ask again", func(ctx context.Context) error { return a.Ask(ctx, flow.Query{Want: flow.Edges}, h.take) })
	eventually(t, "the proxy answers again", func() bool { return e.watching.Load() == 1 })
	a.stop()
	eventually(t, "nobody watches without an agent", func() bool { return e.watching.Load() == 0 })
}

func TestAskIsBounded(t *testing.T) {
	a := startAgent(t, socketPath(t))
	for range 64 {
		run(t, "ask", func(ctx context.Context) error {
			return a.Ask(ctx, flow.Query{Want: flow.Records}, func(flow.Answer) {})
		})
	}
	eventually(t, "one more is refused", func() bool {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		return errors.Is(a.Ask(ctx, flow.Query{Want: flow.Records}, func(flow.Answer) {}), feed.ErrQueries)
	})
}

// A plan arrives however much there is to see.
func TestAnswersDoNotHoldUpPlans(t *testing.T) {
	s, a := newSigner(t), startAgent(t, socketPath(t))
	big := make([]flow.Record, 200)
	for i := range big {
		big[i] = flow.Record{Path: "/" + string(make([]byte, 200))}
	}
	e := &eye{answer: func(_ context.Context, _ flow.Query, emit func(flow.Answer) error) error {
		for {
			if err := emit(flow.Answer{Records: big}); err != nil {
				return nil //nolint:nilerr // the end
			}
		}
	}}
	h, _ := startWatched(t, a.path, e)
	var pieces atomic.Int64
	run(t, "ask", func(ctx context.Context) error {
		return a.Ask(ctx, flow.Query{Want: flow.Records}, func(flow.Answer) { pieces.Add(1) })
	})
	eventually(t, "the flood comes", func() bool { return pieces.Load() > 3 })
	for revision := uint64(1); revision <= 5; revision++ {
		must(t, a.SetPlan("vm-a", s.plan(revision, 100)))
		began := time.Now()
		h.wait(t, "the plan", at(revision))
		if took := time.Since(began); took > 2*time.Second {
			t.Errorf("the plan took %s", took)
		}
	}
}
