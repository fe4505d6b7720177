package e2e_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// proxyPID returns the process of the host's proxy as its agent sees it, and when
// it attached; 0 if there is none.
func (m *member) proxyPID() int {
	m.T.Helper()
	c := &http.Client{Timeout: time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", m.Path("agent.sock"))
		},
	}}
	resp, err := c.Get("http://agent/v1/agent/status")
	if err != nil {
		return 0
	}
	defer resp.Body.Close() //nolint:errcheck // read to its end
	var status struct {
		Proxies []struct {
			PID   int    `json:"pid"`
			State string `json:"state"`
		} `json:"proxies"`
	}
	if err := json.NewDecoder(resp.Body).Decode(&status); err != nil || len(status.Proxies) != 1 {
		return 0
	}
	return status.Proxies[0].PID
}

// TestProxyDies: mesh-proxy is killed again and again, on the caller's host and on
// the callee's, under each kind of supervisor. Connections that come meanwhile wait
// in the agent's sockets; half a second after the kill they are served; and at no
// time does a byte of theirs cross the network in plain.
func TestProxyDies(t *testing.T) {
	t.Parallel()
	for _, supervisor := range []struct {
		name  string
		start func(m *member)
	}{
		{"supervised by the agent", func(m *member) {
			m.agentConfig = m.Write(strings.Replace(readFile(t, m.agentConfig), "proxy {", fmt.Sprintf("proxy {\n  supervise = true\n  state_dir = %q", m.Path("proxy")), 1), 0o600, "agent.hcl")
			m.startAgent()
		}},
		{"started again by a shell", func(m *member) { // as systemd does with RestartSec=100ms
			m.startAgent()
			m.Start("supervisor", "sh", "-c", `while :; do "$@"; sleep 0.1; done`, "sh", bin+"/mesh-proxy", "--feed", m.Path("proxy.sock"), "--state", m.Path("proxy"))
		}},
	} {
		t.Run(supervisor.name, func(t *testing.T) {
			t.Parallel()
			s := &spine{cluster: newCluster(t)}
			for _, m := range []struct {
				name, services string
				to             **member
			}{{"vm-a", "web", &s.web}, {"vm-b", "api,echo", &s.api}} {
				*m.to = s.prepare(m.name)
				(*m.to).Write(s.token(m.name, m.services), 0o600, "join.token")
				supervisor.start(*m.to)
			}
			s.serve()
			s.allowed()
			stop := s.net.capture(t, s.server)
			s.killProxies(t, 10)
			if seen := stop(); strings.Contains(seen, "the-secret") || strings.Contains(seen, "HTTP/1.1") {
				t.Error("the capture on the bridge shows plaintext")
			} else if !strings.Contains(seen, s.api.addrBytes()) {
				t.Errorf("the capture of %d bytes shows no packet of %s: it proves nothing", len(seen), s.api.Address)
			}
		})
	}
}

// killProxies kills the proxy n times, by turns on one host and the other.
func (s *spine) killProxies(t *testing.T, n int) {
	t.Helper()
	dial := s.web.dialer()
	var retried, waited []time.Duration
	for i := range n {
		victim := []*member{s.web, s.api}[i%2]
		pid := 0
		eventually(t, 10*time.Second, "a proxy is attached at "+victim.Name, func() string {
			if pid = victim.proxyPID(); pid == 0 {
				return "none is"
			}
			return ""
		})
		// Only what has run a second counts as good to its supervisor.
		<-time.After(1100 * time.Millisecond)
		killed := time.Now()
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		patient := make(chan time.Duration, 1)
		go func() {
			c := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{
				DisableKeepAlives: true, DialContext: func(_ context.Context, _, addr string) (net.Conn, error) { return dial(addr) },
			}}
			if problem := get(c, hello+"?the-secret"); problem != "" {
				t.Errorf("kill %d of %s: a request on a connection that came right after it: %s", i, victim.Name, problem)
			}
			patient <- time.Since(killed)
		}()
		eventually(t, 5*time.Second, "the mesh serves again", func() string {
			c := &http.Client{Timeout: 150 * time.Millisecond, Transport: &http.Transport{
				DisableKeepAlives: true, DialContext: func(_ context.Context, _, addr string) (net.Conn, error) { return dial(addr) },
			}}
			return get(c, hello+"?the-secret")
		})
		retried = append(retried, time.Since(killed))
		waited = append(waited, <-patient)
	}
	slices.Sort(retried)
	slices.Sort(waited)
	t.Logf("%d kills: a client that retries is served after %s (median), %s (most); one that waits after %s, %s", n,
		retried[n/2].Round(time.Millisecond), retried[n-1].Round(time.Millisecond), waited[n/2].Round(time.Millisecond), waited[n-1].Round(time.Millisecond))
	if retried[n-1] > 500*time.Millisecond {
		t.Errorf("served again after %s, want at most 500 ms", retried[n-1])
	}
}

// TestNoProxyNoBypass: without any proxy nothing gets through, in plain or
// otherwise.
func TestNoProxyNoBypass(t *testing.T) {
	t.Parallel()
	s := newSpine(t)
	s.allowed()
	stop := s.net.capture(t, s.server)
	s.web.proxy.Kill(syscall.SIGKILL)
	if status, _, body := s.web.curl("--max-time", "2", hello+"?the-secret"); !strings.HasPrefix(status, "curl exit 28") {
		t.Errorf("without a proxy at the caller: %s %s; want a connection that waits", status, body)
	}
	s.web.startProxy()
	s.web.answers(5*time.Second, "200", hello+"?the-secret")
	s.api.proxy.Kill(syscall.SIGKILL)
	if status, _, body := s.web.curl("--max-time", "7", hello+"?the-secret"); status != "503" {
		t.Errorf("without a proxy at the callee: %s %s, want 503", status, body)
	}
	s.api.startProxy()
	s.web.answers(5*time.Second, "200", hello+"?the-secret")
	if seen := stop(); strings.Contains(seen, "the-secret") || strings.Contains(seen, "HTTP/1.1") {
		t.Error("the capture on the bridge shows plaintext")
	} else if !strings.Contains(seen, s.api.addrBytes()) {
		t.Errorf("the capture of %d bytes shows no packet of %s: it proves nothing", len(seen), s.api.Address)
	}
}
