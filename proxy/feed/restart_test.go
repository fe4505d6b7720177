package feed_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"testing"
	"time"

	"github.com/meshd/meshd/proxy/feed"
)

// attach attaches a client that answers wishes for a restart so; nil: that can't restart.
func attach(t *testing.T, path string, state feed.State, restart func(done func(int, error))) (*feed.Client, func()) {
	t.Helper()
	c := feed.NewClient(feed.ClientConfig{
		Socket: path, Proxy: "vm-a", Log: slog.New(slog.DiscardHandler), State: state, Restart: restart,
	})
	return c, run(t, "proxy", func(ctx context.Context) error { return c.Run(ctx, newHandler()) })
}

// TestRestart: the wish goes to the process that serves, and its answer comes back.
func TestRestart(t *testing.T) {
	a := startAgent(t, socketPath(t))
	if _, err := a.Restart(t.Context(), "vm-a"); !errors.Is(err, feed.ErrNoProxy) {
		t.Errorf("without a proxy: %v", err)
	}
	attached := func(n int) {
		t.Helper()
		a.waitStatus(t, "all are attached", func(s []feed.ProxyStatus) bool { return len(s) == n })
	}
	_, stopOld := attach(t, a.path, feed.Active, nil)
	attached(1)
	if _, err := a.Restart(t.Context(), "vm-a"); !errors.Is(err, feed.ErrNoRestart) {
		t.Errorf("an older version: %v", err)
	}
	answers := make(chan error, 8)
	answer := func(done func(int, error)) { go func() { done(os.Getpid(), <-answers) }() }
	never := func(func(int, error)) { t.Error("a process that does not serve was asked") }
	attach(t, a.path, feed.Starting, never)
	draining, _ := attach(t, a.path, feed.Active, never)
	draining.Report(feed.SetTo{To: feed.Draining, Until: time.Unix(2e9, 0), Open: 3})
	_, stop := attach(t, a.path, feed.Active, answer)
	attached(4)
	a.waitStatus(t, "one drains", func(s []feed.ProxyStatus) bool {
		for _, p := range s {
			if p.State == feed.Draining {
				return p.Open == 3 && p.Until.Equal(time.Unix(2e9, 0))
			}
		}
		return false
	})
	stopOld()
	attached(3)
	answers <- nil
	if pid, err := a.Restart(t.Context(), "vm-a"); pid != os.Getpid() || err != nil {
		t.Errorf("got process %d: %v", pid, err)
	}
	answers <- errors.New("no such program")
	if _, err := a.Restart(t.Context(), "vm-a"); !errors.Is(err, feed.ErrRestart) || !bytes.Contains([]byte(err.Error()), []byte("no such program")) {
		t.Errorf("a restart that failed: %v", err)
	}
	short, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := a.Restart(short, "vm-a"); !errors.Is(err, context.Canceled) {
		t.Errorf("nobody waits: %v", err)
	}
	answers <- nil
	lost := make(chan error)
	go func() {
		_, err := a.Restart(t.Context(), "vm-a")
		lost <- err
	}()
	stop()
	answers <- nil
	if err := <-lost; err != nil && !errors.Is(err, feed.ErrRestart) && !errors.Is(err, feed.ErrNoProxy) {
		t.Errorf("the process is gone: %v", err)
	}
}

// TestAProcessThatDrainsHoldsNoSocket: otherwise connections would wait in it for nobody.
func TestAProcessThatDrainsHoldsNoSocket(t *testing.T) {
	s, path := newSigner(t), socketPath(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	tcp, ok := l.(*net.TCPListener)
	if !ok {
		t.Fatal("no TCP")
	}
	file, err := tcp.File()
	must(t, errors.Join(err, l.Close()))
	a := startAgent(t, path)
	plan := s.plan(1, 0)
	plan.Listeners[0].Address = l.Addr().String()
	must(t, a.SetPlan("vm-a", plan))
	h := newHandler()
	c := feed.NewClient(feed.ClientConfig{
		Socket: path, Proxy: "vm-a", Log: slog.New(slog.DiscardHandler), Sockets: map[string]*os.File{"mesh": file},
	})
	run(t, "proxy", func(ctx context.Context) error { return c.Run(ctx, h) })
	h.wait(t, "the inherited socket is used", func(_ feed.Update, sockets map[string]bool) bool { return sockets["mesh"] })
	a.waitStatus(t, "it is offered", func(s []feed.ProxyStatus) bool { return len(s) == 1 && len(s[0].Sockets) == 1 })
	c.Report(feed.SetTo{To: feed.Draining})
	a.waitStatus(t, "the agent knows", func(s []feed.ProxyStatus) bool { return s[0].State == feed.Draining })
	a.stop()
	eventually(t, "who connects is refused", func() bool {
		c, err := net.Dial("tcp", l.Addr().String())
		if err == nil {
			_ = c.Close()
		}
		return err != nil
	})
}

// TestLink: sockets, steps and counters of any size pass between two processes.
func TestLink(t *testing.T) {
	ours, theirs, err := feed.NewLinkPair()
	must(t, err)
	defer ours.Close()
	other, err := feed.NewLink(theirs)
	must(t, err)
	sockets := map[string]*os.File{}
	for i := range 100 {
		r, w, err := os.Pipe()
		must(t, errors.Join(err, w.Close()))
		sockets[fmt.Sprint(i)] = r
		t.Cleanup(func() { _ = r.Close() })
	}
	families := bytes.Repeat([]byte("counter "), 500_000)
	go func() {
		defer other.Close()
		if err := errors.Join(other.WriteSockets(sockets), other.Write(feed.Frame{Step: &feed.Step{To: feed.HeirTake}}), other.WriteCounters(families, 3)); err != nil {
			t.Error(err)
		}
	}()
	var got []byte
	passed, steps, whole := 0, 0, 0
	for {
		f, files, err := ours.Read(time.Now().Add(10 * time.Second))
		if errors.Is(err, io.EOF) {
			break
		}
		must(t, err)
		for _, file := range files {
			passed++
			_ = file.Close()
		}
		if f.Step != nil && f.Step.To == feed.HeirTake {
			steps++
		}
		if c := f.Counters; c != nil {
			got = append(got, c.Families...)
			if !c.More && c.Generations == 3 {
				whole++
			}
		}
	}
	if passed != 100 || steps != 1 || whole != 1 || !bytes.Equal(got, families) {
		t.Errorf("%d sockets, %d steps, %d counters of %d bytes came", passed, steps, whole, len(got))
	}
	file, err := os.Open(os.DevNull)
	must(t, err)
	if _, err := feed.NewLink(file); err == nil {
		t.Error("a file is taken for a link")
	}
}
