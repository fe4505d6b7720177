package raftstore

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"github.com/meshd/meshd/server/store"
)

// rounds lets calls that ask the same question at the same time share one answer.
// A round begins after everybody who takes part in it has asked, so its answer is
// about a moment after each of the questions.
type rounds struct {
	mu   sync.Mutex
	next *round
	busy bool
}

type round struct {
	done     chan struct{}
	position store.Position
	err      error
}

// join returns a round that has not begun. Ask, which must end by itself, is
// called for one round at a time by a goroutine that spawn starts; if spawn
// refuses, the answer is store.ErrClosed.
func (s *rounds) join(spawn func(func()) bool, ask func() (store.Position, error)) *round {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.next == nil {
		s.next = &round{done: make(chan struct{})}
	}
	mine := s.next
	if !s.busy {
		s.busy = true
		if !spawn(func() { s.run(ask) }) {
			s.busy, s.next = false, nil
			mine.err = store.ErrClosed
			close(mine.done)
		}
	}
	return mine
}

func (s *rounds) run(ask func() (store.Position, error)) {
	for {
		s.mu.Lock()
		now := s.next
		s.next = nil
		s.busy = now != nil
		s.mu.Unlock()
		if now == nil {
			return
		}
		now.position, now.err = ask()
		close(now.done)
	}
}

// confirm returns the position of this member if it leads, after a majority has
// answered a request that was sent after the call: there was no later leader
// then. What was acknowledged before the call was acknowledged by this leader, or by
// an earlier one, and so was applied when the term began. What was seen before the
// call may be part of another member's state already and not of this one's: a
// follower may apply sooner what the leader has told it is committed. So the
// position is that of all that was committed at the time of the call (Ongaro,
// "Consensus: Bridging Theory and Practice", 2014, section 6.4).
//
// Raft's own VerifyLeader does not do: it takes any answer that arrives after the
// question, also one to a request that was sent long before it, which a process
// that was stopped for a while finds in its sockets.
func (e *Engine) confirm(ctx context.Context) (store.Position, error) {
	r, leads, _ := e.current()
	if leads == nil {
		return store.Position{}, e.noLeader(r)
	}
	if err := e.writes.stalled(); err != nil {
		return store.Position{}, fmt.Errorf("%w on this server: %w", store.ErrNoLeader, err)
	}
	committed := r.CommitIndex()
	ctx, stop := context.WithTimeout(ctx, e.cfg.HeartbeatTimeout)
	defer stop()
	members := r.GetConfiguration() // does not wait for Raft's main loop
	if err := members.Error(); err != nil {
		return store.Position{}, fmt.Errorf("%w: %w", store.ErrNoLeader, err)
	}
	voters, needed := 0, 0
	answers := make(chan bool, len(members.Configuration().Servers))
	asked := 0
	for _, s := range members.Configuration().Servers {
		if s.Suffrage != raft.Voter {
			continue
		}
		voters++
		if s.ID == raft.ServerID(e.cfg.ID) {
			needed--
			continue
		}
		asked++
		e.ask(ctx, s, leads.number, answers)
	}
	needed += voters/2 + 1
	for ; needed > 0 && asked > 0; asked-- {
		select {
		case ok := <-answers:
			if ok {
				needed--
			}
		case <-leads.over:
			return store.Position{}, e.noLeader(r)
		case <-ctx.Done():
			return store.Position{}, fmt.Errorf("%w: too few of %d servers have answered: %w", store.ErrNoLeader, voters, ctx.Err())
		}
	}
	if needed > 0 || r.CurrentTerm() != leads.number || r.State() != raft.Leader {
		return store.Position{}, e.noLeader(r)
	}
	if err := e.catchUpTo(ctx, max(leads.floor, e.newestCommand(committed, leads.floor))); err != nil {
		return store.Position{}, fmt.Errorf("%w: what is committed is not applied yet: %w", store.ErrNoLeader, err)
	}
	return e.space.Position(), nil
}

// newestCommand returns the index of the newest command in the log up to an index,
// or floor if there is none after that: entries of other kinds never reach the state.
func (e *Engine) newestCommand(index, floor uint64) uint64 {
	var entry raft.Log
	for ; index > max(floor, e.applied.Load()); index-- {
		err := e.logs.GetLog(index, &entry)
		if err != nil || entry.Type == raft.LogCommand {
			return index // one that was cut off is applied; one that can't be read ends the engine
		}
	}
	return floor
}

// catchUpTo waits until the entry of an index is part of this member's state.
func (e *Engine) catchUpTo(ctx context.Context, index uint64) error {
	_, leads, _ := e.current()
	if leads == nil {
		return store.ErrNoLeader
	}
	for index > max(leads.floor, e.applied.Load()) {
		select {
		case <-e.space.Changed():
		case <-time.After(time.Millisecond): // an entry may have changed nothing
		case <-leads.over:
			return store.ErrNoLeader
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// ask sends one heartbeat and tells whether s still follows in this term. A
// server that has not answered an earlier one gets no second.
func (e *Engine) ask(ctx context.Context, s raft.Server, term uint64, answers chan<- bool) {
	e.mu.Lock()
	line, wire := e.lines[s.ID], e.wire
	if line == nil {
		line = make(chan struct{}, 1)
		e.lines[s.ID] = line
	}
	e.mu.Unlock()
	header := e.header(wire)
	go func() {
		select {
		case line <- struct{}{}:
		case <-ctx.Done():
			answers <- false
			return
		}
		defer func() { <-line }()
		request := raft.AppendEntriesRequest{RPCHeader: header, Term: term}
		var reply raft.AppendEntriesResponse
		err := wire.AppendEntries(s.ID, s.Address, &request, &reply)
		answers <- err == nil && reply.Success && reply.Term == term
	}()
}

// spread tells the followers that have the entry of an index that it is committed,
// if Raft has nothing newer to send them with it: otherwise one that waits for its
// own state to have what it has just written waits for CommitInterval. It does not
// wait for their answers, and leaves out who has not answered the last time.
func (e *Engine) spread(index uint64) {
	r, leads, _ := e.current()
	if leads == nil || index == 0 || r.LastIndex() != index {
		return
	}
	e.mu.Lock()
	wire := e.wire
	e.mu.Unlock()
	header := e.header(wire)
	for _, s := range servers(r) {
		if s.ID == raft.ServerID(e.cfg.ID) || wire.of(string(s.ID)).last < index || !e.quiet(s.ID) {
			continue
		}
		request := raft.AppendEntriesRequest{
			RPCHeader: header, Term: leads.number, PrevLogEntry: index, PrevLogTerm: leads.number, LeaderCommitIndex: index,
		}
		go func() {
			defer e.loud(s.ID)
			var reply raft.AppendEntriesResponse
			_ = wire.AppendEntries(s.ID, s.Address, &request, &reply) // Raft says the same a little later
		}()
	}
}

// quiet reports whether nothing is being spread to a member, and notes that
// something is until loud.
func (e *Engine) quiet(id raft.ServerID) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	was := !e.spreading[id]
	e.spreading[id] = true
	return was
}

func (e *Engine) loud(id raft.ServerID) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.spreading, id)
}

// header is what Raft puts before its own requests.
func (e *Engine) header(w *wire) raft.RPCHeader {
	id := raft.ServerID(e.cfg.ID)
	return raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: []byte(id), Addr: w.EncodePeer(id, w.LocalAddr())}
}

// patience is how long a call waits for a leader: two elections.
func (e *Engine) patience() time.Duration {
	return 2 * (e.cfg.HeartbeatTimeout + e.cfg.ElectionTimeout)
}
