package agents_test

import (
	"testing"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/client"
	"github.com/meshd/meshd/tests/bench/agents"
)

// Every service has as many instances as the others, no two on one node.
func TestSpread(t *testing.T) {
	t.Parallel()
	size := agents.Size{Agents: 1000, Services: 5000, Instances: 20_000, Upstreams: 10}
	m := agents.NewMesh(size, &client.Client{}, []string{"127.0.0.1:7400"})
	instances := map[catalog.Name]int{}
	for node, names := range m.Spread() {
		seen := map[catalog.Name]bool{}
		for _, name := range names {
			if seen[name] {
				t.Errorf("node %s has %s twice", node, name)
			}
			seen[name] = true
			instances[name]++
		}
		if len(names) != 20 {
			t.Errorf("node %s has %d instances", node, len(names))
		}
	}
	for name, n := range instances {
		if n != 4 {
			t.Errorf("%s has %d instances", name, n)
		}
	}
	if len(instances) != size.Services {
		t.Errorf("%d services have instances", len(instances))
	}
	if got := size.Topics(); got != 33 {
		t.Errorf("an agent follows %d topics", got)
	}
}
