package rpc

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/state"
)

// fleetPatience is how long another server has to tell what it knows of its agents.
const fleetPatience = time.Second

// Peer is another server, as this one asks it. The bytes are those that ServeFleet
// and ServeAsk take and give at the other end.
type Peer struct {
	Name  string
	Fleet func(ctx context.Context, request []byte) (reply []byte, err error)
	// Ask hands emit the pieces of an answer until there are no more, ctx ends, or
	// emit fails.
	Ask func(ctx context.Context, query []byte, emit func(answer []byte) error) error
}

// FleetRequest asks a server for what it knows of its agents.
type FleetRequest struct {
	// Rollout asks how far the proxies of services have come.
	Rollout *RolloutRequest `json:"rollout,omitempty"`
	// Callers asks for the services that call one of these.
	Callers []catalog.Name `json:"callers,omitempty"`
	// Proxies asks for all proxies, Held for the nodes that are not declared lost
	// because too many would be, Silent for those that may be lost soon.
	Proxies bool `json:"proxies,omitempty"`
	Held    bool `json:"held,omitempty"`
	Silent  bool `json:"silent,omitempty"`
	// Release lets the held nodes be declared lost. What Held asks for is told as it
	// was before.
	Release bool `json:"release,omitempty"`
}

// RolloutRequest is part of a FleetRequest.
type RolloutRequest struct {
	Position catalog.Position `json:"position"`
	Services []catalog.Name   `json:"services"`
}

// FleetReply is what one server knows, of what it was asked for.
type FleetReply struct {
	Server string `json:"server"`
	// Rollout has the nodes, of those that run the services, of which the server
	// knows something.
	Rollout map[string]NodeRollout `json:"rollout,omitempty"`
	Callers []catalog.Name         `json:"callers,omitempty"`
	Proxies []Proxy                `json:"proxies,omitempty"`
	Held    []string               `json:"held,omitempty"`
	Silent  []string               `json:"silent,omitempty"`
}

// NodeRollout tells how far the proxies of one node have come, as one server knows.
type NodeRollout struct {
	// Epoch is that of the node's lease if its agent is connected to the server, else
	// 0; Reported is when a proxy last reported.
	Epoch    uint64    `json:"epoch,omitempty"`
	Reported time.Time `json:"reported,omitzero"`
	// The counts are those of Rollout.
	Proxies  int     `json:"proxies"`
	Applied  int     `json:"applied,omitempty"`
	Refused  int     `json:"refused,omitempty"`
	Offline  int     `json:"offline,omitempty"`
	Closed   uint64  `json:"closed,omitempty"`
	Refusals []Proxy `json:"refusals,omitempty"`
}

// better reports whether n says more of the node than o: connected by the newer
// lease, or else heard last.
func (n NodeRollout) better(o NodeRollout) bool {
	return cmp.Or(cmp.Compare(n.Epoch, o.Epoch), n.Reported.Compare(o.Reported)) > 0
}

// Fleet is what the servers together know.
type Fleet struct {
	// Replies are those that were had, this server's first.
	Replies []FleetReply
	// Unasked are the servers that gave none, in order, although agents hold their
	// leases at them: whatever is told without them may be incomplete.
	Unasked []string
}

// LocalFleet returns what this server knows.
func (s *Server) LocalFleet(req FleetRequest) FleetReply {
	out := FleetReply{Server: s.config.Server}
	if req.Rollout != nil {
		out.Rollout = s.rollout(*req.Rollout)
	}
	if len(req.Callers) > 0 {
		for _, destination := range req.Callers {
			out.Callers = append(out.Callers, s.Callers(destination)...)
		}
		slices.SortFunc(out.Callers, catalog.Name.Compare)
		out.Callers = slices.Compact(out.Callers)
	}
	if req.Proxies {
		out.Proxies = s.Proxies()
	}
	if req.Held {
		out.Held = s.HeldNodes()
	}
	if req.Release {
		s.ReleaseNodes()
	}
	if req.Silent {
		out.Silent = s.leases.silent()
	}
	return out
}

// ServeFleet answers another server's AskFleet.
func (s *Server) ServeFleet(request []byte) ([]byte, error) {
	var req FleetRequest
	if err := json.Unmarshal(request, &req); err != nil {
		return nil, fmt.Errorf("read what another server asks of the fleet: %w", err)
	}
	reply, err := json.Marshal(s.LocalFleet(req))
	if err != nil {
		return nil, fmt.Errorf("encode what is known of the fleet: %w", err)
	}
	return reply, nil
}

// AskFleet asks all servers, this one included. It takes a second at most.
func (s *Server) AskFleet(ctx context.Context, req FleetRequest) Fleet {
	out := Fleet{}
	if peers := s.config.peers(); len(peers) > 0 {
		out = s.askPeers(ctx, peers, req)
	}
	out.Replies = slices.Insert(out.Replies, 0, s.LocalFleet(req))
	return out
}

// askPeers asks the other servers all at once.
func (s *Server) askPeers(ctx context.Context, peers []Peer, req FleetRequest) Fleet {
	ctx, cancel := context.WithTimeout(ctx, fleetPatience)
	defer cancel()
	request, err := json.Marshal(req)
	replies := make([]*FleetReply, len(peers))
	var group sync.WaitGroup
	for i, p := range peers {
		if err != nil {
			break // no request can be asked: nobody was
		}
		group.Go(func() {
			raw, err := p.Fleet(ctx, request)
			var reply FleetReply
			if err == nil && json.Unmarshal(raw, &reply) == nil {
				reply.Server = p.Name
				replies[i] = &reply
			}
		})
	}
	group.Wait()
	var out Fleet
	busy := s.leaseholders()
	for i, p := range peers {
		if replies[i] != nil {
			out.Replies = append(out.Replies, *replies[i])
		} else if busy[p.Name] {
			out.Unasked = append(out.Unasked, p.Name)
		}
	}
	slices.Sort(out.Unasked)
	return out
}

// leaseholders returns the servers at which some node holds its lease.
func (s *Server) leaseholders() map[string]bool {
	out := map[string]bool{}
	for _, rec := range state.Leases.All(s.state.Snapshot()) {
		if rec.Err == nil && !rec.Value.Lost {
			out[rec.Value.Server] = true
		}
	}
	return out
}

// silentElsewhere asks the other servers for the nodes that they may lose soon.
func (s *Server) silentElsewhere(ctx context.Context) (silent, unasked []string) {
	peers := s.config.peers()
	if len(peers) == 0 {
		return nil, nil
	}
	f := s.askPeers(ctx, peers, FleetRequest{Silent: true})
	for _, r := range f.Replies {
		silent = append(silent, r.Silent...)
	}
	return silent, f.Unasked
}

// Callers returns the services that call one of those that were asked for, in order.
func (f Fleet) Callers() []catalog.Name {
	var all []catalog.Name
	for _, r := range f.Replies {
		all = append(all, r.Callers...)
	}
	slices.SortFunc(all, catalog.Name.Compare)
	return slices.Compact(all)
}

// Held returns the nodes that some server holds, in order.
func (f Fleet) Held() []string {
	var all []string
	for _, r := range f.Replies {
		all = append(all, r.Held...)
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// Proxies returns what is known of each proxy, by node and ID: the word of the server
// that its agent is connected to or, if there is none, the newest.
func (f Fleet) Proxies() []Proxy {
	type id struct{ node, proxy string }
	best := map[id]Proxy{}
	for _, r := range f.Replies {
		for _, p := range r.Proxies {
			key := id{p.Node, p.ID}
			if b, known := best[key]; !known || cmp.Or(cmp.Compare(p.Epoch, b.Epoch), p.Reported.Compare(b.Reported)) > 0 {
				best[key] = p
			}
		}
	}
	return slices.SortedFunc(maps.Values(best), compareProxies)
}

// Rollout counts the proxies of each service; nodesOf tells on which nodes it runs. A
// node of which no server knows anything counts as one proxy that is offline.
func (f Fleet) Rollout(services []catalog.Name, nodesOf func(catalog.Name) []string) []Rollout {
	best := map[string]NodeRollout{}
	for _, reply := range f.Replies {
		for node, n := range reply.Rollout {
			if b, known := best[node]; !known || n.better(b) {
				best[node] = n
			}
		}
	}
	out := make([]Rollout, 0, len(services))
	for _, service := range services {
		r := Rollout{Service: service}
		for _, node := range nodesOf(service) {
			n, known := best[node]
			if !known {
				n = NodeRollout{Proxies: 1, Offline: 1}
			}
			r.Proxies += n.Proxies
			r.Applied += n.Applied
			r.Refused += n.Refused
			r.Offline += n.Offline
			r.Closed += n.Closed
			r.Refusals = append(r.Refusals, n.Refusals...)
		}
		slices.SortFunc(r.Refusals, compareProxies)
		out = append(out, r)
	}
	return out
}

func compareProxies(a, b Proxy) int {
	return cmp.Or(cmp.Compare(a.Node, b.Node), cmp.Compare(a.ID, b.ID))
}

// ClusterRollout is Rollout for the agents of all servers. Servers that could not be
// asked are named; the rollout is not done then, for what is connected to them is
// not known.
func (s *Server) ClusterRollout(ctx context.Context, at catalog.Position, services []catalog.Name) (all []Rollout, unasked []string) {
	f := s.AskFleet(ctx, FleetRequest{Rollout: &RolloutRequest{Position: at, Services: services}})
	snapshot := s.state.Snapshot()
	return f.Rollout(services, func(service catalog.Name) []string { return slices.Sorted(maps.Keys(nodesOf(snapshot, service))) }), f.Unasked
}
