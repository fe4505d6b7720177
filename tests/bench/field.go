package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/tests/bench/load"
	"github.com/meshd/meshd/tests/conformance/rig"
)

// The loaded plan: what every contender is configured for, though one caller
// loads one of it.
const (
	clusters  = 20
	endpoints = 5
	rules     = 100

	trustDomain = "bench.mesh"
	// peerName is the DNS name in the certificates of HAProxy, which checks no
	// identities but these.
	peerName = "api.bench.mesh"
)

// Services by their place among the clusters; the rest is there for its weight.
const (
	httpCluster   = 0
	streamCluster = 1
	http2Cluster  = 2
)

func service(name string) spiffe.ID {
	return spiffe.Service(trustDomain, catalog.DefaultNamespace, name)
}

func web() spiffe.ID { return service("web") }
func api() spiffe.ID { return service("api") }

// clusterName names the service of a cluster.
func clusterName(i int) string {
	switch i {
	case httpCluster:
		return "api"
	case streamCluster:
		return "stream"
	case http2Cluster:
		return "api2"
	}
	return fmt.Sprintf("service-%02d", i)
}

// callers are who may call: the one that does is in the middle.
func callers() []spiffe.ID {
	out := make([]spiffe.ID, rules)
	for i := range out {
		out[i] = service(fmt.Sprintf("caller-%02d", i))
	}
	out[rules/2] = web()
	return out
}

// hosts are the same for a hop that knows no identities.
func hosts() []string {
	out := make([]string, rules)
	for i := range out {
		out[i] = fmt.Sprintf("192.0.2.%d", i)
	}
	out[rules/2] = "127.0.0.1"
	return out
}

// A scenario is a way from the client to the backend.
type scenario string

const (
	plain  scenario = "plain"
	mutual scenario = "two-hops"
	stream scenario = "tcp"
	// The same over HTTP/2 from end to end: gRPC, too.
	plain2  scenario = "h2"
	mutual2 scenario = "h2-two-hops"
)

// http2 tells whether the ends speak HTTP/2.
func (s scenario) http2() bool { return s == plain2 || s == mutual2 }

// lane is one contender in one scenario.
type lane struct {
	scenario scenario
	name     string
	address  string
	parts    []part
	// bare is that it enforces no access rules, for it knows none.
	bare bool
}

// part is one process whose cost counts.
type part struct {
	role string
	pids []int
	// metrics is its page of metrics.
	metrics string
	// mesh is an address at which it takes mutual TLS, if it does.
	mesh string
}

func (l lane) processes() [][]int {
	out := make([][]int, 0, len(l.parts))
	for _, p := range l.parts {
		out = append(out, p.pids)
	}
	return out
}

// A setting says which CPUs may be used.
type setting string

const (
	// unpinned lets every process use every CPU.
	unpinned setting = "unpinned"
	// pinned gives the proxies the first CPU, client and backend the second.
	pinned setting = "pinned"
)

// cpus returns the CPUs of the proxies, and of client and backend.
func (s setting) cpus() (proxies, ends []int) {
	if s == pinned {
		return []int{0}, []int{1}
	}
	all := make([]int, runtime.NumCPU())
	for i := range all {
		all[i] = i
	}
	return all, all
}

// field is the backend and all contenders, running side by side. Those that
// are not measured are idle.
type field struct {
	options options
	setting setting
	dir     string // of this field, short: unix sockets lie in it
	// authority signs all identities.
	authority *rig.Authority
	// backends are the addresses of the backend: HTTP, the stream, and HTTP/2.
	backend, stream, backend2 string
	lanes                     []lane
	configs                   []config // in the order in which they were written

	processes []*rig.Process
	closers   []func() error
}

// config is a configuration as it was used, for the report.
type config struct {
	Name string `json:"name"`
	Text string `json:"text"`
}

// newField starts everything. The caller must close it, also after an error.
func newField(ctx context.Context, o options, s setting, dir string) (*field, error) {
	f := &field{options: o, setting: s, dir: filepath.Join(dir, string(s[0]))}
	if err := os.Mkdir(f.dir, 0o700); err != nil {
		return f, err
	}
	var err error
	if f.authority, err = rig.NewAuthority(trustDomain); err != nil {
		return f, err
	}
	if err := f.certificates(); err != nil {
		return f, err
	}
	proxies, ends := s.cpus()
	if err := on(ends, f.startBackend); err != nil {
		return f, err
	}
	return f, on(proxies, func() error { return f.startLanes(ctx) })
}

// startLanes starts the contenders that were asked for.
func (f *field) startLanes(ctx context.Context) error {
	hops := f.options.has(plain) || f.options.has(plain2)
	pairs := f.options.has(mutual) || f.options.has(stream) || f.options.has(mutual2)
	for _, c := range []struct {
		peer  string
		hop   bool
		start func() error
	}{
		{meshName, true, func() error { return f.meshHop(meshName, f.options.self) }},
		{versusName, true, func() error { return f.meshHop(versusName, f.options.versusHop) }},
		{haproxyName, true, f.haproxyHop},
		{envoyName, true, f.envoyHop},
		{nginxName, true, func() error { return f.nginxHop(ctx) }},
		{nghttpxName, true, func() error { return f.nghttpxHop(ctx) }},
		{goName, true, f.goHop},
		{meshName, false, func() error { return f.meshPair(ctx, meshName, f.options.mesh) }},
		{versusName, false, func() error { return f.meshPair(ctx, versusName, f.options.versus) }},
		{haproxyName, false, f.haproxyPair},
		{envoyName, false, f.envoyPair},
		{nghttpxName, false, func() error { return f.nghttpxPair(ctx) }},
	} {
		if !f.options.takes(c.peer) || c.hop && !hops || !c.hop && !pairs {
			continue
		}
		if err := c.start(); err != nil {
			return fmt.Errorf("%s: %w", c.peer, err)
		}
	}
	f.lanes = slices.DeleteFunc(f.lanes, func(l lane) bool { return !f.options.has(l.scenario) })
	for _, l := range f.lanes {
		if err := f.check(ctx, l); err != nil {
			return fmt.Errorf("%s, %s: %w", l.scenario, l.name, err)
		}
		for _, p := range l.parts {
			if p.metrics == "" {
				continue
			}
			if _, err := load.Scrape(ctx, p.metrics, ""); err != nil {
				return err
			}
		}
	}
	return nil
}

// close ends everything, the last started first.
func (f *field) close() error {
	var errs []error
	for _, closer := range slices.Backward(f.closers) {
		errs = append(errs, closer())
	}
	f.closers = nil
	return errors.Join(errs...)
}

// on runs start, and whatever processes it starts, on some CPUs.
func on(cpus []int, start func() error) (err error) {
	runtime.LockOSThread() // a process inherits from the thread that makes it
	defer runtime.UnlockOSThread()
	var before, set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &before); err != nil {
		return fmt.Errorf("ask for the CPUs: %w", err)
	}
	for _, cpu := range cpus {
		set.Set(cpu)
	}
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		return fmt.Errorf("choose CPUs %v: %w", cpus, err)
	}
	defer func() { err = errors.Join(err, unix.SchedSetaffinity(0, &before)) }()
	return start()
}

func (f *field) path(name string) string { return filepath.Join(f.dir, name) }

// certificates writes what the peers prove themselves with: like the mesh's
// own, with the names that HAProxy can look at besides.
func (f *field) certificates() error {
	if err := os.WriteFile(f.path("ca.pem"), f.authority.RootPEM(), 0o600); err != nil {
		return err
	}
	for name, id := range map[string]spiffe.ID{"near": web(), "far": api()} {
		template := rig.Template(id)
		template.DNSNames = []string{peerName}
		template.Subject.CommonName = id.String()
		cert, key, err := f.authority.Sign(template)
		if err != nil {
			return err
		}
		data, err := rig.PEM(cert, key)
		if err != nil {
			return err
		}
		if err := os.WriteFile(f.path(name+".pem"), data, 0o600); err != nil {
			return err
		}
	}
	return nil
}

// listen opens sockets for a child.
func (f *field) listen(n int) (addresses []string, files []*os.File, err error) {
	for range n {
		address, file, err := rig.Listen()
		if err != nil {
			return nil, nil, err
		}
		f.closers = append(f.closers, file.Close)
		addresses, files = append(addresses, address), append(files, file)
	}
	return addresses, files, nil
}

// reserve finds ports for a child that opens them itself, with SO_REUSEPORT.
func (f *field) reserve(n int) ([]string, error) {
	out := make([]string, 0, n)
	for range n {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return nil, fmt.Errorf("reserve a port: %w", err)
		}
		f.closers = append(f.closers, func() error { return unix.Close(fd) })
		err = errors.Join(
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1),
			unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}),
		)
		if err != nil {
			return nil, fmt.Errorf("reserve a port: %w", err)
		}
		name, err := unix.Getsockname(fd)
		if err != nil {
			return nil, fmt.Errorf("reserve a port: %w", err)
		}
		in, ok := name.(*unix.SockaddrInet4)
		if !ok {
			return nil, errors.New("reserve a port: not IPv4")
		}
		out = append(out, fmt.Sprintf("127.0.0.1:%d", in.Port))
	}
	return out, nil
}

// freePort finds a port for a child that opens it itself, soon.
func freePort() (string, error) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}

// started takes note of a process, so that it ends.
func (f *field) started(p *rig.Process, err error) (int, error) {
	if err != nil {
		return 0, err
	}
	f.closers = append(f.closers, p.Stop)
	f.processes = append(f.processes, p)
	return p.PID(), nil
}

// alive fails if a process has ended. How it ended is told by close.
func (f *field) alive() error {
	for _, p := range f.processes {
		select {
		case <-p.Done():
			return errEnded
		default:
		}
	}
	return nil
}

var errEnded = errors.New("a process has ended")

// note keeps a configuration for the report, without this run's paths.
func (f *field) note(name, text string) {
	f.configs = append(f.configs, config{name, strings.TrimSpace(strings.ReplaceAll(text, f.dir, "DIR"))})
}

// startBackend starts this program as the backend.
func (f *field) startBackend() error {
	addresses, files, err := f.listen(3)
	if err != nil {
		return err
	}
	f.backend, f.stream, f.backend2 = addresses[0], addresses[1], addresses[2]
	_, err = f.started(rig.Start(f.options.self, []string{backendCommand}, rig.Options{Files: files, Env: quiet()}))
	return err
}

// quiet are the environment of this program's own ends: no collector and no
// signals to threads that wait.
func quiet() []string { return []string{"GOGC=off", "GOMEMLIMIT=2GiB", "GODEBUG=asyncpreemptoff=1"} }
