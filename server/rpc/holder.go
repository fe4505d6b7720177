package rpc

import (
	"context"
	"log/slog"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"

	"github.com/meshd/meshd/server/meshpb"
	"github.com/meshd/meshd/server/state"
)

// maxClaims bounds the leases that are written at once when all of them have to be.
const maxClaims = 16

// holdLeases keeps this server's streams and the leases in the state in agreement,
// until ctx ends: a stream whose node has connected elsewhere, or was declared lost,
// ends. After a restore the leases are those of another day: those of the nodes that
// are connected here are written anew.
func (s *Server) holdLeases(ctx context.Context) error {
	at := s.state.Snapshot()
	s.reviewAll(ctx, at)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-s.state.Changed(at):
		}
		newest, changes, ok := s.state.Changes(at)
		at = newest
		if !ok {
			s.reviewAll(ctx, at)
			continue
		}
		for _, c := range changes {
			node, is := state.Leases.Key(c)
			if !is {
				continue
			}
			if rec, ok := state.Leases.Get(at, node); ok && rec.Err == nil {
				s.leases.observe(node, rec.Value)
			}
			if st := s.fleet.stream(node); st != nil && s.review(st, at) {
				s.claim(ctx, st)
			}
		}
	}
}

// reviewAll is for when anything may have changed.
func (s *Server) reviewAll(ctx context.Context, at *state.Snapshot) {
	var group errgroup.Group
	group.SetLimit(maxClaims)
	for _, st := range s.fleet.streams() {
		if s.review(st, at) {
			group.Go(func() error { s.claim(ctx, st); return nil })
		}
	}
	_ = group.Wait() // claim returns nothing
}

// review ends a stream that the lease of its node does not name any more. It reports
// whether the lease has to be written anew instead.
func (s *Server) review(st *stream, at *state.Snapshot) (claim bool) {
	granted := st.granted()
	if now := at.Position(); now.Generation == granted.at.Generation && granted.at.After(now) {
		return false // older than the stream
	} else if now.Generation != granted.at.Generation {
		return true
	}
	node := st.caller.node
	rec, ok := state.Leases.Get(at, node)
	lease := rec.Value
	switch {
	case rec.Err != nil:
	case !ok && st.admitted(at) != nil:
		st.end(st.admitted(at)) // deleted, its lease with it
	case !ok:
		st.end(s.refuse(codes.Aborted, meshpb.ReasonLeft, "node %s has left", node))
	case lease.Server != s.config.Server:
		st.end(s.refuse(codes.Aborted, meshpb.ReasonSuperseded, "node %s has connected to server %s", node, lease.Server))
	case lease.Epoch != granted.epoch:
		st.end(s.refuse(codes.Aborted, meshpb.ReasonSuperseded, "node %s has opened a newer stream", node))
	case lease.Lost:
		st.end(s.silent(node))
	}
	return false
}

// claim writes the lease of a stream that is older than the generation of the state.
func (s *Server) claim(ctx context.Context, st *stream) {
	granted, err := s.leases.connect(ctx, st.admitted, st.caller.node, st.hello)
	if err != nil {
		if ctx.Err() == nil {
			s.log.WarnContext(ctx, "the lease of a node could not be written anew: it has to connect again",
				slog.String("node", st.caller.node), slog.Any("error", err))
		}
		st.end(s.storeError(err, "record the lease of node "+st.caller.node))
		return
	}
	st.grant(granted)
}

func (s *Server) silent(node string) error {
	return s.refuse(codes.DeadlineExceeded, meshpb.ReasonSilent, "node %s was silent for %s", node, s.config.Lease)
}

// granted and grant keep what the stream's lease says.
func (st *stream) granted() grant {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.lease
}

func (st *stream) grant(g grant) {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.lease = g
}
