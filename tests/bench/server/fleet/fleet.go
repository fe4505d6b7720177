// Package fleet is many hosts in one process: each joins, registers services and
// follows the catalog over a connection of its own, with the agent's own code for
// that, and runs nothing.
package fleet

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/meshd/meshd/agent/view"
	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/intentions"
	"github.com/meshd/meshd/server/client"
	"github.com/meshd/meshd/server/meshpb"
)

// Config is the size of a mesh. The services are spread evenly over the agents,
// and every service calls Callees others.
type Config struct {
	Agents   int
	Services int
	// Instances is how many all services have together.
	Instances int
	// Intentions is how many allow one service to call another.
	Intentions int
	// Upstreams is how many services each agent follows besides Common.
	Upstreams int
}

// Topics is how many each agent follows.
func (c Config) Topics() int { return 3 + c.Instances/c.Agents + c.Upstreams }

// Common is the service that every agent follows.
const Common = "common"

const (
	workers    = 8 // that fill at the same time
	applyBatch = 50
	meshPort   = 7443
	appPort    = 8080
	shift      = 7
)

// Fleet is the hosts of a mesh.
type Fleet struct {
	cfg         Config
	api         *client.Client
	trustDomain string
	roots       ca.Bundle
	servers     atomic.Pointer[[]string]
	agents      []*agent
}

type agent struct {
	name   string
	number int
	leaf   *ca.Leaf
	view   *view.View
}

// New returns a fleet whose hosts have yet to join. The client must be an admin.
func New(cfg Config, api *client.Client, trustDomain string, roots ca.Bundle, servers []string) *Fleet {
	f := &Fleet{cfg: cfg, api: api, trustDomain: trustDomain, roots: roots}
	f.Aim(servers)
	for i := range cfg.Agents {
		f.agents = append(f.agents, &agent{name: fmt.Sprintf("vm-%04d", i), number: i})
	}
	return f
}

// Aim says where the servers are, for all attempts to come.
func (f *Fleet) Aim(servers []string) { f.servers.Store(&servers) }

// Use takes another client from now on, which must be an admin too.
func (f *Fleet) Use(api *client.Client) { f.api = api }

// Join makes every host a node of the mesh.
func (f *Fleet) Join(ctx context.Context) error {
	servers := *f.servers.Load()
	return f.each(ctx, func(ctx context.Context, a *agent) error {
		conn, err := f.dial(servers[a.number%len(servers)], nil)
		if err != nil {
			return err
		}
		defer func() { _ = conn.Close() }() // nothing is waited for
		made, err := f.api.JoinToken(ctx, client.JoinTokenRequest{Node: a.name, Services: []string{"*"}})
		if err != nil {
			return err
		}
		token, err := ca.ParseJoinToken(made.Token)
		if err != nil {
			return err
		}
		key, err := ca.GenerateKey()
		if err != nil {
			return err
		}
		csr, err := ca.NewCSR(key)
		if err != nil {
			return err
		}
		resp, err := again(ctx, func() (*meshpb.JoinResponse, error) {
			return meshpb.NewMeshClient(conn).Join(ctx, &meshpb.JoinRequest{
				Secret: token.Secret.Reveal(), Csr: csr, Node: a.name, Version: "bench", FeatureLevel: catalog.FeatureLevel,
			})
		})
		if err != nil {
			return err
		}
		chain, err := ca.ParseChain(resp.GetChain())
		if err != nil {
			return err
		}
		a.leaf, err = ca.NewLeaf(chain, key)
		return err
	})
}

// again tries a few times what a server may refuse for being asked too often.
func again[T any](ctx context.Context, try func() (T, error)) (T, error) {
	for attempt := 0; ; attempt++ {
		out, err := try()
		if err == nil || attempt == 20 || ctx.Err() != nil {
			return out, err
		}
		timer := time.NewTimer(200 * time.Millisecond)
		select {
		case <-timer.C:
		case <-ctx.Done():
		}
		timer.Stop()
	}
}

// each does something for every agent, some at a time.
func (f *Fleet) each(ctx context.Context, do func(context.Context, *agent) error) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(workers)
	for _, a := range f.agents {
		group.Go(func() error {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if err := do(ctx, a); err != nil {
				return fmt.Errorf("node %s: %w", a.name, err)
			}
			return nil
		})
	}
	return group.Wait()
}

// dial returns a connection that presents leaf, if there is one.
func (f *Fleet) dial(server string, leaf *ca.Leaf) (*grpc.ClientConn, error) {
	options := ca.ClientOptions{
		Bundle: func() ca.Bundle { return f.roots }, Accept: ca.ExpectKind(f.trustDomain, spiffe.KindServer),
		ServerName: meshpb.ServerName, ALPN: []string{"h2"},
	}
	if leaf != nil {
		options.Leaf = func() (*tls.Certificate, error) { return leaf.TLS(), nil }
	}
	return grpc.NewClient("passthrough:///"+server, grpc.WithTransportCredentials(credentials.NewTLS(ca.ClientConfig(options))))
}

// Run connects all hosts that have joined, and keeps them connected until ctx ends.
func (f *Fleet) Run(ctx context.Context) {
	var running sync.WaitGroup
	defer running.Wait()
	for _, a := range f.agents {
		running.Go(func() { _ = a.view.Run(ctx) }) // it returns nil
	}
}

// Prepare makes what Run runs: hosts that know nothing. It is called before each
// Run.
func (f *Fleet) Prepare() {
	for _, a := range f.agents {
		a.view = view.New(view.Config{
			Log:     slog.New(slog.DiscardHandler),
			Dial:    func(server string) (*grpc.ClientConn, error) { return f.dial(server, a.leaf) },
			Servers: func() []string { return *f.servers.Load() },
			Hello: func() view.Hello {
				return view.Hello{Session: a.name, Version: "bench", FeatureLevel: catalog.FeatureLevel, Address: a.address()}
			},
		})
		a.view.Subscribe(f.topics(a))
	}
}

// address is where an agent's proxy would be.
func (a *agent) address() string {
	return fmt.Sprintf("10.%d.%d.%d:%d", 64+a.number>>16, a.number>>8&0xff, a.number&0xff, meshPort)
}

// local are the services of an agent.
func (f *Fleet) local(a *agent) []catalog.Name {
	var out []catalog.Name
	for i := a.number; i < f.cfg.Instances; i += f.cfg.Agents {
		// Each time around, services move on to other agents.
		out = append(out, f.service(i+i/f.cfg.Services*shift))
	}
	return out
}

func (f *Fleet) service(i int) catalog.Name {
	return catalog.Name{Namespace: catalog.DefaultNamespace, Name: fmt.Sprintf("svc-%05d", i%f.cfg.Services)}
}

// callee is the n-th service that a service calls.
func (f *Fleet) callee(i, n int) catalog.Name { return f.service(i + 1 + n*n) }

// topics are what an agent follows, as one does whose services have upstreams.
func (f *Fleet) topics(a *agent) []view.Topic {
	local := f.local(a)
	out := []view.Topic{view.Roots(), view.Node()}
	for _, name := range local {
		out = append(out, view.Intentions(name))
	}
	out = append(out, f.common(a))
	for n := range f.cfg.Upstreams {
		out = append(out, view.Upstream(local[0], f.callee(a.number, n)))
	}
	return out
}

// common is the topic of Common, whose service record carries the marks.
func (f *Fleet) common(a *agent) view.Topic {
	return view.Upstream(f.service(a.number), catalog.Name{Namespace: catalog.DefaultNamespace, Name: Common})
}

// Connected waits until every host holds its lease.
func (f *Fleet) Connected(ctx context.Context) error {
	return f.all(ctx, func(a *agent) (bool, <-chan struct{}) {
		link, changed := a.view.Link()
		return link != nil, changed
	}, nil)
}

// all waits until something is true of every agent, and tells when it was of each.
func (f *Fleet) all(ctx context.Context, is func(*agent) (bool, <-chan struct{}), at []time.Time) error {
	group, ctx := errgroup.WithContext(ctx)
	for i, a := range f.agents {
		group.Go(func() error {
			for {
				ok, changed := is(a)
				if ok {
					if at != nil {
						at[i] = time.Now()
					}
					return nil
				}
				select {
				case <-changed:
				case <-ctx.Done():
					return fmt.Errorf("node %s: %w: %+v", a.name, ctx.Err(), a.view.Status())
				}
			}
		})
	}
	return group.Wait()
}

var errUnconnected = errors.New("not connected")

// Register registers the services of every host, over the connection that holds
// its lease.
func (f *Fleet) Register(ctx context.Context) error {
	return f.each(ctx, func(ctx context.Context, a *agent) error {
		req := &meshpb.RegisterRequest{}
		names := f.local(a)
		if a.number == 0 {
			names = append(names, catalog.Name{Namespace: catalog.DefaultNamespace, Name: Common})
		}
		for _, name := range names {
			one, err := registration(a, name)
			if err != nil {
				return err
			}
			req.Registrations = append(req.Registrations, one)
		}
		_, err := again(ctx, func() (*meshpb.RegisterResponse, error) {
			link, _ := a.view.Link()
			if link == nil {
				return nil, errUnconnected
			}
			resp, err := link.Client.Register(ctx, req)
			if err == nil && len(resp.GetRefusals()) > 0 {
				err = errors.New(resp.GetRefusals()[0].GetReason())
			}
			return resp, err
		})
		return err
	})
}

// registration is what an agent sends of one instance.
func registration(a *agent, name catalog.Name) (*meshpb.Registration, error) {
	d := catalog.Definition{
		Name: name.Name, Namespace: name.Namespace, ID: fmt.Sprintf("%s-%d", name.Name, a.number), Port: appPort, Protocol: catalog.ProtocolHTTP,
		Tags: []string{"v1", "zone-a"}, Meta: map[string]string{"version": "1.2.3", "commit": "0f1e2d3c4b5a69788796a5b4c3d2e1f0"},
	}
	service, err1 := json.Marshal(d.Service())
	instance, err2 := json.Marshal(d.Instance(a.name, a.address()))
	status, err3 := json.Marshal(catalog.InstanceStatus{
		Health: catalog.HealthPassing, Checks: []catalog.CheckState{{Name: "http", Health: catalog.HealthPassing, Output: "200 OK"}},
	})
	return &meshpb.Registration{Service: service, Instance: instance, Status: status}, errors.Join(err1, err2, err3)
}

// Allow writes the intentions.
func (f *Fleet) Allow(ctx context.Context) error {
	common, err := resource(intentions.Intention{Source: "*", Destination: Common, Action: intentions.Allow})
	if err != nil {
		return err
	}
	batch := []client.Resource{common}
	for i := range f.cfg.Intentions - 1 {
		source := i % f.cfg.Services
		one, err := resource(intentions.Intention{
			Source: f.service(source).String(), Destination: f.callee(source, i/f.cfg.Services).String(), Action: intentions.Allow,
			Reason: "it is called by design",
		})
		if err != nil {
			return err
		}
		batch = append(batch, one)
		if len(batch) == applyBatch || i == f.cfg.Intentions-2 {
			if _, err := f.api.Apply(ctx, client.ApplyRequest{Resources: batch}); err != nil {
				return fmt.Errorf("write intentions: %w", err)
			}
			batch = nil
		}
	}
	return nil
}

func resource(value intentions.Intention) (client.Resource, error) {
	spec, err := json.Marshal(value)
	return client.Resource{Kind: client.KindIntention, Spec: spec}, err
}

// Mark changes what all hosts follow. It returns once that is acknowledged.
func (f *Fleet) Mark(ctx context.Context, mark string) error {
	d := catalog.Definition{Name: Common, Namespace: catalog.DefaultNamespace, Port: appPort, Protocol: catalog.ProtocolHTTP}
	service := d.Service()
	service.Owner = mark
	spec, err := json.Marshal(service)
	if err != nil {
		return err
	}
	_, err = f.api.Put(ctx, client.Ref{Kind: client.KindService, Parts: []string{service.Namespace, service.Name}}, spec, client.AnyRevision)
	return err
}

// Marked waits until every host has learnt of a mark, and tells when each did.
func (f *Fleet) Marked(ctx context.Context, mark string) ([]time.Time, error) {
	at := make([]time.Time, len(f.agents))
	needle := []byte(`"owner":"` + mark + `"`)
	err := f.all(ctx, func(a *agent) (bool, <-chan struct{}) {
		changed := a.view.Changed()
		spec, _ := a.view.Snapshot().Get(f.common(a), "service")
		return bytes.Contains(spec, needle), changed
	}, at)
	return at, err
}

// At returns how many hosts hold their lease at each address.
func (f *Fleet) At() map[string]int {
	out := map[string]int{}
	for _, a := range f.agents {
		if link, _ := a.view.Link(); link != nil {
			out[link.Server]++
		}
	}
	return out
}
