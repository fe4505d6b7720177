package main_test

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"crypto/x509"
	"debug/buildinfo"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/intentions"
	"github.com/meshd/meshd/proxy"
	"github.com/meshd/meshd/proxy/feed"
)

const trustDomain = "mesh.example.com"

// binary is the program under test, built once.
var binary string

func TestMain(m *testing.M) {
	_ = os.Unsetenv("NOTIFY_SOCKET") // whoever runs the tests may be a service
	dir, err := os.MkdirTemp("", "mesh-proxy-test")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	binary = filepath.Join(dir, "mesh-proxy")
	out, err := exec.Command("go", "build", "-o", binary, ".").CombinedOutput()
	code := 1
	if err != nil {
		fmt.Fprintf(os.Stderr, "go build: %v\n%s", err, out)
	} else {
		code = m.Run()
	}
	_ = os.RemoveAll(dir)
	os.Exit(code)
}

func TestWrongFlags(t *testing.T) {
	tests := map[string][]string{
		"flag provided but not defined: -fed": {"--fed", "x"},
		"unexpected argument \"serve\"":       {"serve"},
		"--metrics \"0.0.0.0:7490\"":          {"--metrics", "0.0.0.0:7490"},
		"--metrics \"7490\"":                  {"--metrics", "7490"},
		"invalid value \"loud\"":              {"--log-level", "loud"},
		"--drain-timeout -1s":                 {"--drain-timeout", "-1s"},
		"--feed: a path is needed":            {"--feed", ""},
		"--state: a directory is needed":      {"--state", ""},
	}
	for want, args := range tests {
		t.Run(want, func(t *testing.T) {
			out, err := exec.Command(binary, args...).CombinedOutput()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.ExitCode() != 2 {
				t.Errorf("%v, want exit code 2", err)
			}
			if !bytes.Contains(out, []byte(want)) || bytes.Count(out, []byte("\n")) != 1 {
				t.Errorf("it says %q, want one line with %q", out, want)
			}
		})
	}
}

func TestVersionAndHelp(t *testing.T) {
	for flag, want := range map[string]string{"--version": "mesh-proxy ", "--help": "-drain-timeout"} {
		out, err := exec.Command(binary, flag).CombinedOutput()
		if err != nil || !bytes.Contains(out, []byte(want)) {
			t.Errorf("%s: %v, %q", flag, err, out)
		}
	}
}

// The data plane is to stay small: what it links is listed here, and anything else needs a reason.
func TestDependencies(t *testing.T) {
	allowed := map[string]bool{
		"github.com/beorn7/perks": true, "github.com/cespare/xxhash/v2": true, "github.com/google/renameio/v2": true,
		"github.com/munnerz/goautoneg": true, "github.com/prometheus/client_golang": true,
		"github.com/prometheus/client_model": true, "github.com/prometheus/common": true, "github.com/prometheus/procfs": true,
		"golang.org/x/crypto": true, "golang.org/x/sync": true, "golang.org/x/sys": true, "google.golang.org/protobuf": true,
	}
	touchSources(t)
	info, err := buildinfo.ReadFile(binary)
	if err != nil {
		t.Fatal(err)
	}
	for _, dep := range info.Deps {
		if !allowed[dep.Path] {
			t.Errorf("mesh-proxy links %s", dep.Path)
		}
	}
	out, err := exec.Command("go", "list", "-deps", "-f", "{{.ImportPath}} {{join .Imports \",\"}}", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(out)) {
		path, imports, _ := strings.Cut(strings.TrimSpace(line), " ")
		ours, ok := strings.CutPrefix(path, "github.com/meshd/meshd/")
		if !ok {
			continue
		}
		if ours != "cmd/mesh-proxy" && strings.Contains(","+imports+",", ",net/http,") {
			t.Errorf("%s imports net/http: it does not belong in the data path", ours)
		}
		if strings.HasPrefix(ours, "server") || strings.HasPrefix(ours, "agent") {
			t.Errorf("mesh-proxy links %s", ours)
		}
	}
}

// touchSources makes the test's result depend on the sources that the go command reads for it.
func touchSources(t *testing.T) {
	t.Helper()
	for _, dir := range []string{".", "../../proxy", "../../ca", "../../catalog", "../../intentions", "../../go.mod"} {
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err == nil && !d.IsDir() {
				_, err = os.Stat(path)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}

// world is an agent's side with a plan in which web, on this host, reaches api, on this host too.
type world struct {
	t                    *testing.T
	dir, feedPath, state string
	metrics              string
	program              string // if it is not the one under test
	upstream, port       string
	files                map[string]*os.File
	plan                 proxy.Config
	keys                 []*ca.Leaf
}

func newWorld(t *testing.T, app string) *world {
	t.Helper()
	dir := t.TempDir()
	w := &world{t: t, dir: dir, feedPath: filepath.Join(dir, "proxy.sock"), state: filepath.Join(dir, "state"), files: map[string]*os.File{}}
	w.upstream, w.files["upstream"] = listen(t)
	w.port, w.files["mesh"] = listen(t)
	var spare *os.File
	w.metrics, spare = listen(t)
	_ = spare.Close()
	rootKey, err := ca.GenerateKey()
	must(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, rootKey.Public(), rootKey)
	must(t, err)
	root, err := x509.ParseCertificate(der)
	must(t, err)
	bundle, err := ca.NewBundle(trustDomain, root)
	must(t, err)
	for i, name := range []string{"web", "api"} {
		key, err := ca.GenerateKey()
		must(t, err)
		der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
			SerialNumber: big.NewInt(int64(i) + 2), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
			KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
			URIs: []*url.URL{service(name).URL()},
		}, root, key.Public(), rootKey)
		must(t, err)
		chain, err := ca.ParseChain([][]byte{der})
		must(t, err)
		leaf, err := ca.NewLeaf(chain, key)
		must(t, err)
		w.keys = append(w.keys, leaf)
	}
	sni := proxy.ServerName("main", "api", "api", "default")
	w.plan = proxy.Config{
		Position: catalog.Position{Generation: "g1", Revision: 1}, TrustDomain: trustDomain, Bundle: bundle,
		Listeners: []proxy.Listener{
			{Name: "mesh", Kind: proxy.ListenMesh, Address: w.port},
			{Name: "upstream", Kind: proxy.ListenUpstream, Address: w.upstream, Source: service("web"), Cluster: "default/api:main"},
		},
		Inbounds: []proxy.Inbound{{ServerName: sni, Service: service("api"), Instance: "api", Port: "main", Protocol: "tcp", Local: app}},
		Clusters: []proxy.Cluster{{
			Name: "default/api:main", Service: service("api"), Port: "main", Protocol: "tcp",
			Endpoints: []proxy.Endpoint{{Instance: "api", Node: "vm", Address: w.port, ServerName: sni}},
		}},
		Policies: []proxy.Policy{{
			Service:    catalog.Name{Namespace: "default", Name: "api"},
			Intentions: []intentions.Intention{{Source: "web", Destination: "api", Action: intentions.Allow}},
		}},
	}
	return w
}

func service(name string) spiffe.ID { return spiffe.Service(trustDomain, "default", name) }

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func listen(t *testing.T) (string, *os.File) {
	t.Helper()
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	must(t, err)
	defer func() { _ = l.Close() }()
	f, err := l.File()
	must(t, err)
	t.Cleanup(func() { _ = f.Close() })
	return l.Addr().String(), f
}

// agent feeds the world's plan until it is stopped. It passes the world's sockets while they are open here.
func (w *world) agent() (srv *feed.Server, stop func()) {
	w.t.Helper()
	l, err := net.Listen("unix", w.feedPath)
	must(w.t, err)
	srv = feed.NewServer(feed.ServerConfig{Log: slog.New(slog.DiscardHandler)})
	must(w.t, srv.SetKeys("vm", w.keys))
	must(w.t, srv.SetSockets("vm", w.files))
	must(w.t, srv.SetPlan("vm", w.plan))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- srv.Run(ctx, l) }()
	var once sync.Once
	stop = func() {
		once.Do(func() {
			cancel()
			if err := errors.Join(<-done, srv.Close()); err != nil {
				w.t.Errorf("agent: %v", err)
			}
		})
	}
	w.t.Cleanup(stop)
	return srv, stop
}

// forget closes the agent's duplicates of the sockets, as its death does.
func (w *world) forget() {
	for name, f := range w.files {
		_ = f.Close()
		delete(w.files, name)
	}
}

// proxy starts mesh-proxy.
func (w *world) proxy(more ...string) *exec.Cmd {
	w.t.Helper()
	args := []string{"--feed", w.feedPath, "--id", "vm", "--state", w.state, "--metrics", w.metrics, "--drain-timeout", "2s", "--log-level", "debug"}
	cmd := exec.Command(cmp.Or(w.program, binary), append(args, more...)...)
	log, err := os.OpenFile(filepath.Join(w.dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	must(w.t, err)
	cmd.Stderr = log
	must(w.t, cmd.Start())
	_ = log.Close()
	w.t.Cleanup(func() {
		if cmd.ProcessState == nil { // gently, for the sake of those that it may have started
			_ = cmd.Process.Signal(syscall.SIGTERM)
			kill := time.AfterFunc(10*time.Second, func() { _ = cmd.Process.Kill() })
			_ = cmd.Wait()
			kill.Stop()
		}
		if data, err := os.ReadFile(filepath.Join(w.dir, "log")); err == nil && w.t.Failed() {
			w.t.Logf("log:\n%s", data)
		}
	})
	return cmd
}

// talk opens a connection through the mesh and echoes over it.
func (w *world) talk() (net.Conn, error) {
	c, err := net.Dial("tcp", w.upstream)
	if err != nil {
		return nil, err
	}
	w.t.Cleanup(func() { _ = c.Close() })
	return c, echo(c)
}

func echo(c net.Conn) error {
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return err
	}
	if _, err := io.WriteString(c, "hello"); err != nil {
		return err
	}
	buf := make([]byte, 5)
	if _, err := io.ReadFull(c, buf); err != nil {
		return err
	}
	if string(buf) != "hello" {
		return fmt.Errorf("echoed %q", buf)
	}
	return nil
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-ctx.Done():
			t.Fatalf("waited 20 s in vain: %s", what)
		case <-tick.C:
		}
	}
}

func echoApp(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer func() { _ = c.Close() }()
				_, _ = io.Copy(c, c)
			}()
		}
	}()
	return l.Addr().String()
}

func TestFeedKillAndBootAlone(t *testing.T) {
	w := newWorld(t, echoApp(t))
	srv, stopAgent := w.agent()
	first := w.proxy()
	eventually(t, "the plan is applied", func() bool {
		s := srv.Status()
		return len(s) == 1 && s[0].Applied == w.plan.Position
	})
	live, err := w.talk()
	must(t, err)

	// The plan must be on disk before the crash.
	eventually(t, "the plan is on disk", func() bool {
		_, err := feed.NewDiskCache(w.state).Plan()
		return err == nil
	})

	// The agent dies: nothing happens to connections, old or new.
	stopAgent()
	w.forget()
	must(t, echo(live))
	_, err = w.talk()
	must(t, err)

	// The proxy dies too, and comes back alone, from its disk, with sockets of its own.
	must(t, first.Process.Kill())
	_ = first.Wait()
	second := w.proxy()
	started := time.Now()
	eventually(t, "it serves again", func() bool {
		c, err := w.talk()
		if err == nil {
			live = c
		}
		return err == nil
	})
	t.Logf("serving %s after its start", time.Since(started))

	// The agent comes back, takes over the sockets, feeds a newer plan; no connection notices.
	w.plan.Position.Revision++
	srv, _ = w.agent()
	eventually(t, "the newer plan is applied", func() bool {
		s := srv.Status()
		return len(s) == 1 && s[0].Applied == w.plan.Position && len(s[0].Sockets) == 2
	})
	must(t, echo(live))
	_, err = w.talk()
	must(t, err)

	// A deny cuts, also what began while the proxy was alone.
	w.plan.Position.Revision++
	w.plan.Policies[0].Intentions[0].Action = intentions.Deny
	must(t, srv.SetPlan("vm", w.plan))
	if _, err := io.Copy(io.Discard, live); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the denied connection ended with %v, want a reset", err)
	}
	w.plan.Position.Revision++
	w.plan.Policies[0].Intentions[0].Action = intentions.Allow
	must(t, srv.SetPlan("vm", w.plan))
	eventually(t, "the proxy allows again", func() bool { return srv.Status()[0].Applied == w.plan.Position })

	drains(t, w, srv, second)
}

// drains ends a proxy by SIGTERM: its last connection may end in its own time.
func drains(t *testing.T, w *world, srv *feed.Server, second *exec.Cmd) {
	t.Helper()
	live, err := w.talk()
	must(t, err)
	must(t, second.Process.Signal(syscall.SIGTERM))
	eventually(t, "the agent knows that it drains", func() bool {
		s := srv.Status()
		return len(s) == 1 && s[0].State == feed.Draining
	})
	must(t, echo(live))
	must(t, live.Close())
	if err := second.Wait(); err != nil {
		t.Errorf("exit: %v", err)
	}
}

// Connections that wait to be accepted outlive a crash, because the agent keeps the sockets.
func TestConnectionsQueueOverACrash(t *testing.T) {
	w := newWorld(t, echoApp(t))
	srv, _ := w.agent()
	first := w.proxy()
	eventually(t, "the plan is applied", func() bool { s := srv.Status(); return len(s) == 1 && s[0].Applied == w.plan.Position })
	_, err := w.talk()
	must(t, err)
	must(t, first.Process.Kill())
	_ = first.Wait()
	waiting, err := net.Dial("tcp", w.upstream)
	must(t, err)
	defer func() { _ = waiting.Close() }()
	w.proxy()
	must(t, echo(waiting))
}

func TestMetricsAndNoSecretInLogs(t *testing.T) {
	w := newWorld(t, echoApp(t))
	srv, _ := w.agent()
	w.proxy()
	eventually(t, "the plan is applied", func() bool { s := srv.Status(); return len(s) == 1 && s[0].Applied == w.plan.Position })
	_, err := w.talk()
	must(t, err)
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+w.metrics+"/metrics", nil)
	must(t, err)
	res, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(req)
	must(t, err)
	defer func() { _ = res.Body.Close() }()
	body, err := io.ReadAll(res.Body)
	must(t, err)
	for _, want := range []string{
		`mesh_tcp_connections_total{destination="default/api",direction="outbound",source="default/web"} 1`,
		`mesh_plan_revision 1`, `mesh_certificate_expiry_timestamp_seconds{identity="spiffe://mesh.example.com/ns/default/svc/web"}`,
	} {
		if !strings.Contains(string(body), want) {
			t.Errorf("the metrics lack %s", want)
		}
	}
	log, err := os.ReadFile(filepath.Join(w.dir, "log"))
	must(t, err)
	for _, leaf := range w.keys {
		key, err := leaf.KeyDER()
		must(t, err)
		for _, text := range [][]byte{log, body} {
			if bytes.Contains(text, key.Reveal()[40:60]) || bytes.Contains(text, fmt.Appendf(nil, "%x", key.Reveal()[40:60])) {
				t.Error("a private key was printed")
			}
		}
	}
}

// The path of the access log comes with the plan; SIGHUP opens it anew, and ends nothing.
func TestAccessLogFollowsHangups(t *testing.T) {
	w := newWorld(t, echoApp(t))
	path := filepath.Join(w.dir, "access.log")
	w.plan.AccessLog = path
	srv, _ := w.agent()
	cmd := w.proxy()
	eventually(t, "the plan is applied", func() bool { s := srv.Status(); return len(s) == 1 && s[0].Applied == w.plan.Position })
	for range 2 {
		c, err := w.talk()
		must(t, err)
		must(t, c.Close())
		eventually(t, "both sides of the connection are logged", func() bool {
			log, err := os.ReadFile(path)
			return err == nil && bytes.Count(log, []byte(`"kind":"tcp"`)) == 2
		})
		must(t, os.Remove(path))
		must(t, cmd.Process.Signal(syscall.SIGHUP))
	}
}

func TestTooWideAStateDirectoryIsRefused(t *testing.T) {
	w := newWorld(t, "127.0.0.1:1")
	must(t, os.Mkdir(w.state, 0o750))
	must(t, os.Chmod(w.state, 0o750))
	out, err := exec.Command(binary, "--feed", w.feedPath, "--state", w.state, "--metrics", "").CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 1 || !bytes.Contains(out, []byte("too wide")) {
		t.Errorf("%v, %q", err, out)
	}
}
