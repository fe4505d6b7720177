package api

import (
	"context"
	"io"
	"log/slog"
	"net/http"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/client"
)

// Snapshots saves and replaces the whole state.
type Snapshots interface {
	// Export writes the state, encrypted and ended by its checksum.
	Export(ctx context.Context, w io.Writer) (catalog.Position, error)
	// Import replaces the state, in one step, by what Export wrote. The error is a
	// *client.Error when the snapshot is to blame.
	Import(ctx context.Context, r io.Reader) (client.Restored, error)
}

// saveSnapshot streams the state. A failure half-way cuts the connection: the
// snapshot then lacks its end, and cannot be restored.
func (a *API) saveSnapshot(c *call) (any, error) {
	c.out.Header().Set("Content-Type", "application/octet-stream")
	c.out.Header().Set("Cache-Control", "no-store")
	if _, err := a.cfg.Snapshots.Export(c.Context(), c.out); err != nil {
		a.cfg.Log.ErrorContext(c.Context(), "snapshot failed", slog.String("request_id", c.id), slog.Any("error", err))
		panic(http.ErrAbortHandler) // net/http's way to cut a response that has begun
	}
	return written{}, nil
}

func (a *API) restoreSnapshot(c *call) (any, error) {
	done, err := a.cfg.Snapshots.Import(c.Context(), c.Body)
	if err != nil {
		return nil, err
	}
	c.revision = done.Position.Revision
	return done, nil
}
