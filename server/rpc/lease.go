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

// Many nodes that fall silent together say more about the network or about this
// server than about the nodes: when more than half of more than massLoss are
// silent at once, none is declared lost until an operator says so, or they are
// back.
const massLoss = 5

const reapInterval = time.Minute

// leases keeps the clock of every node. One key per node is written when it
// connects, moves or is lost; heartbeats write nothing.
type leases struct {
	config Config
	state  *state.State
	log    *slog.Logger
	// lost is told of each node that was declared lost.
	lost func(node string)

	mu       sync.Mutex
	start    time.Time // clocks of nodes not heard since
	heard    map[string]time.Time
	held     []string
	released bool // an operator has said that the silent nodes are dead
}

func newLeases(config Config, st *state.State, log *slog.Logger, lost func(string)) *leases {
	return &leases{config: config, state: st, log: log, lost: lost, heard: make(map[string]time.Time)}
}

// connect records that the node's agent is connected here.
func (l *leases) connect(ctx context.Context, admit func(state.Reader) error, node string, hello *meshpb.Hello) error {
	l.beat(node)
	_, err := l.state.Update(ctx, func(tx *state.Tx) error {
		if err := admit(tx); err != nil {
			return err
		}
		old, _ := state.Leases.Get(tx, node)
		lease := catalog.Lease{
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
	return err //nolint:wrapcheck // made into a gRPC status by the caller
}

// beat restarts the clock of a node.
func (l *leases) beat(node string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.heard[node] = time.Now()
}

func (l *leases) forget(node string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.heard, node)
}

// run watches the clocks until ctx ends. All of them restart now: while this
// server was away nobody could be heard.
func (l *leases) run(ctx context.Context) error {
	l.mu.Lock()
	l.start = time.Now()
	clear(l.heard)
	l.mu.Unlock()
	tick := time.NewTicker(max(l.config.Lease/10, time.Millisecond))
	defer tick.Stop()
	reaped := time.Now()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if err := l.check(ctx); err != nil && ctx.Err() == nil {
			l.log.WarnContext(ctx, "lost nodes could not be recorded; trying again", slog.Any("error", err))
		}
		if time.Since(reaped) < reapInterval {
			continue
		}
		reaped = time.Now()
		if err := errors.Join(l.reap(ctx), sweepTokens(ctx, l.state, reaped)); err != nil && ctx.Err() == nil {
			l.log.WarnContext(ctx, "instances of lost nodes or old join tokens could not be removed; trying again", slog.Any("error", err))
		}
	}
}

// check declares the nodes lost whose lease has run out.
func (l *leases) check(ctx context.Context) error {
	overdue := l.overdue(time.Now())
	for chunk := range slices.Chunk(overdue, store.MaxKeys/2) {
		var lost []string
		_, err := l.state.Update(ctx, func(tx *state.Tx) error {
			lost = lost[:0]
			for _, node := range chunk {
				rec, ok := state.Leases.Get(tx, node)
				if !ok || rec.Value.Lost || l.silence(node, time.Now()) <= l.config.Lease {
					continue
				}
				rec.Value.Lost, rec.Value.Since = true, time.Now().UTC()
				if err := state.Leases.Put(tx, node, rec.Value); err != nil {
					return fmt.Errorf("lease of node %s: %w", node, err)
				}
				lost = append(lost, node)
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

// overdue returns the nodes to declare lost now. It is empty while they are held.
func (l *leases) overdue(now time.Time) []string {
	var overdue []string
	live, silent := 0, 0
	for node, rec := range state.Leases.All(l.state.Snapshot()) {
		if rec.Err != nil {
			continue
		}
		if rec.Value.Lost {
			// Lost a moment ago: part of the same event.
			if now.Sub(rec.Value.Since) < l.config.Lease {
				live++
				silent++
			}
			continue
		}
		live++
		quiet := l.silence(node, now)
		if quiet > l.config.Lease/2 {
			silent++
		}
		if quiet > l.config.Lease {
			overdue = append(overdue, node)
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(overdue) == 0 {
		if len(l.held) > 0 {
			l.log.Info("held nodes are back or gone: leases run again")
		}
		l.held, l.released = nil, false
		return nil
	}
	if live > massLoss && 2*silent > live && !l.released {
		if len(l.held) == 0 {
			l.log.Error("more than half of the nodes fell silent at once: none is declared lost until they are back or an operator releases them",
				slog.Int("silent", silent), slog.Int("nodes", live))
		}
		l.held = overdue
		return nil
	}
	l.held = nil
	return overdue
}

func (l *leases) silence(node string, now time.Time) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	heard, ok := l.heard[node]
	if !ok || heard.Before(l.start) {
		heard = l.start
	}
	return now.Sub(heard)
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

// HeldNodes returns the nodes that are silent for longer than their lease, but
// not declared lost because too many are. It is empty in normal operation.
func (s *Server) HeldNodes() []string {
	s.leases.mu.Lock()
	defer s.leases.mu.Unlock()
	return slices.Clone(s.leases.held)
}

// ReleaseNodes lets the held nodes be declared lost: an operator has seen that
// they are.
func (s *Server) ReleaseNodes() {
	s.leases.mu.Lock()
	defer s.leases.mu.Unlock()
	s.leases.released = true
}
