package e2e_test

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// seen is what these tests read of a record.
type seen struct {
	Kind        string `json:"kind"`
	Direction   string `json:"direction"`
	Verdict     string `json:"verdict"`
	Node        string `json:"node"`
	Source      string `json:"source"`
	Destination string `json:"destination"`
	Method      string `json:"method"`
	Path        string `json:"path"`
	Status      int    `json:"status"`
	Reason      string `json:"reason"`
	Intention   string `json:"intention"`
	ErrorID     string `json:"error_id"`
}

const (
	webIdentity  = "spiffe://mesh.example.com/ns/default/svc/web"
	apiIdentity  = "spiffe://mesh.example.com/ns/default/svc/api"
	echoIdentity = "spiffe://mesh.example.com/ns/default/svc/echo"
)

// tapped is a meshctl that shows records as JSON.
type tapped struct {
	*process
	t *testing.T
}

// tap starts one on the server, and waits until the hosts have begun.
func (c *cluster) tap(label string, args ...string) *tapped {
	c.t.Helper()
	p := &tapped{t: c.t, process: c.server.Start(label, "meshctl", append([]string{"--addr", c.admin(), "-o", "json"}, args...)...)}
	p.says(5*time.Second, "watching")
	return p
}

// says waits until the output has a text.
func (p *tapped) says(limit time.Duration, text string) {
	p.t.Helper()
	eventually(p.t, limit, fmt.Sprintf("%s says %q", p.Name, text), func() string {
		if out := readFile(p.t, p.Log); !strings.Contains(out, text) {
			return "it says: " + out
		}
		return ""
	})
}

// records returns what it has shown.
func (p *tapped) records() []seen {
	p.t.Helper()
	var all []seen
	for line := range strings.Lines(readFile(p.t, p.Log)) {
		var r seen
		if strings.HasPrefix(line, "{") && strings.HasSuffix(line, "\n") {
			if err := json.Unmarshal([]byte(line), &r); err != nil {
				p.t.Fatalf("%q: %v", line, err)
			}
			all = append(all, r)
		}
	}
	return all
}

// shows waits for a record: what happens is seen within a second.
func (p *tapped) shows(want seen) seen {
	p.t.Helper()
	var found seen
	took := eventually(p.t, 3*time.Second, fmt.Sprintf("%s shows %+v", p.Name, want), func() string {
		for _, r := range p.records() {
			same := r
			if same.ErrorID = ""; same == want {
				found = r
				return ""
			}
		}
		return "it shows: " + readFile(p.t, p.Log)
	})
	p.t.Logf("%s showed %s %s after %s", p.Name, want.Method, want.Path, took.Round(time.Millisecond))
	if took > time.Second {
		p.t.Errorf("%s showed %s %s after %s, want at most 1 s", p.Name, want.Method, want.Path, took)
	}
	return found
}

// TestWatching: what passes is seen within a second, what is denied is listed and explained, through the servers and, once they
// are dead, on the host itself.
func TestWatching(t *testing.T) {
	t.Parallel()
	s := newSpine(t)
	denials := s.tap("denials", "denials", "-f", "--dst", "api")
	tap := s.tap("tap", "tap", "--src", "web")

	// A caller without an intention: his own proxy denies.
	_, headers, _ := s.web.curl("http://127.0.0.1:9191/v1/first?secret=1")
	nearID := headers["mesh-error-id"]
	near := seen{
		Kind: "http", Direction: "outbound", Verdict: "denied", Node: "vm-a", Source: webIdentity, Destination: apiIdentity,
		Method: "GET", Path: "/v1/first", Status: 403, Reason: "denied",
	}
	if got := denials.shows(near); got.ErrorID != nearID {
		t.Errorf("the denial has id %q, the client was told %q", got.ErrorID, nearID)
	}
	s.explained(nearID, "DENIED by policy", "web → api GET /v1/first at ", "seen by the caller's proxy on node vm-a",
		"✗ no intention allows web to call api", `next: meshctl intention allow web api --http "GET /v1/first"`)

	// One with an intention that does not cover the request: the far proxy denies.
	s.meshctl(0, "intention", "allow", "web", "api", "--http", "GET,HEAD /v1/*", "--wait")
	s.web.answers(10*time.Second, "200", "http://127.0.0.1:9191/v1/second?secret=2")
	passed := near
	passed.Direction, passed.Verdict, passed.Node, passed.Path, passed.Status = "inbound", "passed", "vm-b", "/v1/second", 200
	passed.Reason, passed.Intention = "", "web → api"
	tap.shows(passed)
	_, headers, _ = s.web.curl("-X", "POST", "http://127.0.0.1:9191/v1/third?secret=3")
	farID := headers["mesh-error-id"]
	far := passed
	far.Verdict, far.Method, far.Path, far.Status, far.Reason = "denied", "POST", "/v1/third", 403, "denied"
	for _, p := range []*tapped{denials, tap} {
		if got := p.shows(far); got.ErrorID != farID {
			t.Errorf("the denial has id %q, the client was told %q", got.ErrorID, farID)
		}
	}
	s.explained(farID, "DENIED by policy", "seen by the destination's proxy on node vm-b", "✗ intention web → api: none of its rules matches POST /v1/third",
		`✗ now: intention web → api, rule 1 of 1 "allow GET,HEAD /v1/*": POST matches none → deny`, `--http "POST /v1/third" --add`)
	r := s.meshctl(4, "explain", "id:000000")
	if !strings.Contains(r.Stderr, "each keeps its newest 1024 denials") {
		t.Errorf("an unknown id: %s", r.Stderr)
	}

	s.strangersAreListed()
	s.topCounts()
	if out := readFile(t, tap.Log) + readFile(t, denials.Log) + s.meshctl(0, "denials", "--failed", "-o", "json").Stdout; strings.Contains(out, "secret") {
		t.Errorf("a query was shown:\n%s", out)
	}

	// Who may not, sees nothing.
	s.server.Write(s.meshctl(0, "ca", "roots").Stdout, 0o644, "roots.pem")
	remote := []string{"--addr", s.server.Address + ":7400", "--ca-cert", s.server.Path("roots.pem")}
	for _, args := range [][]string{{"tap"}, {"denials"}, {"top", "--once"}, {"explain", "id:" + farID}} {
		if r := s.server.Run("meshctl", append(slices.Clone(remote), args...)...); r.Code != 5 || r.Stdout != "" {
			t.Errorf("%v without a token: exit %d\n%s%s", args, r.Code, r.Stdout, r.Stderr)
		}
	}
	s.onTheHost(nearID, farID, remote)
}

// explained demands an explanation of an id, with these texts.
func (s *spine) explained(id string, want ...string) {
	s.t.Helper()
	r := s.meshctl(3, "explain", "id:"+id)
	for _, text := range want {
		if !strings.Contains(r.Stdout, text) {
			s.t.Errorf("explain id:%s lacks %q:\n%s", id, text, r.Stdout)
		}
	}
}

// strangersAreListed: TCP connections that are denied, and callers who do not prove who they are.
func (s *spine) strangersAreListed() {
	s.t.Helper()
	if c, err := s.web.Dial("127.0.0.1:9192"); err == nil { // nobody allows web to call echo
		if _, err := io.ReadAll(c); err == nil {
			s.t.Error("a denied TCP connection ended as if all was well")
		}
		_ = c.Close()
	}
	plain := s.web.connect(s.api.Address + ":7443")
	if _, err := io.WriteString(plain, "GET / HTTP/1.1\r\n\r\n"); err != nil {
		s.t.Fatal(err)
	}
	_, _ = io.ReadAll(plain)
	for _, want := range []seen{
		{Kind: "tcp", Direction: "outbound", Verdict: "denied", Node: "vm-a", Source: webIdentity, Destination: echoIdentity, Reason: "denied"},
		{Kind: "tcp", Direction: "inbound", Verdict: "refused", Node: "vm-b", Reason: "plaintext"},
	} {
		eventually(s.t, 2*time.Second, fmt.Sprintf("denials list %+v", want), func() string {
			r := s.meshctl(0, "denials", "-o", "json")
			var all []seen
			if err := json.Unmarshal([]byte(r.Stdout), &all); err != nil {
				return err.Error() + r.Stdout
			}
			for _, one := range all {
				if one.ErrorID = ""; one == want {
					return ""
				}
			}
			return "they list: " + r.Stdout
		})
	}
}

// topCounts: what curl sends is counted once.
func (s *spine) topCounts() {
	s.t.Helper()
	l := s.web.startLoad("http://127.0.0.1:9191/v1/load", 4_000, 5*time.Second)
	l.await(s.t, 50)
	var rows []struct {
		Destination string   `json:"destination"`
		Requests    float64  `json:"requests_per_second"`
		Success     *float64 `json:"success"`
		P99         *float64 `json:"p99_ms"`
	}
	before, began := l.sentSoFar(), time.Now()
	r := s.meshctl(0, "top", "--once", "--dst", "api", "--interval", "1s", "-o", "json")
	sent := float64(l.sentSoFar()-before) / time.Since(began).Seconds()
	if err := json.Unmarshal([]byte(r.Stdout), &rows); err != nil || len(rows) != 1 {
		s.t.Fatalf("top: %v\n%s%s", err, r.Stdout, r.Stderr)
	}
	if one := rows[0]; one.Destination != apiIdentity || one.Requests < sent/3 || one.Requests > 1.7*sent || one.Success == nil || *one.Success < 0.99 || one.P99 == nil {
		s.t.Errorf("top shows %s, and %.0f requests a second were sent", r.Stdout, sent)
	}
	l.none(s.t, "top ran beside it")
}

// onTheHost: with every server dead, each host answers for itself.
func (s *spine) onTheHost(nearID, farID string, remote []string) {
	s.t.Helper()
	s.daemon.Kill(syscall.SIGKILL)
	for _, row := range []struct {
		at   *member
		id   string
		want string
		args []string
	}{
		{s.web, nearID, "DENIED by policy\n", []string{"--local"}},
		{s.api, farID, "DENIED by policy\n", []string{"--local"}},
		{s.web, farID, "ANSWERED by the destination's proxy: denied\n", []string{"--local"}}, // which knows why
		{s.web, nearID, "DENIED by policy\n", remote},                                        // no server answers: it asks here
	} {
		args := append([]string{"explain", "id:" + row.id, "--agent-socket", row.at.Path("agent.sock")}, row.args...)
		r := row.at.Run("meshctl", args...)
		if r.Code != 3 || !strings.HasPrefix(r.Stdout, row.want) || !strings.Contains(r.Stdout, "next: meshctl ") {
			s.t.Errorf("%v on %s: exit %d, want 3 and %q\n%s%s", args, row.at.Name, r.Code, row.want, r.Stdout, r.Stderr)
		}
	}
	if r := s.web.Run("meshctl", "explain", "id:000000", "--local", "--agent-socket", s.web.Path("agent.sock")); r.Code != 4 {
		s.t.Errorf("an unknown id on the host: exit %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
	local := &tapped{t: s.t, process: s.web.Start("tap", "meshctl", "tap", "--local", "--agent-socket", s.web.Path("agent.sock"), "-o", "json")}
	local.says(5*time.Second, "watching the proxies of this host")
	s.web.answers(time.Second, "200", "http://127.0.0.1:9191/v1/fourth")
	local.shows(seen{
		Kind: "http", Direction: "outbound", Verdict: "passed", Node: "vm-a", Source: webIdentity, Destination: apiIdentity,
		Method: "GET", Path: "/v1/fourth", Status: 200,
	})
}

// TestTapThatDoesNotRead: who watches and does not read costs nobody anything, and is told what he missed.
func TestTapThatDoesNotRead(t *testing.T) {
	t.Parallel()
	s := newSpine(t)
	s.allowed()
	tap := s.tap("tap", "tap", "--both")
	tap.Kill(syscall.SIGSTOP)
	l := s.web.startLoad(hello, 12_000, 6*time.Second)
	l.await(t, 5_000)
	// Nothing else waits either: not the plan, not the heartbeats.
	start := time.Now()
	s.meshctl(0, "intention", "allow", "web", "api", "--reason", "beside a tap", "--replace", "--wait")
	if took := time.Since(start); took > 2*time.Second {
		t.Errorf("an intention took %s beside a tap that does not read", took)
	}
	l.none(t, "a tap did not read")
	tap.Kill(syscall.SIGCONT)
	tap.says(10*time.Second, "were not shown")
	if r := s.meshctl(0, "nodes", "-o", "csv"); strings.Count(r.Stdout, "connected") != 2 {
		t.Errorf("a node was lost:\n%s", r.Stdout)
	}
}
