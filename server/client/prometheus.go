package client

import (
	"context"
	"net/http"
	"strconv"
)

// TargetGroup is one element of a document of Prometheus' HTTP service
// discovery (https://prometheus.io/docs/prometheus/latest/http_sd/): here one
// node.
type TargetGroup struct {
	Targets []string          `json:"targets"` // host:port
	Labels  map[string]string `json:"labels"`
}

// PrometheusTargets returns the metrics endpoints of all nodes that have joined,
// sorted by node, as Prometheus gets them. Port 0 is that of an agent by default.
func (c *Client) PrometheusTargets(ctx context.Context, port uint16) ([]TargetGroup, error) {
	path := "/v1/prometheus/sd"
	if port != 0 {
		path += "?port=" + strconv.Itoa(int(port))
	}
	var groups []TargetGroup
	return groups, c.do(ctx, http.MethodGet, path, nil, &groups)
}
