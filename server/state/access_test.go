package state_test

import (
	"testing"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/acl"
	"github.com/meshd/meshd/server/state"
	"github.com/meshd/meshd/server/store"
)

// TestAccess: policies take effect in the snapshot that has them, and what can't be
// understood allows nothing.
func TestAccess(t *testing.T) {
	t.Parallel()
	s, engine := start(t)
	write := acl.Request{Verb: acl.Write, Resource: acl.Node, Name: "a"}
	may := func() bool {
		who := acl.Identity{Subject: acl.Bearer, Rights: s.Snapshot().Access().Rights([]string{"p"}, []string{"r"})}
		return acl.May(who, write)
	}
	nodes := catalog.Policy{Name: "p", Rules: []catalog.PolicyRule{{Kinds: []string{"node"}, Name: "*", Verbs: []string{"write"}}}}
	empty := s.Snapshot().Access()
	if may() {
		t.Error("allowed by nothing")
	}
	update(t, s, func(tx *state.Tx) error {
		return state.Nodes.Put(tx, "a", catalog.Node{Name: "a"})
	})
	if s.Snapshot().Access() != empty {
		t.Error("compiled again without need")
	}
	update(t, s, func(tx *state.Tx) error { return state.Policies.Put(tx, "p", nodes) })
	if !may() {
		t.Error("not allowed by its policy")
	}
	commit(t, s, engine, "policy/p", `{"name":"p","rules":[{"kinds":["node"],"name":"*","verbs":["write"],"during":"office hours"}]}`)
	if may() {
		t.Error("allowed by a policy of which a part is not understood")
	}
	commit(t, s, engine, "policy/p", `{"name":"other","rules":[{"kinds":["node"],"name":"*","verbs":["write"]}]}`)
	if may() {
		t.Error("allowed by a policy that has another name than it says")
	}
	update(t, s, func(tx *state.Tx) error {
		other := nodes
		other.Name = "q"
		if err := state.Policies.Put(tx, "q", other); err != nil {
			return err
		}
		return state.Roles.Put(tx, "r", catalog.Role{Name: "r", Policies: []string{"q"}})
	})
	if !may() {
		t.Error("not allowed by its role")
	}
	update(t, s, func(tx *state.Tx) error {
		state.Policies.Delete(tx, "q")
		return nil
	})
	if may() {
		t.Error("allowed by a policy that is gone")
	}
}

// commit writes bytes as another version might.
func commit(t *testing.T, s *state.State, engine store.Engine, key, value string) {
	t.Helper()
	p, err := engine.Commit(t.Context(), store.Txn{Ops: []store.Op{{Key: key, Value: []byte(value)}}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Await(t.Context(), catalog.Position(p)); err != nil {
		t.Fatal(err)
	}
}
