// Package rig puts real mesh-proxy processes between real programs, on
// loopback, without an agent or a server: it feeds them a plan itself. The
// conformance tests and the benchmarks stand on it.
package rig

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/intentions"
	"github.com/meshd/meshd/proxy"
	"github.com/meshd/meshd/proxy/feed"
)

const (
	callerID = "caller"
	calleeID = "callee"
	port     = "http"
	instance = "one"
	// startTimeout is how long the proxies may take to run their plan.
	startTimeout = 20 * time.Second
)

// App is an application behind the callee's proxy.
type App struct {
	// Name is the service's, in the default namespace.
	Name string
	// Address is where it listens, host:port.
	Address string
	// Protocol is what it speaks; HTTP/1.1 if empty.
	Protocol catalog.Protocol
	// Intentions say who may call it.
	Intentions []intentions.Intention
}

// Config configures a Pair.
type Config struct {
	// Proxy is the path of the mesh-proxy program.
	Proxy string
	// Dir is an empty folder for sockets and state. Its path must be short:
	// a unix socket's is at most 107 bytes.
	Dir string
	// Authority signs the identities of both proxies.
	Authority *Authority
	// Source is the identity of the caller.
	Source spiffe.ID
	Apps   []App
	// Args are further arguments of both proxies.
	Args []string
	// Log, if not nil, gets every line that a proxy writes to its log, from
	// one goroutine per proxy.
	Log func(proxy, line string)
}

// Pair is two mesh-proxy processes: the caller's, with one plain listener per
// application, and the callee's, with the mesh port before all of them.
type Pair struct {
	Caller, Callee *Process
	// Mesh is the address of the callee's mesh port.
	Mesh string
	// Upstreams are the addresses of the caller's listeners, by application.
	Upstreams map[string]string

	cfg     Config
	feed    *feed.Server
	stop    context.CancelFunc
	stopped chan error
	opened  []*os.File
}

// ServerName is what a peer on the mesh port asks for to reach an application.
func ServerName(app string) string {
	return proxy.ServerName(port, instance, app, catalog.DefaultNamespace)
}

// NewPair starts the proxies and returns once both run their plan. The caller
// must Close it.
func NewPair(ctx context.Context, cfg Config) (*Pair, error) {
	p := &Pair{cfg: cfg, Upstreams: map[string]string{}, stopped: make(chan error, 1)}
	if err := p.start(ctx); err != nil {
		return nil, errors.Join(err, p.Close())
	}
	return p, nil
}

func (p *Pair) start(ctx context.Context) error {
	socket := filepath.Join(p.cfg.Dir, "feed.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		return fmt.Errorf("open the feed: %w", err)
	}
	p.feed = feed.NewServer(feed.ServerConfig{Log: slog.New(slog.DiscardHandler)})
	running, stop := context.WithCancel(context.WithoutCancel(ctx))
	p.stop = stop
	go func() { p.stopped <- p.feed.Run(running, l) }()
	if err := p.plan(); err != nil {
		return err
	}
	if p.Callee, err = p.launch(calleeID, socket); err != nil {
		return err
	}
	if p.Caller, err = p.launch(callerID, socket); err != nil {
		return err
	}
	return p.ready(ctx)
}

func (p *Pair) launch(id, socket string) (*Process, error) {
	o := Options{}
	if p.cfg.Log != nil {
		o.Stderr = func(line string) { p.cfg.Log(id, line) }
	}
	args := append([]string{
		"--feed", socket, "--id", id, "--state", filepath.Join(p.cfg.Dir, id), "--metrics", "",
		"--drain-timeout", "1s",
	}, p.cfg.Args...)
	return Start(p.cfg.Proxy, args, o)
}

// plan opens the listening sockets and sets plans, keys and sockets.
func (p *Pair) plan() error {
	a := p.cfg.Authority
	caller := p.config()
	callee := p.config()
	mesh, err := p.listen(&callee, proxy.Listener{Name: "mesh", Kind: proxy.ListenMesh})
	if err != nil {
		return err
	}
	p.Mesh = mesh.address
	calleeSockets := map[string]*os.File{"mesh": mesh.file}
	callerSockets := map[string]*os.File{}
	own, err := a.Leaf(p.cfg.Source)
	if err != nil {
		return err
	}
	leaves := []*ca.Leaf{}
	for _, app := range p.cfg.Apps {
		service := spiffe.Service(a.TrustDomain, catalog.DefaultNamespace, app.Name)
		leaf, err := a.Leaf(service)
		if err != nil {
			return err
		}
		leaves = append(leaves, leaf)
		name := catalog.Name{Namespace: catalog.DefaultNamespace, Name: app.Name}
		protocol := cmp.Or(app.Protocol, catalog.ProtocolHTTP)
		callee.Inbounds = append(callee.Inbounds, proxy.Inbound{
			ServerName: ServerName(app.Name), Service: service, Instance: instance, Port: port,
			Protocol: protocol, Local: app.Address,
		})
		callee.Policies = append(callee.Policies, proxy.Policy{Service: name, Intentions: app.Intentions})
		cluster := name.String() + ":" + port
		caller.Clusters = append(caller.Clusters, proxy.Cluster{
			Name: cluster, Service: service, Port: port, Protocol: protocol,
			Endpoints: []proxy.Endpoint{{Instance: instance, Node: "there", Address: p.Mesh, ServerName: ServerName(app.Name)}},
		})
		up, err := p.listen(&caller, proxy.Listener{
			Name: "upstream/" + p.cfg.Source.Name + "/" + app.Name + "/" + port, Kind: proxy.ListenUpstream,
			Source: p.cfg.Source, Cluster: cluster,
		})
		if err != nil {
			return err
		}
		p.Upstreams[app.Name] = up.address
		callerSockets[up.name] = up.file
	}
	return errors.Join(
		p.feed.SetKeys(calleeID, leaves), p.feed.SetSockets(calleeID, calleeSockets), p.feed.SetPlan(calleeID, callee),
		p.feed.SetKeys(callerID, []*ca.Leaf{own}), p.feed.SetSockets(callerID, callerSockets), p.feed.SetPlan(callerID, caller),
	)
}

func (p *Pair) config() proxy.Config {
	return proxy.Config{
		Position: catalog.Position{Generation: "rig", Revision: 1}, Bundle: p.cfg.Authority.Bundle,
		TrustDomain: p.cfg.Authority.TrustDomain,
	}
}

type listening struct {
	name, address string
	file          *os.File
}

// listen opens the socket of a listener and adds it to the plan.
func (p *Pair) listen(to *proxy.Config, l proxy.Listener) (listening, error) {
	address, file, err := Listen()
	if err != nil {
		return listening{}, err
	}
	p.opened = append(p.opened, file)
	l.Address = address
	to.Listeners = append(to.Listeners, l)
	return listening{name: l.Name, address: address, file: file}, nil
}

// ready waits until both processes run their plan.
func (p *Pair) ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for {
		changed := p.feed.Changed()
		applied := 0
		for _, st := range p.feed.Status() {
			if st.Refused != "" {
				return fmt.Errorf("proxy %s refuses its plan: %s", st.Proxy, st.Refused)
			}
			if st.Applied == st.Wanted && !st.Applied.IsZero() {
				applied++
			}
		}
		if applied == 2 {
			return nil
		}
		select {
		case <-changed:
		case <-p.Caller.Done():
			return p.Caller.failure()
		case <-p.Callee.Done():
			return p.Callee.failure()
		case <-ctx.Done():
			return fmt.Errorf("wait for the proxies to run their plan: %w; status %+v", ctx.Err(), p.feed.Status())
		}
	}
}

// Close ends the processes and everything that was opened.
func (p *Pair) Close() error {
	var errs []error
	for _, proc := range []*Process{p.Caller, p.Callee} {
		if proc != nil {
			errs = append(errs, proc.Stop())
		}
	}
	if p.stop != nil {
		p.stop()
		errs = append(errs, <-p.stopped, p.feed.Close())
	}
	for _, f := range p.opened {
		errs = append(errs, f.Close())
	}
	return errors.Join(errs...)
}

// Listen opens a TCP socket on a free port of loopback, for another process to
// accept from. The caller closes the file.
func Listen() (address string, file *os.File, err error) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return "", nil, fmt.Errorf("open a socket: %w", err)
	}
	tl, ok := l.(*net.TCPListener)
	if !ok {
		return "", nil, errors.Join(errors.New("open a socket: not TCP"), l.Close())
	}
	file, err = tl.File()
	return l.Addr().String(), file, errors.Join(err, tl.Close())
}
