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
	Node string `json:"node"`
	ID   string `json:"id"`
	// Connected tells whether the node's agent is connected to the server now, and
	// Epoch is that of its lease then; what was reported before stays known.
	Connected bool   `json:"connected,omitempty"`
	Epoch     uint64 `json:"epoch,omitempty"`
	// Position is the newest input of the plan that the proxy runs.
	Position catalog.Position `json:"position"`
	// Refused says why it did not take the plan of RefusedPosition; empty: none
	// was refused.
	Refused         string           `json:"refused,omitempty"`
	RefusedPosition catalog.Position `json:"refused_position,omitzero"`
	// Closed counts connections closed by denies since the proxy started.
	Closed   uint64    `json:"closed,omitempty"`
	Reported time.Time `json:"reported"`
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

// closeAll ends all streams.
func (f *fleet) closeAll(reason error) {
	for _, st := range f.streams() {
		st.end(reason)
	}
}

// stream returns the node's, nil if it has none.
func (f *fleet) stream(node string) *stream {
	f.mu.Lock()
	defer f.mu.Unlock()
	if m, ok := f.nodes[node]; ok {
		return m.stream
	}
	return nil
}

func (f *fleet) streams() []*stream {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []*stream
	for _, m := range f.nodes {
		if m.stream != nil {
			out = append(out, m.stream)
		}
	}
	return out
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

// Proxies returns what this server knows of all proxies, by node and ID.
func (s *Server) Proxies() []Proxy {
	s.fleet.mu.Lock()
	defer s.fleet.mu.Unlock()
	var out []Proxy
	for _, m := range s.fleet.nodes {
		for _, p := range m.proxies {
			if m.stream != nil {
				p.Connected, p.Epoch = true, m.stream.granted().epoch
			}
			out = append(out, p)
		}
	}
	slices.SortFunc(out, compareProxies)
	return out
}

// Rollout counts, for each service, how many of the proxies that serve it run a
// plan at least as new as position, as this server alone knows: agents that are
// connected to another one are offline to it. For an intention ask for its
// destination and its source; Callers tells the sources that a wildcard concerns.
//
// A proxy also counts as running it when its agent was told everything up to the
// position and the proxy runs the newest of that: most changes are of no concern
// to most nodes, and such a node is not sent anything.
func (s *Server) Rollout(at catalog.Position, services []catalog.Name) []Rollout {
	local := Fleet{Replies: []FleetReply{s.LocalFleet(FleetRequest{Rollout: &RolloutRequest{Position: at, Services: services}})}}
	snapshot := s.state.Snapshot()
	return local.Rollout(services, func(service catalog.Name) []string { return slices.Sorted(maps.Keys(nodesOf(snapshot, service))) })
}

// rollout looks at the nodes of services, of which this server knows something.
func (s *Server) rollout(req RolloutRequest) map[string]NodeRollout {
	snapshot := s.state.Snapshot()
	through := s.feeds.position()
	s.fleet.mu.Lock()
	defer s.fleet.mu.Unlock()
	out := map[string]NodeRollout{}
	for _, service := range req.Services {
		for node := range nodesOf(snapshot, service) {
			if m, known := s.fleet.nodes[node]; known {
				out[node] = m.count(req.Position, through)
			}
		}
	}
	return out
}

// count looks at the proxies of one node; through is how far the feeds have come.
// fleet.mu is held.
func (m *member) count(at, through catalog.Position) NodeRollout {
	var n NodeRollout
	if m.stream != nil {
		n.Epoch = m.stream.granted().epoch
	}
	if len(m.proxies) == 0 {
		n.Proxies = 1
		if m.stream == nil {
			n.Offline = 1
		}
		return n
	}
	for _, p := range m.proxies {
		n.Proxies++
		n.Closed += p.Closed
		if n.Reported.Before(p.Reported) {
			n.Reported = p.Reported
		}
		switch {
		case reached(p.Position, at), m.current(p, at, through):
			n.Applied++
		case p.Refused != "" && reached(p.RefusedPosition, at):
			n.Refused++
			n.Refusals = append(n.Refusals, p)
		case m.stream == nil:
			n.Offline++
		}
	}
	return n
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
