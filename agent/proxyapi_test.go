package agent_test

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"strings"
	"testing"

	"github.com/meshd/meshd/agent"
	"github.com/meshd/meshd/proxy/feed"
)

// planless is a proxy that takes every plan.
type planless struct{}

func (planless) Apply(context.Context, feed.Update) (feed.Result, error) { return feed.Result{}, nil }
func (planless) SetState(feed.State)                                     {}

// TestRestartOverTheSocket: the host's operator has a proxy replaced, and is told what came of it.
func TestRestartOverTheSocket(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.start()
	const path = "/v1/agent/proxies/p1/restart"
	want := func(what string, code int, text string) {
		t.Helper()
		got, body, err := b.call(http.MethodPost, path, "")
		if err != nil || got != code || !strings.Contains(string(body), text) {
			t.Errorf("%s: %d %s %v, want %d and %q", what, got, body, err, code, text)
		}
	}
	b.status("the API is there", func(agent.Status) bool { return true })
	want("no proxy", http.StatusNotFound, "no active process")
	outcome := make(chan error, 1)
	c := feed.NewClient(feed.ClientConfig{
		Socket: b.cfg.Proxy.Socket, Proxy: "p1", Log: slog.New(slog.DiscardHandler),
		Restart: func(done func(int, error)) { done(42, <-outcome) },
	})
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- c.Run(ctx, planless{}) }()
	b.status("it is attached", func(s agent.Status) bool { return len(s.Proxies) == 1 })
	outcome <- nil
	want("done", http.StatusOK, `{"proxy":"p1","pid":42}`)
	outcome <- errors.New("no such program")
	want("not done", http.StatusConflict, "serves on: no such program")
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
