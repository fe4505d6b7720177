package agent_test

import (
	"errors"
	"log/slog"
	"net/http"
	"strings"
	"testing"

	"github.com/meshd/meshd/agent"
	"github.com/meshd/meshd/agent/agenttest"
)

func TestLeave(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.write("services.d/web.hcl", "service \"web\" {}")
	a, err := agent.New(b.cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Leave(t.Context()); !errors.Is(err, agent.ErrNotConnected) {
		t.Errorf("Leave before Run: %v", err)
	}
	done := make(chan error, 1)
	go func() { done <- a.Run(t.Context()) }()
	b.seen("registration", func(s agenttest.Seen) bool { return len(s.Registered) == 1 && s.Streams == 1 })
	b.status("connected", func(s agent.Status) bool { return s.Server.Server != "" })
	if err := a.Leave(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Errorf("Run: %v", err)
	}
	if seen, _ := b.server.Seen(); seen.Left != 1 || len(seen.Registered) != 0 {
		t.Errorf("the server saw %+v", seen)
	}
}

// TestLeaveOverTheSocket: the host's operator makes the node leave, gets an
// answer, and the agent ends.
func TestLeaveOverTheSocket(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.write("services.d/web.hcl", "service \"web\" {}")
	a, err := agent.New(b.cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- a.Run(t.Context()) }()
	b.seen("registration", func(s agenttest.Seen) bool { return len(s.Registered) == 1 && s.Streams == 1 })
	b.status("connected", func(s agent.Status) bool { return s.Server.Server != "" })
	code, body, err := b.call(http.MethodPost, "/v1/agent/leave", "")
	if err != nil || code != http.StatusOK || !strings.Contains(string(body), `"instances":1`) {
		t.Errorf("%d %s %v", code, body, err)
	}
	if err := <-done; err != nil {
		t.Errorf("Run: %v", err)
	}
	if seen, _ := b.server.Seen(); seen.Left != 1 {
		t.Errorf("the server saw %+v", seen)
	}
}
