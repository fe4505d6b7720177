package e2e_test

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// pair is a mesh in which web on one host calls services that two others run.
type pair struct {
	*cluster
	web  *member
	apis [2]*member
}

// Both services of a pair are alike, but that nothing checks the second. Nobody
// but a look at its port can tell that it has ended.
const pairDefinition = `service "api" {
  port     = 8080
  protocol = "http"
  check "alive" {
    http     = "http://127.0.0.1:8080/healthz"
    interval = "1s"
    timeout  = "500ms"
  }
}
service "plain" {
  port     = 8081
  protocol = "http"
}
service "slow" {
  port     = 8082
  protocol = "http"
}
service "echo" {
  port     = 8070
  protocol = "tcp"
}
`

const pairUpstreams = `service "web" {
  upstream "api" { local_port = 9191 }
  upstream "echo" { local_port = 9192 }
  upstream "plain" { local_port = 9193 }
  upstream "slow" { local_port = 9194 }
}
`

func newPair(t *testing.T) *pair {
	t.Helper()
	p := &pair{cluster: newCluster(t)}
	p.web = p.join("vm-a", "web")
	p.web.define("web.hcl", pairUpstreams)
	for i, name := range []string{"vm-b", "vm-c"} {
		m := p.join(name, "api,plain,slow,echo")
		m.nginx(8080, name)
		m.nginx(8081, name)
		serveEcho(m.Listen("127.0.0.1:8070"))
		m.define("api.hcl", pairDefinition)
		p.apis[i] = m
	}
	eventually(t, 20*time.Second, "both instances of all services are there", func() string {
		r := p.meshctl(0, "services", "-o", "csv")
		for _, name := range []string{"api,default:http", "plain,default:http", "slow,default:http", "echo,default:tcp"} {
			if !strings.Contains(r.Stdout, "\n"+name+",2,2,0\n") {
				return r.Stdout
			}
		}
		return ""
	})
	for _, port := range []int{9191, 9192, 9193, 9194} {
		p.web.listens(port)
	}
	for _, m := range p.apis {
		m.listens(7443)
	}
	for _, name := range []string{"api", "plain", "slow", "echo"} {
		p.meshctl(0, "intention", "allow", "web", name, "--wait")
	}
	for _, port := range []string{"9191", "9193"} {
		p.web.answers(10*time.Second, "200", "http://127.0.0.1:"+port+"/")
	}
	return p
}

// reply is what became of one request.
type reply struct {
	sent     time.Time
	took     time.Duration
	instance string // "" if there was no good answer
	problem  string
}

// stream is an endless load at a constant rate whose replies are kept.
type stream struct {
	stop context.CancelFunc
	done chan struct{}

	mu      sync.Mutex
	replies []reply
}

// stream sends requests to a URL, half of them on new connections, until stopped.
func (h *host) stream(url string, perSecond int) *stream {
	ctx, stop := context.WithCancel(context.Background())
	s := &stream{stop: stop, done: make(chan struct{})}
	dial := h.dialer()
	client := func(fresh bool) *http.Client {
		return &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
			DisableKeepAlives: fresh, MaxIdleConnsPerHost: 16,
			DialContext: func(_ context.Context, _, addr string) (net.Conn, error) { return dial(addr) },
		}}
	}
	clients := []*http.Client{client(false), client(true)}
	jobs := make(chan int)
	var workers sync.WaitGroup
	for range 16 {
		workers.Go(func() {
			for i := range jobs {
				s.add(ask(clients[i%2], url))
			}
		})
	}
	go func() {
		defer close(s.done)
		tick := time.NewTicker(time.Second / time.Duration(perSecond))
		defer tick.Stop()
		for i := 0; ctx.Err() == nil; i++ {
			<-tick.C
			jobs <- i
		}
		close(jobs)
		workers.Wait()
		clients[0].CloseIdleConnections()
	}()
	h.T.Cleanup(func() {
		stop()
		<-s.done
	})
	return s
}

// ask sends one request.
func ask(c *http.Client, url string) reply {
	sent := time.Now()
	resp, err := c.Get(url)
	return answered(sent, resp, err)
}

// answered reads what came of a request.
func answered(sent time.Time, resp *http.Response, err error) reply {
	r := reply{sent: sent}
	if err != nil {
		r.problem = err.Error()
		r.took = time.Since(r.sent)
		return r
	}
	defer resp.Body.Close() //nolint:errcheck // read to its end, or given up
	body := make([]byte, 512)
	n, _ := resp.Body.Read(body)
	r.took = time.Since(r.sent)
	if resp.StatusCode != http.StatusOK {
		r.problem = resp.Status + " " + resp.Header.Get("mesh-error")
		return r
	}
	r.instance, _, _ = strings.Cut(strings.TrimPrefix(string(body[:n]), "instance="), " ")
	return r
}

func (s *stream) add(r reply) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.replies = append(s.replies, r)
}

// since returns the replies to what was sent in a time.
func (s *stream) between(from, to time.Time) []reply {
	s.mu.Lock()
	defer s.mu.Unlock()
	var some []reply
	for _, r := range s.replies {
		if !r.sent.Before(from) && r.sent.Before(to) {
			some = append(some, r)
		}
	}
	return some
}

// more waits until some requests that are sent from now on are answered, and
// returns the replies to them.
func (s *stream) more(t *testing.T, n int) []reply {
	t.Helper()
	from := time.Now()
	var some []reply
	eventually(t, 30*time.Second, fmt.Sprintf("%d more requests", n), func() string {
		if some = s.between(from, time.Now()); len(some) < n {
			return fmt.Sprintf("%d came", len(some))
		}
		return ""
	})
	return some
}

// counts tells how many replies came from each instance, and what else came.
func counts(replies []reply) map[string]int {
	m := map[string]int{}
	for _, r := range replies {
		m[r.instance+r.problem]++
	}
	return m
}

// lost demands that no reply tells of a problem.
func lost(t *testing.T, what string, replies []reply) {
	t.Helper()
	var bad []reply
	for _, r := range replies {
		if r.problem != "" {
			bad = append(bad, r)
		}
	}
	t.Logf("%s: %d requests, %d lost; %v", what, len(replies), len(bad), counts(replies))
	if len(bad) > 0 {
		t.Errorf("%s: lost %d of %d: %v", what, len(bad), len(replies), counts(bad))
	}
}

// planned waits until the proxy of the host has a newer plan than at a time.
func (m *member) planned(after time.Time) time.Time {
	m.T.Helper()
	var applied time.Time
	eventually(m.T, 5*time.Second, m.Name+" has a new plan", func() string {
		_, _, text := m.curl("http://127.0.0.1:7491/metrics")
		seconds := value(m.T, text, "mesh_plan_applied_timestamp_seconds")
		applied = time.UnixMicro(int64(seconds * 1e6))
		if !applied.After(after) {
			return "the last one is of " + applied.Format("15:04:05.000")
		}
		return ""
	})
	return applied
}

// TestApplicationDies: two hosts share the load, and one application is killed.
// Its callers know within a second, with a check or without, and from then on
// no request is lost; before, only what it had begun.
func TestApplicationDies(t *testing.T) {
	t.Parallel()
	p := newPair(t)
	for _, service := range []struct {
		name string
		port int
		url  string
	}{
		{"api", 8080, "http://127.0.0.1:9191/"}, {"plain", 8081, "http://127.0.0.1:9193/"},
	} {
		load := p.web.stream(service.url, 200)
		load.more(t, 100) // connections are made
		replies := load.more(t, 400)
		lost(t, service.name+", both there", replies)
		for name, n := range counts(replies) {
			if share := float64(n) / float64(len(replies)); share < 0.35 || share > 0.65 {
				t.Errorf("%s: %s has %.0f %% of the load", service.name, name, 100*share)
			}
		}
		victim := p.apis[1].server(service.port)
		killed := time.Now()
		victim.Kill(syscall.SIGKILL)
		known := p.web.planned(killed)
		if took := known.Sub(killed); took > time.Second {
			t.Errorf("%s: the caller's plan changed %s after the death", service.name, took)
		}
		replies = load.more(t, 400)
		lost(t, service.name+", one known to be dead", slices.Concat(load.between(known.Add(5*time.Millisecond), replies[0].sent), replies))
		between := load.between(killed.Add(-20*time.Millisecond), known)
		t.Logf("%s: the caller's plan changed %s after the death; of what was sent until then: %v",
			service.name, known.Sub(killed).Round(time.Millisecond), counts(between))
		for _, r := range between {
			if strings.Contains(r.problem, "connect-failed") {
				t.Errorf("%s: a request of which the dead got nothing was not given to the other: %+v", service.name, r)
			}
			if r.took > 2*time.Second {
				t.Errorf("%s: a request that the death met was answered after %s: %+v", service.name, r.took, r)
			}
		}
		p.apis[1].nginx(service.port, "vm-c")
		eventually(t, 20*time.Second, "vm-c is back", func() string {
			if n := counts(load.more(t, 50))["vm-c"]; n == 0 {
				return "no request reached it"
			}
			return ""
		})
		lost(t, service.name+", back again", load.more(t, 100))
		load.stop()
		<-load.done
	}
}

// slowServer tells of each request when it has come, and answers it after 2 s.
const slowServer = `
import http.server, sys, time
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def answer(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        print("begun", self.path, flush=True)
        if self.path != "/quick": time.sleep(2)
        body = f"instance={sys.argv[2]} \n".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    do_GET = do_POST = answer
    def log_message(self, *args): pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
`

// TestDeathMeetsRequests: an application dies over requests that it has begun. Each
// fails at once or is made anew elsewhere, and none that may not be repeated is
// begun twice.
func TestDeathMeetsRequests(t *testing.T) {
	t.Parallel()
	p := newPair(t)
	logs := [2]string{}
	for i, m := range p.apis {
		m.serve(8082, python, "-c", slowServer, "8082", m.Name)
		logs[i] = m.server(8082).Log
	}
	dial := p.web.dialer()
	c := &http.Client{Timeout: 15 * time.Second, Transport: &http.Transport{
		MaxIdleConnsPerHost: 32, DialContext: func(_ context.Context, _, addr string) (net.Conn, error) { return dial(addr) },
	}}
	defer c.CloseIdleConnections()
	eventually(t, 30*time.Second, "both serve", func() string {
		var all []reply
		for range 20 {
			all = append(all, ask(c, "http://127.0.0.1:9194/quick"))
		}
		if n := counts(all); n["vm-b"] < 5 || n["vm-c"] < 5 {
			return fmt.Sprint(n)
		}
		return ""
	})
	const each = 8
	var asking sync.WaitGroup
	var got, posted [each]reply
	for i := range each {
		asking.Go(func() { got[i] = ask(c, fmt.Sprintf("http://127.0.0.1:9194/get/%d/", i)) })
		asking.Go(func() {
			resp, err := c.Post(fmt.Sprintf("http://127.0.0.1:9194/post/%d/", i), "text/plain", strings.NewReader("once"))
			posted[i] = answered(time.Now(), resp, err)
		})
	}
	begun := func(log string) int {
		return strings.Count(readFile(t, log), "/get/") + strings.Count(readFile(t, log), "/post/")
	}
	eventually(t, 10*time.Second, "all are begun", func() string {
		if b, c := begun(logs[0]), begun(logs[1]); b+c < 2*each || c < 2 {
			return fmt.Sprintf("%d and %d", b, c)
		}
		return ""
	})
	killed := time.Now()
	p.apis[1].server(8082).Kill(syscall.SIGKILL)
	asking.Wait()
	if took := time.Since(killed); took > 8*time.Second {
		t.Errorf("the last answer came %s after the death", took)
	}
	said := readFile(t, logs[0]) + readFile(t, logs[1])
	for i := range each {
		if n := strings.Count(said, fmt.Sprintf("/post/%d/", i)); n != 1 {
			t.Errorf("POST %d was begun %d times", i, n)
		}
		dead := strings.Contains(readFile(t, logs[1]), fmt.Sprintf("/post/%d/", i))
		if (posted[i].problem != "") != dead {
			t.Errorf("POST %d, begun by the one that died: %t; answered %+v", i, dead, posted[i])
		}
	}
	t.Logf("GET: %v; POST: %v", counts(got[:]), counts(posted[:]))
}

// TestDrainLosesNothing: an instance and a node are drained under load, and taken
// back.
func TestDrainLosesNothing(t *testing.T) {
	t.Parallel()
	p := newPair(t)
	load := p.web.stream("http://127.0.0.1:9191/", 200)
	var held []net.Conn
	for range 8 {
		c := p.web.connect("127.0.0.1:9192")
		exchange(t, c, "before")
		held = append(held, c)
	}
	from := time.Now()
	load.more(t, 100)
	for _, args := range [][]string{{"drain", "api/api", "--node", "vm-c"}, {"drain", "vm-b"}} {
		spared, idle := "vm-b", "vm-c"
		if len(args) == 2 {
			spared, idle = "vm-c", "vm-b"
		}
		told := time.Now()
		p.meshctl(0, args...)
		known := p.web.planned(told)
		replies := load.more(t, 300)
		if n := counts(replies); n[idle] > 0 || n[spared] != len(replies) {
			t.Errorf("after %v: %v", args, n)
		}
		for _, c := range held {
			exchange(t, c, "drained")
		}
		t.Logf("%v: the caller's plan changed after %s", args, known.Sub(told).Round(time.Millisecond))
		p.meshctl(0, append([]string{"undrain"}, args[1:]...)...)
		eventually(t, 20*time.Second, idle+" is back", func() string {
			if n := counts(load.more(t, 50))[idle]; n == 0 {
				return "no request reached it"
			}
			return ""
		})
	}
	lost(t, "drains and back", load.between(from, time.Now()))
}
