package api

import (
	"cmp"
	"net"
	"strconv"
	"strings"

	"github.com/meshd/meshd/server/acl"
	"github.com/meshd/meshd/server/client"
	"github.com/meshd/meshd/server/state"
)

// metricsPort is where agents serve the metrics of their host by default.
const metricsPort = "7490"

// metrics tells about this server, in the form that the caller asks for.
func (a *API) metrics(c *call) (any, error) {
	a.cfg.Metrics.ServeHTTP(c.out, c.Request)
	return written{}, nil
}

// Watches returns how many watches are open.
func (a *API) Watches() int { return len(a.watches) }

// prometheusTargets tells Prometheus where the hosts' metrics are: at the address
// of each node that has joined. Its port is that of all: a fleet has one.
func (a *API) prometheusTargets(c *call) (any, error) {
	port := cmp.Or(c.URL.Query().Get("port"), metricsPort)
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return nil, badField("port", "%q is no port", port)
	}
	s, err := a.fresh(c)
	if err != nil {
		return nil, err
	}
	groups := []client.TargetGroup{} // Prometheus refuses null
	for name, node := range state.Nodes.All(s) {
		status, ok := state.NodeStatuses.Get(s, name)
		if !ok || status.Err != nil || !c.may(acl.Read, acl.Node, named(name)) {
			continue
		}
		host, _, err := net.SplitHostPort(status.Value.Address)
		if err != nil || host == "" {
			continue
		}
		lease, ok := state.Leases.Get(s, name)
		labels := map[string]string{
			"node":                  name,
			"__meta_mesh_node":      name,
			"__meta_mesh_version":   status.Value.Version,
			"__meta_mesh_connected": strconv.FormatBool(ok && lease.Err == nil && !lease.Value.Lost),
		}
		if node.Err == nil {
			for key, value := range node.Value.Labels {
				labels["__meta_mesh_label_"+labelName(key)] = value
			}
		}
		groups = append(groups, client.TargetGroup{Targets: []string{net.JoinHostPort(host, port)}, Labels: labels})
	}
	return groups, nil
}

// labelName replaces what the name of a label of Prometheus may not have.
func labelName(s string) string {
	return strings.Map(func(r rune) rune {
		if r == '_' || 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' {
			return r
		}
		return '_'
	}, s)
}
