package api_test

import (
	"context"
	"encoding/json"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/proxy/flow"
	"github.com/meshd/meshd/server/acl"
	"github.com/meshd/meshd/server/api"
	"github.com/meshd/meshd/server/client"
	"github.com/meshd/meshd/server/state"
	"github.com/meshd/meshd/server/store"
)

// as calls with a token and decodes the answer, if it is what is wanted.
func (w *world) as(t *testing.T, token, method, path, body string, want int, out any) string {
	t.Helper()
	status, text := call(t, method, w.url+path, token, body)
	if status != want {
		t.Fatalf("%s %s: %d %s, want %d", method, path, status, text, want)
	}
	if out != nil {
		if err := json.Unmarshal([]byte(text), out); err != nil {
			t.Fatalf("%s %s: %v in %s", method, path, err, text)
		}
	}
	return text
}

func TestTokenLifeCycle(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.policy(t, "reader", rule("node", "", "*", "read"))
	var made client.NewToken
	w.do(t, http.MethodPost, "/v1/tokens", `{"description":"ci","policies":["reader"],"ttl":"1h"}`, http.StatusOK, &made)
	if made.Token.CreatedBy != "token:"+w.accessor || made.Token.Expires == nil || len(made.Secret) < 40 {
		t.Errorf("made %+v", made.Token)
	}
	for _, rec := range state.Tokens.All(w.state.Snapshot()) {
		if strings.Contains(string(rec.Raw), made.Secret) {
			t.Error("the secret is in the store")
		}
	}
	w.as(t, made.Secret, http.MethodGet, "/v1/nodes", "", http.StatusOK, nil)
	w.as(t, made.Secret, http.MethodPut, "/v1/nodes/a", `{"name":"a"}`, http.StatusForbidden, nil)

	path := "/v1/tokens/" + made.Token.Accessor
	var rotated client.NewToken
	w.do(t, http.MethodPost, path+"/rotate", `{"grace":"1h"}`, http.StatusOK, &rotated)
	if rotated.Secret == made.Secret || rotated.Token.Accessor != made.Token.Accessor || rotated.Token.Rotated == nil || rotated.Token.OldSecretUntil == nil {
		t.Errorf("rotated %+v", rotated.Token)
	}
	w.as(t, made.Secret, http.MethodGet, "/v1/nodes", "", http.StatusOK, nil)
	w.as(t, rotated.Secret, http.MethodGet, "/v1/nodes", "", http.StatusOK, nil)
	var all client.Tokens
	text := w.as(t, w.token, http.MethodGet, "/v1/tokens", "", http.StatusOK, &all)
	if len(all.Tokens) != 2 || strings.Contains(text, "mesht_") {
		t.Errorf("listed %s", text)
	}
	var one client.Token
	w.do(t, http.MethodGet, path, "", http.StatusOK, &one)
	if diff := cmp.Diff(rotated.Token, one); diff != "" {
		t.Errorf("-rotated +got\n%s", diff)
	}
	for _, bad := range []string{`{"grace":"169h"}`, `{"grace":"-1s"}`, `{"grce":"1h"}`} {
		w.do(t, http.MethodPost, path+"/rotate", bad, http.StatusBadRequest, nil)
	}
	var again client.NewToken
	w.do(t, http.MethodPost, path+"/rotate", "", http.StatusOK, &again)
	if again.Token.OldSecretUntil != nil {
		t.Errorf("without a grace: %+v", again.Token)
	}
	for _, old := range []string{made.Secret, rotated.Secret} {
		w.as(t, old, http.MethodGet, "/v1/whoami", "", http.StatusUnauthorized, nil)
	}
	var who client.Whoami
	w.as(t, again.Secret, http.MethodGet, "/v1/whoami", "", http.StatusOK, &who)
	if who.Subject != "token" || who.Token == nil || who.Token.Accessor != made.Token.Accessor || len(who.Rules) != 1 || who.TrustDomain != trustDomain {
		t.Errorf("whoami: %+v", who)
	}
	w.do(t, http.MethodDelete, path, "", http.StatusOK, nil)
	w.as(t, again.Secret, http.MethodGet, "/v1/whoami", "", http.StatusUnauthorized, nil)
	w.do(t, http.MethodDelete, path, "", http.StatusNotFound, nil)
	w.do(t, http.MethodPost, path+"/rotate", "", http.StatusNotFound, nil)
	if n := state.Tokens.Len(w.state.Snapshot()); n != 1 {
		t.Errorf("%d records are left, want the admin's", n)
	}
	for _, r := range w.accounts() {
		if data := jsonOf(t, r); strings.Contains(data, "mesht_") {
			t.Errorf("a secret was accounted for: %s", data)
		}
		if strings.HasPrefix(r.Route, "/v1/tokens") && r.Outcome == api.OutcomeAllowed && r.Verb == acl.Write && (r.Name == "" || r.Revision == 0) {
			t.Errorf("which token, and when? %+v", r)
		}
	}
}

// TestTokensDoNotGrow: nobody gets more, or for longer, than he has.
func TestTokensDoNotGrow(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.policy(t, "minter", rule("token,policy,role", "", "*", "write"), rule("service", "shop", "*", "write"))
	w.policy(t, "shop", rule("service", "shop", "api-*", "read,write"))
	w.policy(t, "tapper", rule("service", "shop", "*", "tap"))
	w.policy(t, "wide", rule("service", "*", "*", "read"))
	w.update(t, func(tx *state.Tx) error {
		for name, policies := range map[string][]string{"small": {"shop"}, "large": {"shop", "wide"}, "dangling": {"gone"}} {
			if err := state.Roles.Put(tx, name, catalog.Role{Name: name, Policies: policies}); err != nil {
				return err
			}
		}
		return nil
	})
	minter := w.grant(t, "minter", "minter")
	record, brief := acl.NewToken("minter", "brief", time.Now())
	soon := time.Now().Add(time.Hour)
	record.Expires = &soon
	w.update(t, func(tx *state.Tx) error { return state.Tokens.Put(tx, acl.Hash([]byte(brief)), record) })
	var admins, shops client.NewToken
	w.do(t, http.MethodPost, "/v1/tokens", `{"policies":["admin"]}`, http.StatusOK, &admins)
	w.do(t, http.MethodPost, "/v1/tokens", `{"policies":["shop"]}`, http.StatusOK, &shops)

	for _, row := range []struct {
		name, who, method, path, body string
		status                        int
		says                          string
	}{
		{"less", minter, "POST", "/v1/tokens", `{"policies":["shop"]}`, 200, ""},
		{"the same", minter, "POST", "/v1/tokens", `{"policies":["minter"]}`, 200, ""},
		{"a role of less", minter, "POST", "/v1/tokens", `{"roles":["small"]}`, 200, ""},
		{"everything", minter, "POST", "/v1/tokens", `{"policies":["admin"]}`, 403, "policy admin allows"},
		{"to read all", minter, "POST", "/v1/tokens", `{"policies":["read-only"]}`, 403, "policy read-only allows"},
		{"less and more", minter, "POST", "/v1/tokens", `{"policies":["shop","wide"]}`, 403, "policy wide allows"},
		{"another verb", minter, "POST", "/v1/tokens", `{"policies":["tapper"]}`, 403, "policy tapper allows"},
		{"a role of more", minter, "POST", "/v1/tokens", `{"roles":["large"]}`, 403, "policy wide allows"},
		{"a role of what is gone", minter, "POST", "/v1/tokens", `{"roles":["dangling"]}`, 404, "policy gone does not exist"},
		{"no policy", minter, "POST", "/v1/tokens", `{}`, 400, "may do nothing"},
		{"a policy that is not", minter, "POST", "/v1/tokens", `{"policies":["shp"]}`, 404, "did you mean shop?"},
		{"a role that is not", minter, "POST", "/v1/tokens", `{"roles":["smal"]}`, 404, "did you mean small?"},
		{"backwards", minter, "POST", "/v1/tokens", `{"policies":["shop"],"ttl":"-1s"}`, 400, "before it begins"},

		{"a policy of less", minter, "PUT", "/v1/policies/less", `{"name":"less","rules":[{"kinds":["service"],"namespace":"shop","name":"x","verbs":["write"]}]}`, 200, ""},
		{"a policy of more", minter, "PUT", "/v1/policies/more", `{"name":"more","rules":[{"kinds":["service"],"namespace":"*","name":"x","verbs":["read"]}]}`, 403, "policy more allows"},
		{"more for oneself", minter, "PUT", "/v1/policies/minter", `{"name":"minter","rules":[{"kinds":["*"],"namespace":"*","name":"*","verbs":["read"]}]}`, 403, "policy minter allows"},
		{"a role that has more", minter, "PUT", "/v1/roles/r", `{"name":"r","policies":["wide"]}`, 403, "policy wide allows"},
		{"a role that has all", minter, "PUT", "/v1/roles/r", `{"name":"r","policies":["admin"]}`, 403, "policy admin allows"},
		{"a role that has less", minter, "PUT", "/v1/roles/r", `{"name":"r","policies":["shop"]}`, 200, ""},
		{"by apply", minter, "POST", "/v1/apply", `{"resources":[{"kind":"role","spec":{"name":"s","policies":["admin"]}}]}`, 403, "policy admin allows"},
		{"by apply, in two steps", minter, "POST", "/v1/apply", `{"resources":[
			{"kind":"policy","spec":{"name":"p","rules":[{"kinds":["node"],"name":"*","verbs":["read"]}]}},{"kind":"role","spec":{"name":"s","policies":["p"]}}]}`, 403, "policy p allows"},

		{"the secret of an admin", minter, "POST", "/v1/tokens/" + admins.Token.Accessor + "/rotate", ``, 403, "policy admin allows"},
		{"the secret of one with less", minter, "POST", "/v1/tokens/" + shops.Token.Accessor + "/rotate", ``, 200, ""},

		{"for as long", brief, "POST", "/v1/tokens", `{"policies":["shop"]}`, 200, `"expires":"` + soon.UTC().Format("2006-01-02T15:04:05")},
		{"for less long", brief, "POST", "/v1/tokens", `{"policies":["shop"],"ttl":"1m"}`, 200, ""},
		{"for longer", brief, "POST", "/v1/tokens", `{"policies":["shop"],"ttl":"2h"}`, 403, "goes on after that"},
		{"one that goes on", brief, "POST", "/v1/tokens/" + shops.Token.Accessor + "/rotate", ``, 403, "goes on after that"},

		{"a built-in policy", w.token, "PUT", "/v1/policies/admin", `{"name":"admin","rules":[]}`, 409, "built in"},
		{"a policy in use", w.token, "DELETE", "/v1/policies/shop", ``, 409, "in use by token"},
		{"a role in use", w.token, "DELETE", "/v1/roles/small", ``, 409, "in use by token"},
		{"an unknown kind", w.token, "PUT", "/v1/policies/x", `{"name":"x","rules":[{"kinds":["gateway"],"namespace":"*","name":"*","verbs":["read"]}]}`, 400, "is no kind"},
		{"an unknown field", w.token, "PUT", "/v1/policies/x", `{"name":"x","rules":[{"kinds":["node"],"name":"*","verbs":["read"],"when":"never"}]}`, 400, "when"},
	} {
		if status, body := call(t, row.method, w.url+row.path, row.who, row.body); status != row.status || !strings.Contains(body, row.says) {
			t.Errorf("%s: %d %s, want %d and %q", row.name, status, body, row.status, row.says)
		}
	}
	s := w.state.Snapshot()
	if _, ok := state.Policies.Get(s, "p"); ok {
		t.Error("a half of a refused apply is there")
	}
}

func TestLastAdmin(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.policy(t, "all", catalog.PolicyRule{Kinds: []string{"*"}, Namespace: "*", Name: "*", Verbs: []string{"read", "write", "tap"}})
	var other client.NewToken
	w.do(t, http.MethodPost, "/v1/tokens", `{"policies":["read-only"]}`, http.StatusOK, &other)
	record, secret := acl.NewToken(acl.PolicyAdmin, "past", time.Now())
	past := time.Now().Add(-time.Hour)
	record.Expires = &past
	w.update(t, func(tx *state.Tx) error { return state.Tokens.Put(tx, acl.Hash([]byte(secret)), record) })
	own := "/v1/tokens/" + w.accessor
	for _, path := range []string{own, own + "?force=false"} {
		if text := w.as(t, w.token, http.MethodDelete, path, "", http.StatusConflict, nil); !strings.Contains(text, "the last one that may do everything") {
			t.Error(text)
		}
	}
	w.do(t, http.MethodDelete, own+"?force=yes", "", http.StatusBadRequest, nil)
	w.do(t, http.MethodDelete, "/v1/tokens/"+other.Token.Accessor, "", http.StatusOK, nil)
	w.do(t, http.MethodDelete, "/v1/tokens/"+record.Accessor, "", http.StatusOK, nil) // expired: it is no admin any more
	w.do(t, http.MethodPost, "/v1/tokens", `{"policies":["all"]}`, http.StatusOK, &other)
	w.do(t, http.MethodDelete, own, "", http.StatusOK, nil)
	w.as(t, other.Secret, http.MethodDelete, "/v1/tokens/"+other.Token.Accessor, "", http.StatusConflict, nil)
	w.as(t, other.Secret, http.MethodDelete, "/v1/tokens/"+other.Token.Accessor+"?force=true", "", http.StatusOK, nil)
	status, body := call(t, http.MethodPost, w.local+"/v1/tokens", "", `{"policies":["admin"]}`)
	if status != http.StatusOK || !strings.Contains(body, `"created_by":"local:admin-socket"`) {
		t.Errorf("the way back in: %d %s", status, body)
	}
}

// TestExpiredTokensAreForgotten, a week after their end, as others are made.
func TestExpiredTokensAreForgotten(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ended := func(ago time.Duration) string {
		record, secret := acl.NewToken("read-only", "", time.Now())
		at := time.Now().Add(-ago)
		record.Expires = &at
		w.update(t, func(tx *state.Tx) error { return state.Tokens.Put(tx, acl.Hash([]byte(secret)), record) })
		return record.Accessor
	}
	recent := ended(time.Hour)
	for range 12 {
		ended(8 * 24 * time.Hour)
	}
	for range 2 {
		w.do(t, http.MethodPost, "/v1/tokens", `{"policies":["read-only"]}`, http.StatusOK, nil)
	}
	var all client.Tokens
	w.do(t, http.MethodGet, "/v1/tokens", "", http.StatusOK, &all)
	if len(all.Tokens) != 4 || !slices.ContainsFunc(all.Tokens, func(one client.Token) bool { return one.Accessor == recent && one.Expired }) {
		t.Errorf("%d tokens: %+v", len(all.Tokens), all.Tokens)
	}
	w.do(t, http.MethodPost, "/v1/tokens/"+recent+"/rotate", "", http.StatusConflict, nil)
}

func TestCanI(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	tokens := w.team(t)
	w.policy(t, "auditor", rule("token", "", "*", "read"))
	tokens["auditor"] = w.grant(t, "auditor", "auditor")
	var who client.Whoami
	w.as(t, tokens["shop"], http.MethodGet, "/v1/whoami", "", http.StatusOK, &who)
	shop := who.Token.Accessor
	for _, row := range []struct {
		who, body string
		status    int
		says      string
	}{
		{"shop", `{"verb":"write","kind":"service","namespace":"shop","name":"cart"}`, 200, `"allowed":true`},
		{"shop", `{"verb":"write","kind":"service","namespace":"shop","name":"cart"}`, 200, `policy shop has { kinds = [\"service\", \"instance\", \"intention\"]`},
		{"shop", `{"verb":"write","kind":"service","namespace":"shop"}`, 200, `"allowed":true`},
		{"shop", `{"verb":"write","kind":"service","namespace":"shop","name":"cart-*"}`, 200, `"allowed":true`},
		{"shop", `{"verb":"write","kind":"service"}`, 200, `"allowed":false`},
		{"shop", `{"verb":"read","kind":"snapshot"}`, 200, `it needs a policy with { kinds = [\"snapshot\"]`},
		{"powerless", `{"verb":"read","kind":"node","name":"x"}`, 200, `"allowed":false`},
		{"api", `{"verb":"read","kind":"node","name":"x9"}`, 200, `"allowed":true`},
		{"shop", `{"verb":"own","kind":"service"}`, 400, "is no verb"},
		{"shop", `{"verb":"read","kind":"gateway"}`, 400, "is no kind"},
		{"shop", `{"verb":"tap","kind":"node"}`, 400, "only services"},
		{"shop", `{"verb":"read","kind":"node","namespace":"shop"}`, 400, "in no namespace"},
		{"auditor", `{"verb":"write","kind":"service","namespace":"shop","accessor":"` + shop + `"}`, 200, `"allowed":true`},
		{"auditor", `{"verb":"write","kind":"service","accessor":"` + shop + `"}`, 200, `"allowed":false`},
		{"auditor", `{"verb":"write","kind":"service","accessor":"nobody"}`, 404, "meshctl token list"},
		{"shop", `{"verb":"write","kind":"service","namespace":"shop","accessor":"` + shop + `"}`, 200, `"allowed":true`},
		{"shop", `{"verb":"read","kind":"node","accessor":"` + w.accessor + `"}`, 403, "read token " + w.accessor},
		{"anonymous", `{"verb":"read","kind":"node"}`, 401, ""},
	} {
		if status, body := call(t, http.MethodPost, w.url+"/v1/can-i", tokens[row.who], row.body); status != row.status || !strings.Contains(body, row.says) {
			t.Errorf("%s asks %s: %d %s, want %d and %q", row.who, row.body, status, body, row.status, row.says)
		}
	}
	if _, body := call(t, http.MethodPost, w.local+"/v1/can-i", "", `{"verb":"write","kind":"snapshot"}`); !strings.Contains(body, `"allowed":true`) {
		t.Error(body)
	}
}

// TestOthersRequestsAreNotShown: who may tap some services sees requests to these.
func TestOthersRequestsAreNotShown(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	tokens := w.team(t)
	to := func(ns, name string) flow.Record {
		r := seen()
		r.Destination = spiffe.Service(trustDomain, ns, name)
		return r
	}
	foreign := seen()
	foreign.Destination = spiffe.Service("other.example", "shop", "cart")
	edge := func(src, dst spiffe.ID) flow.Edge { return flow.Edge{Source: src, Destination: dst} }
	service := func(ns, name string) spiffe.ID { return spiffe.Service(trustDomain, ns, name) }
	w.hosts(func(_ context.Context, q flow.Query, emit func(flow.Answer) error) error {
		if q.Want == flow.Edges {
			return emit(flow.Answer{Sample: &flow.Sample{Edges: []flow.Edge{
				edge(service("default", "web"), service("shop", "cart")), edge(service("shop", "cart"), service("default", "db")), edge(service("default", "web"), service("default", "db")),
			}}})
		}
		return emit(flow.Answer{Records: []flow.Record{to("shop", "cart"), to("default", "api"), foreign}})
	})
	for _, row := range []struct {
		who, path string
		status    int
		shown     int
	}{
		{"admin", "/v1/denials", 200, 3},
		{"shop", "/v1/denials", 200, 1},
		{"shop", "/v1/denials?dst=shop/*", 200, 1},
		{"shop", "/v1/denials?dst=shop/cart", 200, 1},
		{"shop", "/v1/denials?dst=api", 403, 0},
		{"shop", "/v1/denials?dst=default/*", 403, 0},
		{"api", "/v1/denials", 403, 0},
		{"read-only", "/v1/denials", 403, 0},
		{"shop", "/v1/explain/7f3a91", 200, 1},
		{"admin", "/v1/explain/7f3a91", 200, 3},
	} {
		status, body := call(t, http.MethodGet, w.url+row.path, tokens[row.who], "")
		var got struct {
			Records []json.RawMessage `json:"records"`
		}
		if err := json.Unmarshal([]byte(body), &got); err != nil {
			t.Fatal(err)
		}
		if status != row.status || len(got.Records) != row.shown {
			t.Errorf("%s %s: %d %s, want %d and %d records", row.who, row.path, status, body, row.status, row.shown)
		}
	}
	for who, want := range map[string]int{"admin": 3, "read-only": 3, "shop": 2, "api": 0} {
		_, body := call(t, http.MethodGet, w.url+"/v1/top", tokens[who], "")
		if n := strings.Count(body, `"destination":"spiffe`); n != want {
			t.Errorf("%s: top shows %d edges, want %d: %s", who, n, want, body)
		}
	}
	_, body := call(t, http.MethodGet, w.url+"/v1/tap", tokens["shop"], "")
	if n := strings.Count(body, `"error_id"`); n != 1 {
		t.Errorf("a tap shows %d records: %s", n, body)
	}
}

// late is a store whose changes arrive late at this server.
type late struct {
	store.Engine

	once  sync.Once
	asked chan struct{} // closed: somebody wants what is newest
	gate  chan struct{} // closed: changes arrive
}

func (l *late) Barrier(ctx context.Context) (store.Position, error) {
	l.once.Do(func() { close(l.asked) })
	return l.Engine.Barrier(ctx)
}

func (l *late) Watch(ctx context.Context, prefix string, after store.Position) store.Watcher {
	return &lateWatcher{l.Engine.Watch(ctx, prefix, after), l}
}

type lateWatcher struct {
	store.Watcher

	late *late
}

func (w *lateWatcher) Next(ctx context.Context) (store.Batch, error) {
	batch, err := w.Watcher.Next(ctx)
	if err == nil && len(batch.Puts) > 0 {
		select {
		case <-w.late.gate:
		case <-ctx.Done():
		}
	}
	return batch, err
}

// TestTokenOfAMomentAgo: a token that was made at another server is good here at
// once, though what it was made with has not arrived yet.
func TestTokenOfAMomentAgo(t *testing.T) {
	t.Parallel()
	engine := &late{Engine: store.NewMemory(), asked: make(chan struct{}), gate: make(chan struct{})}
	log := slog.New(slog.DiscardHandler)
	st := state.New(engine, log)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- st.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	<-st.Ready()
	url := serve(t, api.New(api.Config{State: st, Log: log}).Handler(false))

	record, secret := acl.NewToken("read-only", "elsewhere", time.Now())
	key := state.Tokens.Path(acl.Hash([]byte(secret)))
	if _, err := engine.Commit(t.Context(), store.Txn{Ops: []store.Op{{Key: key, Value: []byte(jsonOf(t, record))}}}); err != nil {
		t.Fatal(err)
	}
	answers := make(chan int, 1)
	go func() {
		status, _ := call(t, http.MethodGet, url+"/v1/whoami", secret, "")
		answers <- status
	}()
	<-engine.asked
	// Strangers do not make the server ask again and again.
	if status, body := call(t, http.MethodGet, url+"/v1/whoami", "mesht_unknown", ""); status != http.StatusUnauthorized {
		t.Errorf("a stranger: %d %s", status, body)
	}
	close(engine.gate)
	if status := <-answers; status != http.StatusOK {
		t.Errorf("status %d", status)
	}
}

// TestNobodyIsKnownBeforeTheState: a server that starts does not call a good token
// unknown.
func TestNobodyIsKnownBeforeTheState(t *testing.T) {
	t.Parallel()
	log := slog.New(slog.DiscardHandler)
	url := serve(t, api.New(api.Config{State: state.New(store.NewMemory(), log), Log: log}).Handler(false))
	if status, body := call(t, http.MethodGet, url+"/v1/nodes", "mesht_some", ""); status != http.StatusServiceUnavailable {
		t.Errorf("%d %s", status, body)
	}
	if status, body := call(t, http.MethodGet, url+"/v1/nodes", "", ""); status != http.StatusUnauthorized {
		t.Errorf("%d %s", status, body)
	}
}
