package api_test

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/intentions"
	"github.com/meshd/meshd/server/acl"
	"github.com/meshd/meshd/server/api"
	"github.com/meshd/meshd/server/client"
	"github.com/meshd/meshd/server/state"
)

// TestScopedReads: lists, histories and rollouts show what may be read, and nothing
// else.
func TestScopedReads(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	tokens := w.team(t)
	w.do(t, http.MethodPut, "/v1/namespaces/shop", `{"name":"shop"}`, http.StatusOK, nil)
	for _, n := range []string{"shop/cart", "default/api-1", "default/web"} {
		ns, name, _ := strings.Cut(n, "/")
		w.do(t, http.MethodPut, "/v1/services/"+n, fmt.Sprintf(`{"namespace":%q,"name":%q}`, ns, name), http.StatusOK, nil)
	}
	w.nodes(t, "x1", "o1")
	w.update(t, func(tx *state.Tx) error {
		for _, n := range []string{"x1", "o1"} {
			if err := state.NodeStatuses.Put(tx, n, catalog.NodeStatus{Address: "10.0.0.1:7443"}); err != nil {
				return err
			}
		}
		return nil
	})
	for _, i := range [][2]string{{"default/cart", "shop/api-1"}, {"shop/web", "default/cart"}, {"default/api-1", "default/web"}, {"default/web", "default/web"}} {
		dst, src := strings.Split(i[0], "/"), strings.Split(i[1], "/")
		w.do(t, http.MethodPut, "/v1/intentions/"+strings.Join(append(dst, src...), "/"), fmt.Sprintf(`{"source":%q,"destination":%q,"action":"allow"}`, i[1], i[0]), http.StatusOK, nil)
	}
	w.fleet.callers = []catalog.Name{{Namespace: "shop", Name: "cart"}, {Namespace: "default", Name: "web"}}
	w.fleet.rollout = client.Rollout{Done: true, Refused: []string{"proxy p of node o1: no"}}
	for _, row := range []struct {
		who, path string
		want      []string // nil: refused
	}{
		{"shop", "/v1/services", []string{"shop/cart"}},
		{"api", "/v1/services", []string{"api-1"}},
		{"read-only", "/v1/services", []string{"api-1", "web", "shop/cart"}},
		{"read-only", "/v1/services?limit=2", []string{"api-1", "web"}},
		{"shop", "/v1/services?limit=1", []string{"shop/cart"}},
		{"shop", "/v1/services?namespace=shop", []string{"shop/cart"}},
		{"shop", "/v1/services?namespace=default", nil},
		{"api", "/v1/services?namespace=default", []string{"api-1"}},
		{"api", "/v1/nodes", []string{"x1"}},
		{"shop", "/v1/nodes", nil},
		{"shop", "/v1/intentions", []string{"shop/api-1 → cart", "cart → shop/web"}},
		{"api", "/v1/intentions", []string{"web → api-1"}},
		{"read-only", "/v1/policies", []string{"admin", "read-only", "api", "shop"}},
		{"read-only", "/v1/policies?limit=1", []string{"admin"}},
		{"read-only", "/v1/policies?limit=3", []string{"admin", "read-only", "api"}},
		{"admin", "/v1/policies?prefix=a", []string{"admin", "api"}},
		{"shop", "/v1/policies", nil},
		{"shop", "/v1/tokens", nil},
	} {
		status, body := call(t, http.MethodGet, w.url+row.path, tokens[row.who], "")
		var list client.List
		if status == http.StatusOK {
			if err := json.Unmarshal([]byte(body), &list); err != nil {
				t.Fatal(err)
			}
		}
		got := names(list.Items)
		slices.Sort(got)
		want := slices.Clone(row.want)
		slices.Sort(want)
		if (row.want == nil) != (status == http.StatusForbidden) || !slices.Equal(got, want) {
			t.Errorf("%s %s: %d %q, want %q", row.who, row.path, status, got, row.want)
		}
	}
	for _, row := range []struct {
		who, path   string
		has, hasNot string
	}{
		{"shop", "/v1/intentions/history", "cart → shop/web", "api-1 \\u2192"},
		{"shop", "/v1/intentions/history", "cart → shop/web", "web → api-1"},
		{"api", "/v1/prometheus/sd", `"node":"x1"`, "o1"},
		{"shop", "/v1/services/shop/crt", "did you mean shop/cart", "web"},
		{"shop", "/v1/services/shop/wex", "does not exist", "did you mean"},
		{"shop", "/v1/rollout?generation=g&revision=1&service=shop/cart&service=web", "shop/cart", `"web"`},
		{"shop", "/v1/rollout?generation=g&revision=1&callers_of=shop/cart", "shop/cart", `"web"`},
		{"shop", "/v1/rollout?generation=g&revision=1&service=shop/cart", "a proxy refused its plan", "o1"},
		{"read-only", "/v1/rollout?generation=g&revision=1&service=shop/cart", "proxy p of node o1", "read operator"},
		{"powerless", "/v1/rollout?generation=g&revision=1&service=shop/cart", "may not read any service", "Done"},
	} {
		if _, body := call(t, http.MethodGet, w.url+row.path, tokens[row.who], ""); !strings.Contains(body, row.has) || strings.Contains(body, row.hasNot) {
			t.Errorf("%s %s: %s, want %q and not %q", row.who, row.path, body, row.has, row.hasNot)
		}
	}
	for _, row := range []struct {
		who, src, dst string
		status        int
	}{
		{"shop", "web", "shop/cart", 200},
		{"shop", "shop/cart", "web", 200},
		{"shop", "api-1", "web", 403},
		{"shop", "spiffe://other.example/ns/shop/svc/cart", "web", 403},
		{"api", "web", "api-1", 200},
		{"powerless", "web", "api-1", 403},
	} {
		for _, path := range []string{"/v1/intentions/check", "/v1/explain"} {
			if status, body := call(t, http.MethodPost, w.url+path, tokens[row.who], fmt.Sprintf(`{"source":%q,"destination":%q}`, row.src, row.dst)); status != row.status {
				t.Errorf("%s asks %s of %s → %s: %d %s, want %d", row.who, path, row.src, row.dst, status, body, row.status)
			}
		}
	}
}

// TestWatchFollowsPolicies: a watch shows what may be read, and what may be read
// from now on, when policies change.
func TestWatchFollowsPolicies(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.policy(t, "watcher", rule("service", "default", "api-*", "read"))
	secret := w.grant(t, "watcher", "watcher")
	put := func(name string) {
		w.update(t, func(tx *state.Tx) error {
			n := catalog.Name{Namespace: "default", Name: name}
			return state.Services.Put(tx, n, catalog.Service{Namespace: "default", Name: name})
		})
	}
	put("api-1")
	put("web")
	events := w.events(t, "/v1/services?watch=true", secret)
	want := func(texts ...string) {
		t.Helper()
		var got []string
		for range texts {
			got = append(got, <-events)
		}
		if diff := cmp.Diff(texts, got); diff != "" {
			t.Fatalf("-want +got\n%s", diff)
		}
	}
	want("reset", "put api-1", "position")
	put("web-2")
	put("api-2")
	want("put api-2", "position")
	w.policy(t, "watcher", rule("service", "default", "web*", "read"))
	want("reset", "put web", "put web-2", "position")
	put("api-3")
	put("web-3")
	want("put web-3", "position")
	w.accounts()
	w.policy(t, "watcher", rule("node", "", "*", "read"))
	want("error permission")
	for range events {
	}
	if got := w.accounts(); len(got) != 1 || got[0].Outcome != api.OutcomeDenied || got[0].Title != "watcher" || got[0].Code != client.CodePermission {
		t.Errorf("accounted for: %+v", got)
	}
}

// TestWatchEndsWithTheTokensTime: nobody sees more because nothing happens.
func TestWatchEndsWithTheTokensTime(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	record, secret := acl.NewToken("read-only", "short", time.Now())
	soon := time.Now().Add(300 * time.Millisecond)
	record.Expires = &soon
	w.update(t, func(tx *state.Tx) error { return state.Tokens.Put(tx, acl.Hash([]byte(secret)), record) })
	events := w.events(t, "/v1/nodes?watch=true", secret)
	if got := []string{<-events, <-events, <-events}; got[2] != "error unauthorized" {
		t.Errorf("%q", got)
	}
	if late := time.Since(soon); late < 0 || late > 10*time.Second {
		t.Errorf("it ended %v after the token", late)
	}
}

// events follows a stream of events: "reset", "put NAME", "error CODE".
func (w *world) events(t *testing.T, path, token string) <-chan string {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, w.url+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+token)
	resp, err := http.DefaultClient.Do(req) //nolint:bodyclose // the goroutine below does
	if err != nil {
		t.Fatal(err)
	}
	out := make(chan string)
	go func() {
		defer close(out)
		defer resp.Body.Close() //nolint:errcheck // read to its end, or cut by the test's
		lines := bufio.NewScanner(resp.Body)
		kind := ""
		for lines.Scan() {
			if event, is := strings.CutPrefix(lines.Text(), "event: "); is {
				kind = event
			}
			data, is := strings.CutPrefix(lines.Text(), "data: ")
			if !is {
				continue
			}
			var of struct{ Name, Code string }
			if err := json.Unmarshal([]byte(data), &of); err != nil {
				of.Name = err.Error()
			}
			select {
			case out <- strings.TrimSpace(kind + " " + of.Name + of.Code):
			case <-t.Context().Done():
				return
			}
		}
	}()
	return out
}

// ranges puts two resources of each kind, of which a watcher may read the one that
// is called a.
var ranges = map[client.Kind]struct { //nolint:gochecknoglobals // a table
	put   func(tx *state.Tx, name string) error
	shown string
}{
	client.KindNamespace: {func(tx *state.Tx, name string) error {
		return state.Namespaces.PutRaw(tx, name, fmt.Appendf(nil, `{"name":%q}`, name))
	}, "a"},
	client.KindNode: {func(tx *state.Tx, name string) error {
		return state.Nodes.PutRaw(tx, name, fmt.Appendf(nil, `{"name":%q}`, name))
	}, "a"},
	client.KindService: {func(tx *state.Tx, name string) error {
		n := catalog.Name{Namespace: "default", Name: name}
		return state.Services.PutRaw(tx, n, fmt.Appendf(nil, `{"name":%q}`, name))
	}, "a"},
	client.KindInstance: {func(tx *state.Tx, name string) error {
		i := catalog.Instance{Namespace: "default", Service: name, Node: "n", ID: "i"}
		return state.Instances.Put(tx, i.Key(), i)
	}, "a/n/i"},
	client.KindIntention: {func(tx *state.Tx, name string) error {
		i := intentions.Intention{Source: "web", Destination: name, Action: intentions.Allow}
		key, err := i.Key()
		if err != nil {
			return err
		}
		return state.Intentions.Put(tx, key, i)
	}, "web → a"},
	client.KindSet: {func(tx *state.Tx, name string) error {
		return state.Sets.Put(tx, name, state.Set{Name: name})
	}, "a"},
	client.KindPolicy: {func(tx *state.Tx, name string) error {
		return state.Policies.Put(tx, name, catalog.Policy{Name: name})
	}, "a"},
	client.KindRole: {func(tx *state.Tx, name string) error {
		return state.Roles.Put(tx, name, catalog.Role{Name: name, Policies: []string{"p"}})
	}, "a"},
}

// TestEveryWatchIsScoped goes through all kinds: lists and watches show what may be
// read. A kind without a row fails.
func TestEveryWatchIsScoped(t *testing.T) {
	t.Parallel()
	for _, kind := range client.Kinds() {
		row, ok := ranges[kind]
		if !ok {
			t.Errorf("%s has no row: say what there is to see", kind)
			continue
		}
		t.Run(string(kind), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			one := rule(string(kind), "", "a", "read")
			if namespaced, _ := catalog.ScopeOfKind(string(kind)); namespaced {
				one.Namespace = "default"
			}
			w.policy(t, "watcher", one)
			secret := w.grant(t, "watcher", "watcher")
			both := func(tx *state.Tx) error {
				if err := row.put(tx, "b"); err != nil {
					return err
				}
				return row.put(tx, "a")
			}
			path := "/v1/" + kind.Collection()
			events := w.events(t, path+"?watch=true", secret)
			var got []string
			for len(got) < 2 {
				got = append(got, <-events)
			}
			w.update(t, both)
			for len(got) < 4 {
				got = append(got, <-events)
				if got[2] == "reset" && len(got) == 3 { // a policy among what was put
					got = got[:2]
				}
			}
			if diff := cmp.Diff([]string{"reset", "position", "put " + row.shown, "position"}, got); diff != "" {
				t.Errorf("watched, -want +got\n%s", diff)
			}
			var list client.List
			w.as(t, secret, http.MethodGet, path, "", http.StatusOK, &list)
			if got := names(list.Items); !slices.Equal(got, []string{row.shown}) {
				t.Errorf("listed %q", got)
			}
		})
	}
}
