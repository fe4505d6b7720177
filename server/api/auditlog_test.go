package api_test

import (
	"net/http"
	"strings"
	"testing"

	"github.com/meshd/meshd/server/api"
	"github.com/meshd/meshd/server/audit"
)

// TestWritesNeedAPlaceInTheAuditLog: without one nothing is changed; reads go on.
func TestWritesNeedAPlaceInTheAuditLog(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	var kept []api.AuditRecord
	full := false
	w.reserve.Store(func() (func(api.AuditRecord), error) {
		if full {
			return nil, audit.ErrUnavailable
		}
		return func(r api.AuditRecord) { kept = append(kept, r) }, nil
	})
	const node = "/v1/nodes/vm-a"
	w.do(t, http.MethodPut, node, `{"name":"vm-a"}`, http.StatusOK, nil)
	if len(kept) != 1 || kept[0].Outcome != api.OutcomeAllowed || kept[0].Revision == 0 {
		t.Errorf("%+v", kept)
	}
	w.do(t, http.MethodPut, node, `{"name":"vm-b"}`, http.StatusBadRequest, nil)
	if len(kept) != 2 || kept[1].Outcome != api.OutcomeFailed {
		t.Errorf("%+v", kept)
	}
	full = true
	for _, write := range [][2]string{{http.MethodDelete, node}, {http.MethodPost, "/v1/join-tokens"}, {http.MethodPut, "/v1/snapshot"}, {http.MethodPost, "/v1/apply"}} {
		status, body := call(t, write[0], w.url+write[1], w.token, "{}")
		if status != http.StatusServiceUnavailable || !strings.Contains(body, "nothing was changed") {
			t.Errorf("%v: %d %s", write, status, body)
		}
	}
	w.do(t, http.MethodGet, node, "", http.StatusOK, nil)
	// A stranger takes no place, whether there is one or not.
	w.accounts()
	if status, _ := call(t, http.MethodDelete, w.url+node, "", ""); status != http.StatusUnauthorized {
		t.Errorf("a stranger: %d", status)
	}
	if got := w.accounts(); len(kept) != 2 || len(got) != 1 || got[0].Outcome != api.OutcomeDenied {
		t.Errorf("%+v, %+v", kept, got)
	}
}
