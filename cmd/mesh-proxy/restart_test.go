package main_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/meshd/meshd/intentions"
	"github.com/meshd/meshd/proxy/feed"
)

// restart runs mesh-proxy --restart and returns the process that serves then.
func (w *world) restart() (pid int, problem string) {
	out, err := exec.Command(binary, "--restart", "--state", w.state).CombinedOutput()
	if err != nil {
		return 0, strings.TrimSpace(string(out))
	}
	if _, err := fmt.Sscanf(string(out), "process %d serves now", &pid); err != nil {
		return 0, fmt.Sprintf("%q: %v", out, err)
	}
	return pid, ""
}

func (w *world) mustRestart() int {
	w.t.Helper()
	pid, problem := w.restart()
	if problem != "" {
		w.t.Fatalf("restart: %s", problem)
	}
	return pid
}

// settled waits until one process is left, and it is active.
func (w *world) settled(srv *feed.Server, pid int) {
	w.t.Helper()
	eventually(w.t, "one process is left", func() bool {
		s := srv.Status()
		return len(s) == 1 && s[0].State == feed.Active && s[0].PID == pid
	})
}

func (w *world) ready(srv *feed.Server) {
	w.t.Helper()
	eventually(w.t, "the plan is applied", func() bool { s := srv.Status(); return len(s) == 1 && s[0].Applied == w.plan.Position })
}

func (w *world) scrape() ([]byte, error) {
	resp, err := (&http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}).Get("http://" + w.metrics + "/metrics")
	if err != nil {
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	return io.ReadAll(resp.Body)
}

// sessions scrapes how many TCP sessions were counted.
func (w *world) sessions() (float64, error) {
	body, err := w.scrape()
	if err != nil {
		return 0, err
	}
	line := regexp.MustCompile(`mesh_tcp_connections_total\{[^}]*direction="outbound"[^}]*\} (\S+)`).FindSubmatch(body)
	if line == nil {
		return 0, nil
	}
	return strconv.ParseFloat(string(line[1]), 64)
}

// counts waits until so many sessions are counted, by one process and the other: a session is a moment after its first bytes.
func (w *world) counts(want float64) {
	w.t.Helper()
	eventually(w.t, fmt.Sprintf("%v sessions are counted", want), func() bool {
		n, err := w.sessions()
		must(w.t, err)
		return n == want
	})
}

// TestHotRestart: another process takes over without a connection noticing; the first one drains, still enforces plans, passes on
// what it counts, and as the one that was started waits for the end of the other.
func TestHotRestart(t *testing.T) {
	w := newWorld(t, echoApp(t))
	srv, _ := w.agent()
	first := w.proxy("--restart-drain-timeout", "1m")
	w.ready(srv)
	old, err := w.talk()
	must(t, err)
	must(t, errors.Join(old.SetDeadline(time.Time{})))
	denied, err := w.talk()
	must(t, err)
	pid := w.mustRestart()
	var status []feed.ProxyStatus
	eventually(t, "one drains beside one that serves", func() bool {
		status = srv.Status()
		return len(status) == 2 && status[0].State == feed.Draining && status[1].State == feed.Active
	})
	if left := time.Until(status[0].Until); status[0].PID != first.Process.Pid || status[1].PID != pid || status[0].Open != 4 || left < 30*time.Second || left > time.Minute {
		t.Errorf("status %+v, want 4 connections open until in a minute", status)
	}
	must(t, echo(old))
	fresh, err := w.talk()
	must(t, err)
	w.counts(3)

	// A plan is enforced by both.
	w.plan.Position.Revision++
	w.plan.Policies[0].Intentions[0].Action = intentions.Deny
	must(t, srv.SetPlan("vm", w.plan))
	for name, c := range map[string]net.Conn{"old": denied, "fresh": fresh} {
		if _, err := io.Copy(io.Discard, c); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the denied %s connection ended with %v, want a reset", name, err)
		}
	}
	w.settled(srv, pid)
	w.plan.Position.Revision++
	w.plan.Policies[0].Intentions[0].Action = intentions.Allow
	must(t, srv.SetPlan("vm", w.plan))
	w.ready(srv)
	live, err := w.talk()
	must(t, err)
	w.counts(4)

	// Who was started waits, and ends with the other one.
	must(t, first.Process.Signal(syscall.SIGTERM))
	eventually(t, "the second process drains", func() bool { s := srv.Status(); return len(s) == 1 && s[0].State == feed.Draining })
	must(t, echo(live))
	must(t, live.Close())
	if err := first.Wait(); err != nil {
		t.Errorf("exit: %v", err)
	}
	if err := syscall.Kill(pid, 0); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("process %d is left: %v", pid, err)
	}
}

// load keeps opening connections and sending over kept ones until it is stopped, and returns how many exchanges there were.
func (w *world) load(clients int) (stop func() int64) {
	ctx, cancel := context.WithCancel(w.t.Context())
	var g sync.WaitGroup
	var done atomic.Int64
	for i := range clients {
		g.Go(func() {
			var kept net.Conn
			for n := 0; ctx.Err() == nil; n++ {
				// Sessions last up to a hundred exchanges.
				if kept == nil || n%(10*i+1) == 0 {
					if kept != nil {
						_ = kept.Close()
					}
					c, err := net.Dial("tcp", w.upstream)
					if err != nil {
						w.t.Errorf("connect: %v", err)
						return
					}
					kept = c
				}
				if err := echo(kept); err != nil {
					w.t.Errorf("exchange: %v", err)
					return
				}
				done.Add(1)
			}
			_ = kept.Close()
		})
	}
	return func() int64 {
		cancel()
		g.Wait()
		return done.Load()
	}
}

// TestHotRestartUnderLoad replaces the process again and again while sessions come and go: none is refused, none is cut, and no
// counter goes back or counts twice.
func TestHotRestartUnderLoad(t *testing.T) {
	w := newWorld(t, echoApp(t))
	srv, _ := w.agent()
	w.proxy()
	w.ready(srv)
	stop := w.load(8)
	last, watched := 0.0, make(chan struct{})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() {
		defer close(watched)
		for ctx.Err() == nil {
			n, err := w.sessions()
			if err != nil || n < last {
				t.Errorf("the counter was at %v and is at %v: %v", last, n, err)
			}
			last = n
		}
	}()
	pid := 0
	for range 5 {
		pid = w.mustRestart()
	}
	exchanges := stop()
	cancel()
	<-watched
	w.settled(srv, pid)
	n, err := w.sessions()
	must(t, err)
	if exchanges < 100 || n < last {
		t.Errorf("%d exchanges, %v sessions after %v: this proves nothing", exchanges, n, last)
	}
	// What all have counted, is counted once.
	before := n
	for range 3 {
		c, err := w.talk()
		must(t, err)
		must(t, c.Close())
	}
	w.mustRestart()
	w.counts(before + 3)
}

// manager is where systemd would be: it notes what is told, and by whom.
func manager(t *testing.T) (path string, told func() []string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram", Name: path})
	must(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	var mu sync.Mutex
	var all []string
	go func() {
		buf := make([]byte, 4096)
		for {
			n, err := conn.Read(buf)
			if err != nil {
				return
			}
			mu.Lock()
			all = append(all, string(buf[:n]))
			mu.Unlock()
		}
	}()
	return path, func() []string {
		mu.Lock()
		defer mu.Unlock()
		return slices.Clone(all)
	}
}

// TestHotRestartUnderSystemd: the manager is told of the new process, which is its own child as the first one was; the first one
// ends once it has drained.
func TestHotRestartUnderSystemd(t *testing.T) {
	w := newWorld(t, echoApp(t))
	path, told := manager(t)
	t.Setenv("NOTIFY_SOCKET", path)
	t.Setenv("SYSTEMD_EXEC_PID", "")
	srv, _ := w.agent()
	first := w.proxy()
	w.ready(srv)
	old, err := w.talk()
	must(t, err)
	pid := w.mustRestart()
	eventually(t, "the manager is told", func() bool { return slices.Contains(told(), "MAINPID="+strconv.Itoa(pid)) })
	must(t, echo(old))
	must(t, old.Close())
	if err := first.Wait(); err != nil {
		t.Errorf("exit: %v", err)
	}
	w.settled(srv, pid)
	next := w.mustRestart()
	var status syscall.WaitStatus
	if ended, err := syscall.Wait4(pid, &status, 0, nil); ended != pid || err != nil || status.ExitStatus() != 0 {
		t.Errorf("process %d ended with %v: %v; want a child of this one that ends well", pid, status, err)
	}
	// What is told to stop is the newest.
	must(t, syscall.Kill(next, syscall.SIGTERM))
	if ended, err := syscall.Wait4(next, &status, 0, nil); ended != next || err != nil || status.ExitStatus() != 0 {
		t.Errorf("process %d ended with %v: %v", next, status, err)
	}
	if want := []string{"READY=1", "MAINPID=" + strconv.Itoa(pid), "MAINPID=" + strconv.Itoa(next), "STOPPING=1"}; !slices.Equal(told(), want) {
		t.Errorf("the manager was told %q, want %q", told(), want)
	}
}

// TestHotRestartBelowAService: what systemd has told somebody else is not meant for mesh-proxy, nor for its successors.
func TestHotRestartBelowAService(t *testing.T) {
	w := newWorld(t, echoApp(t))
	path, told := manager(t)
	t.Setenv("NOTIFY_SOCKET", path)
	t.Setenv("SYSTEMD_EXEC_PID", "1")
	srv, _ := w.agent()
	first := w.proxy()
	w.ready(srv)
	w.settled(srv, w.mustRestart())
	pid := w.mustRestart()
	w.settled(srv, pid)
	must(t, first.Process.Signal(syscall.SIGTERM))
	if err := first.Wait(); err != nil {
		t.Errorf("exit: %v", err)
	}
	if err := syscall.Kill(pid, 0); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("process %d is left: %v", pid, err)
	}
	if slices.ContainsFunc(told(), func(s string) bool { return strings.HasPrefix(s, "MAINPID=") }) {
		t.Errorf("the manager was told %q", told())
	}
}

// TestNoHeir: a program that does not start, ends too soon, or never serves, leaves the process as it was.
func TestNoHeir(t *testing.T) {
	for name, script := range map[string]string{
		"it can't be run":  "\x7fELF",
		"it ends at once":  "#!/bin/sh\nexit 2\n",
		"it does not know": "#!/bin/sh\nexec " + binary + " --nonsense\n",
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, echoApp(t))
			w.program = filepath.Join(w.dir, "mesh-proxy")
			data, err := os.ReadFile(binary)
			must(t, errors.Join(err, os.WriteFile(w.program, data, 0o700)))
			srv, _ := w.agent()
			w.proxy()
			w.ready(srv)
			old, err := w.talk()
			must(t, err)
			must(t, errors.Join(os.Remove(w.program), os.WriteFile(w.program, []byte(script), 0o700)))
			if pid, problem := w.restart(); pid != 0 || !strings.Contains(problem, "new process ended before") && !strings.Contains(problem, "start "+w.program) {
				t.Errorf("process %d: %q", pid, problem)
			}
			must(t, echo(old))
			_, err = w.talk()
			must(t, err)
			if s := srv.Status(); len(s) != 1 || s[0].State != feed.Active {
				t.Errorf("status %+v", s)
			}
			// And it can still be replaced.
			must(t, errors.Join(os.Remove(w.program), os.WriteFile(w.program, data, 0o700)))
			w.mustRestart()
			must(t, echo(old))
		})
	}
}

// TestRestartsOneAtATime: of two restarts at once one is refused, and the other done.
func TestRestartsOneAtATime(t *testing.T) {
	w := newWorld(t, echoApp(t))
	srv, _ := w.agent()
	w.proxy()
	w.ready(srv)
	problems := make(chan string)
	go func() {
		_, err := srv.Restart(t.Context(), "vm")
		problem := ""
		if err != nil {
			problem = err.Error()
		}
		problems <- problem
	}()
	go func() {
		_, problem := w.restart()
		problems <- problem
	}()
	both := []string{<-problems, <-problems}
	slices.Sort(both)
	// The second may also come so late that it restarts the one that took over, or finds nobody.
	if both[0] != "" || both[1] != "" && !strings.Contains(both[1], "restart") {
		t.Errorf("got %q, want one of them done", both)
	}
	_, err := w.talk()
	must(t, err)
}

// TestFirstProcessIsKilled: whoever watches it starts another one; that of before, which nobody knows, gives way.
func TestFirstProcessIsKilled(t *testing.T) {
	w := newWorld(t, echoApp(t))
	srv, _ := w.agent()
	first := w.proxy()
	w.ready(srv)
	pid := w.mustRestart()
	w.settled(srv, pid)
	live, err := w.talk()
	must(t, err)
	must(t, first.Process.Kill())
	_ = first.Wait()
	second := w.proxy()
	eventually(t, "the process that nobody knows drains", func() bool {
		s := srv.Status()
		i := slices.IndexFunc(s, func(p feed.ProxyStatus) bool { return p.PID == pid })
		return i < 0 || s[i].State == feed.Draining
	})
	must(t, echo(live))
	must(t, live.Close())
	w.settled(srv, second.Process.Pid)
	_, err = w.talk()
	must(t, err)
}

// TestServingProcessIsKilled: the first process ends as the one that served, so that whoever watches it starts another.
func TestServingProcessIsKilled(t *testing.T) {
	w := newWorld(t, echoApp(t))
	srv, _ := w.agent()
	first := w.proxy()
	w.ready(srv)
	live, err := w.talk()
	must(t, err)
	pid := w.mustRestart()
	must(t, syscall.Kill(pid, syscall.SIGKILL))
	var exit *exec.ExitError
	if err := first.Wait(); !errors.As(err, &exit) || exit.ExitCode() != 128+int(syscall.SIGKILL) {
		t.Errorf("exit: %v", err)
	}
	if _, err := io.Copy(io.Discard, live); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("its own connection ended with %v, want a reset", err)
	}
}

// TestRestartWithoutAnAgent: plan, keys and sockets are all at hand.
func TestRestartWithoutAnAgent(t *testing.T) {
	w := newWorld(t, echoApp(t))
	srv, stopAgent := w.agent()
	w.proxy()
	w.ready(srv)
	live, err := w.talk()
	must(t, err)
	eventually(t, "the plan is on disk", func() bool {
		_, err := feed.NewDiskCache(w.state).Plan()
		return err == nil
	})
	stopAgent()
	w.forget()
	pid := w.mustRestart()
	must(t, echo(live))
	_, err = w.talk()
	must(t, err)
	// The agent that comes back takes all from the new one.
	w.plan.Position.Revision++
	srv, _ = w.agent()
	eventually(t, "the newer plan is applied", func() bool {
		s := srv.Status()
		i := slices.IndexFunc(s, func(p feed.ProxyStatus) bool { return p.PID == pid })
		return i >= 0 && s[i].Applied == w.plan.Position && s[i].State == feed.Active
	})
	must(t, echo(live))
}

// TestTheAgentDiesInTheMiddle of a restart: it is done nevertheless.
func TestTheAgentDiesInTheMiddle(t *testing.T) {
	w := newWorld(t, echoApp(t))
	srv, stopAgent := w.agent()
	w.proxy()
	w.ready(srv)
	live, err := w.talk()
	must(t, err)
	eventually(t, "the plan is on disk", func() bool {
		_, err := feed.NewDiskCache(w.state).Plan()
		return err == nil
	})
	restarted := make(chan string, 1)
	go func() {
		_, problem := w.restart()
		restarted <- problem
	}()
	eventually(t, "the new process is there", func() bool { return len(srv.Status()) != 1 })
	stopAgent()
	w.forget()
	if problem := <-restarted; problem != "" {
		t.Errorf("restart: %s", problem)
	}
	must(t, echo(live))
	_, err = w.talk()
	must(t, err)
}

// TestLeftSessionsAreAnnouncedAndCut at the deadline of a restart.
func TestLeftSessionsAreAnnouncedAndCut(t *testing.T) {
	w := newWorld(t, echoApp(t))
	srv, _ := w.agent()
	w.proxy("--restart-drain-timeout", "1s")
	w.ready(srv)
	live, err := w.talk()
	must(t, err)
	pid := w.mustRestart()
	must(t, live.SetDeadline(time.Now().Add(20*time.Second)))
	if _, err := io.Copy(io.Discard, live); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the session ended with %v, want a reset", err)
	}
	w.settled(srv, pid)
	log, err := os.ReadFile(filepath.Join(w.dir, "log"))
	must(t, err)
	for _, want := range []string{"connections from before the restart are left, and will be cut\" open=2", "drained open=2 cut=2"} {
		if !bytes.Contains(log, []byte(want)) {
			t.Errorf("the log lacks %q", want)
		}
	}
	metrics, err := w.scrape()
	must(t, err)
	if n := bytes.Count(metrics, []byte(`,reason="draining"} 1`)); n != 2 {
		t.Errorf("%d directions have a cut connection in the metrics of the new process, want 2", n)
	}
}
