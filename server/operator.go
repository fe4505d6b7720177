package server

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/api"
	"github.com/meshd/meshd/server/client"
	"github.com/meshd/meshd/server/peer"
	"github.com/meshd/meshd/server/state"
	"github.com/meshd/meshd/server/store"
	"github.com/meshd/meshd/server/store/raftstore"
)

const (
	// operatorTime bounds a change of the cluster that an operator asks for, and
	// successorTime how long its answer waits for the next leader.
	operatorTime  = 15 * time.Second
	successorTime = 3 * time.Second
)

// operators shows the servers to the API, and has the leader change them.
type operators struct{ *member }

var _ api.Cluster = operators{}

// Members implements api.Cluster.
func (o operators) Members(ctx context.Context, ask bool) []client.Member {
	told := map[string]peer.Answer[peer.Status]{}
	switch {
	case !ask:
	case o.peer == nil:
		told[o.id] = peer.Answer[peer.Status]{Value: o.peerStatus()}
	default:
		answers, err := o.peer.Status(ctx)
		for _, s := range o.engine.Servers() {
			told[s.ID] = peer.Answer[peer.Status]{Err: cmp.Or(err, errStarting)}
		}
		for _, a := range answers {
			told[a.Server.ID] = a
		}
	}
	var leader peer.Status
	for _, s := range o.engine.Servers() {
		if s.Leader {
			leader = told[s.ID].Value
		}
	}
	out := []client.Member{}
	for _, s := range o.engine.Servers() {
		m := client.Member{Name: nameOf(s.ID), ID: s.ID, Address: s.Address, Voter: s.Voter, Leader: s.Leader}
		if o.peer == nil {
			m.Address = ""
		}
		if record, ok := state.Servers.Get(o.state.Snapshot(), m.Name); ok && record.Err == nil && record.Value.ID == s.ID {
			m.Version, m.FeatureLevel, m.Started = record.Value.Version, record.Value.FeatureLevel, record.Value.Started
		}
		if answer, asked := told[s.ID]; asked {
			describe(&m, answer, leader)
		}
		out = append(out, m)
	}
	slices.SortFunc(out, func(a, b client.Member) int { return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.ID, b.ID)) })
	return out
}

// describe adds what a server has told of itself.
func describe(m *client.Member, answer peer.Answer[peer.Status], leader peer.Status) {
	if answer.Err != nil {
		m.Problem = answer.Err.Error()
		return
	}
	told := answer.Value
	m.Version, m.FeatureLevel, m.Started, m.Agents, m.Applied = told.Version, told.FeatureLevel, told.Started, told.Agents, told.Applied
	m.Position = catalog.Position{Generation: told.Generation, Revision: told.Revision}
	m.Contact = catalog.Duration((time.Duration(told.ContactMS) * time.Millisecond).Truncate(time.Second))
	switch {
	case told.Hash == "" || told.HashAt != leader.HashAt:
	case told.Hash == leader.Hash:
		m.State = client.StateEqual
	default:
		m.State = client.StateDifferent
	}
}

// Transfer implements api.Cluster.
func (o operators) Transfer(ctx context.Context, name string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, operatorTime)
	defer cancel()
	before, _ := o.engine.Leader()
	to := anyServer
	if name != "" {
		server, ok := o.named(name)
		if !ok {
			return "", o.judge(fmt.Errorf("%w: %s", raftstore.ErrUnknownServer, name))
		}
		if server.ID == before {
			return nameOf(before), nil
		}
		to = server.ID
	}
	if err := o.demand(ctx, demand{Transfer: to}); err != nil {
		return "", err
	}
	return o.successor(ctx, before), nil
}

// successor waits for another leader than the one before, and returns its name.
func (o operators) successor(ctx context.Context, before string) string {
	ctx, cancel := context.WithTimeout(ctx, successorTime)
	defer cancel()
	for {
		changed := o.engine.Changed()
		if id, _ := o.engine.Leader(); id != "" && id != before {
			return nameOf(id)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ""
		}
	}
}

// Remove implements api.Cluster.
func (o operators) Remove(ctx context.Context, name string) (client.Member, error) {
	ctx, cancel := context.WithTimeout(ctx, operatorTime)
	defer cancel()
	server, ok := o.named(name)
	if !ok {
		return client.Member{}, o.judge(fmt.Errorf("%w: %s", raftstore.ErrUnknownServer, name))
	}
	removed := client.Member{Name: nameOf(server.ID), ID: server.ID, Address: server.Address, Voter: server.Voter, Leader: server.Leader}
	return removed, o.demand(ctx, demand{Remove: server.ID})
}

// demand has the leader do something. Its errors are those of judge.
func (o operators) demand(ctx context.Context, d demand) error {
	if o.engine.Leading() {
		return o.judge(o.obey(ctx, d))
	}
	leader, address := o.engine.Leader()
	if leader == "" || leader == o.id || o.peer == nil {
		return o.judge(store.ErrNoLeader)
	}
	query, err := json.Marshal(d)
	if err != nil {
		return fmt.Errorf("ask the leader: %w", err)
	}
	reply, err := o.peer.Fleet(ctx, peer.Server{ID: leader, Address: address}, query)
	switch {
	case errors.Is(err, peer.ErrUnreachable):
		return o.judge(fmt.Errorf("%w that answers: %s at %s: %w", store.ErrNoLeader, nameOf(leader), address, err))
	case err != nil:
		return o.judge(fmt.Errorf("%w: asked the leader, %s at %s: %w", store.ErrUnknownOutcome, nameOf(leader), address, err))
	}
	var said verdict
	if err := json.Unmarshal(reply, &said); err != nil {
		return o.judge(fmt.Errorf("%w: read the answer of the leader, %s: %w", store.ErrUnknownOutcome, nameOf(leader), err))
	}
	if said.Error != nil {
		return said.Error
	}
	return nil
}

// verdict answers a demand.
type verdict struct {
	Error *client.Error `json:"error,omitempty"`
}

// judge says what an error of a change of the cluster means to an operator.
func (m *member) judge(err error) error {
	var said *client.Error
	switch {
	case err == nil:
		return nil
	case errors.As(err, &said):
		return said
	case errors.Is(err, store.ErrUnknownOutcome):
		return &client.Error{Code: client.CodeUnknown, Message: err.Error(), Next: "look with meshctl members, and repeat the command: that is safe"}
	case errors.Is(err, raftstore.ErrUnknownServer):
		return &client.Error{Code: client.CodeNotFound, Message: err.Error(), Next: m.haveServers()}
	case errors.Is(err, raftstore.ErrAlone):
		return &client.Error{Code: client.CodeConflict, Message: err.Error(), Next: "see meshctl members: another server must answer, and have a vote"}
	case errors.Is(err, store.ErrNoLeader), errors.Is(err, context.DeadlineExceeded), errors.Is(err, store.ErrClosed):
		return &client.Error{Code: client.CodeUnavailable, Message: err.Error(), Next: "wait for the servers to elect a leader"}
	default:
		return &client.Error{Code: client.CodeUnavailable, Message: err.Error(), Next: "nothing was changed; see meshctl members, and try again"}
	}
}

// haveServers names those that there are.
func (m *member) haveServers() string {
	var names []string
	for _, s := range m.engine.Servers() {
		names = append(names, nameOf(s.ID))
	}
	slices.Sort(names)
	return "the servers are " + strings.Join(names, ", ")
}

// allowed refuses, on the leader, what would stop the cluster. It asks the servers
// whether they are there, as heartbeats tell that late.
func (m *member) allowed(ctx context.Context, d demand, server raftstore.Server) error {
	conflict := func(next, format string, args ...any) error {
		return &client.Error{Code: client.CodeConflict, Message: fmt.Sprintf(format, args...), Next: next}
	}
	there := map[string]bool{m.id: true}
	if m.peer != nil {
		told, err := m.peer.Status(ctx)
		if err != nil {
			return fmt.Errorf("ask the servers: %w", err)
		}
		for _, one := range told {
			there[one.Server.ID] = one.Err == nil
		}
	}
	answers := func(s raftstore.Server) bool {
		return there[s.ID] && (s.Self || s.Contact >= 0 && s.Contact <= aliveWithin)
	}
	name := nameOf(server.ID)
	if d.Transfer != "" {
		switch {
		case !server.Voter:
			return conflict("it gets a vote by itself once it has caught up, unless its configuration says non_voter", "%s has no vote and can't lead", name)
		case !answers(server):
			return conflict("see meshctl members", "%s does not answer the leader and can't lead", name)
		default:
			return nil
		}
	}
	voters, alive := 0, 0
	for _, s := range m.engine.Servers() {
		if s.Voter && s.ID != server.ID {
			voters++
			if answers(s) {
				alive++
			}
		}
	}
	switch {
	case !server.Voter:
		return nil
	case voters == 0:
		return conflict("add another server first, or stop this one", "%s is the only server with a vote", name)
	case 2*alive <= voters:
		return conflict("bring another server back first", "without %s, %d of %d servers with a vote answer, which is no majority: the cluster would stop", name, alive, voters)
	default:
		return nil
	}
}
