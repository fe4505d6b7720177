package api_test

import (
	"net/http"
	"strings"
	"testing"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/client"
	"github.com/meshd/meshd/server/state"
)

// instances registers passing instances of api as "node/id".
func (w *world) instances(t *testing.T, names ...string) {
	t.Helper()
	service := catalog.Name{Namespace: "default", Name: "api"}
	w.update(t, func(tx *state.Tx) error {
		if err := state.Services.Put(tx, service, catalog.Service{Name: "api", Ports: []catalog.ServicePort{{Name: "http", Protocol: catalog.ProtocolHTTP}}}); err != nil {
			return err
		}
		for _, n := range names {
			node, id, _ := strings.Cut(n, "/")
			key := catalog.InstanceKey{Service: service, Node: node, ID: id}
			if err := state.Nodes.Put(tx, node, catalog.Node{Name: node, Services: []string{"api"}}); err != nil {
				return err
			}
			if err := state.Leases.Put(tx, node, catalog.Lease{Server: "s1"}); err != nil {
				return err
			}
			if err := state.Instances.Put(tx, key, catalog.Instance{Service: "api", ID: id, Node: node}); err != nil {
				return err
			}
			if err := state.InstanceStatuses.Put(tx, key, catalog.InstanceStatus{Health: catalog.HealthPassing}); err != nil {
				return err
			}
		}
		return nil
	})
}

func TestDrain(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.instances(t, "vm-a/one", "vm-a/two", "vm-b/one")
	healthy := func(want int) {
		t.Helper()
		var item client.Item
		w.do(t, http.MethodGet, "/v1/services/default/api", "", http.StatusOK, &item)
		if got := string(item.Status); !strings.Contains(got, `"healthy":`+string(rune('0'+want))) {
			t.Errorf("%s, want %d healthy", got, want)
		}
	}
	change := func(method, path, body, want string) client.Result {
		t.Helper()
		var r client.Result
		w.do(t, method, path, body, http.StatusOK, &r)
		if len(r.Changes) != 1 || r.Changes[0].Change != want {
			t.Errorf("%s %s: %+v, want %s", method, path, r.Changes, want)
		}
		return r
	}
	const two = "/v1/instances/default/api/vm-a/two/drain"
	change(http.MethodPut, two, `{"reason":"OPS-77"}`, client.ChangeDrained)
	healthy(2)
	change(http.MethodPut, two, `{"reason":"OPS-77"}`, client.ChangeUnchanged)
	if r := change(http.MethodPut, "/v1/nodes/vm-a/drain", "", client.ChangeDrained); len(r.Warnings) != 0 {
		t.Errorf("vm-b still serves: %q", r.Warnings)
	}
	healthy(1)
	if r := change(http.MethodPut, "/v1/nodes/vm-b/drain", `{}`, client.ChangeDrained); len(r.Warnings) != 1 {
		t.Errorf("nothing serves api any more: %q", r.Warnings)
	}
	healthy(0)
	var item client.Item
	w.do(t, http.MethodGet, "/v1/nodes/vm-a", "", http.StatusOK, &item)
	if !strings.Contains(string(item.Status), `"drain":true`) {
		t.Errorf("node: %s", item.Status)
	}
	rec, _ := state.NodeDrains.Get(w.state.Snapshot(), "vm-b")
	if rec.Value.By == "" || rec.Value.Since.IsZero() {
		t.Errorf("record: %+v", rec.Value)
	}
	change(http.MethodDelete, "/v1/nodes/vm-a/drain", "", client.ChangeUndrained)
	healthy(1) // two has a drain of its own
	change(http.MethodDelete, two, "", client.ChangeUndrained)
	change(http.MethodDelete, two, "", client.ChangeUnchanged)
	healthy(2)
	w.do(t, http.MethodPut, "/v1/nodes/vm-c/drain", "", http.StatusNotFound, nil)
	w.do(t, http.MethodPut, "/v1/instances/default/api/vm-b/two/drain", "", http.StatusNotFound, nil)
	w.do(t, http.MethodPut, "/v1/nodes/vm-a/drain", `{"reson":"x"}`, http.StatusBadRequest, nil)
	w.do(t, http.MethodPut, "/v1/nodes/vm-a/drain", `{"reason":"`+strings.Repeat("x", 300)+`"}`, http.StatusBadRequest, nil)
}

func TestLeave(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	var names []string
	for id := range strings.SplitSeq("a b c d e f g h i j k l", " ") {
		names = append(names, "vm-a/"+id)
	}
	w.instances(t, names[:6]...)
	w.instances(t, append(names[6:], "vm-b/a")...)
	w.do(t, http.MethodPost, "/v1/nodes/vm-a/leave", "", http.StatusConflict, nil)
	w.update(t, func(tx *state.Tx) error { return state.Leases.Put(tx, "vm-a", catalog.Lease{Server: "s1", Lost: true}) })
	var r client.Result
	w.do(t, http.MethodPost, "/v1/nodes/vm-a/leave", "", http.StatusOK, &r)
	s := w.state.Snapshot()
	if len(r.Changes) != 12 || state.Instances.Len(s) != 1 || state.InstanceStatuses.Len(s) != 1 || r.Position != s.Position() {
		t.Errorf("%d changes, left %d instances and %d statuses", len(r.Changes), state.Instances.Len(s), state.InstanceStatuses.Len(s))
	}
	w.do(t, http.MethodPost, "/v1/nodes/vm-a/leave", "", http.StatusOK, &r)
	if len(r.Changes) != 0 {
		t.Errorf("again: %+v", r.Changes)
	}
	w.do(t, http.MethodPost, "/v1/nodes/vm-c/leave", "", http.StatusNotFound, nil)
}
