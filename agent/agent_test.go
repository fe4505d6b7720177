package agent_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/meshd/meshd/agent"
	"github.com/meshd/meshd/agent/agenttest"
	"github.com/meshd/meshd/agent/view"
	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/proxy"
	"github.com/meshd/meshd/proxy/feed"
	"github.com/meshd/meshd/server/meshpb"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	web = catalog.Name{Namespace: "default", Name: "web"} //nolint:gochecknoglobals // a constant
	api = catalog.Name{Namespace: "default", Name: "api"} //nolint:gochecknoglobals // a constant
)

// bench is one host with its stand-in server.
type bench struct {
	t      *testing.T
	server *agenttest.Server
	stop   func()
	dir    string
	cfg    agent.Config
	// before, if set, is called by the server before it handles a call.
	before atomic.Pointer[func(rpc string)]
}

// newBench returns a host with a join token. The directory is short: a unix
// socket's path has at most 107 bytes.
func newBench(t *testing.T) *bench {
	t.Helper()
	dir, err := os.MkdirTemp("", "agent") //nolint:usetesting // t.TempDir is too long for sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	a, err := agenttest.NewAuthority()
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{t: t, server: agenttest.NewServer(a), dir: dir}
	bundle, err := a.Bundle()
	if err != nil {
		t.Fatal(err)
	}
	b.server.Put(view.Roots(), agenttest.TrustDomain, mustJSON(t, map[string]string{"pem": string(bundle.PEM(agenttest.TrustDomain))}))
	b.server.Put(view.Node(), "spec", mustJSON(t, catalog.Node{Name: "vm-a", Services: []string{"*"}}))
	b.server.Refuse = func(rpc string, _ spiffe.ID) error {
		if before := b.before.Load(); before != nil {
			(*before)(rpc)
		}
		return nil
	}
	stop, err := b.server.Start(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b.stop = sync.OnceFunc(stop)
	t.Cleanup(b.stop)
	token, err := ca.JoinToken{Servers: []string{b.server.Address}, Roots: bundle.Hash(agenttest.TrustDomain), Secret: ca.NewSecret(bytes.Repeat([]byte{7}, 32))}.Encode()
	if err != nil {
		t.Fatal(err)
	}
	b.write("join.token", token)
	if err := os.Mkdir(filepath.Join(dir, "services.d"), 0o750); err != nil {
		t.Fatal(err)
	}
	b.cfg = agent.Config{
		NodeName: "vm-a", Advertise: "127.0.0.1", DataDir: filepath.Join(dir, "data"), ServicesDir: filepath.Join(dir, "services.d"),
		Socket: filepath.Join(dir, "agent.sock"), Join: agent.Join{TokenFile: filepath.Join(dir, "join.token")},
		Proxy:   agent.Proxy{Socket: filepath.Join(dir, "proxy.sock"), ID: "p1", MeshAddress: "127.0.0.1", MeshPort: freePort(t)},
		Metrics: agent.Metrics{Address: "off"},
	}
	return b
}

func mustJSON(t *testing.T, v any) []byte {
	t.Helper()
	data, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// freePort returns a port that nobody listens on now.
func freePort(t *testing.T) uint16 {
	t.Helper()
	l, port := occupy(t, "tcp", "127.0.0.1:0")
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	return port
}

func occupy(t *testing.T, network, address string) (net.Listener, uint16) {
	t.Helper()
	var lc net.ListenConfig
	l, err := lc.Listen(t.Context(), network, address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	tcp, ok := l.Addr().(*net.TCPAddr)
	if !ok {
		t.Fatal("no TCP address")
	}
	return l, uint16(tcp.Port)
}

func (b *bench) write(name, content string) {
	b.t.Helper()
	if err := os.WriteFile(filepath.Join(b.dir, name), []byte(content), 0o600); err != nil {
		b.t.Fatal(err)
	}
}

// start runs an agent; stop waits for its end and demands that it is clean.
func (b *bench) start() (stop func()) {
	b.t.Helper()
	a, err := agent.New(b.cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		b.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(b.t.Context())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			b.t.Errorf("Run: %v", err)
		}
	})
	b.t.Cleanup(stop)
	return stop
}

func (b *bench) deadline() context.Context {
	ctx, cancel := context.WithTimeout(b.t.Context(), 20*time.Second)
	b.t.Cleanup(cancel)
	return ctx
}

func (b *bench) seen(what string, fits func(agenttest.Seen) bool) agenttest.Seen {
	b.t.Helper()
	seen, ok := b.server.Until(b.deadline(), fits)
	if !ok {
		b.t.Fatalf("%s: the server never saw it: %+v", what, seen)
	}
	return seen
}

// status waits for a status that fits, over the local API.
func (b *bench) status(what string, fits func(agent.Status) bool) agent.Status {
	b.t.Helper()
	ctx := b.deadline()
	var s agent.Status
	for {
		if code, body, err := b.call(http.MethodGet, "/v1/agent/status", ""); err == nil && code == http.StatusOK {
			s = agent.Status{}
			if err := json.Unmarshal(body, &s); err != nil {
				b.t.Fatal(err)
			}
			if fits(s) {
				return s
			}
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			b.t.Fatalf("%s: never so; status %s", what, mustJSON(b.t, s))
		}
	}
}

func (b *bench) call(method, path, body string) (code int, answer []byte, err error) {
	var d net.Dialer
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return d.DialContext(ctx, "unix", b.cfg.Socket)
		},
	}}
	req, err := http.NewRequestWithContext(b.t.Context(), method, "http://agent"+path, strings.NewReader(body))
	if err != nil {
		return 0, nil, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	answer, err = io.ReadAll(resp.Body)
	return resp.StatusCode, answer, err
}

// recorder is a mesh-proxy that only takes notes, over the real feed.
type recorder struct {
	mu      sync.Mutex
	update  feed.Update
	applies int
	bare    int // updates that had something to call, and no key
	changed chan struct{}
}

func (r *recorder) Apply(_ context.Context, u feed.Update) (feed.Result, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	u.Sockets = maps.Clone(u.Sockets)
	r.update = u
	r.applies++
	if len(u.Config.Clusters) > 0 && len(u.Keys) == 0 {
		r.bare++
	}
	close(r.changed)
	r.changed = make(chan struct{})
	return feed.Result{Open: 1}, nil
}

func (*recorder) SetState(feed.State) {}

func (r *recorder) until(b *bench, what string, fits func(feed.Update) bool) feed.Update {
	b.t.Helper()
	ctx := b.deadline()
	for {
		r.mu.Lock()
		u, changed := r.update, r.changed
		ok := r.applies > 0 && fits(u)
		r.mu.Unlock()
		if ok {
			return u
		}
		select {
		case <-changed:
		case <-ctx.Done():
			b.t.Fatalf("%s: the proxy never got it: %+v", what, u.Config)
		}
	}
}

// proxy starts a recorder that is fed.
func (b *bench) proxy() (r *recorder, stop func()) {
	b.t.Helper()
	r = &recorder{changed: make(chan struct{})}
	c := feed.NewClient(feed.ClientConfig{
		Socket: b.cfg.Proxy.Socket, Proxy: "p1", Version: "test", Log: slog.New(slog.DiscardHandler),
		Cache: feed.NewDiskCache(filepath.Join(b.dir, "proxy")),
	})
	ctx, cancel := context.WithCancel(b.t.Context())
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx, r) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			b.t.Errorf("feed client: %v", err)
		}
	})
	b.t.Cleanup(stop)
	return r, stop
}

// upstreamAPI is what the servers tell of api, as web sees it.
func (b *bench) upstreamAPI() {
	t := view.Upstream(web, api)
	b.server.Put(t, "service", mustJSON(b.t, catalog.Service{Name: "api", Ports: []catalog.ServicePort{{Name: "http", Protocol: "http"}}}))
	b.server.Put(t, "instance/vm-b/api", mustJSON(b.t, catalog.Instance{
		Service: "api", ID: "api", Node: "vm-b", MeshAddress: "10.0.0.2:7443", Ports: []catalog.InstancePort{{Name: "http", Port: 80}},
	}))
	b.server.Put(t, "status/vm-b/api", mustJSON(b.t, catalog.InstanceStatus{Health: catalog.HealthPassing}))
	b.server.Put(view.Intentions(web), "x", []byte(`{"source":"*","destination":"web","action":"allow"}`))
}

func webDefinition(local uint16) string {
	return fmt.Sprintf("service \"web\" {\n  port = 9\n  check \"beat\" { ttl = \"1h\" }\n  upstream \"api\" { local_port = %d }\n}\n", local)
}

func full(u feed.Update) bool {
	return len(u.Config.Clusters) == 1 && len(u.Config.Clusters[0].Endpoints) == 1 && len(u.Keys) == 1 && len(u.Sockets) == 2 &&
		len(u.Config.Policies) == 1 && len(u.Config.Policies[0].Intentions) == 1
}

func TestFromTokenToPlan(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	local := freePort(t)
	b.write("services.d/web.hcl", webDefinition(local))
	b.upstreamAPI()
	stop := b.start()
	r, stopProxy := b.proxy()
	u := r.until(b, "the whole plan", full)
	want := []string{"mesh", fmt.Sprintf("upstream/default/web/default/api/%d", local)}
	if got := slices.Sorted(maps.Keys(u.Sockets)); !cmp.Equal(want, got) {
		t.Errorf("sockets %v, want %v", got, want)
	}
	if u.Keys[0].ID() != spiffe.Service(agenttest.TrustDomain, "default", "web") {
		t.Errorf("keys %v", u.Keys)
	}
	var instance catalog.Instance
	seen := b.seen("registration", func(s agenttest.Seen) bool { return len(s.Registered) == 1 })
	if err := json.Unmarshal(seen.Registered[0].GetInstance(), &instance); err != nil {
		t.Fatal(err)
	}
	mesh := fmt.Sprintf("127.0.0.1:%d", b.cfg.Proxy.MeshPort)
	if instance.MeshAddress != mesh || instance.Node != "vm-a" || instance.Ports[0].ServerName != "default.web.web.default.mesh" {
		t.Errorf("registered %+v", instance)
	}
	b.seen("report of the proxy", func(s agenttest.Seen) bool { return s.Applied["p1"].GetPosition().GetRevision() > 0 })

	// The check's verdict goes out, its output only with the transition.
	code, body, err := b.call(http.MethodPut, "/v1/agent/checks/web/beat", `{"status":"passing","output":"fine"}`)
	if err != nil || code != http.StatusNoContent {
		t.Fatalf("report: %d %s %v", code, body, err)
	}
	b.seen("passing", func(s agenttest.Seen) bool {
		return len(s.Registered) == 1 && strings.Contains(string(s.Registered[0].GetStatus()), `"health":"passing"`)
	})
	registers, _ := b.server.Seen()
	if _, _, err := b.call(http.MethodPut, "/v1/agent/checks/default%2Fweb%2Fweb/beat", `{"status":"passing","output":"finer"}`); err != nil {
		t.Fatal(err)
	}
	s := b.status("newest output", func(s agent.Status) bool {
		return len(s.Instances) == 1 && len(s.Instances[0].Checks) == 1 && s.Instances[0].Checks[0].Output == "finer" && s.PolicyAge != nil && s.Registration.Current
	})
	if after, _ := b.server.Seen(); after.Registers != registers.Registers {
		t.Error("a result that changed no verdict left the host")
	}
	if s.Node != "vm-a" || s.TrustDomain != agenttest.TrustDomain || s.Server.ServerID != "s1" || s.PolicyAge == nil ||
		len(s.Leaves) != 2 || len(s.Proxies) != 1 || len(s.Listeners) != 2 || !s.Registration.Current || s.Plan.Revision == 0 {
		t.Errorf("status %s", mustJSON(t, s))
	}

	// With every server dead, a restart of the agent and then of the proxy.
	b.stop()
	stop()
	stop = b.start()
	b.status("back without servers", func(s agent.Status) bool {
		return len(s.Proxies) == 1 && len(s.Instances) == 1 && s.Instances[0].Health == catalog.HealthPassing && s.Server.Error != ""
	})
	if _, err := os.Stat(b.cfg.Join.TokenFile); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the token file: %v", err)
	}
	stopProxy()
	r, _ = b.proxy()
	u = r.until(b, "the whole plan, from disk", full)
	if _, ok := u.Sockets["mesh"]; !ok {
		t.Error("no mesh socket")
	}
	stop()
}

func TestUpstreamPortHeldByAnother(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	taken, port := occupy(t, "tcp", "127.0.0.1:0")
	b.write("services.d/web.hcl", webDefinition(port))
	b.upstreamAPI()
	b.start()
	name := fmt.Sprintf("upstream/default/web/default/api/%d", port)
	find := func(s agent.Status) agent.ListenerStatus {
		for _, l := range s.Listeners {
			if l.Name == name {
				return l
			}
		}
		return agent.ListenerStatus{}
	}
	// The holder is this very process, which the agent does not name.
	want := fmt.Sprintf("127.0.0.1:%d is held by another process", port)
	b.status("waiting", func(s agent.Status) bool { return find(s).Waiting == want })
	if err := taken.Close(); err != nil {
		t.Fatal(err)
	}
	b.status("open", func(s agent.Status) bool { return find(s).Open })
	r, _ := b.proxy()
	r.until(b, "the socket", func(u feed.Update) bool { return u.Sockets[name] != nil })
}

func TestBadFilesRefusalsAndFindings(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	_, port := occupy(t, "tcp4", "0.0.0.0:0")
	b.write("services.d/web.hcl", fmt.Sprintf("service \"web\" { port = %d }", port))
	b.write("services.d/bad.hcl", "service \"x\" {\n  port = \"many\"\n}\n")
	b.server.SetRefusals(&meshpb.Refusal{Service: "default/web", Instance: "web", Reason: "vm-a may not run web"})
	b.start()
	s := b.status("refused", func(s agent.Status) bool { return len(s.Registration.Refusals) == 1 && len(s.Files) == 2 })
	if got := s.Registration.Refusals[0].Reason; got != "vm-a may not run web" {
		t.Errorf("refusal %q", got)
	}
	if len(s.Files[0].Problems) != 1 || !strings.HasPrefix(s.Files[0].Problems[0], "bad.hcl:2: port: ") {
		t.Errorf("problems %q", s.Files[0].Problems)
	}
	want := fmt.Sprintf("web also listens on 0.0.0.0:%d, reachable without the mesh → bind 127.0.0.1", port)
	if !slices.Contains(s.Findings, want) {
		t.Errorf("findings %q, want %q", s.Findings, want)
	}
}

func TestLocalAPIRefuses(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.write("services.d/web.hcl", "service \"web\" {\n  check \"beat\" { ttl = \"1h\" }\n  check \"port\" {\n    tcp = \"127.0.0.1:1\"\n    interval = \"1h\"\n  }\n}\nservice \"other\" { id = \"web\" }\n")
	b.start()
	b.status("up", func(s agent.Status) bool { return len(s.Instances) == 2 })
	rows := []struct {
		method, path, body string
		code               int
		says               string
	}{
		{http.MethodPut, "/v1/agent/checks/web%2Fweb/beat", `{"status":"passing"}`, 204, ""},
		{http.MethodPut, "/v1/agent/checks/web/beat", `{"status":"passing"}`, 404, "write one of default/other/web, default/web/web"},
		{http.MethodPut, "/v1/agent/checks/nobody/beat", `{"status":"passing"}`, 404, "no such instance on this host"},
		{http.MethodPut, "/v1/agent/checks/web%2Fweb/none", `{"status":"passing"}`, 404, "no such check"},
		{http.MethodPut, "/v1/agent/checks/web%2Fweb/port", `{"status":"passing"}`, 409, "takes no reports"},
		{http.MethodPut, "/v1/agent/checks/web%2Fweb/beat", `{"status":"fine"}`, 400, "unknown health"},
		{http.MethodPut, "/v1/agent/checks/web%2Fweb/beat", `{"status":"passing","Status":"critical"}`, 400, "body"},
		{http.MethodPut, "/v1/agent/checks/web%2Fweb/beat", `{"status":"passing","more":1}`, 400, "more"},
		{http.MethodPut, "/v1/agent/checks/web%2Fweb/beat", strings.Repeat(" ", 1<<20), 400, "body"},
		{http.MethodPost, "/v1/agent/status", ``, 405, ""},
		{http.MethodGet, "/v1/agent/", ``, 404, ""},
	}
	for _, row := range rows {
		code, body, err := b.call(row.method, row.path, row.body)
		if err != nil || code != row.code || !strings.Contains(string(body), row.says) {
			t.Errorf("%s %s %.60s: %d %s %v, want %d %q", row.method, row.path, row.body, code, body, err, row.code, row.says)
		}
	}
	info, err := os.Stat(b.cfg.Socket)
	if err != nil || info.Mode().Perm() != 0o660 {
		t.Errorf("the socket's mode: %v, %v", info, err)
	}
}

func TestSecondAgentIsRefused(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.start()
	b.status("up", func(agent.Status) bool { return true })
	second, err := agent.New(b.cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if err := second.Run(t.Context()); !errors.Is(err, agent.ErrRunning) {
		t.Errorf("the second agent: %v", err)
	}
	b.status("the first still runs", func(agent.Status) bool { return true })
}

func TestAnotherNodeName(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	stop := b.start()
	b.status("joined", func(s agent.Status) bool { return s.TrustDomain != "" })
	stop()
	b.cfg.NodeName = "vm-b"
	a, err := agent.New(b.cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Run(t.Context()); !errors.Is(err, agent.ErrNode) {
		t.Errorf("Run: %v", err)
	}
}

// TestTakesOverFromAProxyAlone: a proxy that booted without an agent has opened
// the sockets itself; the agent takes those, rather than wait for the ports.
func TestTakesOverFromAProxyAlone(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.write("services.d/web.hcl", webDefinition(freePort(t)))
	b.upstreamAPI()
	stop := b.start()
	r, stopProxy := b.proxy()
	r.until(b, "the whole plan", full)
	stopProxy()
	stop()
	r, stopProxy = b.proxy()
	r.until(b, "the plan on disk", func(u feed.Update) bool { return u.Alone && full(u) })
	b.start()
	b.status("taken over", func(s agent.Status) bool {
		return len(s.Listeners) == 2 && s.Listeners[0].Open && s.Listeners[1].Open
	})
	stopProxy()
	r, _ = b.proxy()
	r.until(b, "the sockets for the next proxy", full)
}

func TestHangupReloads(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.start()
	b.status("up", func(s agent.Status) bool { return s.TrustDomain != "" })
	b.write("services.d/web.hcl", "service \"web\" {}")
	if err := syscall.Kill(os.Getpid(), syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	b.status("read", func(s agent.Status) bool { return len(s.Instances) == 1 })
}

func TestEndDeregistersNothing(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.write("services.d/web.hcl", "service \"web\" {}")
	stop := b.start()
	b.seen("registration", func(s agenttest.Seen) bool { return len(s.Registered) == 1 })
	stop()
	if seen, _ := b.server.Seen(); seen.Left != 0 || len(seen.Registered) != 1 {
		t.Errorf("the server saw %+v", seen)
	}
}

// TestPlanFollows: a deny reaches the proxy, and a proxy's socket is kept when
// the agent restarts under it.
func TestPlanFollows(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.write("services.d/web.hcl", webDefinition(freePort(t)))
	b.upstreamAPI()
	stop := b.start()
	r, _ := b.proxy()
	before := r.until(b, "the whole plan", full)
	b.server.Put(view.Intentions(web), "x", []byte(`{"source":"*","destination":"web","action":"deny"}`))
	r.until(b, "deny", func(u feed.Update) bool {
		return len(u.Config.Policies) == 1 && len(u.Config.Policies[0].Intentions) == 1 && u.Config.Policies[0].Intentions[0].Action == "deny"
	})
	stop()
	b.start()
	b.server.Put(view.Upstream(web, api), "denied", []byte(`{"reason":"no intention"}`))
	u := r.until(b, "plan of the next agent", func(u feed.Update) bool {
		return len(u.Config.Clusters) == 1 && u.Config.Clusters[0].Denied == "no intention"
	})
	listeners := func(u feed.Update) []proxy.Listener { return u.Config.Listeners }
	if diff := cmp.Diff(listeners(before), listeners(u)); diff != "" || len(u.Sockets) != 2 || len(u.Keys) != 1 {
		t.Errorf("after the restart: %d sockets, %d keys, %s", len(u.Sockets), len(u.Keys), diff)
	}
	b.status("every listener serves", func(s agent.Status) bool {
		return len(s.Listeners) == 2 && !slices.ContainsFunc(s.Listeners, func(l agent.ListenerStatus) bool {
			return l.Waiting != "" && !l.Open && !strings.Contains(l.Waiting, "another process")
		})
	})
}
