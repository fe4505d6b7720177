package client

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"time"

	"github.com/meshd/meshd/catalog"
)

// Restored is what a restore did.
type Restored struct {
	// Before is the state that was replaced, Position the one that is there now, at
	// the begin of a new generation.
	Before   catalog.Position `json:"before"`
	Position catalog.Position `json:"position"`
	Snapshot Snapshot         `json:"snapshot"`
	// Changes says how the two differ, by kind of record; not only kinds that users
	// write.
	Changes []RecordChange `json:"changes"`
}

// Snapshot is what a snapshot says of itself.
type Snapshot struct {
	TrustDomain string           `json:"trust_domain"`
	Server      string           `json:"server,omitempty"` // that took it
	Version     string           `json:"version,omitempty"`
	Created     time.Time        `json:"created"`
	Position    catalog.Position `json:"position"`
}

// RecordChange counts records of one kind.
type RecordChange struct {
	Kind    string `json:"kind"`
	Added   int    `json:"added"`
	Changed int    `json:"changed"`
	Removed int    `json:"removed"`
}

// SaveSnapshot writes the whole state to w, encrypted under the cluster key, and
// returns how many bytes it has. One that was cut short is refused by
// RestoreSnapshot.
func (c *Client) SaveSnapshot(ctx context.Context, w io.Writer) (int64, error) {
	resp, err := c.send(ctx, http.MethodGet, "/v1/snapshot", "", nil)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close() //nolint:errcheck // read to its end below
	n, err := io.Copy(w, resp.Body)
	if err != nil {
		return n, fmt.Errorf("save the snapshot: %w", err)
	}
	return n, nil
}

// RestoreSnapshot replaces the whole state by what r holds.
func (c *Client) RestoreSnapshot(ctx context.Context, r io.Reader) (Restored, error) {
	var out Restored
	resp, err := c.send(ctx, http.MethodPut, "/v1/snapshot", "application/octet-stream", r)
	if err != nil {
		return out, err
	}
	return out, c.read(resp, http.MethodPut, "/v1/snapshot", &out)
}
