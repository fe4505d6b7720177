package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/meshd/meshd/server/client"
	"github.com/meshd/meshd/tests/machines"
)

// Mesh is the smallest that the servers rule: the service web on one host calls the
// service api on another one, through a proxy on each.
type Mesh struct {
	Web, API *Member

	cluster *Cluster
}

// Member is a host with an agent and a proxy.
type Member struct {
	*machines.Host
	Agent, Proxy *machines.Process
	// Programs is the folder that its programs are taken from.
	Programs string

	config string
}

const agentConfig = `
servers      = [%[1]s]
node_name    = %[2]q
advertise    = %[3]q
data_dir     = "%[4]s/agent"
services_dir = "%[4]s/services.d"
socket       = "%[4]s/agent.sock"
join {
  token_file = "%[4]s/join.token"
}
proxy {
  socket = "%[4]s/proxy.sock"
}
metrics {
  address = "%[3]s:7490"
}
`

const (
	webDefinition = "service \"web\" {\n  upstream \"api\" { local_port = 9191 }\n}\n"
	apiDefinition = "service \"api\" {\n  port     = 8080\n  protocol = \"http\"\n}\n"
)

// Mesh starts hosts with agents and proxies, whose programs are in a folder, and
// waits until a request gets through.
func (c *Cluster) Mesh(programs string) *Mesh {
	c.t.Helper()
	m := &Mesh{cluster: c}
	m.Web = c.member("vm-a", "web", webDefinition, programs)
	m.API = c.member("vm-b", "api", apiDefinition, programs)
	app := &http.Server{ReadHeaderTimeout: 10 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, "hello "+r.URL.Path) // the caller counts what is missing
	})}
	l := m.API.Listen("127.0.0.1:8080")
	go func() { _ = app.Serve(l) }() // until the listener is closed
	c.t.Cleanup(func() { _ = app.Close() })
	intention := json.RawMessage(`{"source":"web","destination":"api","action":"allow"}`)
	if _, err := c.Servers[0].API().Apply(c.t.Context(), client.ApplyRequest{Resources: []client.Resource{{Kind: client.KindIntention, Spec: intention}}}); err != nil {
		c.t.Fatal(err)
	}
	pooled := m.client(true)
	machines.Eventually(c.t, 40*time.Second, "web calls api", func() string {
		if err := call(pooled, "/first"); err != nil {
			return err.Error()
		}
		return ""
	})
	return m
}

func (c *Cluster) member(name, service, definition, programs string) *Member {
	c.t.Helper()
	m := &Member{Host: c.Net.Host(c.t, name), Programs: programs}
	token, err := c.Servers[0].API().JoinToken(c.t.Context(), client.JoinTokenRequest{Node: name, Services: []string{service}})
	if err != nil {
		c.t.Fatal(err)
	}
	m.Write(token.Token, 0o600, "join.token")
	m.Write(definition, 0o644, "services.d", service+".hcl")
	var servers []string
	for _, s := range c.Servers {
		servers = append(servers, fmt.Sprintf("%q", s.Address+":7400"))
	}
	m.config = m.Write(fmt.Sprintf(agentConfig, strings.Join(servers, ", "), name, m.Address, m.Dir), 0o600, "agent.hcl")
	m.StartAgent()
	m.StartProxy()
	c.t.Cleanup(func() {
		if c.t.Failed() {
			for _, p := range []*machines.Process{m.Agent, m.Proxy} {
				_ = copyFile(p.Log, filepath.Join(c.t.ArtifactDir(), name+"-"+filepath.Base(p.Log))) // its end is in the test's own log
			}
		}
	})
	return m
}

// StartAgent starts the host's agent.
func (m *Member) StartAgent() {
	m.T.Helper()
	m.Agent = m.Start("agent", filepath.Join(m.Programs, "meshd"), "agent", "--config", m.config)
}

// StartProxy starts the host's proxy.
func (m *Member) StartProxy() {
	m.T.Helper()
	m.Proxy = m.Start("proxy", filepath.Join(m.Programs, "mesh-proxy"), "--feed", m.Path("proxy.sock"), "--state", m.Path("proxy"))
}

// client is one of the application web.
func (m *Mesh) client(pooled bool) *http.Client {
	return &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: !pooled, MaxIdleConnsPerHost: 16,
		DialContext: func(_ context.Context, _, address string) (net.Conn, error) { return m.Web.Dial(address) },
	}}
}

var errStatus = errors.New("unexpected answer")

func call(c *http.Client, path string) error {
	resp, err := c.Get("http://127.0.0.1:9191" + path)
	if err != nil {
		return fmt.Errorf("call api: %w", err)
	}
	defer resp.Body.Close() //nolint:errcheck // read to its end
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return fmt.Errorf("call api: %w", err)
	}
	if resp.StatusCode != http.StatusOK || string(body) != "hello "+path {
		return fmt.Errorf("%w: %s (mesh-error %s) %q", errStatus, resp.Status, resp.Header.Get("Mesh-Error"), body)
	}
	return nil
}

// Traffic is requests from web to api, at a steady rate.
type Traffic struct {
	stop context.CancelFunc
	work sync.WaitGroup

	// Repeat lets a request be sent once more when its connection is closed without
	// an answer: a proxy that stops ends those on which nothing has come yet. One that
	// comes just then is met by a reset instead of an end.
	Repeat atomic.Bool

	mu       sync.Mutex
	sent     int
	repeated int
	failed   []error
}

// Traffic sends rate requests a second, half of them on connections of their own.
func (m *Mesh) Traffic(rate int) *Traffic {
	const workers = 8
	ctx, stop := context.WithCancel(m.cluster.t.Context())
	tr := &Traffic{stop: stop}
	m.cluster.t.Cleanup(func() { stop(); tr.work.Wait() })
	began := time.Now()
	for i := range workers {
		tr.work.Go(func() {
			client := m.client(i%2 == 0)
			tick := time.NewTicker(time.Second * workers / time.Duration(rate))
			defer tick.Stop()
			for n := 0; ; n++ {
				select {
				case <-ctx.Done():
					return
				case <-tick.C:
				}
				path := fmt.Sprintf("/%d-%d", i, n)
				err := call(client, path)
				again := unanswered(err) && tr.Repeat.Load()
				if again {
					err = call(client, path)
				}
				tr.mu.Lock()
				tr.sent++
				if again {
					tr.repeated++
				}
				if err != nil {
					tr.failed = append(tr.failed, fmt.Errorf("after %s: %w", time.Since(began).Round(time.Millisecond), err))
				}
				tr.mu.Unlock()
			}
		})
	}
	return tr
}

// unanswered reports whether the connection ended before a byte of an answer came.
func unanswered(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

// End stops the requests; each that was not answered is an error of the test.
func (tr *Traffic) End(t *testing.T) (sent int) {
	t.Helper()
	tr.stop()
	tr.work.Wait()
	for i, err := range tr.failed {
		if i < 10 {
			t.Error(err)
		}
	}
	t.Logf("%d requests, %d repeated, %d lost", tr.sent, tr.repeated, len(tr.failed))
	return tr.sent
}

// Programs is the folder of the programs that users get, built from this tree.
func Programs() string { return filepath.Join(programs, folderNormal) }
