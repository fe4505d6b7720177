package rpc_test

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/meshd/meshd/server/meshpb"
	"github.com/meshd/meshd/server/rpc"
	"github.com/meshd/meshd/server/state"
)

// Agents are told where the servers are, as those say of themselves; until one has,
// what this one was configured with. So is a host that joins.
func TestAgentsAreToldOfTheServers(t *testing.T) {
	t.Parallel()
	c := start(t, rpc.Config{Advertise: []string{"10.0.0.1:7400"}})
	c.listen()
	a := c.connect(c.join("vm-a", "web"), "s1", &meshpb.Topic{Kind: "servers"})
	put := func(name, address string) {
		a.reach(c.update(func(tx *state.Tx) error {
			return state.Servers.Put(tx, name, state.Server{ID: name, Address: address, Version: "v"})
		}))
	}
	look := func(what string, want ...string) {
		t.Helper()
		if diff := cmp.Diff(want, a.keys("servers")); diff != "" {
			t.Errorf("%s (-want +got):\n%s", what, diff)
		}
	}
	a.reach(c.state.Snapshot().Position())
	look("nobody has said where he is", "10.0.0.1:7400")
	if got := a.held["servers"]["10.0.0.1:7400"]; got != `{"address":"10.0.0.1:7400"}` {
		t.Errorf("an address is told as %s", got)
	}
	put("s2", "10.0.0.2:7400")
	put("s1", "10.0.0.1:7400")
	look("both have", "10.0.0.1:7400", "10.0.0.2:7400")
	put("s2", "10.0.0.3:7400")
	look("one has moved", "10.0.0.1:7400", "10.0.0.3:7400")

	who := newIdentity(t)
	res, err := c.rpc.Join(t.Context(), &meshpb.JoinRequest{Secret: c.token("vm-b", false), Csr: who.csr, Node: "vm-b"})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"10.0.0.1:7400", "10.0.0.3:7400"}, res.GetServers()); diff != "" {
		t.Errorf("joined (-want +got):\n%s", diff)
	}
}
