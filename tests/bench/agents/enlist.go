package agents

import (
	"context"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/meshpb"
)

// joinsAtOnce bounds the nodes that Enlist joins at a time.
const joinsAtOnce = 16

// How often, and how long apart, something is tried that a server may refuse because it
// is asked too often.
const (
	attempts     = 20
	attemptPause = 200 * time.Millisecond
)

// Enlist joins nodes as hosts do, by a join token each, at the servers that the tokens
// name, in turn. It returns their certificates, in order, and the mesh's roots.
func Enlist(ctx context.Context, nodes []string, token func(ctx context.Context, node string) (string, error)) ([]*ca.Leaf, ca.Bundle, error) {
	leaves := make([]*ca.Leaf, len(nodes))
	bundles := make([]ca.Bundle, len(nodes))
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(joinsAtOnce)
	for i, node := range nodes {
		group.Go(func() error {
			text, err := token(ctx, node)
			if err != nil {
				return fmt.Errorf("token of node %s: %w", node, err)
			}
			leaves[i], bundles[i], err = enlist(ctx, i, node, text)
			if err != nil {
				return fmt.Errorf("join node %s: %w", node, err)
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil || len(nodes) == 0 {
		return nil, ca.Bundle{}, err
	}
	return leaves, bundles[0], nil
}

func enlist(ctx context.Context, i int, node, text string) (*ca.Leaf, ca.Bundle, error) {
	token, err := ca.ParseJoinToken(text)
	if err != nil {
		return nil, ca.Bundle{}, err
	}
	conn, err := grpc.NewClient("passthrough:///"+token.Servers[i%len(token.Servers)],
		grpc.WithTransportCredentials(credentials.NewTLS(ca.PinnedConfig(token.Roots, meshpb.ServerName, []string{"h2"}))))
	if err != nil {
		return nil, ca.Bundle{}, err
	}
	defer func() { _ = conn.Close() }()
	key, err := ca.GenerateKey()
	if err != nil {
		return nil, ca.Bundle{}, err
	}
	csr, err := ca.NewCSR(key)
	if err != nil {
		return nil, ca.Bundle{}, err
	}
	res, err := again(ctx, func() (*meshpb.JoinResponse, error) {
		return meshpb.NewMeshClient(conn).Join(ctx, &meshpb.JoinRequest{
			Secret: token.Secret.Reveal(), Csr: csr, Node: node, Version: "simulated", FeatureLevel: catalog.FeatureLevel,
		})
	})
	if err != nil {
		return nil, ca.Bundle{}, err
	}
	var bundle ca.Bundle
	if err := bundle.UnmarshalJSON(res.GetBundle()); err != nil {
		return nil, ca.Bundle{}, err
	}
	chain, err := ca.ParseChain(res.GetChain())
	if err != nil {
		return nil, ca.Bundle{}, err
	}
	leaf, err := ca.NewLeaf(chain, key)
	return leaf, bundle, err
}

// again tries something until it works, or was tried often enough.
func again[T any](ctx context.Context, try func() (T, error)) (T, error) {
	for attempt := 1; ; attempt++ {
		out, err := try()
		if err == nil || attempt == attempts || ctx.Err() != nil {
			return out, err
		}
		timer := time.NewTimer(attemptPause)
		select {
		case <-timer.C:
		case <-ctx.Done():
		}
		timer.Stop()
	}
}
