package cluster

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"time"

	"github.com/meshd/meshd/tests/canary"
)

// sweep looks for the cluster's secrets in all that its programs have left, and in
// the metrics of the servers that still run. An agent and its proxy keep the private
// keys of their own host. It runs after each test.
func (c *Cluster) sweep() {
	for i, f := range c.Sweep() {
		if i < 10 {
			c.t.Errorf("a secret is where none may be: %s", f)
		}
	}
}

// Sweep is what New does when the test ends.
func (c *Cluster) Sweep() []canary.Find {
	c.t.Helper()
	finds, searchers, err := canary.Mesh{
		Folders: []string{filepath.Dir(filepath.Dir(c.Servers[0].Dir))}, // of all folders of the test
		Inputs:  canary.Inputs(),
		KeepsKeys: func(path string) bool {
			return strings.Contains(path, "/agent/") || strings.Contains(path, "/proxy/")
		},
	}.Sweep()
	if err != nil {
		c.t.Fatal(err)
	}
	for _, s := range c.Servers {
		for _, look := range searchers {
			if f, err := s.searchMetrics(look); err == nil { // else it does not run
				finds = append(finds, f...)
			}
		}
	}
	return finds
}

// searchMetrics looks into what the server tells Prometheus.
func (s *Server) searchMetrics(look *canary.Searcher) ([]canary.Find, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	transport := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", s.Path("server.sock"))
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://meshd/v1/metrics", nil)
	if err != nil {
		return nil, fmt.Errorf("ask for metrics: %w", err)
	}
	resp, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		return nil, fmt.Errorf("ask for metrics: %w", err)
	}
	defer resp.Body.Close() //nolint:errcheck // read to its end
	return look.Reader("the metrics of "+s.Name, resp.Body)
}
