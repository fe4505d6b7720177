package api_test

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/intentions"
	"github.com/meshd/meshd/server/acl"
	"github.com/meshd/meshd/server/client"
	"github.com/meshd/meshd/server/state"
)

func rule(kinds, namespace, name, verbs string) catalog.PolicyRule {
	return catalog.PolicyRule{Kinds: strings.Split(kinds, ","), Namespace: namespace, Name: name, Verbs: strings.Split(verbs, ",")}
}

// policy writes a policy as the servers do.
func (w *world) policy(t *testing.T, name string, rules ...catalog.PolicyRule) {
	t.Helper()
	w.update(t, func(tx *state.Tx) error {
		return state.Policies.Put(tx, name, catalog.Policy{Name: name, Rules: rules})
	})
}

// grant makes a token with policies and returns its secret.
func (w *world) grant(t *testing.T, description string, policies ...string) string {
	t.Helper()
	record, secret := acl.NewToken("", description, time.Now())
	record.Policies = policies
	w.update(t, func(tx *state.Tx) error { return state.Tokens.Put(tx, acl.Hash([]byte(secret)), record) })
	return secret
}

// team makes tokens of callers whose rights are limited.
func (w *world) team(t *testing.T) map[string]string {
	t.Helper()
	w.policy(t, "shop", rule("service,instance,intention", "shop", "*", "write"), rule("service", "shop", "*", "tap"))
	w.policy(t, "api", rule("service,instance,intention", "default", "api-*", "read,write"), rule("node,join_token", "", "x*", "write"), rule("namespace,set", "", "x", "write"))
	tokens := map[string]string{
		"anonymous": "", "unknown": "mesht_wrong", "admin": w.token,
		"powerless": w.grant(t, "powerless"), "dangling": w.grant(t, "dangling", "gone"), "read-only": w.grant(t, "read-only", "read-only"),
		"shop": w.grant(t, "shop", "shop"), "api": w.grant(t, "api", "api"),
	}
	record, secret := acl.NewToken(acl.PolicyAdmin, "expired", time.Now())
	past := time.Now().Add(-time.Minute)
	record.Expires = &past
	w.update(t, func(tx *state.Tx) error { return state.Tokens.Put(tx, acl.Hash([]byte(secret)), record) })
	tokens["expired"] = secret
	return tokens
}

// The objects that routes are tried with: of the shop, of api, of neither.
var objects = map[byte]*strings.Replacer{ //nolint:gochecknoglobals // a table
	'S': strings.NewReplacer("{name}", "s", "{namespace}", "shop", "{service}", "cart", "{node}", "n", "{id}", "i", "{destination}", "cart",
		"{source_namespace}", "shop", "{source}", "web", "{accessor}", "a", "{part}", "config"),
	'A': strings.NewReplacer("{name}", "x", "{namespace}", "default", "{service}", "api-1", "{node}", "n", "{id}", "i", "{destination}", "api-1",
		"{source_namespace}", "default", "{source}", "web", "{accessor}", "a", "{part}", "config"),
	'O': strings.NewReplacer("{name}", "o", "{namespace}", "other", "{service}", "api-1", "{node}", "n", "{id}", "i", "{destination}", "api-1",
		"{source_namespace}", "shop", "{source}", "cart", "{accessor}", "a", "{part}", "config"),
}

const (
	public  = "everybody"
	self    = "read-only:SAO shop:SAO api:SAO powerless:SAO dangling:SAO"
	nobody  = "" // but admins
	readers = "read-only:SAO"
)

// routeRows says who may use each route, and with which objects. Admins, and the
// admin socket, may use all of them. The names of services are: namespaces,
// nodes and sets have no namespace, so that theirs are x for api, s and o.
var routeRows = map[string]string{ //nolint:gochecknoglobals // a table
	"GET /v1/healthz":      public,
	"GET /v1/readyz":       public,
	"GET /v1/openapi.json": public,
	"GET /v1/ca/roots":     public,

	"GET /v1/whoami":              self,
	"POST /v1/can-i":              self,
	"GET /v1/rollout":             self, // without rights it is refused later, see TestScopedReads
	"POST /v1/apply":              self, // see TestEveryTransactionIsAuthorized
	"POST /v1/intentions/undo":    self, // likewise
	"GET /v1/status":              readers,
	"GET /v1/metrics":             readers,
	"GET /v1/debug/{part}":        readers,
	"POST /v1/held-nodes/release": nobody,
	"GET /v1/snapshot":            nobody,
	"PUT /v1/snapshot":            nobody,
	"GET /v1/audit":               nobody,

	"GET /v1/members":                         readers,
	"POST /v1/operator/raft/transfer":         nobody,
	"DELETE /v1/operator/raft/servers/{name}": nobody,

	"GET /v1/tokens":                    nobody,
	"POST /v1/tokens":                   nobody,
	"GET /v1/tokens/{accessor}":         nobody,
	"DELETE /v1/tokens/{accessor}":      nobody,
	"POST /v1/tokens/{accessor}/rotate": nobody,
	"POST /v1/join-tokens":              "api:SAO", // the node is in the body

	"GET /v1/prometheus/sd":   readers + " api:SAO", // what they may see
	"GET /v1/tap":             "shop:SAO",
	"GET /v1/denials":         "shop:SAO",
	"GET /v1/explain/{id}":    "shop:SAO",
	"GET /v1/top":             readers + " shop:SAO api:SAO",
	"POST /v1/explain":        readers + " shop:SAO api:SAO", // the destination is in the body
	"GET /v1/namespaces":      readers + " api:SAO",
	"GET /v1/nodes":           readers + " api:SAO",
	"GET /v1/sets":            readers + " api:SAO",
	"GET /v1/services":        readers + " shop:SAO api:SAO",
	"GET /v1/instances":       readers + " shop:SAO api:SAO",
	"GET /v1/intentions":      readers + " shop:SAO api:SAO",
	"GET /v1/policies":        readers,
	"GET /v1/policies/{name}": readers,
	"GET /v1/roles":           readers,
	"GET /v1/roles/{name}":    readers,

	"PUT /v1/policies/{name}":    nobody,
	"DELETE /v1/policies/{name}": nobody,
	"PUT /v1/roles/{name}":       nobody,
	"DELETE /v1/roles/{name}":    nobody,

	"GET /v1/namespaces/{name}":              readers + " api:A",
	"PUT /v1/namespaces/{name}":              "api:A",
	"DELETE /v1/namespaces/{name}":           "api:A",
	"GET /v1/nodes/{name}":                   readers + " api:A",
	"PUT /v1/nodes/{name}":                   "api:A",
	"DELETE /v1/nodes/{name}":                "api:A",
	"PUT /v1/nodes/{name}/drain":             "api:A",
	"DELETE /v1/nodes/{name}/drain":          "api:A",
	"POST /v1/nodes/{name}/leave":            "api:A",
	"GET /v1/sets/{name}":                    readers + " api:A",
	"PUT /v1/sets/{name}":                    "api:A",
	"DELETE /v1/sets/{name}":                 "api:A",
	"POST /v1/intentions/check":              readers + " shop:SAO api:SAO", // the destination is in the body
	"GET /v1/intentions/history":             readers + " shop:SAO api:SAO", // what they may see
	"GET /v1/services/{namespace}/{name}":    readers + " shop:S",
	"PUT /v1/services/{namespace}/{name}":    "shop:S",
	"DELETE /v1/services/{namespace}/{name}": "shop:S",

	"GET /v1/instances/{namespace}/{service}/{node}/{id}":          readers + " shop:S api:A",
	"PUT /v1/instances/{namespace}/{service}/{node}/{id}":          "shop:S api:A",
	"DELETE /v1/instances/{namespace}/{service}/{node}/{id}":       "shop:S api:A",
	"PUT /v1/instances/{namespace}/{service}/{node}/{id}/drain":    "shop:S api:A",
	"DELETE /v1/instances/{namespace}/{service}/{node}/{id}/drain": "shop:S api:A",

	// An intention is read from either side, and written from the destination's.
	"GET /v1/intentions/{namespace}/{destination}/{source_namespace}/{source}":    readers + " shop:SO api:A",
	"PUT /v1/intentions/{namespace}/{destination}/{source_namespace}/{source}":    "shop:S api:A",
	"DELETE /v1/intentions/{namespace}/{destination}/{source_namespace}/{source}": "shop:S api:A",
}

// TestEveryRouteIsAuthorized goes through the whole route table. A route without a
// row fails.
func TestEveryRouteIsAuthorized(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	tokens := w.team(t)
	rows := map[string]bool{}
	for _, r := range w.api.Routes() {
		row, ok := routeRows[r.Method+" "+r.Pattern]
		if !ok {
			t.Errorf("%s %s has no row: say who may use it", r.Method, r.Pattern)
			continue
		}
		rows[r.Method+" "+r.Pattern] = true
		for object, fill := range objects {
			path := fill.Replace(r.Pattern)
			for who, token := range tokens {
				want := who == "admin" || allowedBy(row, who, object)
				if who == "unknown" || who == "expired" {
					want = false
				}
				status, body := call(t, r.Method, w.url+path, token, "{}")
				refusal := http.StatusForbidden
				if slices.Contains([]string{"anonymous", "unknown", "expired"}, who) {
					refusal = http.StatusUnauthorized
				}
				refused := status == http.StatusUnauthorized || status == http.StatusForbidden
				if refused == want || refused && status != refusal {
					t.Errorf("%s %s by %s: %d %s", r.Method, path, who, status, body)
				}
			}
			if status, body := call(t, r.Method, w.local+path, "", "{}"); status == http.StatusUnauthorized || status == http.StatusForbidden {
				t.Errorf("%s %s on the admin socket: %d %s", r.Method, path, status, body)
			}
			if status := withCertificate(t, w, r.Method, path); row != public && status != http.StatusUnauthorized {
				t.Errorf("%s %s by a node's certificate: %d", r.Method, path, status)
			}
		}
	}
	for row := range routeRows {
		if !rows[row] {
			t.Errorf("there is no route %s", row)
		}
	}
}

// allowedBy reads a row.
func allowedBy(row, who string, object byte) bool {
	if row == public {
		return true
	}
	for one := range strings.FieldsSeq(row) {
		if name, may, _ := strings.Cut(one, ":"); name == who {
			return strings.IndexByte(may, object) >= 0
		}
	}
	return false
}

// withCertificate calls as a host does: the HTTP API takes no certificate for a
// token.
func withCertificate(t *testing.T, w *world, method, path string) int {
	t.Helper()
	req := httptest.NewRequestWithContext(t.Context(), method, path, strings.NewReader("{}"))
	id := &url.URL{Scheme: "spiffe", Host: trustDomain, Path: "/node/n"}
	req.TLS = &tls.ConnectionState{HandshakeComplete: true, PeerCertificates: []*x509.Certificate{{URIs: []*url.URL{id}}}}
	out := httptest.NewRecorder()
	w.api.Handler(false).ServeHTTP(out, req)
	return out.Code
}

// TestEveryTransactionIsAuthorized: what one request writes at several places is
// authorized at each, before anything is written.
func TestEveryTransactionIsAuthorized(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	tokens := w.team(t)
	w.do(t, http.MethodPut, "/v1/namespaces/shop", `{"name":"shop"}`, http.StatusOK, nil)
	intention := func(src, dst string) string {
		return fmt.Sprintf(`{"kind":"intention","spec":{"source":%q,"destination":%q,"action":"allow"}}`, src, dst)
	}
	mine, others := intention("web", "shop/cart"), intention("shop/cart", "web")
	var first client.Result
	w.do(t, http.MethodPost, "/v1/apply", `{"resources":[`+mine+`,`+others+`]}`, http.StatusOK, &first)
	w.do(t, http.MethodPost, "/v1/apply", `{"set":"x","resources":[`+intention("a", "api-1")+`,`+intention("a", "web")+`]}`, http.StatusOK, nil)
	w.do(t, http.MethodPut, "/v1/nodes/x-payments", `{"name":"x-payments","services":["payments"]}`, http.StatusOK, nil)
	undo := fmt.Sprintf(`{"revision":%d}`, first.Position.Revision)
	for _, row := range []struct {
		name, who, method, path, body string
		denied                        string // what the refusal names; "": it is done
	}{
		{"apply one's own", "shop", "POST", "/v1/apply", `{"resources":[` + mine + `]}`, ""},
		{"apply a new one", "shop", "POST", "/v1/apply", `{"resources":[` + intention("cron", "shop/cart") + `]}`, ""},
		{"apply both", "shop", "POST", "/v1/apply", `{"resources":[` + intention("cron", "shop/pay") + `,` + others + `]}`, "write intention default/web"},
		{"try both", "shop", "POST", "/v1/apply", `{"dry_run":true,"resources":[` + intention("cron", "shop/pay") + `,` + others + `]}`, "write intention default/web"},
		{"apply to all of a namespace", "shop", "POST", "/v1/apply", `{"resources":[` + intention("cron", "shop/*") + `]}`, ""},
		{"apply to all", "shop", "POST", "/v1/apply", `{"resources":[` + intention("cron", "*") + `]}`, "write intention */*"},
		{"apply to all of a prefix", "api", "POST", "/v1/apply", `{"resources":[` + intention("cron", "default/*") + `]}`, "write intention default/*"},
		{"apply a set", "shop", "POST", "/v1/apply", `{"set":"x","resources":[` + mine + `]}`, "write set x"},
		{"apply a set of one's own", "api", "POST", "/v1/apply", `{"set":"x","resources":[` + intention("a", "api-1") + `]}`, ""},
		{"prune a set", "api", "POST", "/v1/apply", `{"set":"x","prune":true,"resources":[` + intention("a", "api-1") + `]}`, "write intention default/web"},
		{"delete a set with all", "api", "DELETE", "/v1/sets/x?prune=true", "", "write intention default/web"},
		{"undo both", "shop", "POST", "/v1/intentions/undo", undo, "write intention default/web"},
		{"undo by a reader", "read-only", "POST", "/v1/intentions/undo", undo, "write intention"},
		{"delete with the URL of another", "shop", "DELETE", "/v1/intentions/default/web/shop/cart", "", "write intention default/web"},
		{"a spec that is not the URL's", "shop", "PUT", "/v1/services/shop/cart", `{"name":"web"}`, "400"},
		{"a node that may run one's own", "api", "PUT", "/v1/nodes/x1", `{"name":"x1","services":["api-1"]}`, ""},
		{"a node that may run others'", "api", "PUT", "/v1/nodes/x2", `{"name":"x2","services":["api-1","payments"]}`, "write service default/payments"},
		{"a node that may run all", "api", "PUT", "/v1/nodes/x2", `{"name":"x2","services":["*"]}`, "write service */*"},
		{"a node that may run all of a namespace", "api", "PUT", "/v1/nodes/x2", `{"name":"x2","services":["shop/*"]}`, "write service shop/*"},
		{"a join token for one's own", "api", "POST", "/v1/join-tokens", `{"node":"x3","services":["api-1"]}`, ""},
		{"a join token for others' services", "api", "POST", "/v1/join-tokens", `{"node":"x3","services":["payments"]}`, "write service default/payments"},
		{"a join token in place of a node with others' services", "api", "POST", "/v1/join-tokens", `{"node":"x-payments","replace":true}`, "write service default/payments"},
		{"a join token for another node", "api", "POST", "/v1/join-tokens", `{"node":"o","services":["api-1"]}`, "write join_token o"},
	} {
		status, body := call(t, row.method, w.url+row.path, tokens[row.who], row.body)
		switch {
		case row.denied == "":
			if status != http.StatusOK {
				t.Errorf("%s: %d %s", row.name, status, body)
			}
		case row.denied == "400":
			if status != http.StatusBadRequest {
				t.Errorf("%s: %d %s", row.name, status, body)
			}
		case status != http.StatusForbidden || !strings.Contains(body, row.denied):
			t.Errorf("%s: %d %s, want a refusal to %s", row.name, status, body, row.denied)
		}
	}
	s := w.state.Snapshot()
	for _, name := range []string{"pay"} {
		for key := range state.Intentions.All(s) {
			if key.Destination == name {
				t.Errorf("a part of a refused apply is there: %v", key)
			}
		}
	}
	if _, ok := state.Intentions.Get(s, intentions.Key{DestinationNamespace: "default", Destination: "web", SourceNamespace: "shop", Source: "cart"}); !ok {
		t.Error("a part of a refused change was done")
	}
}
