package server

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/api"
	"github.com/meshd/meshd/server/client"
	"github.com/meshd/meshd/server/rpc"
)

// elsewhereInterval is how often the other servers are asked again how far their
// proxies are, while somebody waits for that.
const elsewhereInterval = 250 * time.Millisecond

// fleet shows the API what all servers together know of proxies. A call takes a
// second at most, if a server does not answer.
type fleet struct {
	rpc   *rpc.Server
	alone func() bool
}

var _ api.Fleet = fleet{}

func (f fleet) ask(req rpc.FleetRequest) rpc.Fleet { return f.rpc.AskFleet(context.Background(), req) }

// Rollout implements api.Fleet.
func (f fleet) Rollout(at catalog.Position, services []catalog.Name) (client.Rollout, <-chan struct{}) {
	changed := f.changed()
	rollouts, unasked := f.rpc.ClusterRollout(context.Background(), at, services)
	out := client.Rollout{Position: at, Done: len(unasked) == 0, Unasked: unasked}
	for _, r := range rollouts {
		out.Services = append(out.Services, client.RolloutService{Service: r.Service.Short(), Applied: r.Applied, Total: r.Proxies})
		out.Done = out.Done && r.Applied == r.Proxies
		out.Closed += r.Closed
		for _, p := range r.Refusals {
			out.Refused = append(out.Refused, fmt.Sprintf("proxy %s of node %s: %s", p.ID, p.Node, p.Refused))
		}
	}
	return out, changed
}

// changed returns a channel that is closed when something may have changed, here
// or at another server.
func (f fleet) changed() <-chan struct{} {
	here := f.rpc.FleetChanged()
	if f.alone() {
		return here
	}
	either := make(chan struct{})
	timer := time.NewTimer(elsewhereInterval)
	go func() {
		defer close(either)
		defer timer.Stop()
		select {
		case <-here:
		case <-timer.C:
		}
	}()
	return either
}

// Callers implements api.Fleet.
func (f fleet) Callers(services []catalog.Name) []catalog.Name {
	return f.ask(rpc.FleetRequest{Callers: services}).Callers()
}

// Held implements api.Fleet.
func (f fleet) Held() []string { return f.ask(rpc.FleetRequest{Held: true}).Held() }

// Release implements api.Fleet.
func (f fleet) Release() { f.ask(rpc.FleetRequest{Release: true}) }

// Proxies implements api.Fleet.
func (f fleet) Proxies() []client.ProxyStatus {
	proxies := f.ask(rpc.FleetRequest{Proxies: true}).Proxies()
	out := make([]client.ProxyStatus, 0, len(proxies))
	for _, p := range proxies {
		out = append(out, client.ProxyStatus{Node: p.Node, Proxy: p.ID, Position: p.Position, Refused: p.Refused, Closed: p.Closed})
	}
	return slices.Clip(out)
}
