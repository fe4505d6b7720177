package api_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/client"
	"github.com/meshd/meshd/server/state"
)

func (w *world) history(t *testing.T, query string) client.History {
	t.Helper()
	var h client.History
	w.do(t, http.MethodGet, "/v1/intentions/history?"+query, "", http.StatusOK, &h)
	return h
}

// edited are the changes of a history in a line each.
func edited(h client.History) []string {
	var out []string
	for _, tr := range h.Transactions {
		for _, c := range tr.Changes {
			out = append(out, c.Name+" "+c.Change)
		}
	}
	return out
}

// intend lets source call api, or forbids it.
func (w *world) intend(t *testing.T, source, action string) client.Result {
	t.Helper()
	var r client.Result
	w.do(t, http.MethodPut, "/v1/intentions/default/api/default/"+source,
		fmt.Sprintf(`{"source":"default/%s","destination":"api","action":%q}`, source, action), http.StatusOK, &r)
	return r
}

func TestHistory(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.intend(t, "web", "allow")
	w.intend(t, "web", "allow") // unchanged
	w.intend(t, "cron", "allow")
	w.intend(t, "web", "deny")
	w.do(t, http.MethodDelete, "/v1/intentions/default/api/default/cron", "", http.StatusOK, nil)
	all := w.history(t, "")
	want := []string{"cron → api deleted", "web → api updated", "cron → api created", "web → api created"}
	if d := cmp.Diff(want, edited(all)); d != "" {
		t.Error(d)
	}
	for _, tr := range all.Transactions {
		if !strings.HasPrefix(tr.By, "token:") || tr.ByName != "test" || tr.At.IsZero() || tr.Revision == 0 {
			t.Errorf("%+v", tr)
		}
	}
	if got := edited(w.history(t, "source=cron&destination=default/api")); !slices.Equal(got, []string{want[0], want[2]}) {
		t.Errorf("of one pair: %v", got)
	}
	if got := w.history(t, "since=2099-01-01T00:00:00Z"); len(got.Transactions) != 0 {
		t.Errorf("of the future: %+v", got)
	}
	var paged []string
	for q := "limit=3"; ; {
		page := w.history(t, q)
		paged = append(paged, edited(page)...)
		if page.Continue == "" {
			break
		}
		q = "limit=3&continue=" + page.Continue
	}
	if d := cmp.Diff(want, paged); d != "" {
		t.Error(d)
	}
	for _, bad := range []string{"sources=web", "source=a/b/c", "destination=A", "since=today", "limit=0", "continue=x"} {
		w.do(t, http.MethodGet, "/v1/intentions/history?"+bad, "", http.StatusBadRequest, nil)
	}
}

func TestUndo(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.intend(t, "web", "allow")
	const two = `{"resources":[
		{"kind":"intention","spec":{"source":"web","destination":"api","action":"deny"}},
		{"kind":"intention","spec":{"source":"cron","destination":"api","action":"allow"}}]}`
	var both client.Result
	w.do(t, http.MethodPost, "/v1/apply", two, http.StatusOK, &both)
	undo := func(body string, want int, out any) { w.do(t, http.MethodPost, "/v1/intentions/undo", body, want, out) }
	at := func(extra string) string { return fmt.Sprintf(`{"revision":%d%s}`, both.Position.Revision, extra) }

	// One of the two was changed since: neither is restored.
	w.intend(t, "cron", "deny")
	var refusal struct {
		Error client.Error `json:"error"`
	}
	undo(at(""), http.StatusConflict, &refusal)
	if f := refusal.Error.Fields; len(f) != 1 || f[0].Field != "cron → api" || !strings.Contains(f[0].Problem, "now: deny; before: none") {
		t.Errorf("%+v", refusal.Error)
	}
	var dry, done client.Result
	undo(at(`,"force":true,"dry_run":true`), http.StatusOK, &dry)
	undo(at(`,"force":true`), http.StatusOK, &done)
	want := []string{"web → api updated", "cron → api deleted"}
	if !slices.Equal(changes(dry), want) || !slices.Equal(changes(done), want) || !dry.DryRun || done.Changes[0].Revision == 0 {
		t.Errorf("dry %v, done %v", changes(dry), changes(done))
	}
	newest := w.history(t, "limit=1").Transactions[0]
	if newest.Note != fmt.Sprintf("undo %d", both.Position.Revision) || newest.Revision != done.Position.Revision {
		t.Errorf("%+v", newest)
	}
	// What is as it was before needs nothing.
	var again client.Result
	undo(at(""), http.StatusOK, &again)
	if got := changes(again); !slices.Equal(got, []string{"web → api unchanged"}) {
		t.Errorf("again: %v", got)
	}
	for body, status := range map[string]int{
		`{"revision":1}`: http.StatusNotFound, `{}`: http.StatusBadRequest, `{"revison":1}`: http.StatusBadRequest,
	} {
		undo(body, status, nil)
	}
	if status, _ := call(t, http.MethodPost, w.url+"/v1/intentions/undo", "", at("")); status != http.StatusUnauthorized {
		t.Errorf("without a token: %d", status)
	}
}

// TestUndoOfParts: the parts of what was too large for one record are restored
// together, by whichever of their revisions; or not at all, once one is forgotten.
func TestUndoOfParts(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.intend(t, "web", "allow")
	w.intend(t, "cron", "allow")
	part := func(number uint64, part int, revision uint64, source string) {
		w.update(t, func(tx *state.Tx) error {
			return state.IntentionEdits.Put(tx, state.EditsKey{Number: number, Part: part}, state.Edits{
				Revision: revision, Total: number, Intentions: []state.Edit{{
					Key: "default/api/_/default/" + source, After: json.RawMessage(`{"source":"default/` + source + `","destination":"api","action":"allow"}`),
				}},
			})
		})
	}
	part(50, 0, 7001, "web")
	part(50, 1, 7002, "cron")
	part(60, 1, 8002, "web") // its first part is forgotten
	if got := w.history(t, "limit=2").Transactions; len(got) != 2 || got[1].Revision != 7001 || len(got[1].Changes) != 2 {
		t.Errorf("history: %+v", got)
	}
	w.do(t, http.MethodPost, "/v1/intentions/undo", `{"revision":8002}`, http.StatusNotFound, nil)
	for _, revision := range []int{7002, 7001} {
		var done client.Result
		w.do(t, http.MethodPost, "/v1/intentions/undo", fmt.Sprintf(`{"revision":%d,"dry_run":true}`, revision), http.StatusOK, &done)
		if got := changes(done); !slices.Equal(got, []string{"web → api deleted", "cron → api deleted"}) {
			t.Errorf("undo %d: %v", revision, got)
		}
	}
}

func TestExplainBlames(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.do(t, http.MethodPut, "/v1/services/default/api", `{"namespace":"default","name":"api","ports":[{"name":"http","protocol":"http"}]}`, http.StatusOK, nil)
	explain := func() client.Explanation {
		var e client.Explanation
		w.do(t, http.MethodPost, "/v1/explain", `{"source":"web","destination":"api"}`, http.StatusOK, &e)
		return e
	}
	last := func(e client.Explanation) string { return e.Facts[len(e.Facts)-1].Text }
	undo := func(r client.Result) string { return fmt.Sprintf("meshctl intention undo %d", r.Position.Revision) }
	w.intend(t, "web", "allow")
	if e := explain(); !strings.Contains(last(e), "→ allow; created 2") || !strings.HasSuffix(last(e), "UTC by test") {
		t.Errorf("%+v", e)
	}
	// Taken away by a change, given back by undoing it.
	r := w.intend(t, "web", "deny")
	if e := explain(); !strings.HasSuffix(last(e), "by test (before: allow)") || !slices.Contains(e.Next, undo(r)) {
		t.Errorf("%+v", e)
	}
	w.intend(t, "web", "allow")
	w.do(t, http.MethodDelete, "/v1/intentions/default/api/default/web", "", http.StatusOK, &r)
	if e := explain(); !strings.Contains(last(e), "intention web → api was deleted") || !slices.Contains(e.Next, undo(r)) {
		t.Errorf("%+v", e)
	}
	// A change that did not take it away is not offered.
	r = w.intend(t, "*", "deny")
	if e := explain(); slices.Contains(e.Next, undo(r)) {
		t.Errorf("%+v", e)
	}
}

func TestExplainNamesTheOutside(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.instances(t, "vm-a/one")
	key := catalog.InstanceKey{Service: catalog.Name{Namespace: "default", Name: "api"}, Node: "vm-a", ID: "one"}
	w.update(t, func(tx *state.Tx) error {
		return state.Instances.Put(tx, key, catalog.Instance{Service: "api", ID: "one", Node: "vm-a", External: "api.example.com"})
	})
	var e client.Explanation
	w.do(t, http.MethodPost, "/v1/explain", `{"source":"web","destination":"api"}`, http.StatusOK, &e)
	const want = "service api: 1 of 1 healthy, outside the mesh: api.example.com through vm-a"
	if !slices.ContainsFunc(e.Facts, func(f client.Fact) bool { return f.Text == want }) {
		t.Errorf("%+v", e.Facts)
	}
}
