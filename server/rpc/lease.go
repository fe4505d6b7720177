package rpc

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/meshpb"
	"github.com/meshd/meshd/server/state"
	"github.com/meshd/meshd/server/store"
)

// Many nodes that fall silent together say more about the network or about the
// servers than about the nodes: when more than half of more than massLoss are
// silent at once, none is declared lost until an operator says so, or they are
// back.
const massLoss = 5

const reapInterval = time.Minute

// connectTimeout bounds the write of a lease: an agent is better refused than
// kept waiting for a server that has no leader.
const connectTimeout = 5 * time.Second

// leases keeps the clocks of nodes: of those whose lease names this server, and,
// where it leads, of those whose lease names a server that is gone. One key per
// node is written when it connects, moves or is lost; heartbeats write nothing.
type leases struct {
	config Config
	state  *state.State
	log    *slog.Logger
	// lost is told of each node that was declared lost here.
	lost func(node string)
	// elsewhere asks the other servers which of their nodes are silent for half a
	// lease, and names those that gave no answer.
	elsewhere func(ctx context.Context) (silent, unasked []string)
	// away says that this server has turned its agents away: it knows of nobody then.
	away func() bool

	mu    sync.Mutex
	start time.Time // clocks of own nodes not heard since
	heard map[string]time.Time
	// orphans are the servers whose nodes this server watches besides its own, and
	// since when: their clocks began then.
	orphans map[string]time.Time
	// lately has the nodes that were seen to be declared lost, by anybody.
	lately   map[string]time.Time
	held     []string
	released bool // an operator has said that the silent nodes are dead
}

func newLeases(config Config, st *state.State, log *slog.Logger) *leases {
	return &leases{
		config: config, state: st, log: log,
		heard: make(map[string]time.Time), orphans: make(map[string]time.Time), lately: make(map[string]time.Time),
	}
}

// grant is what connect has written.
type grant struct {
	epoch uint64
	at    catalog.Position
}

// connect records that the node's agent is connected here.
func (l *leases) connect(ctx context.Context, admit func(state.Reader) error, node string, hello *meshpb.Hello) (grant, error) {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	l.beat(node)
	var lease catalog.Lease
	at, err := l.state.Update(ctx, func(tx *state.Tx) error {
		if err := admit(tx); err != nil {
			return err
		}
		old, _ := state.Leases.Get(tx, node)
		lease = catalog.Lease{
			Server: l.config.Server, Session: hello.GetSession(), Epoch: old.Value.Epoch + 1, Since: time.Now().UTC(),
		}
		if err := state.Leases.Put(tx, node, lease); err != nil {
			return fmt.Errorf("lease of node %s: %w", node, err)
		}
		status, _ := state.NodeStatuses.Get(tx, node)
		status.Value.Address = hello.GetAddress()
		status.Value.Version = hello.GetVersion()
		status.Value.FeatureLevel = int(hello.GetFeatureLevel())
		return state.NodeStatuses.Put(tx, node, status.Value)
	})
	l.beat(node)
	return grant{lease.Epoch, at}, err //nolint:wrapcheck // made into a gRPC status by the caller
}

// beat restarts the clock of a node.
func (l *leases) beat(node string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.heard[node] = time.Now()
}

// observe notes what somebody has written of a node: that it is connected, which
// restarts its clock, or that it is lost.
func (l *leases) observe(node string, lease catalog.Lease) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if lease.Lost {
		l.lately[node] = time.Now()
		return
	}
	delete(l.lately, node)
	if lease.Server != l.config.Server {
		l.heard[node] = time.Now()
	}
}

func (l *leases) forget(node string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.heard, node)
	delete(l.lately, node)
}

// restart lets the clocks of all nodes begin now: while this server was away, stood
// still or had turned its agents away, nobody could be heard.
func (l *leases) restart() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.start = time.Now()
	clear(l.heard)
	clear(l.orphans)
}

// run watches the clocks until ctx ends. All of them restart now.
func (l *leases) run(ctx context.Context) error {
	l.restart()
	every := max(l.config.Lease/10, time.Millisecond)
	tick := time.NewTicker(every)
	defer tick.Stop()
	waited := time.Now()
	reaped := waited
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if late := time.Since(waited); late > l.config.Lease/4+every {
			l.log.WarnContext(ctx, "this server stood still: the leases of its nodes begin anew", slog.Duration("for", late))
			l.restart()
		}
		if l.away() {
			waited = time.Now()
			continue
		}
		l.adopt(time.Now())
		if err := l.check(ctx); err != nil && ctx.Err() == nil {
			l.log.WarnContext(ctx, "lost nodes could not be recorded; trying again", slog.Any("error", err))
		}
		if time.Since(reaped) >= reapInterval && l.config.leads() {
			reaped = time.Now()
			if err := errors.Join(l.reap(ctx), sweepTokens(ctx, l.state, reaped)); err != nil && ctx.Err() == nil {
				l.log.WarnContext(ctx, "instances of lost nodes or old join tokens could not be removed; trying again", slog.Any("error", err))
			}
		}
		waited = time.Now()
	}
}

// adopt finds out for whose nodes this server has to care, beside its own. Their
// clocks begin when it does.
func (l *leases) adopt(now time.Time) {
	named := map[string]bool{}
	for _, rec := range state.Leases.All(l.state.Snapshot()) {
		if rec.Err == nil && !rec.Value.Lost && rec.Value.Server != l.config.Server {
			named[rec.Value.Server] = true
		}
	}
	leads := l.config.leads()
	gone := make(map[string]time.Time)
	for server := range named {
		if leads && !l.config.alive(server) {
			gone[server] = now
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for server := range gone {
		if since, ok := l.orphans[server]; ok {
			gone[server] = since
		} else {
			l.log.Warn("a server is gone: the leases of its nodes are watched here and begin anew", slog.String("server", server))
		}
	}
	l.orphans = gone
	for node, since := range l.lately {
		if now.Sub(since) > l.config.Lease {
			delete(l.lately, node)
		}
	}
}

// overdue is a lease that is over, as it was seen to be.
type overdue struct {
	node, server string
	epoch        uint64
}

// check declares the nodes lost whose lease has run out. What has happened to a
// lease since it was looked at counts: a node that is connected elsewhere by now is
// not lost, whatever was heard of it here.
func (l *leases) check(ctx context.Context) error {
	for chunk := range slices.Chunk(l.overdue(ctx, time.Now()), store.MaxKeys/2) {
		var lost []string
		_, err := l.state.Update(ctx, func(tx *state.Tx) error {
			lost = lost[:0]
			for _, o := range chunk {
				rec, ok := state.Leases.Get(tx, o.node)
				if !ok || rec.Err != nil || rec.Value.Lost || rec.Value.Server != o.server || rec.Value.Epoch != o.epoch {
					continue
				}
				if quiet, mine := l.silence(o.node, o.server, time.Now()); !mine || quiet <= l.config.Lease {
					continue
				}
				rec.Value.Lost, rec.Value.Since = true, time.Now().UTC()
				if err := state.Leases.Put(tx, o.node, rec.Value); err != nil {
					return fmt.Errorf("lease of node %s: %w", o.node, err)
				}
				lost = append(lost, o.node)
			}
			return nil
		})
		if err != nil {
			return err //nolint:wrapcheck // says what was written
		}
		for _, node := range lost {
			l.log.WarnContext(ctx, "node is lost: its instances are used only while nothing better exists", slog.String("node", node))
			l.lost(node)
		}
	}
	return nil
}

// overdue returns the leases to declare lost now. It is empty while they are held.
func (l *leases) overdue(ctx context.Context, now time.Time) []overdue {
	var over []overdue
	live, silent := map[string]string{}, map[string]bool{} // by node; live has their servers
	for node, rec := range state.Leases.All(l.state.Snapshot()) {
		switch {
		case rec.Err != nil:
		case rec.Value.Lost:
			if l.lostLately(node, now) { // part of the same event
				live[node], silent[node] = rec.Value.Server, true
			}
		default:
			live[node] = rec.Value.Server
			quiet, mine := l.silence(node, rec.Value.Server, now)
			silent[node] = mine && quiet > l.config.Lease/2
			if mine && quiet > l.config.Lease {
				over = append(over, overdue{node, rec.Value.Server, rec.Value.Epoch})
			}
		}
	}
	many := func() bool {
		n := 0
		for node := range live {
			if silent[node] {
				n++
			}
		}
		return len(live) > massLoss && 2*n > len(live)
	}
	if len(over) > 0 && len(live) > massLoss && !many() {
		theirs, unasked := l.elsewhere(ctx)
		for _, node := range theirs {
			silent[node] = true
		}
		for node, server := range live {
			// Nobody watches them, and nobody can say that they are well.
			silent[node] = silent[node] || slices.Contains(unasked, server) && l.config.alive(server)
		}
	}
	return l.hold(over, len(live), many())
}

// hold returns over, or nothing if these nodes are to be held.
func (l *leases) hold(over []overdue, live int, many bool) []overdue {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(over) == 0 {
		if len(l.held) > 0 {
			l.log.Info("held nodes are back or gone: leases run again")
		}
		l.held, l.released = nil, false
		return nil
	}
	if many && !l.released {
		if len(l.held) == 0 {
			l.log.Error("more than half of the nodes fell silent at once: none is declared lost until they are back or an operator releases them",
				slog.Int("silent_here", len(over)), slog.Int("nodes", live))
		}
		l.held = l.held[:0:0]
		for _, o := range over {
			l.held = append(l.held, o.node)
		}
		return nil
	}
	l.held = nil
	return over
}

// silence is for how long a node was not heard, and whether that is this server's
// to tell.
func (l *leases) silence(node, server string, now time.Time) (quiet time.Duration, mine bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	began := l.start
	if server != l.config.Server {
		if began, mine = l.orphans[server]; !mine {
			return 0, false
		}
	}
	heard := l.heard[node]
	if heard.Before(began) {
		heard = began
	}
	return now.Sub(heard), true
}

func (l *leases) lostLately(node string, now time.Time) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	since, ok := l.lately[node]
	return ok && now.Sub(since) < l.config.Lease
}

// silent returns the nodes that this server watches and has not heard for half a
// lease.
func (l *leases) silent() []string {
	now := time.Now()
	var out []string
	for node, rec := range state.Leases.All(l.state.Snapshot()) {
		if rec.Err != nil || rec.Value.Lost {
			continue
		}
		if quiet, mine := l.silence(node, rec.Value.Server, now); mine && quiet > l.config.Lease/2 {
			out = append(out, node)
		}
	}
	return out
}

// reap removes the instances of nodes that have been lost for too long.
func (l *leases) reap(ctx context.Context) error {
	for node, rec := range state.Leases.All(l.state.Snapshot()) {
		if rec.Err != nil || !rec.Value.Lost || time.Since(rec.Value.Since) < l.config.ReapAfter {
			continue
		}
		still := func(r state.Reader) bool {
			now, ok := state.Leases.Get(r, node)
			return ok && now.Value == rec.Value
		}
		err := removeInstances(ctx, l.state, node, func(r state.Reader, _ catalog.InstanceKey) bool { return still(r) })
		if err != nil {
			return err
		}
		_, err = l.state.Update(ctx, func(tx *state.Tx) error {
			if still(tx) {
				state.Leases.Delete(tx, node)
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("remove the lease of node %s: %w", node, err)
		}
		l.log.InfoContext(ctx, "instances of a lost node were removed", slog.String("node", node), slog.Time("lost_since", rec.Value.Since))
	}
	return nil
}

// HeldNodes returns the nodes, of those that this server watches, that are silent
// for longer than their lease, but not declared lost because too many are. It is
// empty in normal operation.
func (s *Server) HeldNodes() []string {
	s.leases.mu.Lock()
	defer s.leases.mu.Unlock()
	return slices.Clone(s.leases.held)
}

// ReleaseNodes lets the nodes that this server holds be declared lost: an operator
// has seen that they are.
func (s *Server) ReleaseNodes() {
	s.leases.mu.Lock()
	defer s.leases.mu.Unlock()
	s.leases.released = true
}
