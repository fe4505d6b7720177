package dataplane_test

import (
	"strings"
	"testing"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/proxy/flow"
)

func TestStacks(t *testing.T) {
	m := newMesh(t, options{protocol: catalog.ProtocolTCP, apps: []string{serveTCP(t, echo)}, intention: allow()})
	exchange(t, dial(t, m.upstream), "x")
	var text strings.Builder
	err := m.a.plane.Watch(t.Context(), flow.Query{Want: flow.Stacks}, func(a flow.Answer) error {
		_, err := text.WriteString(a.Stacks)
		return err
	})
	if err != nil || !strings.Contains(text.String(), "goroutine ") || !strings.Contains(text.String(), "dataplane.(*Plane).splice") {
		t.Errorf("%v\n%.2000s", err, text.String())
	}
}
