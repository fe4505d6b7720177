package agent_test

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/meshd/meshd/agent"
	"github.com/meshd/meshd/agent/agenttest"
	"github.com/meshd/meshd/server/meshpb"
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

// TestLeaveWaits: what was registered before the node leaves is answered before the
// server is told that it leaves; a node that gives up waiting stays.
func TestLeaveWaits(t *testing.T) {
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
	b.status("registered", func(s agent.Status) bool { return s.Registration.Current })

	held, release := make(chan struct{}), make(chan struct{})
	hold := sync.OnceFunc(func() { close(held); <-release })
	before := func(rpc string) {
		if rpc == "Register" {
			hold()
		}
	}
	b.before.Store(&before)
	b.write("services.d/api.hcl", "service \"api\" {}")
	a.Reload()
	<-held
	short, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := a.Leave(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Leave while a registration is under way: %v", err)
	}
	if seen, _ := b.server.Seen(); seen.Left != 0 {
		t.Error("Leave went past a registration")
	}
	left := make(chan error, 1)
	go func() { left <- a.Leave(t.Context()) }()
	close(release)
	if err := <-left; err != nil {
		t.Error(err)
	}
	if err := <-done; err != nil {
		t.Errorf("Run: %v", err)
	}
	if seen, _ := b.server.Seen(); seen.Left != 1 || len(seen.Registered) != 0 {
		t.Errorf("the server saw %+v", seen)
	}
}

// TestLeaveOpensNoStream: the server ends the stream before it answers. That ends
// neither the call, nor does the agent connect again meanwhile: a lease would come of
// it that is lost a moment later. If it is to stay after all, it does.
func TestLeaveOpensNoStream(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.write("services.d/web.hcl", "service \"web\" {}")
	a, err := agent.New(b.cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- a.Run(t.Context()) }()
	b.status("registered", func(s agent.Status) bool { return s.Registration.Current })
	arrived, release := make(chan struct{}), make(chan struct{})
	before := func(rpc string) {
		if rpc == "Leave" {
			close(arrived)
			<-release
		}
	}
	b.before.Store(&before)
	ctx, cancel := context.WithCancel(t.Context())
	left := make(chan error, 1)
	go func() { left <- a.Leave(ctx) }()
	<-arrived
	b.server.Cut()
	b.status("tried to connect", func(s agent.Status) bool {
		return strings.Contains(s.Server.Error, "the node has left") || len(b.hellos()) > 1
	})
	if n := len(b.hellos()); n != 1 {
		t.Errorf("%d streams", n)
	}
	b.before.Store(nil)
	cancel()
	if err := <-left; !errors.Is(err, context.Canceled) && status.Code(err) != codes.Canceled {
		t.Errorf("Leave that is given up: %v", err)
	}
	close(release)
	b.seen("the node that stays connects again", func(s agenttest.Seen) bool { return len(s.Hellos) == 2 && s.Streams == 1 })
	b.status("registered again", func(s agent.Status) bool { return s.Server.Server != "" && s.Registration.Current })
	if err := a.Leave(t.Context()); err != nil {
		t.Error(err)
	}
	if err := <-done; err != nil {
		t.Errorf("Run: %v", err)
	}
}

func (b *bench) hellos() []*meshpb.Hello {
	seen, _ := b.server.Seen()
	return seen.Hellos
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
