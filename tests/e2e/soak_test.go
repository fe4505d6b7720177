package e2e_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/reflection"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
)

// What a soak puts on the mesh, per second.
const (
	soakRequests = 300 // half of them on new connections
	soakHTTP2    = 100 // of HTTP/2, on kept connections
	soakCalls    = 100 // of gRPC: unary ones, and messages of streams
	soakSessions = 50  // TCP, opened and closed
	soakChanges  = 1   // of the plan
)

// soakCall is how long a stream of gRPC lives, in messages.
const soakCall = 50

// soakTime is how long TestSoak runs: SOAKTIME, and short in `make test`.
func soakTime(t *testing.T) time.Duration {
	t.Helper()
	text := os.Getenv("SOAKTIME")
	if text == "" {
		return 25 * time.Second
	}
	d, err := time.ParseDuration(text)
	if err != nil || d < 10*time.Second {
		t.Fatalf("SOAKTIME %q: write a duration of 10s or more", text)
	}
	return d
}

// footprint is what a process holds at one moment.
type footprint struct {
	private     int // KiB that it shares with nobody
	goroutines  int
	descriptors int
}

// measured is one process under test.
type measured struct {
	name string
	// pid is the process, which another one may follow.
	pid func() int
	// metrics returns the text of its own metrics, in which prefix stands before
	// the names of the usual ones.
	metrics func() string
	prefix  string
	// history is how many KiB a change of the plan may cost for ever.
	history int
	seen    []footprint
}

func (m *measured) sample(t *testing.T) footprint {
	t.Helper()
	pid := m.pid()
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatalf("%s: %v", m.name, err)
	}
	return footprint{private: private(t, pid), descriptors: len(fds), goroutines: int(value(t, m.metrics(), m.prefix+"go_goroutines"))}
}

// private is the memory of a process that it shares with nobody, in KiB.
func private(t *testing.T, pid int) int {
	t.Helper()
	sum := 0
	for line := range strings.Lines(readFile(t, fmt.Sprintf("/proc/%d/smaps_rollup", pid))) {
		if fields := strings.Fields(line); strings.HasPrefix(line, "Private_") && len(fields) == 3 {
			n, err := strconv.Atoi(fields[1])
			if err != nil {
				t.Fatal(err)
			}
			sum += n
		}
	}
	return sum
}

// value returns a metric without labels.
func value(t *testing.T, text, name string) float64 {
	t.Helper()
	for line := range strings.Lines(text) {
		if rest, ok := strings.CutPrefix(line, name+" "); ok {
			v, err := strconv.ParseFloat(strings.TrimSpace(rest), 64)
			if err != nil {
				t.Fatalf("%s: %v", line, err)
			}
			return v
		}
	}
	t.Fatalf("no metric %s in %d bytes", name, len(text))
	return 0
}

// dialer returns a function that connects from inside the host, on threads that
// stay there until the end of the test: cheaper than dial, for many connections.
func (h *host) dialer() func(addr string) (net.Conn, error) {
	type dialed struct {
		conn net.Conn
		err  error
	}
	type job struct {
		addr  string
		reply chan dialed
	}
	jobs := make(chan job)
	var threads sync.WaitGroup
	for range 4 {
		threads.Go(func() {
			h.Inside(func() {
				for j := range jobs {
					c, err := (&net.Dialer{Timeout: 5 * time.Second}).Dial("tcp", j.addr)
					j.reply <- dialed{c, err}
				}
			})
		})
	}
	ended := make(chan struct{})
	h.T.Cleanup(func() {
		close(ended)
		close(jobs)
		threads.Wait()
	})
	return func(addr string) (net.Conn, error) {
		reply := make(chan dialed, 1)
		select {
		case jobs <- job{addr, reply}:
			d := <-reply
			return d.conn, d.err
		case <-ended:
			return nil, net.ErrClosed
		}
	}
}

// traffic is a mixed load at a constant rate.
type traffic struct {
	requests, sessions, calls atomic.Int64
	mu                        sync.Mutex
	failed                    []string
}

func (l *traffic) fail(problem string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.failed = append(l.failed, time.Now().Format("15:04:05.000 ")+problem)
}

// run sends requests and opens sessions until ctx ends.
func (l *traffic) run(ctx context.Context, dial func(string) (net.Conn, error)) {
	http1 := func(fresh bool) *http.Client {
		return &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
			DisableKeepAlives: fresh, MaxIdleConnsPerHost: 16,
			DialContext: func(context.Context, string, string) (net.Conn, error) { return dial("127.0.0.1:9191") },
		}}
	}
	clients := []*http.Client{http1(false), http1(true)}
	defer clients[0].CloseIdleConnections()
	cc, err := grpc.NewClient("passthrough:///127.0.0.1:9194", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(_ context.Context, addr string) (net.Conn, error) { return dial(addr) }))
	if err != nil {
		l.fail("gRPC: " + err.Error())
		return
	}
	defer cc.Close() //nolint:errcheck // its calls are over
	var workers sync.WaitGroup
	defer workers.Wait()
	every := func(perSecond, parallel int, work func(i int)) {
		jobs := make(chan int)
		for range parallel {
			workers.Go(func() {
				for i := range jobs {
					work(i)
				}
			})
		}
		workers.Go(func() {
			defer close(jobs)
			tick := time.NewTicker(time.Second / time.Duration(perSecond))
			defer tick.Stop()
			for i := 0; ; i++ {
				select {
				case <-ctx.Done():
					return
				case <-tick.C:
					jobs <- i
				}
			}
		})
	}
	every(soakRequests, 16, func(i int) {
		if problem := get(clients[i%2], hello); problem != "" {
			l.fail(problem)
		}
		l.requests.Add(1)
	})
	h2 := &http.Client{Timeout: 10 * time.Second, Transport: prior()}
	h2.Transport.(*http.Transport).DialContext = func(_ context.Context, _, addr string) (net.Conn, error) { return dial(addr) } //nolint:errcheck,forcetypeassert // by its making
	defer h2.CloseIdleConnections()
	every(soakHTTP2, 8, func(i int) {
		if problem := get(h2, "http://127.0.0.1:9193/"+strconv.Itoa(i)); problem != "" {
			l.fail("HTTP/2: " + problem)
		}
		l.requests.Add(1)
	})
	every(soakCalls, 200, func(i int) {
		l.calls.Add(1)
		// To its end even when the load's comes: otherwise that would be the call's deadline, which the proxies may well
		// see pass a moment before we do.
		if err := call(context.WithoutCancel(ctx), cc, i%soakCall == 0); err != nil {
			l.fail("gRPC: " + err.Error())
		}
	})
	every(soakSessions, 8, func(i int) {
		if err := session(dial, fmt.Sprintf("%01024d", i)); err != nil {
			l.fail("TCP: " + err.Error())
		}
		l.sessions.Add(1)
	})
}

// call makes a unary call of gRPC, or opens a stream and exchanges messages on it
// for some seconds.
func call(ctx context.Context, cc *grpc.ClientConn, stream bool) error {
	if !stream {
		ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
		defer cancel()
		_, err := healthpb.NewHealthClient(cc).Check(ctx, &healthpb.HealthCheckRequest{})
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	messages, err := reflectionpb.NewServerReflectionClient(cc).ServerReflectionInfo(ctx)
	if err != nil {
		return err
	}
	tick := time.NewTicker(3 * time.Second / soakCall)
	defer tick.Stop()
	for i := range soakCall {
		err := messages.Send(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{}})
		if err == nil {
			_, err = messages.Recv()
		}
		if err != nil {
			return fmt.Errorf("message %d of a stream: %w", i, err)
		}
		<-tick.C
	}
	if err := messages.CloseSend(); err != nil {
		return err
	}
	if _, err := messages.Recv(); !errors.Is(err, io.EOF) {
		return fmt.Errorf("the end of a stream: %w", err)
	}
	return nil
}

// session opens a connection to echo, sends a text, and reads it and the end.
func session(dial func(string) (net.Conn, error), text string) error {
	c, err := dial("127.0.0.1:9192")
	if err != nil {
		return err
	}
	defer c.Close() //nolint:errcheck // its end was read, or an error is returned
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return err
	}
	if _, err := io.WriteString(c, text); err != nil {
		return err
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil { //nolint:errcheck,forcetypeassert // a TCP connection by its making
		return err
	}
	got, err := io.ReadAll(c)
	if err == nil && string(got) != text {
		err = fmt.Errorf("%d of %d bytes came back", len(got), len(text))
	}
	return err
}

// newSoak is a spine with services of HTTP/2 and gRPC besides.
func newSoak(t *testing.T) *spine {
	t.Helper()
	s := &spine{cluster: newCluster(t)}
	s.web, s.api = s.join("vm-a", "web"), s.join("vm-b", "api,echo,api2,greeter")
	s.serve()
	srv := sink2(s.api.Listen("127.0.0.1:8071"), &crowd{})
	t.Cleanup(func() { _ = srv.Close() })
	greeter := grpc.NewServer()
	healthpb.RegisterHealthServer(greeter, health.NewServer())
	reflection.Register(greeter)
	l := s.api.Listen("127.0.0.1:8072")
	go func() { _ = greeter.Serve(l) }()
	t.Cleanup(greeter.Stop)
	s.web.define("web.hcl", strings.TrimSuffix(webDefinition, "}\n")+"  upstream \"api2\" { local_port = 9193 }\n  upstream \"greeter\" { local_port = 9194 }\n}\n")
	s.api.define("http2.hcl", "service \"api2\" {\n  port     = 8071\n  protocol = \"http2\"\n}\nservice \"greeter\" {\n  port     = 8072\n  protocol = \"grpc\"\n}\n")
	for _, name := range []string{"api2", "greeter"} {
		s.meshctl(0, "intention", "allow", "web", name, "--wait")
	}
	s.allowed()
	s.web.listens(9194)
	s.web.answers(15*time.Second, "200", "--http2-prior-knowledge", "http://127.0.0.1:9193/")
	return s
}

// TestSoak: under a mixed load of HTTP/1.1, HTTP/2, gRPC and TCP, with a new plan
// each second and a proxy replaced each minute, no process of the mesh grows once
// it is warm, and nothing is lost. `make soak` runs it for long.
func TestSoak(t *testing.T) {
	t.Parallel()
	length := soakTime(t)
	s := newSoak(t)
	all := s.measured()
	dial := s.web.dialer()

	ctx, stop := context.WithTimeout(t.Context(), length)
	defer stop()
	load := &traffic{}
	var running sync.WaitGroup
	running.Go(func() { load.run(ctx, dial) })
	changes := 0
	change := time.NewTicker(time.Second / soakChanges)
	defer change.Stop()
	period := min(time.Minute, length/10)
	row := time.NewTicker(period)
	defer row.Stop()
	// By turns on one host and the other: what is compared is then also one process with another.
	handOver := time.NewTicker(min(time.Minute, length/4))
	defer handOver.Stop()
	handovers := 0
	begun, before := time.Now(), value(t, all[0].metrics(), "mesh_plan_revision")
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-change.C:
			changes++
			s.changePlan(changes)
		case <-handOver.C:
			m := []*member{s.web, s.api}[handovers%2]
			handovers++
			if r := m.Run("meshctl", "proxy", "restart", "--agent-socket", m.Path("agent.sock")); r.Code != 0 {
				t.Errorf("restart %d, on %s: exit %d: %s", handovers, m.Name, r.Code, r.Stderr)
			}
		case <-row.C:
			line := fmt.Sprintf("soak %6s %7d requests %6d calls %6d sessions %5d plans %3d restarts", time.Since(begun).Round(time.Second), load.requests.Load(),
				load.calls.Load(), load.sessions.Load(), changes, handovers)
			for _, m := range all {
				f := m.sample(t)
				m.seen = append(m.seen, f)
				line += fmt.Sprintf(" | %s %5d KiB %3d go %3d fd", m.name, f.private, f.goroutines, f.descriptors)
			}
			say("%s", line) // at once: a soak is long
		}
	}
	running.Wait()
	if got := value(t, all[0].metrics(), "mesh_plan_revision") - before; got < float64(changes)/2 {
		t.Errorf("%d changes moved the caller's plan by %.0f revisions only", changes, got)
	}
	if n := load.requests.Load(); n < int64(length.Seconds()*soakRequests/2) {
		t.Errorf("only %d requests in %s: this machine is too busy for the soak", n, length)
	}
	if len(load.failed) > 0 {
		t.Errorf("%d failed; the first: %s", len(load.failed), strings.Join(load.failed[:min(5, len(load.failed))], "; "))
	}
	for _, m := range all {
		m.flat(t, length)
	}
}

// measured lists the processes of the mesh.
func (s *spine) measured() []*measured {
	of := func(m *member, port int) func() string {
		return func() string {
			_, _, body := m.curl(fmt.Sprintf("http://127.0.0.1:%d/metrics", port))
			return body
		}
	}
	server := func() string {
		return s.server.Run("curl", "--silent", "--show-error", "--unix-socket", s.server.Path("server.sock"), "http://server/v1/metrics").Stdout
	}
	return []*measured{
		{name: "web proxy", pid: s.web.servingPID, metrics: of(s.web, 7491)},
		{name: "api proxy", pid: s.api.servingPID, metrics: of(s.api, 7491)},
		{name: "web agent", pid: s.web.agent.PID, metrics: of(s.web, 7490), prefix: "mesh_agent_"},
		{name: "api agent", pid: s.api.agent.PID, metrics: of(s.api, 7490), prefix: "mesh_agent_"},
		// It remembers the last 2,000 changes of intentions: every second change.
		{name: "server", pid: s.daemon.PID, metrics: server, history: 4},
	}
}

// changePlan makes a change that reaches both hosts: an intention of api's, and
// its weight, by turns.
func (s *spine) changePlan(i int) {
	if i%2 == 0 {
		s.meshctl(0, "intention", []string{"allow", "deny"}[i/2%2], "soak", "api", "--replace")
		return
	}
	s.api.define("api.hcl", strings.Replace(apiDefinition, "port     = 8080", fmt.Sprintf("port     = 8080\n  weight   = %d", 1+i/2%2), 1))
}

// flat holds the last fifth of the samples against the first after a third of the
// time: ten minutes of thirty.
func (m *measured) flat(t *testing.T, length time.Duration) {
	t.Helper()
	n := len(m.seen)
	warm, span := n/3, max(1, n/5)
	early, late := highest(m.seen[warm:warm+span]), highest(m.seen[n-span:])
	// A short run sees the collector's rhythm rather than a trend.
	memory, handles := max(1024, early.private/20), 8
	if length < 10*time.Minute {
		memory, handles = max(6*1024, early.private/3), 48
	}
	memory += m.history * int(length.Seconds()) * soakChanges
	if late.private > early.private+memory {
		t.Errorf("%s: private memory grew from %d to %d KiB, %d more are allowed", m.name, early.private, late.private, memory)
	}
	if late.goroutines > early.goroutines+handles || late.descriptors > early.descriptors+handles {
		t.Errorf("%s: goroutines and descriptors went from %d and %d to %d and %d", m.name, early.goroutines, early.descriptors, late.goroutines, late.descriptors)
	}
}

// highest is the most of each figure.
func highest(all []footprint) (top footprint) {
	for _, f := range all {
		top = footprint{max(top.private, f.private), max(top.goroutines, f.goroutines), max(top.descriptors, f.descriptors)}
	}
	return top
}
