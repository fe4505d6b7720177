package rpc

import (
	"context"
	"log/slog"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/meshpb"
	"github.com/meshd/meshd/server/state"
)

const pruneRetry = time.Second

// prune removes what a node's record no longer allows: the instances of services
// that were taken from it, and everything of a node that was deleted. What is in the
// state the leader removes; what is known here only, each server does.
func (s *Server) prune(ctx context.Context) error {
	at := s.state.Snapshot()
	pending := everyNode(at)
	led := true
	for {
		leads := s.config.leads()
		if leads && !led {
			pending = everyNode(at) // the leader before may not have come to it
		}
		led = leads
		for node := range pending {
			if !leads {
				if _, exists := state.Nodes.Get(at, node); !exists {
					s.forgetNode(node)
				}
				delete(pending, node)
				continue
			}
			if err := s.pruneNode(ctx, node); err != nil {
				if ctx.Err() == nil {
					s.log.WarnContext(ctx, "what a node may no longer have could not be removed; trying again",
						slog.String("node", node), slog.Any("error", err))
				}
				continue
			}
			delete(pending, node)
		}
		var again <-chan time.Time
		if len(pending) > 0 || s.config.Leads != nil {
			again = time.After(pruneRetry)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-again:
		case <-s.state.Changed(at):
		}
		newest, changes, ok := s.state.Changes(at)
		at = newest
		if !ok {
			pending = everyNode(newest)
		}
		for _, c := range changes {
			if node, is := state.Nodes.Key(c); is {
				pending[node] = true
			}
		}
	}
}

// everyNode returns all nodes that have left a trace.
func everyNode(snapshot *state.Snapshot) map[string]bool {
	nodes := make(map[string]bool)
	for key := range state.Instances.All(snapshot) {
		nodes[key.Node] = true
	}
	for node := range state.NodeIdentities.All(snapshot) {
		nodes[node] = true
	}
	return nodes
}

func (s *Server) pruneNode(ctx context.Context, node string) error {
	rec, exists := state.Nodes.Get(s.state.Snapshot(), node)
	if rec.Err != nil {
		return nil //nolint:nilerr // it may do nothing, but nothing is destroyed over what can't be read
	}
	err := removeInstances(ctx, s.state, node, func(r state.Reader, key catalog.InstanceKey) bool {
		now, _ := state.Nodes.Get(r, node)
		return now.Err == nil && !now.Value.MayRun(key.Service)
	})
	if err != nil || exists {
		return err
	}
	_, err = s.state.Update(ctx, func(tx *state.Tx) error {
		if _, back := state.Nodes.Get(tx, node); back {
			return nil
		}
		state.NodeIdentities.Delete(tx, node)
		state.NodeStatuses.Delete(tx, node)
		state.Leases.Delete(tx, node)
		state.NodeDrains.Delete(tx, node)
		for key := range state.InstanceDrains.All(tx) {
			if key.Node == node {
				state.InstanceDrains.Delete(tx, key)
			}
		}
		return nil
	})
	if err != nil {
		return err //nolint:wrapcheck // says what was written
	}
	s.forgetNode(node)
	return nil
}

// forgetNode drops what is known here of a node that no longer exists, and ends its
// stream.
func (s *Server) forgetNode(node string) {
	s.limits.forget(node)
	s.leases.forget(node)
	s.fleet.forget(node, s.refuse(codes.PermissionDenied, meshpb.ReasonNodeUnknown, "node %s was deleted", node))
}
