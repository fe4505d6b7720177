package agents

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/meshd/meshd/agent/view"
	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/intentions"
	"github.com/meshd/meshd/server/client"
	"github.com/meshd/meshd/server/meshpb"
)

// Size is that of a mesh. The services are spread evenly over the agents, and each
// service calls others.
type Size struct {
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
func (s Size) Topics() int { return 3 + s.Instances/s.Agents + s.Upstreams }

// Common is the service that every agent follows, and whose record carries the marks.
const Common = "common"

const (
	registerAtOnce = 8
	applyBatch     = 50
	appPort        = 8080
	shift          = 7
)

// Mesh is the hosts of a mesh and what they run. Its methods are for one goroutine,
// but for Aim.
type Mesh struct {
	size    Size
	api     *client.Client
	servers atomic.Pointer[[]string]
	leaves  []*ca.Leaf
	bundle  ca.Bundle
}

// NewMesh returns a mesh whose hosts have yet to join. The client must be an admin's;
// servers are the addresses, host:port, that the agents try to reach.
func NewMesh(size Size, api *client.Client, servers []string) *Mesh {
	m := &Mesh{size: size, api: api}
	m.Aim(servers)
	return m
}

// Aim says where the servers are, for all attempts of agents to come.
func (m *Mesh) Aim(servers []string) { m.servers.Store(&servers) }

// Use takes another client from now on, which must be an admin's too.
func (m *Mesh) Use(api *client.Client) { m.api = api }

// node is the name of a host.
func node(i int) string { return fmt.Sprintf("vm-%04d", i) }

// Join makes every host a node of the mesh.
func (m *Mesh) Join(ctx context.Context) error {
	nodes := make([]string, m.size.Agents)
	for i := range nodes {
		nodes[i] = node(i)
	}
	var err error
	m.leaves, m.bundle, err = Enlist(ctx, nodes, func(ctx context.Context, node string) (string, error) {
		made, err := m.api.JoinToken(ctx, client.JoinTokenRequest{Node: node, Services: []string{"*"}})
		return made.Token, err
	})
	return err
}

// Fleet returns the agents of all hosts, which have joined and know nothing yet.
func (m *Mesh) Fleet() *Fleet {
	who := make([]Agent, len(m.leaves))
	for i, leaf := range m.leaves {
		who[i] = Agent{Leaf: leaf, Topics: m.topics(i)}
	}
	return New(Config{
		Log:     slog.New(slog.DiscardHandler),
		Bundle:  func() ca.Bundle { return m.bundle },
		Servers: func() []string { return *m.servers.Load() },
	}, who)
}

// local are the services of a host.
func (m *Mesh) local(host int) []catalog.Name {
	var out []catalog.Name
	for i := host; i < m.size.Instances; i += m.size.Agents {
		// Each time around, services move on to other hosts.
		out = append(out, m.service(i+i/m.size.Services*shift))
	}
	return out
}

func (m *Mesh) service(i int) catalog.Name {
	return catalog.Name{Namespace: catalog.DefaultNamespace, Name: fmt.Sprintf("svc-%05d", i%m.size.Services)}
}

// callee is the n-th service that a service calls.
func (m *Mesh) callee(i, n int) catalog.Name { return m.service(i + 1 + n*n) }

// topics are what an agent follows, as one does whose services have upstreams.
func (m *Mesh) topics(host int) []view.Topic {
	local := m.local(host)
	out := []view.Topic{view.Roots(), view.Node()}
	for _, name := range local {
		out = append(out, view.Intentions(name))
	}
	out = append(out, m.common(host))
	for n := range m.size.Upstreams {
		out = append(out, view.Upstream(local[0], m.callee(host, n)))
	}
	return out
}

// common is the topic of Common.
func (m *Mesh) common(host int) view.Topic {
	return view.Upstream(m.service(host), catalog.Name{Namespace: catalog.DefaultNamespace, Name: Common})
}

// errUnconnected is that an agent lost its server.
var errUnconnected = errors.New("not connected")

// Register registers the services of every host, each over the connection of its agent.
func (m *Mesh) Register(ctx context.Context, f *Fleet) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(registerAtOnce)
	for host := range f.members {
		group.Go(func() error {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if err := m.register(ctx, f, host); err != nil {
				return fmt.Errorf("register the services of node %s: %w", node(host), err)
			}
			return nil
		})
	}
	return group.Wait()
}

func (m *Mesh) register(ctx context.Context, f *Fleet, host int) error {
	req := &meshpb.RegisterRequest{}
	names := m.local(host)
	if host == 0 {
		names = append(names, catalog.Name{Namespace: catalog.DefaultNamespace, Name: Common})
	}
	for _, name := range names {
		one, err := registration(host, name)
		if err != nil {
			return err
		}
		req.Registrations = append(req.Registrations, one)
	}
	_, err := again(ctx, func() (*meshpb.RegisterResponse, error) {
		link, _ := f.members[host].view.Link()
		if link == nil {
			return nil, errUnconnected
		}
		res, err := link.Client.Register(ctx, req)
		if err == nil && len(res.GetRefusals()) > 0 {
			err = errors.New(res.GetRefusals()[0].GetReason())
		}
		return res, err
	})
	return err
}

// registration is what an agent sends of one instance.
func registration(host int, name catalog.Name) (*meshpb.Registration, error) {
	d := catalog.Definition{
		Name: name.Name, Namespace: name.Namespace, ID: fmt.Sprintf("%s-%d", name.Name, host), Port: appPort, Protocol: catalog.ProtocolHTTP,
		Tags: []string{"v1", "zone-a"}, Meta: map[string]string{"version": "1.2.3", "commit": "0f1e2d3c4b5a69788796a5b4c3d2e1f0"},
	}
	service, err1 := json.Marshal(d.Service())
	instance, err2 := json.Marshal(d.Instance(node(host), meshAddress(host)))
	status, err3 := json.Marshal(catalog.InstanceStatus{
		Health: catalog.HealthPassing, Checks: []catalog.CheckState{{Name: "http", Health: catalog.HealthPassing, Output: "200 OK"}},
	})
	return &meshpb.Registration{Service: service, Instance: instance, Status: status}, errors.Join(err1, err2, err3)
}

// Allow writes the intentions, and one that lets everybody call Common.
func (m *Mesh) Allow(ctx context.Context) error {
	all := []intentions.Intention{{Source: "*", Destination: Common, Action: intentions.Allow}}
	for i := range m.size.Intentions {
		source := i % m.size.Services
		all = append(all, intentions.Intention{
			Source: m.service(source).String(), Destination: m.callee(source, i/m.size.Services).String(), Action: intentions.Allow,
			Reason: "it is called by design",
		})
	}
	for some := range slices.Chunk(all, applyBatch) {
		req := client.ApplyRequest{}
		for _, value := range some {
			spec, err := json.Marshal(value)
			if err != nil {
				return err
			}
			req.Resources = append(req.Resources, client.Resource{Kind: client.KindIntention, Spec: spec})
		}
		if _, err := m.api.Apply(ctx, req); err != nil {
			return fmt.Errorf("write intentions: %w", err)
		}
	}
	return nil
}

// Mark writes down what all agents follow. It returns the position of that once it is
// acknowledged.
func (m *Mesh) Mark(ctx context.Context, mark string) (catalog.Position, error) {
	d := catalog.Definition{Name: Common, Namespace: catalog.DefaultNamespace, Port: appPort, Protocol: catalog.ProtocolHTTP}
	service := d.Service()
	service.Owner = mark
	spec, err := json.Marshal(service)
	if err != nil {
		return catalog.Position{}, err
	}
	res, err := m.api.Put(ctx, client.Ref{Kind: client.KindService, Parts: []string{service.Namespace, service.Name}}, spec, client.AnyRevision)
	if err != nil {
		return catalog.Position{}, fmt.Errorf("write what all agents follow: %w", err)
	}
	return res.Position, nil
}

// Marked waits until every agent holds a mark that Mark wrote at a position, and
// returns how long after since each of them did, in rising order.
func (m *Mesh) Marked(ctx context.Context, f *Fleet, mark string, at catalog.Position, since time.Time) ([]time.Duration, error) {
	took, err := f.AwaitSome(ctx, len(f.members), at, since)
	if err != nil {
		return nil, err
	}
	needle := []byte(`"owner":"` + mark + `"`)
	for host, one := range f.members {
		if spec, _ := one.view.Snapshot().Get(m.common(host), "service"); !bytes.Contains(spec, needle) {
			return nil, fmt.Errorf("%w: node %s is at position %v, which has the mark %s, and holds %q", ErrIncomplete, node(host), one.view.Snapshot().Position(), mark, spec)
		}
	}
	return took, nil
}
