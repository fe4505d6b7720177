package drive

import (
	"context"
	"net"

	"github.com/meshd/meshd/tests/bench/server/bareraft"
)

// raftWriter is a client of bareraft.
type raftWriter struct {
	address string
	client  *bareraft.Client
}

// Write implements Writer. A failed connection is made anew by the next call.
func (w *raftWriter) Write(ctx context.Context, key string, value []byte, expect uint64) (uint64, error) {
	if w.client == nil {
		var d net.Dialer
		conn, err := d.DialContext(ctx, "tcp", w.address)
		if err != nil {
			return 0, err
		}
		w.client = bareraft.NewClient(conn)
	}
	revision, err := w.client.Set(ctx, key, value, expect)
	if err != nil && !bareraft.Refused(err) {
		w.Close()
	}
	return revision, err
}

// Close implements Writer.
func (w *raftWriter) Close() {
	if w.client != nil {
		w.client.Close()
		w.client = nil
	}
}
