package rpc_test

import (
	"encoding/json"
	"testing"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/intentions"
	"github.com/meshd/meshd/server/rpc"
	"github.com/meshd/meshd/server/state"
)

// TestDrainIsShownToCallers: an operator's drain is in the status that callers
// get, whatever the agent registers, and goes when it is taken back.
func TestDrainIsShownToCallers(t *testing.T) {
	t.Parallel()
	c := start(t, rpc.Config{})
	c.listen()
	leafA, leafB := c.join("vm-a", "web"), c.join("vm-b", "api")
	b := c.dial(leafB)
	register(t, b, definition(t, "vm-b", api("one"), catalog.HealthPassing), definition(t, "vm-b", api("two"), catalog.HealthPassing))
	c.intention("web", "api", intentions.Allow)
	a := c.connect(leafA, "s1", topicUpstream("web", "api"))
	one := catalog.InstanceKey{Service: catalog.Name{Namespace: "default", Name: "api"}, Node: "vm-b", ID: "one"}
	for _, step := range []struct {
		name     string
		do       func() catalog.Position
		one, two catalog.InstanceStatus
	}{
		{
			"at first", func() catalog.Position { return c.state.Snapshot().Position() },
			catalog.InstanceStatus{Health: catalog.HealthPassing},
			catalog.InstanceStatus{Health: catalog.HealthPassing},
		},
		{"one is drained", func() catalog.Position {
			return c.update(func(tx *state.Tx) error { return state.InstanceDrains.Put(tx, one, state.Drain{By: "x"}) })
		}, catalog.InstanceStatus{Health: catalog.HealthPassing, Drain: true}, catalog.InstanceStatus{Health: catalog.HealthPassing}},
		{"its agent has other news", func() catalog.Position {
			return position(register(t, b, definition(t, "vm-b", api("one"), catalog.HealthWarning), definition(t, "vm-b", api("two"), catalog.HealthPassing)))
		}, catalog.InstanceStatus{Health: catalog.HealthWarning, Drain: true}, catalog.InstanceStatus{Health: catalog.HealthPassing}},
		{"the node is drained", func() catalog.Position {
			return c.update(func(tx *state.Tx) error { return state.NodeDrains.Put(tx, "vm-b", state.Drain{By: "x"}) })
		}, catalog.InstanceStatus{Health: catalog.HealthWarning, Drain: true}, catalog.InstanceStatus{Health: catalog.HealthPassing, Drain: true}},
		{"one is taken back, the node is not", func() catalog.Position {
			return c.update(func(tx *state.Tx) error { state.InstanceDrains.Delete(tx, one); return nil })
		}, catalog.InstanceStatus{Health: catalog.HealthWarning, Drain: true}, catalog.InstanceStatus{Health: catalog.HealthPassing, Drain: true}},
		{"all is taken back", func() catalog.Position {
			return c.update(func(tx *state.Tx) error { state.NodeDrains.Delete(tx, "vm-b"); return nil })
		}, catalog.InstanceStatus{Health: catalog.HealthWarning}, catalog.InstanceStatus{Health: catalog.HealthPassing}},
	} {
		a.reach(step.do())
		for id, want := range map[string]catalog.InstanceStatus{"one": step.one, "two": step.two} {
			var got catalog.InstanceStatus
			if err := json.Unmarshal([]byte(a.held["upstream default/api default/web"]["status/vm-b/"+id]), &got); err != nil {
				t.Fatalf("%s: %s: %v", step.name, id, err)
			}
			if got.Health != want.Health || got.Drain != want.Drain {
				t.Errorf("%s: %s is %+v, want %+v", step.name, id, got, want)
			}
		}
	}
}

func TestDeletedNodeTakesItsDrainsAlong(t *testing.T) {
	t.Parallel()
	c := start(t, rpc.Config{})
	c.join("vm-b", "api")
	c.update(func(tx *state.Tx) error {
		if err := state.NodeDrains.Put(tx, "vm-b", state.Drain{}); err != nil {
			return err
		}
		key := catalog.InstanceKey{Service: catalog.Name{Namespace: "default", Name: "api"}, Node: "vm-b", ID: "api"}
		return state.InstanceDrains.Put(tx, key, state.Drain{})
	})
	c.update(func(tx *state.Tx) error { state.Nodes.Delete(tx, "vm-b"); return nil })
	c.until(func(s *state.Snapshot) bool { return state.NodeDrains.Len(s)+state.InstanceDrains.Len(s) == 0 })
}
