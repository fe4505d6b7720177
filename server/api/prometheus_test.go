package api_test

import (
	"net/http"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/client"
	"github.com/meshd/meshd/server/state"
)

func TestMetricsAreForOperators(t *testing.T) {
	w := newWorld(t)
	if code, body := call(t, http.MethodGet, w.url+"/v1/metrics", w.token, ""); code != http.StatusOK || body != "stand_in 1\n" {
		t.Errorf("with a token: %d %q", code, body)
	}
	if code, body := call(t, http.MethodGet, w.url+"/v1/metrics", "", ""); code != http.StatusUnauthorized {
		t.Errorf("without one: %d %q", code, body)
	}
}

func TestPrometheusTargets(t *testing.T) {
	w := newWorld(t)
	if _, body := call(t, http.MethodGet, w.url+"/v1/prometheus/sd", w.token, ""); body != "[]" && body != "[]\n" {
		t.Errorf("without nodes it is %q, want an empty list", body)
	}
	w.update(t, func(tx *state.Tx) error {
		for name, labels := range map[string]map[string]string{"vm-a": {"rack/row": "r1"}, "vm-b": nil, "vm-never-joined": nil} {
			if err := state.Nodes.Put(tx, name, catalog.Node{Name: name, Labels: labels}); err != nil {
				return err
			}
		}
		if err := state.Leases.Put(tx, "vm-a", catalog.Lease{Server: "s1", Session: "x"}); err != nil {
			return err
		}
		if err := state.NodeStatuses.Put(tx, "vm-a", catalog.NodeStatus{Address: "10.0.1.17:7443", Version: "1.0.0"}); err != nil {
			return err
		}
		return state.NodeStatuses.Put(tx, "vm-b", catalog.NodeStatus{Address: "[fd00::1]:7443", Version: "1.0.0"})
	})
	for query, port := range map[string]string{"": "7490", "?port=9999&stale=true": "9999"} {
		var got []client.TargetGroup
		w.do(t, http.MethodGet, "/v1/prometheus/sd"+query, "", http.StatusOK, &got)
		want := []client.TargetGroup{
			{Targets: []string{"10.0.1.17:" + port}, Labels: map[string]string{
				"node": "vm-a", "__meta_mesh_node": "vm-a", "__meta_mesh_version": "1.0.0", "__meta_mesh_connected": "true", "__meta_mesh_label_rack_row": "r1",
			}},
			{Targets: []string{"[fd00::1]:" + port}, Labels: map[string]string{
				"node": "vm-b", "__meta_mesh_node": "vm-b", "__meta_mesh_version": "1.0.0", "__meta_mesh_connected": "false",
			}},
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("targets%s (-want +got):\n%s", query, diff)
		}
	}
	w.do(t, http.MethodGet, "/v1/prometheus/sd?port=x", "", http.StatusBadRequest, nil)
}
