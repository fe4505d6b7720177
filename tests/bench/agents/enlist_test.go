package agents_test

import (
	"context"
	"log/slog"
	"testing"
	"time"

	"github.com/meshd/meshd/agent/view"
	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/server/acl"
	"github.com/meshd/meshd/server/state"
	"github.com/meshd/meshd/tests/bench/agents"
)

// Nodes that join by tokens are agents like any other.
func TestEnlist(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 1)
	token := func(ctx context.Context, node string) (string, error) {
		record, secret, err := acl.NewJoinToken(node, []string{"*"}, 0, false, time.Now())
		if err != nil {
			return "", err
		}
		_, err = w.states[0].Update(ctx, func(tx *state.Tx) error { return state.JoinTokens.Put(tx, acl.Hash(secret), record) })
		if err != nil {
			return "", err
		}
		return ca.JoinToken{Servers: w.addresses, Roots: w.bundle.Hash(trustDomain), Secret: ca.NewSecret(secret)}.Encode()
	}
	leaves, bundle, err := agents.Enlist(t.Context(), []string{"vm-a", "vm-b", "vm-c"}, token)
	if err != nil {
		t.Fatal(err)
	}
	var who []agents.Agent
	for _, leaf := range leaves {
		who = append(who, agents.Agent{Leaf: leaf, Topics: []view.Topic{view.Roots(), view.Node()}})
	}
	f := agents.New(agents.Config{Log: slog.New(slog.DiscardHandler), Bundle: func() ca.Bundle { return bundle }, Servers: func() []string { return w.addresses }}, who)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	done := make(chan error, 1)
	go func() { done <- f.Run(ctx) }()
	if err := f.AwaitConnected(ctx); err != nil {
		t.Error(err)
	}
	if got := f.Connected()["s0"]; got != 3 {
		t.Errorf("%d are connected", got)
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Run: %v", err)
	}
}
