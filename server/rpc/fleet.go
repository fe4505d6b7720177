package rpc

import (
	"cmp"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/meshpb"
	"github.com/meshd/meshd/server/state"
)

// maxProxies bounds what one node may report of.
const maxProxies = 1024

// Proxy is what a node's agent last reported of one of its proxies.
type Proxy struct {
	Node, ID string
	// Connected tells whether the node's agent is connected to this server now;
	// what was reported before stays known.
	Connected bool
	// Position is the newest input of the plan that the proxy runs.
	Position catalog.Position
	// Refused says why it did not take the plan of RefusedPosition; empty: none
	// was refused.
	Refused         string
	RefusedPosition catalog.Position
	// Closed counts connections closed by denies since the proxy started.
	Closed   uint64
	Reported time.Time
}

// Node is an agent that is connected to this server.
type Node struct {
	Name, Session, Version string
	FeatureLevel           int
	Since                  time.Time
}

// Rollout tells how far a position has come with the proxies of one service.
type Rollout struct {
	Service catalog.Name
	// Proxies of the nodes with an instance of the service. A node whose agent
	// never reported a proxy counts as one that has applied nothing.
	Proxies int
	// Applied have reached the position, Refused have refused it or a later plan,
	// Offline have not reached it and their agents are not connected here.
	Applied, Refused, Offline int
	// Refusals are the proxies that Refused counts.
	Refusals []Proxy
	// Closed sums up the closed connections of these proxies: its growth over a
	// change is what the change closed.
	Closed uint64
}

// Done reports whether every proxy of the service runs the position or has
// refused it.
func (r Rollout) Done() bool { return r.Applied+r.Refused == r.Proxies }

// fleet knows who is connected and what they run.
type fleet struct {
	mu      sync.Mutex
	nodes   map[string]*member
	changed chan struct{}
}

type member struct {
	stream  *stream // nil while not connected
	proxies map[string]Proxy
}

func newFleet() *fleet {
	return &fleet{nodes: make(map[string]*member), changed: make(chan struct{})}
}

// wake tells those who wait that something changed. mu is held.
func (f *fleet) wake() {
	close(f.changed)
	f.changed = make(chan struct{})
}

func (f *fleet) member(node string) *member {
	m, ok := f.nodes[node]
	if !ok {
		m = &member{proxies: make(map[string]Proxy)}
		f.nodes[node] = m
	}
	return m
}

// connect makes st the node's stream and returns the one that it replaces.
func (f *fleet) connect(st *stream) (older *stream) {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.member(st.caller.node)
	older, m.stream = m.stream, st
	f.wake()
	return older
}

func (f *fleet) disconnect(st *stream) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if m, ok := f.nodes[st.caller.node]; ok && m.stream == st {
		m.stream = nil
		f.wake()
	}
}

// close ends the node's stream, if there is one.
func (f *fleet) close(node string, reason error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if m, ok := f.nodes[node]; ok && m.stream != nil {
		m.stream.end(reason)
	}
}

// forget drops a node that no longer exists.
func (f *fleet) forget(node string, reason error) {
	f.close(node, reason)
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.nodes, node)
	f.wake()
}

// applied records a report; a proxy too many is dropped.
func (f *fleet) applied(node string, a *meshpb.Applied) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.member(node)
	if _, known := m.proxies[a.GetProxy()]; !known && len(m.proxies) >= maxProxies {
		return false
	}
	m.proxies[a.GetProxy()] = Proxy{
		Node: node, ID: a.GetProxy(), Position: fromWire(a.GetPosition()), Refused: a.GetRefused(),
		RefusedPosition: fromWire(a.GetRefusedPosition()), Closed: a.GetClosed(), Reported: time.Now(),
	}
	f.wake()
	return true
}

// moved wakes those who wait for a rollout: the feeds have come further.
func (f *fleet) moved() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.wake()
}

// FleetChanged returns a channel that is closed at the next change of Nodes,
// Proxies or Rollout. Take it before reading them.
func (s *Server) FleetChanged() <-chan struct{} {
	s.fleet.mu.Lock()
	defer s.fleet.mu.Unlock()
	return s.fleet.changed
}

// Nodes returns the agents that are connected to this server, by name.
func (s *Server) Nodes() []Node {
	s.fleet.mu.Lock()
	defer s.fleet.mu.Unlock()
	var out []Node
	for name, m := range s.fleet.nodes {
		if st := m.stream; st != nil {
			out = append(out, Node{
				Name: name, Session: st.hello.GetSession(), Version: st.hello.GetVersion(),
				FeatureLevel: int(st.hello.GetFeatureLevel()), Since: st.since,
			})
		}
	}
	slices.SortFunc(out, func(a, b Node) int { return cmp.Compare(a.Name, b.Name) })
	return out
}

// Proxies returns what is known of all proxies, by node and ID.
func (s *Server) Proxies() []Proxy {
	s.fleet.mu.Lock()
	defer s.fleet.mu.Unlock()
	var out []Proxy
	for _, m := range s.fleet.nodes {
		for _, p := range m.proxies {
			p.Connected = m.stream != nil
			out = append(out, p)
		}
	}
	slices.SortFunc(out, func(a, b Proxy) int { return cmp.Or(cmp.Compare(a.Node, b.Node), cmp.Compare(a.ID, b.ID)) })
	return out
}

// Rollout counts, for each service, how many of the proxies that serve it run a
// plan at least as new as position. For an intention ask for its destination and
// its source; Callers tells the sources that a wildcard concerns.
//
// A proxy also counts as running it when its agent was told everything up to the
// position and the proxy runs the newest of that: most changes are of no concern
// to most nodes, and such a node is not sent anything.
func (s *Server) Rollout(at catalog.Position, services []catalog.Name) []Rollout {
	snapshot := s.state.Snapshot()
	through := s.feeds.position()
	s.fleet.mu.Lock()
	defer s.fleet.mu.Unlock()
	out := make([]Rollout, 0, len(services))
	for _, service := range services {
		r := Rollout{Service: service}
		for node := range nodesOf(snapshot, service) {
			s.fleet.count(&r, node, at, through)
		}
		out = append(out, r)
	}
	return out
}

// count adds the proxies of one node to r; through is how far the feeds have come.
// mu is held.
func (f *fleet) count(r *Rollout, node string, at, through catalog.Position) {
	m, known := f.nodes[node]
	if !known || len(m.proxies) == 0 {
		r.Proxies++
		if !known || m.stream == nil {
			r.Offline++
		}
		return
	}
	for _, p := range m.proxies {
		r.Proxies++
		r.Closed += p.Closed
		switch {
		case reached(p.Position, at), m.current(p, at, through):
			r.Applied++
		case p.Refused != "" && reached(p.RefusedPosition, at):
			r.Refused++
			r.Refusals = append(r.Refusals, p)
		case m.stream == nil:
			r.Offline++
		}
	}
}

// current reports whether the proxy runs all that concerns it up to at.
func (m *member) current(p Proxy, at, through catalog.Position) bool {
	if m.stream == nil || !reached(through, at) {
		return false
	}
	told, all := m.stream.settled()
	return all && !told.IsZero() && reached(p.Position, told)
}

func reached(have, want catalog.Position) bool { return have == want || have.After(want) }

// Callers returns the services that are subscribed to destination as an upstream
// by some connected agent, in order.
func (s *Server) Callers(destination catalog.Name) []catalog.Name {
	return slices.SortedFunc(maps.Keys(s.feeds.callers(destination)), catalog.Name.Compare)
}

func nodesOf(snapshot *state.Snapshot, service catalog.Name) map[string]bool {
	nodes := make(map[string]bool)
	for key := range snapshot.InstancesOf(service) {
		nodes[key.Node] = true
	}
	return nodes
}
