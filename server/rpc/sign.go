package rpc

import (
	"context"
	"errors"
	"log/slog"
	"slices"

	"google.golang.org/grpc/codes"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/acl"
	"github.com/meshd/meshd/server/meshpb"
	"github.com/meshd/meshd/server/state"
)

// keptKeys is how many keys of a node are accepted: the newest, the one that asked
// for it, and one more for connections that are older than both.
const keptKeys = 3

// Sign implements meshpb.MeshServer. It decides on a linearizable read: what was
// taken from a node before the call is refused to it.
func (s *Server) Sign(ctx context.Context, req *meshpb.SignRequest) (*meshpb.SignResponse, error) {
	c, err := s.authenticate(ctx, acl.Sign)
	if err != nil {
		return nil, err
	}
	if !s.limits.allowSign(c.node) {
		return nil, s.refuse(codes.ResourceExhausted, meshpb.ReasonTooMany, "node %s asks for too many certificates: try again in a second", c.node)
	}
	id, err := spiffe.Parse(req.GetId())
	if err != nil {
		return nil, s.refuse(codes.InvalidArgument, meshpb.ReasonBadRequest, "identity: %v", err)
	}
	pub, err := ca.PublicKeyFromCSR(req.GetCsr())
	if err != nil {
		return nil, s.refuse(codes.InvalidArgument, meshpb.ReasonBadRequest, "certificate request for %s: %v", id, err)
	}
	if id.TrustDomain != s.config.TrustDomain {
		return nil, s.refuse(codes.PermissionDenied, meshpb.ReasonNotPermitted, "%s is not of trust domain %s", id, s.config.TrustDomain)
	}
	switch id.Kind {
	case spiffe.KindService:
		err = s.mayBe(ctx, c, catalog.Name{Namespace: id.Namespace, Name: id.Name})
	case spiffe.KindNode:
		err = s.renewNode(ctx, c, id, pub)
	default:
		err = s.refuse(codes.PermissionDenied, meshpb.ReasonNotPermitted, "a node can't become %s", id)
	}
	if err != nil {
		return nil, err
	}
	chain, err := s.sign(ctx, ca.SignRequest{PublicKey: pub, ID: id})
	if err != nil {
		return nil, err
	}
	return &meshpb.SignResponse{Chain: chain}, nil
}

// mayBe refuses a service that the node must not be, or does not run.
func (s *Server) mayBe(ctx context.Context, c caller, service catalog.Name) error {
	snapshot, err := s.state.Fresh(ctx)
	if err != nil {
		return s.storeError(err, "check what node "+c.node+" may be")
	}
	if err := s.admit(snapshot, c); err != nil {
		return err
	}
	if node, _ := state.Nodes.Get(snapshot, c.node); node.Err != nil || !node.Value.MayRun(service) {
		return s.refuse(codes.PermissionDenied, meshpb.ReasonNotPermitted,
			"node %s may not run %s: add it to the services of the node", c.node, service.Short())
	}
	if !snapshot.Runs(c.node, service) {
		return s.refuse(codes.PermissionDenied, meshpb.ReasonNotRegistered,
			"no instance of %s is registered on node %s: register it first", service.Short(), c.node)
	}
	return nil
}

// renewNode makes the new key one of the node's. The key that asks stays valid:
// the answer may be lost.
func (s *Server) renewNode(ctx context.Context, c caller, id spiffe.ID, pub any) error {
	if id.Name != c.node {
		return s.refuse(codes.PermissionDenied, meshpb.ReasonNotPermitted, "node %s can't become %s", c.node, id)
	}
	hash, err := ca.PublicKeyHash(pub)
	if err != nil {
		return s.refuse(codes.InvalidArgument, meshpb.ReasonBadRequest, "public key of %s: %v", id, err)
	}
	_, err = s.state.Update(ctx, func(tx *state.Tx) error {
		if err := s.admit(tx, c); err != nil {
			return err
		}
		identity, _ := state.NodeIdentities.Get(tx, c.node)
		keys := []string{hash.String()}
		for _, key := range append([]string{c.key}, identity.Value.Keys...) {
			if !slices.Contains(keys, key) && len(keys) < keptKeys {
				keys = append(keys, key)
			}
		}
		return state.NodeIdentities.Put(tx, c.node, state.NodeIdentity{Keys: keys, Since: identity.Value.Since})
	})
	return s.storeError(err, "renew node "+c.node)
}

func (s *Server) sign(ctx context.Context, req ca.SignRequest) ([][]byte, error) {
	chain, err := s.authority.Sign(ctx, req)
	switch {
	case err == nil:
		return chain.DER(), nil
	case errors.Is(err, ca.ErrRequest):
		return nil, s.refuse(codes.InvalidArgument, meshpb.ReasonBadRequest, "certificate for %s: %v", req.ID, err)
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return nil, s.refuse(codes.Canceled, meshpb.ReasonStore, "certificate for %s: %v", req.ID, err)
	default:
		s.log.ErrorContext(ctx, "certificate could not be signed", slog.String("id", req.ID.String()), slog.Any("error", err))
		return nil, s.refuse(codes.Unavailable, meshpb.ReasonStore, "certificate for %s: %v", req.ID, err)
	}
}
