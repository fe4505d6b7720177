package api_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/client"
	"github.com/meshd/meshd/server/state"
)

// applySet applies nodes as a set and returns the answer.
func (w *world) applySet(t *testing.T, set string, prune bool, want int, nodes ...string) client.Result {
	t.Helper()
	req := client.ApplyRequest{Set: set, Prune: prune}
	for _, n := range nodes {
		req.Resources = append(req.Resources, client.Resource{Kind: client.KindNode, Spec: json.RawMessage(`{"name":"` + n + `"}`)})
	}
	body, err := json.Marshal(req)
	if err != nil {
		t.Fatal(err)
	}
	var r client.Result
	w.do(t, http.MethodPost, "/v1/apply", string(body), want, &r)
	return r
}

func changes(r client.Result) []string {
	var out []string
	for _, c := range r.Changes {
		out = append(out, c.Name+" "+c.Change)
	}
	return out
}

func (w *world) setMembers(name string) []string {
	var out []string
	for m := range w.state.Snapshot().MembersOf(name) {
		out = append(out, m.Kind+"/"+m.Name)
	}
	return out
}

func TestSets(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	if got := changes(w.applySet(t, "shop", false, http.StatusOK, "a", "b")); !slices.Equal(got, []string{"a created", "b created"}) {
		t.Errorf("first: %v", got)
	}
	first, ok := state.Sets.Get(w.state.Snapshot(), "shop")
	if !ok || first.Value.By == "" || first.Value.Updated.IsZero() {
		t.Errorf("record: %+v, %v", first.Value, ok)
	}
	w.applySet(t, "shop", true, http.StatusOK, "b", "a")
	if again, _ := state.Sets.Get(w.state.Snapshot(), "shop"); again.Revision != first.Revision {
		t.Error("applying the same again has written")
	}
	// Without --prune nothing is deleted, and it is said.
	r := w.applySet(t, "shop", false, http.StatusOK, "b", "c")
	if got := changes(r); !slices.Equal(got, []string{"b unchanged", "c created"}) || len(r.Warnings) != 1 || !strings.Contains(r.Warnings[0], "node a") {
		t.Errorf("without prune: %v %q", got, r.Warnings)
	}
	// Another set can't take what belongs to this one, and then does nothing.
	w.applySet(t, "other", true, http.StatusConflict, "x", "c")
	if _, ok := state.Nodes.Get(w.state.Snapshot(), "x"); ok {
		t.Error("a refused set has written")
	}
	// What somebody else deleted is gone from the set, too.
	w.do(t, http.MethodDelete, "/v1/nodes/b", "", http.StatusOK, nil)
	if got := w.setMembers("shop"); !slices.Equal(got, []string{"node/a", "node/c"}) {
		t.Errorf("members: %v", got)
	}
	if got := changes(w.applySet(t, "shop", true, http.StatusOK, "d")); !slices.Equal(got, []string{"d created", "a deleted", "c deleted"}) {
		t.Errorf("with prune: %v", got)
	}
	w.do(t, http.MethodPut, "/v1/sets/shop", `{"name":"shop"}`, http.StatusBadRequest, nil)
	w.do(t, http.MethodDelete, "/v1/sets/shop?prune=x", "", http.StatusBadRequest, nil)
	w.do(t, http.MethodDelete, "/v1/sets/shop?revision=1", "", http.StatusBadRequest, nil)
	w.do(t, http.MethodDelete, "/v1/sets/shap", "", http.StatusNotFound, nil)
	w.do(t, http.MethodDelete, "/v1/sets/shop", "", http.StatusOK, nil)
	w.do(t, http.MethodGet, "/v1/nodes/d", "", http.StatusOK, nil)
	w.applySet(t, "other", false, http.StatusOK, "d")
	w.do(t, http.MethodDelete, "/v1/sets/other?prune=true", "", http.StatusOK, &r)
	if got := changes(r); !slices.Equal(got, []string{"d deleted", "other deleted"}) || len(w.setMembers("other")) != 0 {
		t.Errorf("delete with prune: %v", got)
	}
	for _, body := range []string{`{"set":"shop"}`, `{"set":"Shop","resources":[{"kind":"node","spec":{"name":"a"}}]}`, `{"prune":true,"resources":[]}`} {
		w.do(t, http.MethodPost, "/v1/apply", body, http.StatusBadRequest, nil)
	}
}

// TestSetKeepsOrder: a namespace goes after what is in it, in one transaction.
func TestSetKeepsOrder(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	const service = `{"kind":"service","spec":{"namespace":"batch","name":"x"}}`
	const intention = `{"kind":"intention","spec":{"source":"spiffe://other.example/ns/a/svc/b","destination":"batch/x","action":"allow"}}`
	const namespace = `{"kind":"namespace","spec":{"name":"batch"}}`
	const node = `{"kind":"node","spec":{"name":"a"}}`
	var r client.Result
	w.do(t, http.MethodPost, "/v1/apply", `{"set":"s","resources":[`+intention+`,`+service+`,`+namespace+`,`+node+`]}`, http.StatusOK, &r)
	const pruned = `"set":"s","prune":true,"resources":[` + node + `]}`
	w.do(t, http.MethodPost, "/v1/apply", `{"dry_run":true,`+pruned, http.StatusOK, &r)
	if len(r.Changes) != 4 || !r.DryRun {
		t.Errorf("dry run: %v", changes(r))
	}
	w.do(t, http.MethodGet, "/v1/services/batch/x", "", http.StatusOK, nil)
	w.do(t, http.MethodPost, "/v1/apply", `{`+pruned, http.StatusOK, &r)
	want := []string{"a unchanged", "spiffe://other.example/ns/a/svc/b → batch/x deleted", "batch/x deleted", "batch deleted"}
	if got := changes(r); !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	// What others have put into the namespace keeps it, and with it everything.
	w.do(t, http.MethodPost, "/v1/apply", `{"set":"s","resources":[`+namespace+`,`+node+`]}`, http.StatusOK, nil)
	w.do(t, http.MethodPut, "/v1/services/batch/y", `{"namespace":"batch","name":"y"}`, http.StatusOK, nil)
	w.do(t, http.MethodPost, "/v1/apply", `{`+pruned, http.StatusConflict, nil)
}

// TestLargeSet does not fit a transaction, and is all or nothing all the same.
func TestLargeSet(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.update(t, func(tx *state.Tx) error { return state.Nodes.Put(tx, "own", catalog.Node{Name: "own"}) })
	var nodes []string
	for n := range 500 {
		nodes = append(nodes, fmt.Sprintf("n%03d", n))
	}
	old := w.state.Snapshot().Position()
	r := w.applySet(t, "all", true, http.StatusOK, nodes...)
	if len(r.Changes) != 500 || r.Position.Generation == old.Generation || r.Changes[7].Revision == 0 {
		t.Errorf("%d changes, %v after %v", len(r.Changes), r.Position, old)
	}
	// A small change of a large set is a transaction.
	now := w.state.Snapshot().Position()
	r = w.applySet(t, "all", true, http.StatusOK, append(nodes[3:], "new")...)
	if r.Position.Generation != now.Generation || len(r.Changes) != 501 || r.Changes[500].Change != client.ChangeDeleted {
		t.Errorf("%d changes, %v after %v", len(r.Changes), r.Position, now)
	}
	// A refusal at its end leaves nothing behind.
	w.applySet(t, "other", false, http.StatusConflict, append([]string{"n499"}, func() (more []string) {
		for n := range 100 {
			more = append(more, fmt.Sprintf("m%03d", n))
		}
		return more
	}()...)...)
	if got := state.Nodes.Len(w.state.Snapshot()); got != 499 {
		t.Errorf("%d nodes, want 499", got)
	}
	w.do(t, http.MethodDelete, "/v1/sets/all?prune=true", "", http.StatusOK, nil)
	if s := w.state.Snapshot(); state.Nodes.Len(s) != 1 || state.SetMembers.Len(s) != 0 || state.Sets.Len(s) != 0 {
		t.Errorf("left: %d nodes, %d members", state.Nodes.Len(s), state.SetMembers.Len(s))
	}
	if n := state.Tokens.Len(w.state.Snapshot()); n != 1 {
		t.Errorf("%d tokens: a rewrite has lost what it was not about", n)
	}
}
