package rpc_test

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/acl"
	"github.com/meshd/meshd/server/meshpb"
	"github.com/meshd/meshd/server/rpc"
	"github.com/meshd/meshd/server/state"
)

func TestJoin(t *testing.T) {
	t.Parallel()
	c := start(t, rpc.Config{Advertise: []string{"10.0.0.1:7400"}})
	c.listen()
	client := c.dial(nil)
	secret := c.token("vm-a", false, "web", "batch/*")
	who := newIdentity(t)
	request := &meshpb.JoinRequest{Secret: secret, Csr: who.csr, Node: "vm-a", Version: "1.2", FeatureLevel: 1}
	res, err := client.Join(t.Context(), request)
	if err != nil {
		t.Fatal(err)
	}
	leaf := who.leaf(t, res.GetChain())
	if leaf.ID() != spiffe.Node(trustDomain, "vm-a") {
		t.Errorf("certificate for %v", leaf.ID())
	}
	if life := time.Until(leaf.NotAfter()); life < 719*time.Hour || life > 720*time.Hour {
		t.Errorf("certificate for %v, want 720 h", life)
	}
	if diff := cmp.Diff([]string{"10.0.0.1:7400"}, res.GetServers()); diff != "" || res.GetTrustDomain() != trustDomain || len(res.GetBundle()) == 0 {
		t.Errorf("answer: %v %s", res.GetServers(), res.GetTrustDomain())
	}
	node, _ := state.Nodes.Get(c.state.Snapshot(), "vm-a")
	if diff := cmp.Diff(catalog.Node{Name: "vm-a", Services: []string{"web", "batch/*"}}, node.Value); diff != "" {
		t.Errorf("node (-want +got):\n%s", diff)
	}
	// The answer was lost: the same key asks again.
	again, err := client.Join(t.Context(), request)
	if err != nil {
		t.Fatalf("the same key again: %v", err)
	}
	if who.leaf(t, again.GetChain()).ID() != leaf.ID() {
		t.Error("another identity")
	}
	if _, err := c.dial(leaf).Register(t.Context(), &meshpb.RegisterRequest{}); err != nil {
		t.Errorf("the certificate is no good: %v", err)
	}
}

// Every failure has one cause, for people and for programs.
func TestJoinRefused(t *testing.T) {
	t.Parallel()
	c := start(t, rpc.Config{})
	c.listen()
	client := c.dial(nil)
	c.join("vm-taken", "web")
	c.update(func(tx *state.Tx) error {
		return state.Nodes.Put(tx, "vm-planned", catalog.Node{Name: "vm-planned", Services: []string{"db"}})
	})
	store := func(change func(*acl.JoinToken)) []byte {
		record, secret, err := acl.NewJoinToken("vm-x", nil, 0, false, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		change(&record)
		c.update(func(tx *state.Tx) error { return state.JoinTokens.Put(tx, acl.Hash(secret), record) })
		return secret
	}
	used := c.token("vm-b", false)
	if _, err := client.Join(t.Context(), &meshpb.JoinRequest{Secret: used, Csr: newIdentity(t).csr, Node: "vm-b"}); err != nil {
		t.Fatal(err)
	}
	past := time.Now().Add(-time.Second)
	csr := newIdentity(t).csr
	for _, row := range []struct {
		name   string
		node   string
		secret []byte
		csr    []byte
		code   codes.Code
		reason meshpb.Reason
	}{
		{"unknown token", "vm-x", []byte("guess"), csr, codes.Unauthenticated, meshpb.ReasonTokenUnknown},
		{"no token", "vm-x", nil, csr, codes.Unauthenticated, meshpb.ReasonTokenUnknown},
		{"used token", "vm-b", used, csr, codes.PermissionDenied, meshpb.ReasonTokenUsed},
		{"another node's", "vm-y", c.token("vm-x", false), csr, codes.PermissionDenied, meshpb.ReasonTokenNode},
		{"expired", "vm-x", store(func(r *acl.JoinToken) { r.Expires = past }), csr, codes.PermissionDenied, meshpb.ReasonTokenExpired},
		{"server's clock", "vm-x", store(func(r *acl.JoinToken) { r.Created = time.Now().Add(time.Hour) }), csr, codes.FailedPrecondition, meshpb.ReasonClock},
		{"name in use", "vm-taken", c.token("vm-taken", false), csr, codes.AlreadyExists, meshpb.ReasonNameInUse},
		{"no request", "vm-x", c.token("vm-x", false), nil, codes.InvalidArgument, meshpb.ReasonBadRequest},
		{"no name", "VM.x", c.token("vm-x", false), csr, codes.InvalidArgument, meshpb.ReasonBadRequest},
		{"fine", "vm-x", c.token("vm-x", false), csr, codes.OK, ""},
		{"replaced", "vm-taken", c.token("vm-taken", true), csr, codes.OK, ""},
		{"planned", "vm-planned", c.token("vm-planned", false, "payments"), csr, codes.OK, ""},
	} {
		_, err := client.Join(t.Context(), &meshpb.JoinRequest{Secret: row.secret, Csr: row.csr, Node: row.node})
		reason, at := meshpb.ReasonOf(err)
		if status.Code(err) != row.code || reason != row.reason {
			t.Errorf("%s: %v (%s), want %v (%s)", row.name, err, reason, row.code, row.reason)
		}
		if err != nil && time.Since(at).Abs() > time.Minute {
			t.Errorf("%s: the server's time is %v", row.name, at)
		}
	}
	node, _ := state.Nodes.Get(c.state.Snapshot(), "vm-planned")
	if diff := cmp.Diff([]string{"db"}, node.Value.Services); diff != "" {
		t.Errorf("a token has changed the permissions of a node that had some:\n%s", diff)
	}
}

// A rebuilt host takes over the name, and the old one's certificate with it.
func TestJoinReplace(t *testing.T) {
	t.Parallel()
	c := start(t, rpc.Config{})
	c.listen()
	before := c.dial(c.join("vm-a", "web"))
	register(t, before, definition(t, "vm-a", web(""), catalog.HealthPassing))
	who := newIdentity(t)
	res, err := c.rpc.Join(t.Context(), &meshpb.JoinRequest{Secret: c.token("vm-a", true, "web"), Csr: who.csr, Node: "vm-a"})
	if err != nil {
		t.Fatal(err)
	}
	_, err = before.Register(t.Context(), &meshpb.RegisterRequest{})
	if reason, _ := meshpb.ReasonOf(err); reason != meshpb.ReasonNodeReplaced {
		t.Errorf("the old host: %v", err)
	}
	if _, err := c.dial(who.leaf(t, res.GetChain())).Register(t.Context(), &meshpb.RegisterRequest{}); err != nil {
		t.Errorf("the new host: %v", err)
	}
}

// Two at once with one token: one wins, whatever the interleaving.
func TestJoinRace(t *testing.T) {
	t.Parallel()
	const races = 500 // two goroutines each
	c := start(t, rpc.Config{JoinRate: 1e6})
	c.listen()
	client := c.dial(nil)
	identities := make([]identity, 2*races)
	for i := range identities {
		identities[i] = newIdentity(t)
	}
	var winners [races]atomic.Int32
	var group sync.WaitGroup
	gate := make(chan struct{})
	for race := range races {
		node := fmt.Sprintf("vm-%d", race)
		secret := c.token(node, false)
		for side := range 2 {
			group.Go(func() {
				<-gate
				_, err := client.Join(context.Background(), &meshpb.JoinRequest{Secret: secret, Csr: identities[2*race+side].csr, Node: node})
				reason, _ := meshpb.ReasonOf(err)
				switch {
				case err == nil:
					winners[race].Add(1)
				case reason != meshpb.ReasonTokenUsed:
					t.Errorf("race %d: %v", race, err)
				}
			})
		}
	}
	close(gate)
	group.Wait()
	for race := range races {
		if n := winners[race].Load(); n != 1 {
			t.Errorf("race %d has %d winners", race, n)
		}
	}
}
