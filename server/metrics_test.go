package server_test

import (
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/meshd/meshd/server"
)

func TestMetricsCountRequests(t *testing.T) {
	t.Parallel()
	i := mustRun(t, server.Config{DataDir: privateDir(t)})
	get := func(path string) string {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://server"+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := i.local().Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close() //nolint:errcheck // read to its end
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return string(body)
	}
	get("/v1/nodes")
	get("/v1/nodes/vm-9")
	get("/v1/nope")
	text := get("/v1/metrics")
	for _, want := range []string{
		`mesh_server_requests_total{code="200",method="GET",route="/v1/nodes"} 1`,
		`mesh_server_requests_total{code="404",method="GET",route="/v1/nodes/{name}"} 1`,
		`mesh_server_requests_total{code="404",method="other",route="other"} 1`,
		`mesh_server_request_duration_seconds_count{method="GET",route="/v1/nodes"} 1`,
		`mesh_server_nodes_held 0`,
	} {
		if !strings.Contains(text, want+"\n") {
			t.Errorf("no %s", want)
		}
	}
}
