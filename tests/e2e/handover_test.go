package e2e_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// What passes two proxies while they are replaced, per second.
const (
	handoverRequests = 400 // a quarter each: GET and POST, on new and on kept connections
	handoverSessions = 30  // TCP, of half a second
	handoverSockets  = 20  // WebSocket, of a second
	handoverCalls    = 200 // HTTP/2, one request and one answer
	handoverStreams  = 20  // gRPC, of a second, both ways
)

// handovers is how often TestHandOver replaces a proxy, and at how many times the load: RESTARTS and RESTARTLOAD, little in
// `make test`.
func handovers(t *testing.T) (restarts, load int) {
	t.Helper()
	restarts, load = 6, 1
	for name, to := range map[string]*int{"RESTARTS": &restarts, "RESTARTLOAD": &load} {
		if text := os.Getenv(name); text != "" {
			n, err := strconv.Atoi(text)
			if err != nil || n < 1 {
				t.Fatalf("%s %q: write a number", name, text)
			}
			*to = n
		}
	}
	return restarts, load
}

// TestHandOver is F24: the proxies of caller and callee are replaced by turns, under HTTP on new and kept connections, WebSocket
// and TCP. No request fails, no connection is refused or cut, every request is counted once, and after each restart one process
// is left.
func TestHandOver(t *testing.T) {
	t.Parallel()
	restarts, factor := handovers(t)
	s := &spine{cluster: newCluster(t)}
	s.web, s.api = s.join("vm-a", "web"), s.join("vm-b", "api,echo,ws,rpc")
	s.serve()
	s.web.define("web.hcl", strings.Replace(webDefinition, "}\n}", "}\n  upstream \"ws\" { local_port = 9193 }\n  upstream \"rpc\" { local_port = 9194 }\n}", 1))
	s.api.define("ws.hcl", "service \"ws\" {\n  port     = 8060\n  protocol = \"http\"\n}\n")
	s.api.define("rpc.hcl", "service \"rpc\" {\n  port     = 8050\n  protocol = \"grpc\"\n}\n")
	serveCalls(t, s.api.Listen("127.0.0.1:8050"))
	s.meshctl(0, "intention", "allow", "web", "rpc", "--wait")
	serveUpgrades(t, s.api.Listen("127.0.0.1:8060"))
	s.meshctl(0, "intention", "allow", "web", "ws", "--wait")
	s.allowed()
	s.web.answers(10*time.Second, "426", "http://127.0.0.1:9193/")
	before := s.counted(t)

	dial := s.web.dialer()
	ctx, stop := context.WithCancel(t.Context())
	l := &mixed{dial: dial, factor: factor}
	var running sync.WaitGroup
	running.Go(func() { l.run(ctx) })
	var took []time.Duration
	last := before
	for i := range restarts {
		m := []*member{s.web, s.api}[i%2]
		pid := m.servingPID()
		begun := time.Now()
		r := m.Run("meshctl", "proxy", "restart", "--agent-socket", m.Path("agent.sock"))
		if r.Code != 0 {
			t.Fatalf("restart %d, on %s: exit %d: %s", i, m.Name, r.Code, r.Stderr)
		}
		took = append(took, time.Since(begun).Round(time.Millisecond))
		if now := m.servingPID(); now == pid {
			t.Errorf("restart %d, on %s: process %d serves, and %d before", i, m.Name, now, pid)
		}
		<-time.After(700 * time.Millisecond)
		if now := s.counted(t); now < last {
			t.Errorf("restart %d, on %s: requests were counted to %v, and are to %v", i, m.Name, last, now)
		} else {
			last = now
		}
	}
	stop()
	running.Wait()
	say("%s: %d restarts, the slowest took %s; %d requests, %d TCP sessions, %d WebSockets, %d calls, %d streams, %d failed", t.Name(), restarts, longest(took),
		l.requests.Load(), l.sessions.Load(), l.sockets.Load(), l.calls.Load(), l.streams.Load(), len(l.failed))
	if len(l.failed) > 0 {
		t.Errorf("%d failed; the first: %s", len(l.failed), strings.Join(l.failed[:min(5, len(l.failed))], "; "))
	}
	if n := l.requests.Load(); n < int64(restarts*50) || l.sessions.Load() == 0 || l.sockets.Load() == 0 || l.calls.Load() == 0 || l.streams.Load() == 0 {
		t.Errorf("%d requests, %d sessions, %d WebSockets: this proves nothing", n, l.sessions.Load(), l.sockets.Load())
	}
	for _, m := range []*member{s.web, s.api} {
		eventually(t, 60*time.Second, "one process is left on "+m.Name, func() string {
			r := m.Run("meshctl", "proxy", "status", "--local", "--agent-socket", m.Path("agent.sock"), "-o", "csv")
			if strings.Count(r.Stdout, "\n") == 2 && strings.Contains(r.Stdout, ",active,") {
				return ""
			}
			return r.Stdout + r.Stderr
		})
	}
	// Each upgrade is a request, too.
	want := before + float64(l.requests.Load()+l.sockets.Load()+l.calls.Load()+l.streams.Load())
	eventually(t, 10*time.Second, "every request is counted, once", func() string {
		if now := s.counted(t); now != want {
			return fmt.Sprintf("%v are, want %v", now, want)
		}
		return ""
	})
}

// servingPID returns the process of the host's proxy that serves, as soon as there is one.
func (m *member) servingPID() (pid int) {
	m.T.Helper()
	eventually(m.T, 10*time.Second, "a proxy serves on "+m.Name, func() string {
		r := m.Run("meshctl", "proxy", "status", "--local", "--agent-socket", m.Path("agent.sock"), "-o", "csv")
		found := regexp.MustCompile(`(?m)^[^,]*,(\d+),active,`).FindStringSubmatch(r.Stdout)
		if found == nil {
			return r.Stdout + r.Stderr
		}
		var err error
		if pid, err = strconv.Atoi(found[1]); err != nil {
			m.T.Fatal(err)
		}
		return ""
	})
	return pid
}

// counted is how many requests the caller's proxy has counted.
func (s *spine) counted(t *testing.T) float64 {
	t.Helper()
	body := ""
	eventually(t, 10*time.Second, "the proxy tells its metrics", func() string {
		status, _, text := s.web.curl("http://127.0.0.1:7491/metrics")
		if body = text; status != "200" {
			return status
		}
		return ""
	})
	sum := 0.0
	for _, line := range regexp.MustCompile(`(?m)^mesh_requests_total\{.*direction="outbound".*\} (\S+)$`).FindAllStringSubmatch(body, -1) {
		n, err := strconv.ParseFloat(line[1], 64)
		if err != nil {
			t.Fatal(err)
		}
		sum += n
	}
	return sum
}

func longest(all []time.Duration) time.Duration {
	out := time.Duration(0)
	for _, d := range all {
		out = max(out, d)
	}
	return out
}

// serveUpgrades answers every POST, and every upgrade, after which it sends back what comes. Anything else is told to upgrade.
func serveUpgrades(t *testing.T, l net.Listener) {
	t.Helper()
	srv := &http.Server{ReadHeaderTimeout: 10 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPost {
			if body, err := io.ReadAll(r.Body); err != nil || string(body) != "once" {
				w.WriteHeader(http.StatusBadRequest)
			}
			return
		}
		if r.Header.Get("Upgrade") == "" {
			w.WriteHeader(http.StatusUpgradeRequired)
			return
		}
		c, rw, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return
		}
		defer c.Close() //nolint:errcheck // the far side is gone anyway
		_, err = io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n")
		if err == nil {
			_, _ = io.Copy(c, rw)
		}
	})}
	go func() { _ = srv.Serve(l) }()
	t.Cleanup(func() { _ = srv.Close() })
}

// mixed is what passes the proxies. Nothing of it is ever repeated.
type mixed struct {
	traffic
	dial    func(string) (net.Conn, error)
	factor  int
	sockets atomic.Int64
	calls   atomic.Int64
	streams atomic.Int64
}

func (l *mixed) run(ctx context.Context) {
	client := func(fresh bool) *http.Client {
		return &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
			DisableKeepAlives: fresh, MaxIdleConnsPerHost: 16,
			DialContext: func(_ context.Context, _, address string) (net.Conn, error) { return l.dial(address) },
		}}
	}
	kept, fresh := client(false), client(true)
	defer kept.CloseIdleConnections()
	var workers sync.WaitGroup
	defer workers.Wait()
	every := func(perSecond, parallel int, work func(i int)) {
		workers.Go(func() {
			tick := time.NewTicker(time.Second / time.Duration(perSecond*l.factor))
			defer tick.Stop()
			slots := make(chan struct{}, parallel*l.factor)
			for i := 0; ; i++ {
				select {
				case <-ctx.Done():
					return
				case <-tick.C:
				}
				slots <- struct{}{}
				workers.Go(func() {
					defer func() { <-slots }()
					work(i)
				})
			}
		})
	}
	every(handoverRequests, 32, func(i int) {
		c := kept
		if i%2 == 0 {
			c = fresh
		}
		problem := ""
		if i%4 < 2 {
			problem = get(c, hello)
		} else {
			problem = post(c, "http://127.0.0.1:9193/")
		}
		if problem != "" {
			l.fail(problem)
		}
		l.requests.Add(1)
	})
	protocols := &http.Protocols{}
	protocols.SetUnencryptedHTTP2(true)
	rpc := &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{
		Protocols: protocols, DialContext: func(_ context.Context, _, address string) (net.Conn, error) { return l.dial(address) },
	}}
	defer rpc.CloseIdleConnections()
	every(handoverCalls, 32, func(int) {
		if err := callLines(rpc, 1, 0); err != nil {
			l.fail("call: " + err.Error())
		}
		l.calls.Add(1)
	})
	every(handoverStreams, 64, func(int) {
		if err := callLines(rpc, 5, 200*time.Millisecond); err != nil {
			l.fail("stream: " + err.Error())
		}
		l.streams.Add(1)
	})
	every(handoverSessions, 64, func(i int) {
		if err := l.talk("127.0.0.1:9192", "", 5, 100*time.Millisecond); err != nil {
			l.fail("TCP: " + err.Error())
		}
		l.sessions.Add(1)
	})
	every(handoverSockets, 64, func(i int) {
		if err := l.talk("127.0.0.1:9193", upgrade, 5, 200*time.Millisecond); err != nil {
			l.fail("WebSocket: " + err.Error())
		}
		l.sockets.Add(1)
	})
}

// serveCalls answers every call by what it sends, as it comes, and a status in the trailers.
func serveCalls(t *testing.T, l net.Listener) {
	t.Helper()
	protocols := &http.Protocols{}
	protocols.SetUnencryptedHTTP2(true)
	srv := &http.Server{ReadHeaderTimeout: 10 * time.Second, Protocols: protocols, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/grpc")
		w.Header().Set("Trailer", "grpc-status")
		flow := http.NewResponseController(w)
		if flow.Flush() != nil { // the head goes first
			return
		}
		status := "0"
		for in, line := bufio.NewReader(r.Body), ""; ; {
			var err error
			if line, err = in.ReadString('\n'); err == io.EOF { //nolint:errorlint // as it is
				break
			}
			if err == nil {
				_, err = io.WriteString(w, line)
			}
			if err != nil || flow.Flush() != nil {
				status = "2"
				break
			}
		}
		w.Header().Set("grpc-status", status)
	})}
	go func() { _ = srv.Serve(l) }()
	t.Cleanup(func() { _ = srv.Close() })
}

// callBody is the body of a call. A client may begin it anew on another connection, after a GOAWAY that says that the server has not
// looked at the request; were that not so, the request would be counted twice.
type callBody struct {
	mu sync.Mutex
	in *io.PipeWriter
}

func (l *callBody) begin() (io.ReadCloser, error) {
	out, in := io.Pipe()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.in = in
	return out, nil
}

func (l *callBody) writer() *io.PipeWriter {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.in
}

// callLines sends n lines with pauses, and reads each of them back, and the status.
func callLines(c *http.Client, n int, pause time.Duration) error {
	sent := &callBody{}
	body, err := sent.begin()
	if err != nil {
		return err
	}
	req, err := http.NewRequest(http.MethodPost, "http://127.0.0.1:9194/mesh.Echo/Lines", body)
	if err != nil {
		return err
	}
	req.GetBody = sent.begin
	req.Header.Set("Content-Type", "application/grpc")
	req.Header.Set("Te", "trailers")
	resp, err := c.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()     //nolint:errcheck // read to its end
	defer sent.writer().Close() //nolint:errcheck // a pipe
	in := bufio.NewReader(resp.Body)
	for i := range n {
		line := fmt.Sprintf("line %d\n", i)
		if _, err := io.WriteString(sent.writer(), line); err != nil {
			return err
		}
		if got, err := in.ReadString('\n'); err != nil || got != line {
			return fmt.Errorf("line %d came back as %q, mesh-error=%q: %w", i, got, resp.Header.Get("mesh-error"), err)
		}
		<-time.After(pause)
	}
	_ = sent.writer().Close() // a pipe
	if _, err := io.Copy(io.Discard, in); err != nil {
		return err
	}
	if status := resp.Trailer.Get("grpc-status"); status != "0" {
		return fmt.Errorf("status %q, mesh-error=%q", status, resp.Header.Get("mesh-error"))
	}
	return nil
}

// post sends what a client does not send a second time.
func post(c *http.Client, url string) string {
	req, err := http.NewRequest(http.MethodPost, url, struct{ io.Reader }{strings.NewReader("once")})
	if err != nil {
		return err.Error()
	}
	req.ContentLength = 4
	resp, err := c.Do(req)
	if err != nil {
		return err.Error()
	}
	defer resp.Body.Close() //nolint:errcheck // read to its end
	body, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		return fmt.Sprintf("POST: %s mesh-error=%q %q: %v", resp.Status, resp.Header.Get("mesh-error"), body, err)
	}
	return ""
}

const upgrade = "GET / HTTP/1.1\r\nHost: ws\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"

// talk opens a connection, upgrades it if asked to, sends n lines with pauses, and reads each of them back.
func (l *mixed) talk(address, upgrade string, n int, pause time.Duration) error {
	c, err := l.dial(address)
	if err != nil {
		return err
	}
	defer c.Close() //nolint:errcheck // all was read, or an error is returned
	if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		return err
	}
	in := bufio.NewReader(c)
	if upgrade != "" {
		if _, err := io.WriteString(c, upgrade); err != nil {
			return err
		}
		resp, err := http.ReadResponse(in, nil) //nolint:bodyclose // the answer to an upgrade has none
		if err != nil {
			return err
		}
		if resp.StatusCode != http.StatusSwitchingProtocols {
			return fmt.Errorf("the answer to an upgrade: %s mesh-error=%q", resp.Status, resp.Header.Get("mesh-error"))
		}
	}
	for i := range n {
		line := fmt.Sprintf("line %d\n", i)
		if _, err := io.WriteString(c, line); err != nil {
			return err
		}
		if got, err := in.ReadString('\n'); err != nil || got != line {
			return fmt.Errorf("line %d came back as %q: %w", i, got, err)
		}
		<-time.After(pause)
	}
	return nil
}

// TestHandOverAndKill: the process that took over is killed while the one before drains. It is served again within half a second,
// and nothing crosses the network in plain.
func TestHandOverAndKill(t *testing.T) {
	t.Parallel()
	s := &spine{cluster: newCluster(t)}
	for _, m := range []struct {
		name, services string
		to             **member
	}{{"vm-a", "web", &s.web}, {"vm-b", "api,echo", &s.api}} {
		*m.to = s.prepare(m.name)
		(*m.to).Write(s.token(m.name, m.services), 0o600, "join.token")
		config := (*m.to).Path("proxy")
		(*m.to).agentConfig = (*m.to).Write(strings.Replace(readFile(t, (*m.to).agentConfig), "proxy {", fmt.Sprintf("proxy {\n  supervise = true\n  state_dir = %q", config), 1), 0o600, "agent.hcl")
		(*m.to).startAgent()
	}
	s.serve()
	s.allowed()
	stop := s.net.capture(t, s.server)
	dial := s.web.dialer()
	long := s.web.connect("127.0.0.1:9192") // keeps the first processes draining
	exchange(t, long, "before")
	for _, m := range []*member{s.web, s.api} {
		if r := m.Run("meshctl", "proxy", "restart", "--agent-socket", m.Path("agent.sock")); r.Code != 0 {
			t.Fatalf("restart on %s: exit %d: %s", m.Name, r.Code, r.Stderr)
		}
	}
	exchange(t, long, "after")
	for _, m := range []*member{s.web, s.api} {
		<-time.After(1100 * time.Millisecond) // only what has run a second counts as good to its supervisor
		pid := m.servingPID()
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatalf("kill the proxy %d of %s: %v", pid, m.Name, err)
		}
		took := eventually(t, 5*time.Second, "the mesh serves again", func() string {
			c := &http.Client{Timeout: 150 * time.Millisecond, Transport: &http.Transport{
				DisableKeepAlives: true, DialContext: func(_ context.Context, _, addr string) (net.Conn, error) { return dial(addr) },
			}}
			return get(c, hello+"?the-secret")
		})
		say("%s: served %s after the kill on %s", t.Name(), took.Round(time.Millisecond), m.Name)
		if took > 500*time.Millisecond {
			t.Errorf("served again %s after the kill on %s, want at most 500 ms", took, m.Name)
		}
	}
	if seen := stop(); strings.Contains(seen, "the-secret") || strings.Contains(seen, "HTTP/1.1") {
		t.Error("the capture on the bridge shows plaintext")
	} else if !strings.Contains(seen, s.api.addrBytes()) {
		t.Errorf("the capture of %d bytes shows no packet of %s: it proves nothing", len(seen), s.api.Address)
	}
}
