package rpc_test

import (
	"context"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/server/meshpb"
	"github.com/meshd/meshd/server/rpc"
	"github.com/meshd/meshd/server/state"
)

// accessRows are the calls of agents. All are for the certificate of a node that
// is known, but for those that are open.
var accessRows = map[string]struct { //nolint:gochecknoglobals // a table
	open bool
	call func(context.Context, meshpb.MeshClient) error
}{
	// It carries its own proof, a join token.
	"Join": {open: true, call: func(ctx context.Context, c meshpb.MeshClient) error {
		_, err := c.Join(ctx, &meshpb.JoinRequest{})
		return err
	}},
	"Sign": {call: func(ctx context.Context, c meshpb.MeshClient) error {
		_, err := c.Sign(ctx, &meshpb.SignRequest{})
		return err
	}},
	"Register": {call: func(ctx context.Context, c meshpb.MeshClient) error {
		_, err := c.Register(ctx, &meshpb.RegisterRequest{})
		return err
	}},
	"Leave": {call: func(ctx context.Context, c meshpb.MeshClient) error {
		_, err := c.Leave(ctx, &meshpb.LeaveRequest{})
		return err
	}},
	"Sync": {call: func(ctx context.Context, c meshpb.MeshClient) error {
		stream, err := c.Sync(ctx)
		if err != nil {
			return err
		}
		_, err = stream.Recv()
		return err
	}},
	"Watch": {call: func(ctx context.Context, c meshpb.MeshClient) error {
		stream, err := c.Watch(ctx)
		if err != nil {
			return err
		}
		_, err = stream.Recv()
		return err
	}},
}

// TestEveryCallIsAuthorized goes through all calls of the service. A call without a
// row fails.
func TestEveryCallIsAuthorized(t *testing.T) {
	t.Parallel()
	c := start(t, rpc.Config{})
	c.listen()
	signed := func(id spiffe.ID) *ca.Leaf {
		who := newIdentity(t)
		chain, err := c.authority.Sign(t.Context(), ca.SignRequest{PublicKey: who.key.Public(), ID: id})
		if err != nil {
			t.Fatal(err)
		}
		leaf, err := ca.NewLeaf(chain, who.key)
		if err != nil {
			t.Fatal(err)
		}
		return leaf
	}
	gone := c.join("vm-gone", "web")
	c.update(func(tx *state.Tx) error {
		state.Nodes.Delete(tx, "vm-gone")
		return nil
	})
	callers := []struct {
		name string
		leaf *ca.Leaf
		node bool
	}{
		{"nobody", nil, false},
		{"a service", signed(spiffe.Service(trustDomain, "default", "web")), false},
		{"a server", signed(spiffe.Server(trustDomain, "server-2")), false},
		{"a node that never joined", signed(spiffe.Node(trustDomain, "vm-never")), false},
		{"a node that was deleted", gone, false},
		{"a node", c.join("vm-a", "web"), true},
	}
	known := map[string]bool{}
	for _, m := range meshpb.Mesh_ServiceDesc.Methods {
		known[m.MethodName] = true
	}
	for _, s := range meshpb.Mesh_ServiceDesc.Streams {
		known[s.StreamName] = true
	}
	for name := range accessRows {
		if !known[name] {
			t.Errorf("there is no call %s", name)
		}
	}
	for name := range known {
		row, ok := accessRows[name]
		if !ok {
			t.Errorf("%s has no row: say who may call it", name)
			continue
		}
		for _, who := range callers {
			limit := 10 * time.Second // for a refusal
			if who.node || row.open {
				limit = 500 * time.Millisecond // a stream that is let in waits for us
			}
			ctx, cancel := context.WithTimeout(t.Context(), limit)
			err := row.call(ctx, c.dial(who.leaf))
			cancel()
			code := status.Code(err)
			refused := code == codes.Unauthenticated || code == codes.PermissionDenied
			if reason, _ := meshpb.ReasonOf(err); row.open {
				refused = reason == meshpb.ReasonNoIdentity || reason == meshpb.ReasonNotPermitted
			}
			if want := !who.node && !row.open; refused != want {
				t.Errorf("%s by %s: %v", name, who.name, err)
			}
		}
	}
}
