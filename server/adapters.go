package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"slices"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/api"
	"github.com/meshd/meshd/server/client"
	"github.com/meshd/meshd/server/rpc"
	"github.com/meshd/meshd/server/state"
	"github.com/meshd/meshd/server/store"
)

// fleet shows the API what rpc knows of proxies.
type fleet struct {
	rpc *rpc.Server
}

var _ api.Fleet = fleet{}

// Rollout implements api.Fleet.
func (f fleet) Rollout(at catalog.Position, services []catalog.Name) (client.Rollout, <-chan struct{}) {
	changed := f.rpc.FleetChanged()
	out := client.Rollout{Position: at, Done: true}
	for _, r := range f.rpc.Rollout(at, services) {
		out.Services = append(out.Services, client.RolloutService{Service: r.Service.Short(), Applied: r.Applied, Total: r.Proxies})
		out.Done = out.Done && r.Applied == r.Proxies
		out.Closed += r.Closed
		for _, p := range r.Refusals {
			out.Refused = append(out.Refused, fmt.Sprintf("proxy %s of node %s: %s", p.ID, p.Node, p.Refused))
		}
	}
	return out, changed
}

// Callers implements api.Fleet.
func (f fleet) Callers(services []catalog.Name) []catalog.Name {
	var all []catalog.Name
	for _, s := range services {
		all = append(all, f.rpc.Callers(s)...)
	}
	slices.SortFunc(all, catalog.Name.Compare)
	return slices.Compact(all)
}

// Held implements api.Fleet.
func (f fleet) Held() []string { return f.rpc.HeldNodes() }

// Release implements api.Fleet.
func (f fleet) Release() { f.rpc.ReleaseNodes() }

// Proxies implements api.Fleet.
func (f fleet) Proxies() []client.ProxyStatus {
	proxies := f.rpc.Proxies()
	out := make([]client.ProxyStatus, 0, len(proxies))
	for _, p := range proxies {
		out = append(out, client.ProxyStatus{Node: p.Node, Proxy: p.ID, Position: p.Position, Refused: p.Refused, Closed: p.Closed})
	}
	return out
}

var errForeignSnapshot = errors.New("snapshot can't be restored here")

// snapshots saves and replaces the whole store.
type snapshots struct {
	engine    store.Engine
	authority *authority
}

var _ api.Snapshots = snapshots{}

// Export implements api.Snapshots.
func (s snapshots) Export(ctx context.Context, w io.Writer) (catalog.Position, error) {
	at, err := store.Export(ctx, s.engine, w)
	return catalog.Position(at), err //nolint:wrapcheck // says what was done
}

// Import implements api.Snapshots. A snapshot of another cluster, or of a newer
// version, changes nothing.
func (s snapshots) Import(ctx context.Context, r io.Reader) (catalog.Position, error) {
	_, pairs, err := store.ReadDump(r)
	if err != nil {
		return catalog.Position{}, fmt.Errorf("restore: %w", err)
	}
	at, err := store.Replace(ctx, s.engine, store.Position{}, state.Carry(s.ours(pairs))) //nolint:contextcheck // opening a CA does no I/O
	if errors.Is(err, errForeignSnapshot) {
		return catalog.Position{}, &client.Error{Code: client.CodeConflict, Message: err.Error(), Next: "nothing was changed; restore it on a cluster of its own"}
	}
	if err != nil {
		return catalog.Position{}, fmt.Errorf("restore: %w", err)
	}
	return catalog.Position(at), nil
}

// ours passes the pairs on, and ends with an error unless they were of this
// cluster.
func (s snapshots) ours(pairs iter.Seq2[store.Pair, error]) iter.Seq2[store.Pair, error] {
	return func(yield func(store.Pair, error) bool) {
		known, signs := false, false
		for pair, err := range pairs {
			switch {
			case err != nil:
			case pair.Key == state.Clusters.Path(state.Singleton{}):
				known = true
				err = s.checkCluster(pair)
			case pair.Key == state.Authorities.Path(ProviderBuiltin):
				signs = true
				err = s.checkAuthority(pair)
			}
			if !yield(pair, err) || err != nil {
				return
			}
		}
		if !known || !signs {
			yield(store.Pair{}, fmt.Errorf("%w: it has no record of its cluster, or of its CA", errForeignSnapshot))
		}
	}
}

func (s snapshots) checkCluster(pair store.Pair) error {
	cluster, err := state.Clusters.Read(state.Singleton{}, pair.Value)
	switch {
	case err != nil:
		return fmt.Errorf("%w: %w", errForeignSnapshot, err)
	case cluster.TrustDomain != s.authority.config.TrustDomain:
		return fmt.Errorf("%w: it is of trust domain %q, this cluster is %q", errForeignSnapshot, cluster.TrustDomain, s.authority.config.TrustDomain)
	case cluster.FeatureLevel > catalog.FeatureLevel:
		return fmt.Errorf("%w: %w: it is at feature level %d, this program knows %d",
			errForeignSnapshot, ErrTooOld, cluster.FeatureLevel, catalog.FeatureLevel)
	default:
		return nil
	}
}

// checkAuthority refuses a CA that this cluster could not sign with: after the
// restore no certificate could be renewed, and no server start.
func (s snapshots) checkAuthority(pair store.Pair) error {
	raw, err := state.Authorities.Read(ProviderBuiltin, pair.Value)
	if err == nil {
		_, err = s.authority.signer(state.Record[json.RawMessage]{Value: raw, Raw: pair.Value})
	}
	if err != nil {
		return fmt.Errorf("%w: %w", errForeignSnapshot, err)
	}
	return nil
}
