package registry_test

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"

	"github.com/meshd/meshd/agent/registry"
	"github.com/meshd/meshd/server/meshpb"
)

// recorder is the client of a server that answers as the test says.
type recorder struct {
	meshpb.MeshClient

	mu       sync.Mutex
	sent     []string
	err      error
	refusals []*meshpb.Refusal
	hold     chan struct{} // if not nil, an answer waits until it is closed
}

func (r *recorder) Register(_ context.Context, req *meshpb.RegisterRequest, _ ...grpc.CallOption) (*meshpb.RegisterResponse, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	text := ""
	for _, reg := range req.GetRegistrations() {
		text += string(reg.GetInstance())
	}
	r.sent = append(r.sent, text)
	if hold := r.hold; hold != nil {
		r.mu.Unlock()
		<-hold
		r.mu.Lock()
	}
	if r.err != nil {
		return nil, r.err
	}
	return &meshpb.RegisterResponse{Position: &meshpb.Position{Generation: "g", Revision: 9}, Refusals: r.refusals}, nil
}

func (r *recorder) take() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := slices.Clone(r.sent)
	r.sent = nil
	return out
}

func (r *recorder) answer(err error, refusals ...*meshpb.Refusal) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.err, r.refusals = err, refusals
}

// link is a connection that comes and goes.
type link struct {
	mu      sync.Mutex
	client  meshpb.MeshClient
	changed chan struct{}
}

func (l *link) get() (meshpb.MeshClient, <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.client, l.changed
}

func (l *link) set(c meshpb.MeshClient) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.client = c
	close(l.changed)
	l.changed = make(chan struct{})
}

func set(names ...string) []*meshpb.Registration {
	var all []*meshpb.Registration
	for _, n := range names {
		all = append(all, &meshpb.Registration{Instance: []byte(n)})
	}
	return all
}

func TestSync(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l, r := &link{changed: make(chan struct{})}, &recorder{}
		s := registry.NewSyncer(registry.SyncConfig{Log: slog.New(slog.DiscardHandler), Link: l.get})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- s.Run(ctx) }()
		step := func(what string, wait time.Duration, want ...string) {
			t.Helper()
			if wait > 0 {
				<-time.After(wait)
			}
			synctest.Wait()
			if diff := cmp.Diff(want, r.take()); diff != "" {
				t.Errorf("%s: %s", what, diff)
			}
		}
		l.set(r)
		step("nothing is sent before Set: the folder was not read yet", time.Hour)
		l.set(nil)
		s.Set(set("a", "b"))
		step("not connected", time.Hour)
		l.set(r)
		step("on connection", 0, "ab")
		if st, _ := s.Status(); !st.Current || st.Position.Revision != 9 || st.Error != "" {
			t.Errorf("status %+v", st)
		}
		s.Set(set("a", "b"))
		step("no change", time.Minute)
		s.Set(set("a"))
		step("a change", 0, "a")
		l.set(nil)
		l.set(r)
		step("a new connection", 0, "a")
		// Every 5 min, give or take half of it: once at least, three times at most.
		<-time.After(5*time.Minute + 5*time.Minute/2)
		synctest.Wait()
		if sent := r.take(); len(sent) < 1 || len(sent) > 3 || slices.ContainsFunc(sent, func(s string) bool { return s != "a" }) {
			t.Errorf("now and then: %q", sent)
		}

		r.answer(errors.New("no quorum"))
		s.Set(set())
		synctest.Wait()
		if st, _ := s.Status(); st.Current || st.Error != "no quorum" {
			t.Errorf("status %+v", st)
		}
		<-time.After(time.Minute)
		if n := len(r.take()); n < 5 || n > 40 {
			t.Errorf("%d attempts in a minute", n)
		}
		refusal := &meshpb.Refusal{Service: "default/api", Instance: "api", Reason: "vm-a may not run api"}
		r.answer(nil, refusal)
		<-time.After(time.Minute)
		synctest.Wait()
		want := []registry.Refusal{{Service: "default/api", Instance: "api", Reason: "vm-a may not run api"}}
		st, _ := s.Status()
		if diff := cmp.Diff(want, st.Refusals); diff != "" || st.Error != "" {
			t.Errorf("refusals: %s, %q", diff, st.Error)
		}
		if n := len(r.take()); n < 2 {
			t.Errorf("a refused set was sent %d times in a minute: it may be allowed meanwhile", n)
		}
		r.answer(nil)
		s.Retry()
		step("at once when something changed", 0, "")
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// TestPause: what is asked of a server after Pause comes after every registration,
// so that a node which leaves is not registered again by what was under way.
func TestPause(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l, r := &link{changed: make(chan struct{})}, &recorder{hold: make(chan struct{})}
		l.set(r)
		s := registry.NewSyncer(registry.SyncConfig{Log: slog.New(slog.DiscardHandler), Link: l.get})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- s.Run(ctx) }()
		s.Set(set("a"))
		synctest.Wait()

		short, stop := context.WithTimeout(t.Context(), time.Second)
		defer stop()
		if err := s.Pause(short); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Pause while a registration is under way: %v", err)
		}
		paused := make(chan error, 1)
		go func() { paused <- s.Pause(t.Context()) }()
		synctest.Wait()
		select {
		case err := <-paused:
			t.Errorf("Pause returned while a registration was under way: %v", err)
		default:
		}
		close(r.hold)
		if err := <-paused; err != nil {
			t.Error(err)
		}
		if diff := cmp.Diff([]string{"a"}, r.take()); diff != "" {
			t.Error(diff)
		}
		s.Set(set("b"))
		s.Retry()
		l.set(nil)
		l.set(r)
		<-time.After(time.Hour)
		synctest.Wait()
		if sent := r.take(); len(sent) != 0 {
			t.Errorf("sent while paused: %q", sent)
		}
		s.Resume()
		synctest.Wait()
		if diff := cmp.Diff([]string{"b"}, r.take()); diff != "" {
			t.Error(diff)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}
