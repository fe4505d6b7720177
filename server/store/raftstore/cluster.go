package raftstore

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/raft"

	"github.com/meshd/meshd/server/store"
)

// Errors of changes of the cluster.
var (
	// ErrFounded says that this member has a state and can't found a cluster.
	ErrFounded = errors.New("this server is or was a member of a cluster")
	// ErrUnknownServer says that no member has that ID.
	ErrUnknownServer = errors.New("no such server in the cluster")
	// ErrAlone says that there is nobody to give the leadership to.
	ErrAlone = errors.New("no other server can lead")
	// ErrTaken says that a member of that name is alive under another ID.
	ErrTaken = errors.New("a server of that name is alive")
)

// changeTimeout bounds how long a change of the cluster waits for the one before.
const changeTimeout = 10 * time.Second

// Server is a member of the cluster, as this member knows it.
type Server struct {
	ID, Address string
	// Voter counts for majorities. Leader is the member that leads as far as this
	// one knows, Self is this one.
	Voter, Leader, Self bool
	// Contact is since when the member has not answered, and Last where its log
	// ended then, as an index to compare with Stats.Last. Only a leader knows
	// them of others; Contact is negative for one that has never answered.
	Contact time.Duration
	Last    uint64
}

func configuration(members []Member) raft.Configuration {
	var c raft.Configuration
	for _, m := range members {
		c.Servers = append(c.Servers, raft.Server{ID: raft.ServerID(m.ID), Address: raft.ServerAddress(m.Address)})
	}
	return c
}

// servers returns the newest configuration that this member has, committed or
// not, which is the one that counts in Raft.
func servers(r *raft.Raft) []raft.Server {
	if r == nil {
		return nil
	}
	f := r.GetConfiguration() // does not wait for Raft's main loop
	if f.Error() != nil {
		return nil
	}
	return f.Configuration().Servers
}

// Found begins a cluster of these members, this one included. It is called once,
// on one member, while all of them run and are empty; the others learn of it from
// the leader that they elect. It returns when the list is on this member's disk,
// or ErrFounded.
func (e *Engine) Found(ctx context.Context, members []Member) error {
	r, err := e.running(ctx)
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(members, func(m Member) bool { return m.ID == e.cfg.ID }) {
		return fmt.Errorf("%w: found a cluster without this server, %q", store.ErrInvalid, e.cfg.ID)
	}
	if err := e.bounded(ctx, func() error { return r.BootstrapCluster(configuration(members)).Error() }); err != nil {
		if errors.Is(err, raft.ErrCantBootstrap) {
			return fmt.Errorf("found a cluster: %w", ErrFounded)
		}
		return fmt.Errorf("found a cluster: %w", err)
	}
	e.stand() // there can't be a leader yet
	e.tell()
	return nil
}

// running waits until Raft runs, which is before the engine serves.
func (e *Engine) running(ctx context.Context) (*raft.Raft, error) {
	for {
		news := e.Changed()
		if r, _, _ := e.current(); r != nil {
			return r, nil
		}
		select {
		case <-news:
		case <-e.closing:
			return nil, store.ErrClosed
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// bounded runs a call that may block longer than ctx lasts.
func (e *Engine) bounded(ctx context.Context, call func() error) error {
	done := make(chan error, 1)
	if !e.spawn(func() { done <- call() }) {
		return store.ErrClosed
	}
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Member reports whether this member belongs to a cluster: it knows a list of
// servers, and is on it.
func (e *Engine) Member() bool {
	return slices.ContainsFunc(e.Servers(), func(s Server) bool { return s.Self })
}

// Servers returns the members of the cluster as this one knows them, by ID. It is
// empty before it has learnt of a cluster.
func (e *Engine) Servers() []Server {
	r, leads, _ := e.current()
	if r == nil {
		return nil
	}
	leader, _ := e.Leader()
	var all []Server
	for _, s := range servers(r) {
		one := Server{
			ID: string(s.ID), Address: string(s.Address), Voter: s.Suffrage == raft.Voter,
			Leader: string(s.ID) == leader, Self: string(s.ID) == e.cfg.ID,
		}
		switch h := e.wire.of(one.ID); {
		case one.Self:
			one.Last = r.LastIndex()
		case leads == nil || h.at.IsZero():
			one.Contact = -1
		default:
			one.Contact, one.Last = time.Since(h.at), h.last
		}
		all = append(all, one)
	}
	slices.SortFunc(all, func(a, b Server) int { return cmp.Compare(a.ID, b.ID) })
	return all
}

// Leader returns who leads as far as this member knows; "" if it knows of nobody.
func (e *Engine) Leader() (id, address string) {
	r, _, _ := e.current()
	if r == nil {
		return "", ""
	}
	a, i := r.LeaderWithID()
	return string(i), string(a)
}

// Leading reports whether this member leads and its state is complete.
func (e *Engine) Leading() bool {
	_, leads, _ := e.current()
	return leads != nil
}

// Contact is how long ago this member last knew of a leader with a majority behind
// it: 0 while it leads itself. Before it has heard of one, it counts from the
// start of Run.
func (e *Engine) Contact() time.Duration {
	e.mu.Lock()
	defer e.mu.Unlock()
	switch {
	case e.term != nil || e.raft == nil:
		return 0
	case e.raft.LastContact().After(e.led):
		return time.Since(e.raft.LastContact())
	default:
		return time.Since(e.led)
	}
}

// Changed returns a channel that is closed at the next change of the leader or of
// the servers. Take it first, and look then.
func (e *Engine) Changed() <-chan struct{} {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.news
}

// tell closes the channel that Changed has returned.
func (e *Engine) tell() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.tellLocked()
}

func (e *Engine) tellLocked() {
	close(e.news)
	e.news = make(chan struct{})
}

// configured is called by the machine with every list of servers that is
// committed. One without this member means that it was removed, if it was on an
// earlier one and is not on a later one: the log also holds the lists from before
// it came.
func (e *Engine) configured(c raft.Configuration) {
	r, _, _ := e.current()
	switch {
	case e.on(c.Servers):
		e.belonged.Store(true)
	case r != nil && e.belonged.Load() && !e.on(servers(r)):
		e.fail(fmt.Errorf("%w: %q is not on the list of servers any more", ErrRemoved, e.cfg.ID))
	}
	e.tell()
}

// on reports whether this member is on a list of servers.
func (e *Engine) on(list []raft.Server) bool {
	return slices.ContainsFunc(list, func(s raft.Server) bool { return s.ID == raft.ServerID(e.cfg.ID) })
}

// Removed tells this member that another one, which belongs to the cluster, does
// not know it any more: Raft itself does not tell who was removed. Run ends with
// ErrRemoved, unless a leader is in touch.
func (e *Engine) Removed() {
	if e.Contact() > 2*e.cfg.HeartbeatTimeout {
		e.fail(fmt.Errorf("%w: the other servers do not know %q", ErrRemoved, e.cfg.ID))
	}
}

// office returns Raft if this member leads.
func (e *Engine) office(ctx context.Context) (*raft.Raft, error) {
	if err := e.enter(ctx); err != nil {
		return nil, err
	}
	r, leads, _ := e.current()
	if leads == nil {
		return nil, e.noLeader(r)
	}
	return r, nil
}

// Add makes a server a member, or changes its address or whether it votes. A
// member of the same name (see Identify) or address with another ID is the same
// machine before its state was lost: it is removed first, unless it is alive
// (ErrTaken). It works on the leader only; elsewhere it returns
// store.ErrNoLeader. It returns when the change is committed.
func (e *Engine) Add(ctx context.Context, id, address string, voter bool) error {
	r, err := e.office(ctx)
	if err != nil {
		return err
	}
	for _, s := range e.Servers() {
		if s.ID == id || (nameOf(s.ID) != nameOf(id) && s.Address != address) {
			continue
		}
		if s.Self || e.alive(s) {
			return fmt.Errorf("%w: add %q at %s, but %q answers at %s", ErrTaken, id, address, s.ID, s.Address)
		}
		e.log.InfoContext(ctx, "a server has come back without its state", slog.String("was", s.ID), slog.String("is", id))
		if err := e.reconfigure(ctx, r, func(timeout time.Duration) raft.IndexFuture {
			return r.RemoveServer(raft.ServerID(s.ID), 0, timeout)
		}); err != nil {
			return fmt.Errorf("remove server %q, whose place %q takes: %w", s.ID, id, err)
		}
	}
	err = e.reconfigure(ctx, r, func(timeout time.Duration) raft.IndexFuture {
		if voter {
			return r.AddVoter(raft.ServerID(id), raft.ServerAddress(address), 0, timeout)
		}
		return r.AddNonvoter(raft.ServerID(id), raft.ServerAddress(address), 0, timeout)
	})
	if err != nil {
		return fmt.Errorf("add server %q at %s: %w", id, address, err)
	}
	return nil
}

// alive reports whether a leader has to take another member for alive: it has
// answered lately, or the leader has not been in office for long enough to know.
func (e *Engine) alive(s Server) bool {
	_, leads, _ := e.current()
	lately := 2 * e.cfg.HeartbeatTimeout
	return leads == nil || time.Since(leads.begun) < lately || s.Contact >= 0 && s.Contact < lately
}

// nameOf returns the part of an ID that Identify was given.
func nameOf(id string) string {
	if at := strings.LastIndexByte(id, '.'); at > 0 {
		return id[:at]
	}
	return id
}

// Remove removes a member. A leader that is to remove itself hands the leadership
// over and asks the next one. Otherwise as Add; ErrUnknownServer if there is none.
func (e *Engine) Remove(ctx context.Context, id string) error {
	r, err := e.office(ctx)
	if err != nil {
		return err
	}
	if err := e.known(id); err != nil {
		return fmt.Errorf("remove server %q: %w", id, err)
	}
	if id == e.cfg.ID {
		return e.leave(ctx)
	}
	if err := e.reconfigure(ctx, r, func(timeout time.Duration) raft.IndexFuture {
		return r.RemoveServer(raft.ServerID(id), 0, timeout)
	}); err != nil {
		return fmt.Errorf("remove server %q: %w", id, err)
	}
	return nil
}

// leave removes this member, which leads.
func (e *Engine) leave(ctx context.Context) error {
	if e.cfg.Forward == nil {
		return fmt.Errorf("remove the leader: %w", ErrAlone)
	}
	if err := e.Transfer(ctx, ""); err != nil {
		return fmt.Errorf("remove the leader: %w", err)
	}
	return e.lead(ctx, func() error {
		return fmt.Errorf("%w yet but the one to be removed", store.ErrNoLeader)
	}, func(id, address string) error {
		reply, err := e.cfg.Forward(ctx, id, address, append([]byte{askRemove}, e.cfg.ID...))
		if err != nil {
			return fmt.Errorf("remove the former leader: %w", err)
		}
		_, err = decodeReply(reply)
		return err
	})
}

// Demote makes a voter a member that does not vote. Otherwise as Remove.
func (e *Engine) Demote(ctx context.Context, id string) error {
	r, err := e.office(ctx)
	if err != nil {
		return err
	}
	if err := e.known(id); err != nil {
		return fmt.Errorf("demote server %q: %w", id, err)
	}
	if err := e.reconfigure(ctx, r, func(timeout time.Duration) raft.IndexFuture {
		return r.DemoteVoter(raft.ServerID(id), 0, timeout)
	}); err != nil {
		return fmt.Errorf("demote server %q: %w", id, err)
	}
	return nil
}

func (e *Engine) known(id string) error {
	if !slices.ContainsFunc(e.Servers(), func(s Server) bool { return s.ID == id }) {
		return ErrUnknownServer
	}
	return nil
}

// reconfigure makes one change of the list of servers and waits for its commit.
func (e *Engine) reconfigure(ctx context.Context, r *raft.Raft, change func(timeout time.Duration) raft.IndexFuture) error {
	err := e.bounded(ctx, func() error { return change(changeTimeout).Error() })
	switch {
	case errors.Is(err, raft.ErrNotLeader), errors.Is(err, raft.ErrLeadershipTransferInProgress):
		return e.noLeader(r)
	case errors.Is(err, raft.ErrLeadershipLost), errors.Is(err, raft.ErrRaftShutdown):
		return fmt.Errorf("%w: %w", store.ErrUnknownOutcome, err)
	case err != nil:
		return err
	}
	e.tell()
	return nil
}

// Transfer hands the leadership to a voter; "" is the most up to date of those
// that answer. It returns when this member does not lead any more. It works on
// the leader only, else it returns store.ErrNoLeader; ErrAlone if there is no
// such voter.
func (e *Engine) Transfer(ctx context.Context, id string) error {
	r, leads, _ := e.current()
	if r == nil || leads == nil {
		return store.ErrNoLeader
	}
	candidates := e.Servers()
	candidates = slices.DeleteFunc(candidates, func(s Server) bool {
		alive := s.Contact >= 0 && s.Contact < 2*e.cfg.HeartbeatTimeout
		return s.Self || !s.Voter || id != "" && s.ID != id || id == "" && !alive
	})
	if len(candidates) == 0 {
		return fmt.Errorf("hand over the leadership: %w", ErrAlone)
	}
	to := slices.MaxFunc(candidates, func(a, b Server) int {
		return cmp.Or(cmp.Compare(a.Last, b.Last), cmp.Compare(b.Contact, a.Contact))
	})
	err := e.bounded(ctx, func() error {
		return r.LeadershipTransferToServer(raft.ServerID(to.ID), raft.ServerAddress(to.Address)).Error()
	})
	if err != nil {
		return fmt.Errorf("hand over the leadership to %q: %w", to.ID, err)
	}
	return nil
}

// correctAddress puts the address under which this leader is reached now onto the
// list, for the next leader: it was founded without a network, or has moved.
func (e *Engine) correctAddress(r *raft.Raft) {
	address := e.wire.LocalAddr()
	for _, s := range servers(r) {
		if s.ID != raft.ServerID(e.cfg.ID) || s.Address == address || s.Suffrage != raft.Voter {
			continue
		}
		err := r.AddVoter(s.ID, address, 0, changeTimeout).Error()
		e.log.Info("the address of this server has changed", slog.String("was", string(s.Address)),
			slog.String("is", string(address)), slog.Any("error", err))
	}
}
