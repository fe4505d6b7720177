package rpc

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/acl"
	"github.com/meshd/meshd/server/meshpb"
	"github.com/meshd/meshd/server/state"
	"github.com/meshd/meshd/server/store"
)

// newcomer is one request to join, understood.
type newcomer struct {
	node  string
	token string // acl.Hash
	key   string // ca.Hash of the public key
	pub   ca.SignRequest
	req   *meshpb.JoinRequest
	now   time.Time
}

// Join implements meshpb.MeshServer. The token is consumed by the transaction that
// makes the node; the certificate is signed after it. If the answer is lost, the
// same key gets another certificate, until the token expires.
func (s *Server) Join(ctx context.Context, req *meshpb.JoinRequest) (*meshpb.JoinResponse, error) {
	if err := acl.Authorize(acl.Identity{}, acl.Request{Verb: acl.Write, Resource: acl.Join, Name: req.GetNode()}); err != nil {
		return nil, s.refuse(codes.PermissionDenied, meshpb.ReasonNotPermitted, "%v", err)
	}
	if !s.limits.allowJoin() {
		return nil, s.refuse(codes.ResourceExhausted, meshpb.ReasonTooMany, "too many hosts join at once: try again in a second")
	}
	if err := s.quorate(); err != nil {
		return nil, err
	}
	n, err := s.newcomer(req)
	if err != nil {
		return nil, err
	}
	// A token that was made on another server a moment ago may not be here yet.
	if _, known := state.JoinTokens.Get(s.state.Snapshot(), n.token); !known {
		if _, err := s.state.Fresh(ctx); err != nil {
			return nil, s.storeError(err, "look up the join token")
		}
	}
	if _, err := s.state.Update(ctx, func(tx *state.Tx) error { return s.consume(tx, n) }); err != nil {
		return nil, s.storeError(err, "join node "+n.node)
	}
	chain, err := s.sign(ctx, n.pub)
	if err != nil {
		return nil, err
	}
	bundle, err := json.Marshal(s.authority.Bundle())
	if err != nil {
		return nil, s.refuse(codes.Internal, meshpb.ReasonStore, "encode the trust bundle: %v", err)
	}
	return &meshpb.JoinResponse{Chain: chain, TrustDomain: s.config.TrustDomain, Bundle: bundle, Servers: announced(s.state.Snapshot(), s.config.Advertise)}, nil
}

func (s *Server) newcomer(req *meshpb.JoinRequest) (newcomer, error) {
	if err := catalog.CheckLabel(req.GetNode()); err != nil {
		return newcomer{}, s.refuse(codes.InvalidArgument, meshpb.ReasonBadRequest, "node name: %v", err)
	}
	pub, err := ca.PublicKeyFromCSR(req.GetCsr())
	if err != nil {
		return newcomer{}, s.refuse(codes.InvalidArgument, meshpb.ReasonBadRequest, "certificate request of node %s: %v", req.GetNode(), err)
	}
	hash, err := ca.PublicKeyHash(pub)
	if err != nil {
		return newcomer{}, s.refuse(codes.InvalidArgument, meshpb.ReasonBadRequest, "public key of node %s: %v", req.GetNode(), err)
	}
	return newcomer{
		node:  req.GetNode(),
		token: acl.Hash(req.GetSecret()),
		key:   hash.String(),
		pub:   ca.SignRequest{PublicKey: pub, ID: spiffe.Node(s.config.TrustDomain, req.GetNode())},
		req:   req,
		now:   time.Now().UTC(),
	}, nil
}

// consume uses up the token and makes the node: one winner per token and, by the
// records it reads, one per name.
func (s *Server) consume(tx *state.Tx, n newcomer) error {
	record, ok := state.JoinTokens.Get(tx, n.token)
	if !ok || record.Err != nil {
		return s.refuse(codes.Unauthenticated, meshpb.ReasonTokenUnknown,
			"the join token is not known here: it was deleted, or made by another cluster; make a new one with meshctl token join")
	}
	token := record.Value
	if err := s.usable(token, n); err != nil {
		return err
	}
	if token.UsedBy == n.key {
		return s.repeat(tx, n)
	}
	_, exists := state.Nodes.Get(tx, n.node)
	status, joined := state.NodeStatuses.Get(tx, n.node)
	if exists && joined && !token.Replace {
		return s.refuse(codes.AlreadyExists, meshpb.ReasonNameInUse,
			"the name %s is in use by a machine that joined at %s from %s; give this one another node_name, or, if it takes the other's place, use a token of meshctl token join --node %s --replace",
			n.node, status.Value.Joined.Format(time.RFC3339), orUnknown(status.Value.Address), n.node)
	}
	token.Used, token.UsedBy = &n.now, n.key
	if err := state.JoinTokens.Put(tx, n.token, token); err != nil {
		return fmt.Errorf("consume the join token: %w", err)
	}
	if !exists {
		if err := state.Nodes.Put(tx, n.node, catalog.Node{Name: n.node, Services: token.Services}); err != nil {
			return fmt.Errorf("create node %s: %w", n.node, err)
		}
	}
	if err := state.NodeIdentities.Put(tx, n.node, state.NodeIdentity{Keys: []string{n.key}, Since: n.now}); err != nil {
		return fmt.Errorf("record the key of node %s: %w", n.node, err)
	}
	return state.NodeStatuses.Put(tx, n.node, catalog.NodeStatus{
		Version: n.req.GetVersion(), FeatureLevel: int(n.req.GetFeatureLevel()), Joined: n.now,
	})
}

// usable refuses a token for one reason, the most telling first.
func (s *Server) usable(token acl.JoinToken, n newcomer) error {
	switch {
	case token.Node != n.node:
		return s.refuse(codes.PermissionDenied, meshpb.ReasonTokenNode,
			"the join token admits node %s, not %s: set node_name, or make a token for %s", token.Node, n.node, n.node)
	case n.now.Before(token.Created.Add(-ca.Backdate)):
		return s.refuse(codes.FailedPrecondition, meshpb.ReasonClock,
			"the server's clock (%s) is before the time at which the join token was made (%s): set the clocks of the servers",
			n.now.Format(time.RFC3339), token.Created.Format(time.RFC3339))
	case token.Used != nil && token.UsedBy != n.key:
		return s.refuse(codes.PermissionDenied, meshpb.ReasonTokenUsed,
			"the join token was used at %s by another host: make a new one; if nobody should have used it, delete node %s",
			token.Used.Format(time.RFC3339), n.node)
	case !n.now.Before(token.Expires):
		return s.refuse(codes.PermissionDenied, meshpb.ReasonTokenExpired,
			"the join token expired at %s, now is %s: make a new one", token.Expires.Format(time.RFC3339), n.now.Format(time.RFC3339))
	default:
		return nil
	}
}

// repeat admits the key that has used the token already, unless the name was
// taken from it since.
func (s *Server) repeat(tx *state.Tx, n newcomer) error {
	return s.admit(tx, caller{node: n.node, key: n.key})
}

// keepTokens is how long a join token is kept after its end, so that a late use of
// it can still be told from one that never was.
const keepTokens = 24 * time.Hour

// sweepTokens removes join tokens that ended long ago.
func sweepTokens(ctx context.Context, st *state.State, now time.Time) error {
	var old []string
	for hash, rec := range state.JoinTokens.All(st.Snapshot()) {
		if rec.Err == nil && now.Sub(rec.Value.Expires) > keepTokens {
			old = append(old, hash)
		}
	}
	for chunk := range slices.Chunk(old, store.MaxKeys/2) {
		_, err := st.Update(ctx, func(tx *state.Tx) error {
			for _, hash := range chunk {
				state.JoinTokens.Delete(tx, hash)
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("remove old join tokens: %w", err)
		}
	}
	return nil
}

func orUnknown(address string) string {
	if address == "" {
		return "an unknown address"
	}
	return address
}
