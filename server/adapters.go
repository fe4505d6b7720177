package server

import (
	"fmt"
	"slices"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/api"
	"github.com/meshd/meshd/server/client"
	"github.com/meshd/meshd/server/rpc"
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
