package server

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/meshd/meshd/server/peer"
	"github.com/meshd/meshd/server/state"
	"github.com/meshd/meshd/server/store/raftstore"
)

// verifyInterval is how often the servers compare their states.
const verifyInterval = time.Minute

// steward looks after the members of the cluster: it gives votes to servers that
// have caught up, and removes those that are dead. It runs on the server that
// leads.
func (m *member) steward(ctx context.Context) error {
	if m.peer == nil {
		return nil
	}
	seen := map[string]observed{}
	begin := time.Now()
	for pause(ctx, stewardInterval) {
		servers := m.engine.Servers()
		m.observe(seen, servers, begin)
		next, ok := situation{
			now: time.Now(), servers: servers, seen: seen, nonVoter: m.nonVoters(),
			deadAfter: m.live.now().Autopilot.RemoveDeadAfter.Std(), mostVoters: maxExpected,
		}.nextStep()
		if !ok {
			continue
		}
		if err := m.take(ctx, next); err != nil && ctx.Err() == nil {
			m.log.WarnContext(ctx, "the cluster could not be changed; trying again", slog.String("server", next.server.ID),
				slog.String("change", next.act.String()), slog.Any("error", err))
		}
	}
	return nil
}

// observe brings seen up to date. What was seen of servers that are no members is
// forgotten.
func (m *member) observe(seen map[string]observed, servers []raftstore.Server, begin time.Time) {
	now, last := time.Now(), uint64(0)
	for _, s := range servers {
		if s.Self {
			last = s.Last
		}
	}
	for _, s := range servers {
		o, known := seen[s.ID]
		if !known {
			o.answered = begin
		}
		if s.Self {
			o.answered = now
		} else if s.Contact >= 0 {
			o.answered = now.Add(-s.Contact)
		}
		switch close := s.Contact >= 0 && s.Contact <= aliveWithin && s.Last+closeBehind >= last; {
		case !close:
			o.steady = time.Time{}
		case o.steady.IsZero():
			o.steady = now
		}
		seen[s.ID] = o
	}
	for id := range seen {
		if !slices.ContainsFunc(servers, func(s raftstore.Server) bool { return s.ID == id }) {
			delete(seen, id)
		}
	}
}

// nonVoters returns the names of the servers that are to have no vote.
func (m *member) nonVoters() map[string]bool {
	out := map[string]bool{}
	for name, record := range state.Servers.All(m.state.Snapshot()) {
		if record.Err == nil && record.Value.NonVoter {
			out[name] = true
		}
	}
	return out
}

func (m *member) take(ctx context.Context, next step) error {
	var err error
	switch next.act {
	case actPromote:
		err = m.engine.Add(ctx, next.server.ID, next.server.Address, true)
	case actDemote:
		err = m.engine.Demote(ctx, next.server.ID)
	case actRemove:
		err = m.removeServer(ctx, next.server.ID, false)
	}
	if err != nil {
		return fmt.Errorf("%s %s: %w", next.act, next.server.ID, err)
	}
	m.log.InfoContext(ctx, "the cluster was changed", slog.String("server", next.server.ID), slog.String("change", next.act.String()),
		slog.String("why", next.why))
	return nil
}

// removeServer takes a member out of the cluster, on the leader. For good says
// that an operator did, so that it is not let in again.
func (m *member) removeServer(ctx context.Context, id string, forGood bool) error {
	name := nameOf(id)
	_, err := m.state.Update(ctx, func(tx *state.Tx) error {
		record, ok := state.Servers.Get(tx, name)
		if !ok || record.Err != nil {
			return record.Err
		}
		server := record.Value
		if forGood && !slices.Contains(server.Removed, id) {
			server.Removed = append(slices.Clone(server.Removed), id)
		}
		if server.ID == id {
			server.ID, server.Address, server.PeerAddress = "", "", ""
		}
		if server.ID == "" && len(server.Removed) == 0 {
			state.Servers.Delete(tx, name)
			return nil
		}
		return state.Servers.Put(tx, name, server)
	})
	if err != nil {
		return err //nolint:wrapcheck // says what was written
	}
	return m.engine.Remove(ctx, id) //nolint:wrapcheck // says what was done
}

// errApart is wrapped when the states of two servers differ at one entry of the log.
var errApart = errors.New("the states of the servers have come apart")

// verify marks the log now and then, so that the servers can compare their states
// there. It runs on the server that leads.
func (m *member) verify(ctx context.Context) error {
	for pause(ctx, verifyInterval) {
		if err := m.engine.Verify(ctx); err != nil && ctx.Err() == nil {
			m.log.WarnContext(ctx, "the log could not be marked for the comparison of states", slog.Any("error", err))
		}
	}
	return nil
}

// compare holds this server's state against those of the others at the newest
// mark, until ctx ends. A server whose state is not the leader's must not serve: it
// returns an error. The leader counts those that differ from it.
func (m *member) compare(ctx context.Context) error {
	for m.peer != nil && pause(ctx, verifyInterval/2) {
		at, sum, ok := m.engine.Hash()
		others, err := m.peer.Status(ctx)
		if !ok || err != nil {
			continue // before the first mark, or while the server stops
		}
		apart, err := comparison{at: at, own: hex.EncodeToString(sum[:]), leads: m.engine.Leading(), others: others}.result()
		if err != nil {
			return err
		}
		for _, id := range apart {
			m.log.ErrorContext(ctx, "the state of a server differs from the leader's", slog.String("server", id), slog.Uint64("entry", at))
		}
		m.apart.Store(int64(len(apart)))
	}
	return nil
}

// comparison is the hash of this server's state at an entry of the log, with what
// the other servers say of theirs.
type comparison struct {
	at     uint64
	own    string
	leads  bool
	others []peer.Answer[peer.Status]
}

// result returns, on the leader, the IDs of those whose state is another one; and
// elsewhere an error if the leader's is. Servers that are at another mark, or do not
// answer, say nothing.
func (c comparison) result() (apart []string, err error) {
	for _, other := range c.others {
		if other.Err != nil || other.Value.HashAt != c.at || other.Value.Hash == c.own {
			continue
		}
		if c.leads {
			apart = append(apart, other.Server.ID)
		} else if other.Server.Leader {
			return nil, fmt.Errorf("%w: at entry %d of the log this server has %.16s, the leader %s has %.16s; "+
				"move the folder store in the data_dir away and start the server: it comes back as a new member with the leader's state",
				errApart, c.at, c.own, nameOf(other.Server.ID), other.Value.Hash)
		}
	}
	return apart, nil
}
