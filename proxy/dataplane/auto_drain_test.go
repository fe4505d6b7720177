package dataplane_test

import (
	"errors"
	"io"
	"testing"

	"github.com/meshd/meshd/catalog"
)

// TestAutoDrain: a connection on which nobody has spoken does not hold up the end of the process.
func TestAutoDrain(t *testing.T) {
	m := newMesh(t, options{protocol: catalog.ProtocolAuto, apps: []string{serveTCP(t, echo)}, intention: allow()})
	c := dial(t, m.upstream)
	eventually(t, "the far side is open", func() bool { return m.b.metric("mesh_connections_open", "direction", "inbound") == 1 })
	if got := m.a.plane.Drain(t.Context(), soon(t, 0)); got.Cut != 0 || got.Begun != 1 {
		t.Errorf("drained %+v", got)
	}
	if n, err := c.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
		t.Errorf("the client got %d bytes and %v, want the end", n, err)
	}
}
