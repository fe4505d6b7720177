package server

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"time"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/api"
	"github.com/meshd/meshd/server/backup"
	"github.com/meshd/meshd/server/client"
	"github.com/meshd/meshd/server/state"
	"github.com/meshd/meshd/server/store"
)

// Snapshots is the block snapshots of server.hcl: what the server that leads saves
// by itself.
type Snapshots struct {
	// Enabled is true when absent.
	Enabled *bool `json:"enabled,omitempty"`
	// Interval is the time between two: 1 h by default, at least a minute.
	Interval catalog.Duration `json:"interval,omitzero"`
	// Retain is how many of the newest are kept, 24 by default. Of older ones the
	// last of each day is kept for RetainDays days, 7 by default.
	Retain     int `json:"retain,omitempty"`
	RetainDays int `json:"retain_days,omitempty"`
	// MaxMiB bounds the size of all together, 1024 by default.
	MaxMiB int `json:"max_mib,omitempty"`
	// Dir is snapshots in DataDir by default.
	Dir string `json:"dir,omitempty"`
}

const minSnapshotInterval = time.Minute

func (c Snapshots) withDefaults(dataDir string) Snapshots {
	c.Interval = cmp.Or(c.Interval, catalog.Duration(time.Hour))
	c.Retain = cmp.Or(c.Retain, 24)
	c.RetainDays = cmp.Or(c.RetainDays, 7)
	c.MaxMiB = cmp.Or(c.MaxMiB, 1024)
	c.Dir = cmp.Or(c.Dir, filepath.Join(dataDir, "snapshots"))
	return c
}

func (c Snapshots) validate(p *catalog.Problems) {
	if d := c.Interval.Std(); d != 0 && d < minSnapshotInterval {
		p.Add("snapshots.interval", "%s is too short: write at least %s; enabled = false takes none", d, minSnapshotInterval)
	}
	for _, n := range []struct {
		field string
		value int
	}{{"snapshots.retain", c.Retain}, {"snapshots.retain_days", c.RetainDays}, {"snapshots.max_mib", c.MaxMiB}} {
		if n.value < 0 {
			p.Add(n.field, "%d is negative", n.value)
		}
	}
}

// schedule is what the keeper goes by.
func (c Snapshots) schedule() backup.Schedule {
	s := backup.Schedule{Interval: c.Interval.Std(), Retain: c.Retain, Days: c.RetainDays, MaxBytes: int64(c.MaxMiB) << 20}
	if c.Enabled != nil && !*c.Enabled {
		s.Interval = 0
	}
	return s
}

func (m *member) newKeeper() *backup.Keeper {
	schedule := func() backup.Schedule { return m.live.now().Snapshots.schedule() }
	return backup.NewKeeper(m.config.Snapshots.Dir, schedule, m.live.next, m.engine, m.cluster(), m.log)
}

// snapshots saves and replaces the whole store.
type snapshots struct {
	engine    store.Engine
	cluster   backup.Cluster
	authority *authority
}

var _ api.Snapshots = snapshots{}

func (m *member) snapshots() snapshots {
	return snapshots{engine: m.engine, cluster: m.cluster(), authority: m.authority}
}

// cluster is whose snapshots are taken here.
func (m *member) cluster() backup.Cluster {
	return backup.Cluster{TrustDomain: m.config.TrustDomain, Key: m.authority.key, Server: m.name, Version: m.config.Version}
}

// Export implements api.Snapshots.
func (s snapshots) Export(ctx context.Context, w io.Writer) (catalog.Position, error) {
	header, err := backup.Save(ctx, w, s.engine, s.cluster, time.Now())
	return catalog.Position(header.Position), err //nolint:wrapcheck // says what was done
}

// Import implements api.Snapshots. A snapshot of another cluster, or of a newer
// version, changes nothing.
func (s snapshots) Import(ctx context.Context, r io.Reader) (client.Restored, error) {
	seen := &restoreCheck{authority: s.authority}
	done, err := backup.Restore(ctx, r, s.engine, s.cluster, backup.Policy{
		Check: seen.check,
		// Who the servers are is not undone by bringing back what they hold.
		Keep:    func(key string) bool { return strings.HasPrefix(key, string(state.Servers.Kind())+"/") },
		Rewrite: state.Carry,
	})
	switch {
	case errors.Is(err, backup.ErrForeign):
		return client.Restored{}, &client.Error{Code: client.CodeConflict, Message: err.Error(), Next: "nothing was changed; restore it on a cluster with its own cluster key"}
	case errors.Is(err, backup.ErrFormat), errors.Is(err, backup.ErrDamaged):
		return client.Restored{}, &client.Error{Code: client.CodeInvalid, Message: err.Error(), Next: "nothing was changed; look at the file with meshctl snapshot inspect"}
	case err != nil:
		return client.Restored{}, err //nolint:wrapcheck // says what was done
	}
	out := client.Restored{
		Before: catalog.Position(done.Before), Position: catalog.Position(done.After), Changes: []client.RecordChange{},
		Snapshot: client.Snapshot{
			TrustDomain: done.Header.TrustDomain, Server: done.Header.Server, Version: done.Header.Version,
			Created: done.Header.Created, Position: catalog.Position(done.Header.Position),
		},
	}
	for _, c := range done.Changes {
		out.Changes = append(out.Changes, client.RecordChange(c))
	}
	return out, nil
}

// restoreCheck refuses snapshots that this cluster could not go on with.
type restoreCheck struct {
	authority    *authority
	known, signs bool
}

// check is backup.Policy's.
func (c *restoreCheck) check(pair store.Pair) error {
	switch pair.Key {
	case state.Clusters.Path(state.Singleton{}):
		c.known = true
		return c.cluster(pair)
	case state.Authorities.Path(ProviderBuiltin):
		c.signs = true
		return c.signer(pair)
	case "":
		if !c.known || !c.signs {
			return fmt.Errorf("%w: it has no record of its cluster, or of its CA", backup.ErrForeign)
		}
	}
	return nil
}

func (c *restoreCheck) cluster(pair store.Pair) error {
	cluster, err := state.Clusters.Read(state.Singleton{}, pair.Value)
	switch own := c.authority.config.TrustDomain; {
	case err != nil:
		return fmt.Errorf("%w: %w", backup.ErrForeign, err)
	case cluster.TrustDomain != own:
		return fmt.Errorf("%w: it is of trust domain %q, this cluster is %q", backup.ErrForeign, cluster.TrustDomain, own)
	case cluster.FeatureLevel > catalog.FeatureLevel:
		return fmt.Errorf("%w: %w: it is at feature level %d, this program knows %d",
			backup.ErrForeign, ErrTooOld, cluster.FeatureLevel, catalog.FeatureLevel)
	default:
		return nil
	}
}

// signer refuses a CA that this cluster could not sign with: after the restore no
// certificate could be renewed, and no server start.
func (c *restoreCheck) signer(pair store.Pair) error {
	raw, err := state.Authorities.Read(ProviderBuiltin, pair.Value)
	if err == nil {
		_, err = c.authority.signer(state.Record[json.RawMessage]{Value: raw, Raw: pair.Value})
	}
	if err != nil {
		return fmt.Errorf("%w: %w", backup.ErrForeign, err)
	}
	return nil
}
