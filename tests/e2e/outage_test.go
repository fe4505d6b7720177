package e2e_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// load is a bounded stream of requests from one host, at a constant rate, half
// of them on new connections.
type load struct {
	mu     sync.Mutex
	sent   int
	failed []string
	done   chan struct{}
}

// startLoad sends n requests, spread evenly over a time. It ends with the test
// at the latest.
func (h *host) startLoad(url string, n int, over time.Duration) *load {
	l := &load{done: make(chan struct{})}
	ctx, stop := context.WithCancel(context.Background())
	h.T.Cleanup(func() {
		stop()
		<-l.done
	})
	dial := func(context.Context, string, string) (net.Conn, error) { return h.Dial("127.0.0.1:9191") }
	keep := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DialContext: dial, MaxIdleConnsPerHost: 16}}
	fresh := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}}
	jobs := make(chan int)
	var workers sync.WaitGroup
	for range 8 {
		workers.Go(func() {
			for i := range jobs {
				c := keep
				if i%2 == 1 {
					c = fresh
				}
				l.record(get(c, url))
			}
		})
	}
	go func() {
		defer close(l.done)
		tick := time.NewTicker(over / time.Duration(n))
		defer tick.Stop()
		for i := range n {
			<-tick.C
			if ctx.Err() != nil {
				break
			}
			jobs <- i
		}
		close(jobs)
		workers.Wait()
		keep.CloseIdleConnections()
	}()
	return l
}

// get returns what is wrong with a request's answer, or "".
func get(c *http.Client, url string) string {
	resp, err := c.Get(url)
	if err != nil {
		return err.Error()
	}
	defer resp.Body.Close() //nolint:errcheck // read to its end
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return err.Error()
	}
	if resp.StatusCode != http.StatusOK || !strings.HasPrefix(string(body), "instance=") {
		return fmt.Sprintf("%s mesh-error=%q %q", resp.Status, resp.Header.Get("mesh-error"), body)
	}
	return ""
}

func (l *load) record(problem string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.sent++
	if problem != "" {
		l.failed = append(l.failed, time.Now().Format("05.000 ")+problem)
	}
}

// sentSoFar is how many requests are finished.
func (l *load) sentSoFar() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.sent
}

// await waits until some requests more are finished.
func (l *load) await(t *testing.T, more int) {
	t.Helper()
	until := l.sentSoFar() + more
	eventually(t, 2*time.Minute, "the load goes on", func() string {
		if n := l.sentSoFar(); n < until {
			return fmt.Sprintf("%d of %d requests", n, until)
		}
		return ""
	})
}

// none waits for the end and demands that no request failed.
func (l *load) none(t *testing.T, what string) {
	t.Helper()
	<-l.done
	t.Logf("%s: %d requests, %d lost", what, l.sent, len(l.failed))
	if len(l.failed) > 0 {
		t.Errorf("%s: lost %d of %d; the first: %s", what, len(l.failed), l.sent, l.failed[:min(3, len(l.failed))])
	}
}

const hello = "http://127.0.0.1:9191/hello"

// TestAgentDies: the only agent of the only instance is killed; its lease runs
// out, and its instance is still used, because nothing better exists.
func TestAgentDies(t *testing.T) {
	t.Parallel()
	s := newSpine(t)
	s.allowed()
	l := s.web.startLoad(hello, 10_000, 60*time.Second)
	l.await(t, 500)
	s.api.agent.Kill(syscall.SIGKILL)
	eventually(t, 20*time.Second, "vm-b is stale", func() string {
		if r := s.meshctl(0, "get", "node", "vm-b"); !strings.Contains(r.Stdout, "stale") {
			return r.Stdout
		}
		return ""
	})
	if r := s.meshctl(3, "check"); !strings.Contains(r.Stdout, "out of touch") {
		t.Errorf("check: %s", r.Stdout)
	}
	l.none(t, "agent killed")
}

// TestAgentRestarts: an agent that stops, is replaced and starts again, under
// load and while it holds the listening sockets, costs no request.
func TestAgentRestarts(t *testing.T) {
	t.Parallel()
	s := newSpine(t)
	s.allowed()
	l := s.web.startLoad(hello, 3_000, 15*time.Second)
	for _, m := range []*member{s.api, s.web} {
		l.await(t, 300)
		m.agent.Stop(t, 5*time.Second)
		l.await(t, 100)
		m.startAgent()
		l.await(t, 300)
		m.agent.Kill(syscall.SIGKILL)
		m.startAgent()
	}
	eventually(t, 10*time.Second, "both nodes are connected again", func() string {
		if r := s.meshctl(0, "get", "nodes"); strings.Count(r.Stdout, "connected") != 2 {
			return r.Stdout
		}
		return ""
	})
	l.none(t, "agents stopped, killed and started")
	// And the restarted ones are still in charge.
	s.meshctl(0, "intention", "deny", "web", "api", "--replace", "--wait")
	s.web.answers(2*time.Second, "403", hello)
}

// checkLocal runs meshctl check on the host, without a server.
func (m *member) checkLocal() result {
	m.T.Helper()
	return m.Run("meshctl", "check", "--local", "--agent-socket", m.Path("agent.sock"))
}

// TestServersDie: with no server alive everything goes on, new connections
// included, and agent and proxy can be restarted.
func TestServersDie(t *testing.T) {
	t.Parallel()
	s := newSpine(t)
	s.allowed()
	l := s.web.startLoad(hello, 3_000, 20*time.Second)
	l.await(t, 200)
	s.daemon.Kill(syscall.SIGKILL)
	l.await(t, 500)
	eventually(t, 5*time.Second, "the agent says that it serves from disk", func() string {
		r := s.web.checkLocal()
		if r.Code == 3 && strings.Contains(r.Stdout, "✗ no server for") && strings.Contains(r.Stdout, "serving from disk, the first certificate ends in 2") {
			return ""
		}
		return fmt.Sprintf("exit %d: %s%s", r.Code, r.Stdout, r.Stderr)
	})
	s.web.agent.Kill(syscall.SIGKILL)
	s.api.agent.Kill(syscall.SIGKILL)
	l.await(t, 100)
	s.web.startAgent()
	s.api.startAgent()
	l.none(t, "servers killed, agents restarted")

	for _, m := range []*member{s.api, s.web} {
		m.proxy.Kill(syscall.SIGKILL)
		m.startProxy()
	}
	took := s.web.answers(10*time.Second, "200", hello)
	t.Logf("both proxies restarted without servers: served again after %s", took.Round(time.Millisecond))
	// A proxy comes back even when its agent does not.
	s.api.agent.Kill(syscall.SIGKILL)
	s.api.proxy.Kill(syscall.SIGKILL)
	s.api.startProxy()
	took = s.web.answers(10*time.Second, "200", hello)
	t.Logf("a proxy alone, from its own disk: served again after %s", took.Round(time.Millisecond))
	s.api.startAgent()
	s.startServer()
	s.meshctl(0, "intention", "deny", "web", "api", "--replace")
	s.web.answers(15*time.Second, "403", hello)
}

// TestRestoreOlderSnapshot: revisions go back, and all agents follow the next
// intention all the same.
func TestRestoreOlderSnapshot(t *testing.T) {
	t.Parallel()
	s := newSpine(t)
	var agents []*member
	for i := range 18 {
		m := s.prepare(fmt.Sprintf("vm-%d", i))
		m.Write(s.token(m.Name, "web"), 0o600, "join.token")
		m.define("web.hcl", webDefinition)
		m.startAgent()
		m.startProxy()
		agents = append(agents, m)
	}
	agents = append(agents, s.web)
	for _, m := range agents {
		m.answers(30*time.Second, "403", hello)
	}
	snapshot := filepath.Join(s.server.Dir, "snapshot")
	s.meshctl(0, "snapshot", "save", snapshot)
	if info, err := os.Stat(snapshot); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("snapshot file: %v, %v", info, err)
	}
	for i := range 30 { // raise the revision far above the snapshot's
		s.meshctl(0, "intention", "allow", fmt.Sprintf("x%d", i), "api")
	}
	s.meshctl(0, "intention", "allow", "web", "api")
	for _, m := range agents {
		m.answers(10*time.Second, "200", hello)
	}
	s.meshctl(0, "snapshot", "restore", "--yes", snapshot)
	for _, m := range agents {
		m.answers(5*time.Second, "403", hello)
	}
	start := time.Now()
	s.meshctl(0, "intention", "allow", "web", "api")
	var wg sync.WaitGroup
	times := make([]time.Duration, len(agents))
	for i, m := range agents {
		wg.Go(func() { times[i] = m.opens(start) })
	}
	wg.Wait()
	last := time.Duration(0)
	for i, took := range times {
		if took == 0 {
			t.Errorf("%s does not follow", agents[i].Name)
		}
		last = max(last, took)
	}
	t.Logf("restored; %d agents and the server's own follow the next intention, the last after %s", len(agents), last.Round(time.Millisecond))
	if last > time.Second {
		t.Errorf("the last agent follows after %s, want at most 1 s", last)
	}
}

// opens asks the mesh from inside the host until it answers 200, and returns
// when that was, counted from start; 0 if it never was.
func (m *member) opens(start time.Time) time.Duration {
	c := &http.Client{Timeout: 2 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext:       func(context.Context, string, string) (net.Conn, error) { return m.Dial("127.0.0.1:9191") },
	}}
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for time.Since(start) < 10*time.Second {
		if get(c, hello) == "" {
			return time.Since(start)
		}
		<-tick.C
	}
	return 0
}
