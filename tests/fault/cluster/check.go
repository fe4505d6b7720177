package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/meshd/meshd/server/client"
	"github.com/meshd/meshd/tests/fault/history"
	"github.com/meshd/meshd/tests/machines"
)

// tracer watches one server, and begins again whenever that breaks.
type tracer struct {
	load   *Load
	server *Server
	api    *client.Client

	mu    sync.Mutex
	trace history.Trace
	view  map[string]history.Version // what the last batch led to
}

func (w *tracer) run(ctx context.Context) {
	again := time.NewTicker(50 * time.Millisecond)
	defer again.Stop()
	for {
		w.connection(ctx)
		select {
		case <-ctx.Done():
			return
		case <-again.C:
		}
	}
}

// connection follows one watch to its end.
func (w *tracer) connection(ctx context.Context) {
	batch := history.Batch{Again: true, Floor: w.load.Revision(), Puts: map[string]history.Version{}}
	for event, err := range w.api.Watch(ctx, client.KindService, client.Selection{Namespace: namespace}) {
		if err != nil {
			if code := client.CodeOf(err); code != client.CodeUnreachable && code != client.CodeUnavailable && ctx.Err() == nil {
				w.load.problem(fmt.Errorf("watch of %s: %w", w.trace.Name, err))
			}
			return
		}
		name := func() string { return event.Item.Ref.Parts[len(event.Item.Ref.Parts)-1] }
		switch event.Type {
		case client.EventReset:
			batch.Reset, batch.Deletes = true, nil
			clear(batch.Puts)
		case client.EventPut:
			batch.Puts[name()] = valueOf(event.Item)
		case client.EventDelete:
			batch.Deletes = append(batch.Deletes, name())
		case client.EventPosition:
			batch.Position = event.Position.Revision
			w.add(batch)
			batch = history.Batch{Puts: map[string]history.Version{}}
		}
	}
}

func (w *tracer) add(b history.Batch) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.trace.Batches = append(w.trace.Batches, b)
	if b.Reset || w.view == nil {
		w.view = map[string]history.Version{}
	}
	for _, key := range b.Deletes {
		delete(w.view, key)
	}
	maps.Copy(w.view, b.Puts)
}

func (w *tracer) now() map[string]history.Version {
	w.mu.Lock()
	defer w.mu.Unlock()
	return maps.Clone(w.view)
}

func (w *tracer) holds(state map[string]history.Version) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return maps.Equal(w.view, state)
}

// checkTime is how long the search for an order of the operations may take.
const checkTime = 90 * time.Second

// Check ends the clients, waits until all servers and watches agree, and holds
// everything that was seen against what a correct cluster can answer. All faults
// must be over. It returns how many writes were acknowledged.
func (l *Load) Check(t *testing.T) int {
	t.Helper()
	l.stopClients()
	l.work.Wait()
	final := l.settle(t)
	l.End()
	l.mu.Lock()
	for i, err := range l.problems {
		if i < 10 {
			t.Error(err)
		}
	}
	l.mu.Unlock()
	ops := l.Ops()
	if err := history.Check(ops, checkTime); err != nil {
		t.Error(err)
	}
	batches := 0
	for _, w := range l.traces {
		batches += len(w.trace.Batches)
		end := final
		if w.server.left {
			end = w.view
		}
		if err := history.CheckWatch(w.trace, ops, together, end); err != nil {
			t.Error(err)
		}
	}
	l.cluster.Agree(t)
	if keeps(t) {
		l.keep(t, ops)
	}
	count := map[history.Outcome]int{}
	acked := 0
	for _, o := range ops {
		count[o.Outcome]++
		if o.Kind != history.Read && o.Outcome == history.OK {
			acked++
		}
	}
	t.Logf("%d operations in %s (%d writes acknowledged, %d conflicts, %d unknown) and %d batches of %d watches are in order; elections: %d",
		len(ops), l.Now().Round(time.Second), acked, count[history.Conflict], count[history.Unknown], batches, len(l.traces), len(l.cluster.Elections()))
	return acked
}

// keep writes down what was seen, for people.
func (l *Load) keep(t *testing.T, ops []history.Op) {
	t.Helper()
	var text strings.Builder
	fmt.Fprintf(&text, "times are since %s\n", l.Start().Format(time.RFC3339Nano))
	for _, o := range ops {
		fmt.Fprintln(&text, o)
	}
	if err := os.WriteFile(filepath.Join(t.ArtifactDir(), "history.txt"), []byte(text.String()), 0o600); err != nil {
		t.Error(err)
	}
}

// settle reads the state, linearizably, and waits until each watch has come to it.
func (l *Load) settle(t *testing.T) map[string]history.Version {
	t.Helper()
	var final map[string]history.Version
	machines.Eventually(t, 30*time.Second, "the servers answer", func() string {
		all, err := l.cluster.Leader().API().List(t.Context(), client.KindService, client.Selection{Namespace: namespace})
		if err != nil {
			return err.Error()
		}
		final = stateOf(all.Items)
		return ""
	})
	for _, w := range l.traces {
		if w.server.left {
			continue
		}
		machines.Eventually(t, 30*time.Second, "the watch of "+w.trace.Name+" comes to the end", func() string {
			if !w.holds(final) {
				return fmt.Sprintf("it is at %v, the state is %v", w.now(), final)
			}
			return ""
		})
	}
	return final
}

// Agree waits until all servers that run hold the same state.
func (c *Cluster) Agree(t *testing.T) {
	t.Helper()
	machines.Eventually(t, 30*time.Second, "all servers hold the same state", func() string {
		first := ""
		for i, s := range c.Servers {
			if s.left || s.Process == nil || !s.Process.Running() {
				continue
			}
			state, err := s.local(t.Context())
			if err != nil {
				return fmt.Sprintf("%s: %v", s.Name, err)
			}
			if i == 0 || first == "" {
				first = state
			} else if state != first {
				return fmt.Sprintf("%s has\n%s\n%s has\n%s", c.Servers[0].Name, first, s.Name, state)
			}
		}
		return c.hashes(t)
	})
}

// hashes says whether the servers find the hashes of their states to be different.
func (c *Cluster) hashes(t *testing.T) string {
	t.Helper()
	all, err := c.Leader().API().Members(t.Context())
	if err != nil {
		return err.Error()
	}
	for _, m := range all.Members {
		if m.State == client.StateDifferent {
			t.Errorf("the state of %s hashes differently from the leader's", m.Name)
		}
	}
	return ""
}

// local returns what the server itself holds, asking no other: every resource with
// its revision.
func (s *Server) local(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	var d net.Dialer
	transport := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return d.DialContext(ctx, "unix", s.Path("server.sock"))
	}}
	var text strings.Builder
	for _, kind := range client.Kinds() {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://meshd/v1/"+kind.Collection()+"?stale=true&limit=1000", nil)
		if err != nil {
			return "", fmt.Errorf("ask for %s: %w", kind, err)
		}
		resp, err := (&http.Client{Transport: transport}).Do(req)
		if err != nil {
			return "", fmt.Errorf("ask for %s: %w", kind, err)
		}
		data, err := io.ReadAll(resp.Body)
		_ = resp.Body.Close() // read to its end
		if err != nil || resp.StatusCode != http.StatusOK {
			return "", fmt.Errorf("ask for %s: %s %s: %w", kind, resp.Status, data, errors.Join(err, errAnswer))
		}
		var all client.List
		if err := json.Unmarshal(data, &all); err != nil {
			return "", fmt.Errorf("ask for %s: %w", kind, err)
		}
		for _, i := range all.Items {
			fmt.Fprintf(&text, "%s %s @%d %s\n", i.Kind, i.Name, i.Revision, i.Spec)
		}
	}
	return text.String(), nil
}

var errAnswer = errors.New("no answer")
