package api_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/ca/builtin"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/intentions"
	"github.com/meshd/meshd/proxy/flow"
	"github.com/meshd/meshd/server/acl"
	"github.com/meshd/meshd/server/api"
	"github.com/meshd/meshd/server/client"
	"github.com/meshd/meshd/server/state"
	"github.com/meshd/meshd/server/store"
)

const trustDomain = "mesh.example.com"

// standInFleet is a stand-in for the agents' streams: it has what a test puts
// into it.
type standInFleet struct {
	rollout client.Rollout
	changed chan struct{}
	proxies []client.ProxyStatus
	callers []catalog.Name
	held    []string
	ask     atomic.Pointer[func(context.Context, flow.Query, func(flow.Answer) error) error]
}

// Ask answers as a test says; until it says anything, with nothing.
func (f *standInFleet) Ask(ctx context.Context, q flow.Query, emit func(flow.Answer) error) error {
	if ask := f.ask.Load(); ask != nil {
		return (*ask)(ctx, q, emit)
	}
	return emit(flow.Answer{Caught: true})
}

func (f *standInFleet) Rollout(pos catalog.Position, services []catalog.Name) (client.Rollout, <-chan struct{}) {
	r := f.rollout
	r.Position = pos
	for _, s := range services {
		r.Services = append(slices.Clone(r.Services), client.RolloutService{Service: s.Short()})
	}
	return r, f.changed
}

func (f *standInFleet) Callers([]catalog.Name) []catalog.Name { return slices.Clone(f.callers) }

func (f *standInFleet) Held() []string { return slices.Clone(f.held) }

func (f *standInFleet) Release() { f.held = nil }

func (f *standInFleet) Proxies() []client.ProxyStatus { return slices.Clone(f.proxies) }

// engineSnapshots are those of the server without encryption.
type engineSnapshots struct{ store.Engine }

func (e engineSnapshots) Export(ctx context.Context, w io.Writer) (catalog.Position, error) {
	pos, err := store.Export(ctx, e.Engine, w)
	return catalog.Position(pos), err
}

func (e engineSnapshots) Import(ctx context.Context, r io.Reader) (client.Restored, error) {
	pos, err := store.Import(ctx, e.Engine, r)
	return client.Restored{Position: catalog.Position(pos)}, err
}

type world struct {
	api   *api.API
	state *state.State
	fleet *standInFleet

	servers *standInCluster

	url   string // of the public handler
	local string // of the handler behind the admin socket
	token string

	age      atomic.Int64 // how old the state may be
	accessor string       // of token
	mu       sync.Mutex
	audited  []api.AuditRecord
	reserve  atomic.Value // what Config.Reserve does, if that is more than account
}

// account keeps what is audited.
func (w *world) account(r api.AuditRecord) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.audited = append(w.audited, r)
}

// accounts returns what was audited since the last call.
func (w *world) accounts() []api.AuditRecord {
	w.mu.Lock()
	defer w.mu.Unlock()
	all := w.audited
	w.audited = nil
	return all
}

func newWorld(t *testing.T) *world {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	key := ca.GenerateClusterKey()
	stored, err := builtin.Create(key, trustDomain, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	authority, err := builtin.Open(stored, key, builtin.Config{})
	if err != nil {
		t.Fatal(err)
	}
	engine := store.NewMemory()
	st := state.New(engine, log)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- st.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("state.Run: %v", err)
		}
		if err := engine.Close(); err != nil {
			t.Errorf("engine.Close: %v", err)
		}
	})
	<-st.Ready()
	w := &world{state: st, fleet: &standInFleet{changed: make(chan struct{})}, servers: &standInCluster{leader: "s1"}}
	record, secret := acl.NewToken(acl.PolicyAdmin, "test", time.Now())
	w.update(t, func(tx *state.Tx) error { return state.Tokens.Put(tx, acl.Hash([]byte(secret)), record) })
	w.token, w.accessor = secret, record.Accessor
	w.api = api.New(api.Config{
		State: st, Authority: authority, Fleet: w.fleet, Ask: w.fleet.Ask, Snapshots: engineSnapshots{engine}, Log: log,
		Cluster: w.servers,
		Metrics: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "stand_in 1\n") }),
		Info:    client.Status{Server: "s1", TrustDomain: trustDomain}, Addresses: func() []string { return []string{"127.0.0.1:7400"} }, Heartbeat: 20 * time.Millisecond,
		Reserve: func() (func(api.AuditRecord), error) {
			if reserve, ok := w.reserve.Load().(func() (func(api.AuditRecord), error)); ok {
				return reserve()
			}
			return w.account, nil
		},
		Audit: w.account, Age: func() time.Duration { return time.Duration(w.age.Load()) },
	})
	w.url, w.local = serve(t, w.api.Handler(false)), serve(t, w.api.Handler(true))
	return w
}

func serve(t *testing.T, h http.Handler) string {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return s.URL
}

func (w *world) update(t *testing.T, f func(*state.Tx) error) {
	t.Helper()
	if _, err := w.state.Update(t.Context(), f); err != nil {
		t.Fatal(err)
	}
}

// call sends one request and returns status and body.
func call(t *testing.T, method, url, token, body string) (int, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close() //nolint:errcheck // read to its end
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(data)
}

// do calls as admin, demands a status and decodes the body.
func (w *world) do(t *testing.T, method, path, body string, want int, out any) {
	t.Helper()
	status, text := call(t, method, w.url+path, w.token, body)
	if status != want {
		t.Fatalf("%s %s: %d %s, want %d", method, path, status, text, want)
	}
	if out != nil {
		if err := json.Unmarshal([]byte(text), out); err != nil {
			t.Fatalf("%s %s: %v in %s", method, path, err, text)
		}
	}
}

func TestResourceLifeCycle(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	const path = "/v1/intentions/default/api/default/web"
	spec := `{"source":"web", "destination":"api",  "action":"allow"}` // two spaces: bytes are kept
	var created client.Result
	w.do(t, http.MethodPut, path+"?revision=0", spec, http.StatusOK, &created)
	if c := created.Changes[0]; c.Change != client.ChangeCreated || c.Revision == 0 || len(created.Warnings) != 2 {
		t.Errorf("create: %+v, warnings %q", c, created.Warnings)
	}
	var item client.Item
	w.do(t, http.MethodGet, path, "", http.StatusOK, &item)
	if string(item.Spec) == "" || item.Name != "web → api" || item.Revision != created.Changes[0].Revision {
		t.Errorf("get: %+v", item)
	}
	rec, ok := state.Intentions.Get(w.state.Snapshot(), intentions.Key{DestinationNamespace: "default", Destination: "api", SourceNamespace: "default", Source: "web"})
	if !ok || string(rec.Raw) != spec {
		t.Errorf("stored %q, want the user's bytes %q", rec.Raw, spec)
	}
	var again client.Result
	w.do(t, http.MethodPut, path, `{"action":"allow","destination":"api","source":"web"}`, http.StatusOK, &again)
	if again.Changes[0].Change != client.ChangeUnchanged {
		t.Errorf("the same value again: %+v", again.Changes[0])
	}
	w.do(t, http.MethodPut, path+"?revision=0", `{"source":"web","destination":"api","action":"deny"}`, http.StatusConflict, nil)
	w.do(t, http.MethodPut, path+fmt.Sprintf("?revision=%d", item.Revision), `{"source":"web","destination":"api","action":"deny"}`, http.StatusOK, nil)
	w.do(t, http.MethodDelete, path+fmt.Sprintf("?revision=%d", item.Revision), "", http.StatusConflict, nil)
	w.do(t, http.MethodDelete, path, "", http.StatusOK, nil)
	w.do(t, http.MethodDelete, path, "", http.StatusNotFound, nil)
	w.do(t, http.MethodGet, path, "", http.StatusNotFound, nil)
}

func TestBadInput(t *testing.T) {
	w := newWorld(t)
	w.do(t, http.MethodPut, "/v1/services/default/db", `{"name":"db","ports":[{"name":"pg","protocol":"tcp"}]}`, http.StatusOK, nil)
	w.do(t, http.MethodPut, "/v1/namespaces/batch", `{"name":"batch"}`, http.StatusOK, nil)
	const web = "/v1/intentions/default/api/default/web"
	for _, c := range []struct {
		name, method, path, body string
		status                   int
		says                     string
	}{
		{"case variant", "PUT", web, `{"source":"web","destination":"api","action":"deny","Action":"allow"}`, 400, "Action"},
		{"duplicate", "PUT", web, `{"source":"web","destination":"api","action":"deny","action":"allow"}`, 400, "action"},
		{"unknown member", "PUT", web, `{"source":"web","destination":"api","action":"deny","mode":"observe"}`, 400, "mode"},
		{"two values", "PUT", web, `{"source":"web","destination":"api","action":"deny"}{}`, 400, "invalid"},
		{"URL and spec differ", "PUT", web, `{"source":"web","destination":"apx","action":"deny"}`, 400, "apx"},
		{"namespace typo", "PUT", "/v1/intentions/batc/api/default/web", `{"source":"web","destination":"batc/api","action":"deny"}`, 404, "did you mean batch?"},
		{"rules on tcp", "PUT", "/v1/intentions/default/db/default/web", `{"source":"web","destination":"db","rules":[{"action":"allow","methods":["GET"]}]}`, 400, "declared tcp"},
		{"namespace in use", "PUT", "/v1/services/batch/x", `{"namespace":"batch","name":"x"}`, 200, "created"},
		{"delete it", "DELETE", "/v1/namespaces/batch", ``, 409, "batch/x"},
		{"instances are the agents'", "DELETE", "/v1/instances/default/db/vm-a/db", ``, 400, "services.d"},
		{"name typo", "GET", "/v1/services/default/dd", ``, 404, "did you mean db?"},
		{"no such route", "GET", "/v1/servces", ``, 404, "no route"},
		{"no such revision", "DELETE", web + "?revision=x", ``, 400, "no revision"},
		{"wrong method", "POST", "/v1/nodes", ``, 405, "use GET"},
		{"unknown member, named", "PUT", "/v1/nodes/a", `{"name":"a","servces":["web"]}`, 400, `"field":"servces"`},
		{"too large", "PUT", web, `{"source":"` + strings.Repeat("w", 600<<10) + `"}`, 413, "bytes"},
		{"join token without node", "POST", "/v1/join-tokens", `{"services":["web"]}`, 400, "name"},
		{"join token for ever", "POST", "/v1/join-tokens", `{"node":"vm-a","ttl":"48h"}`, 400, "24h"},
		{"half a request", "POST", "/v1/intentions/check", `{"source":"web","destination":"api","method":"GET"}`, 400, "both"},
		{"ambiguous path", "POST", "/v1/intentions/check", `{"source":"web","destination":"api","method":"GET","path":"/a%2fb"}`, 400, "400"},
		{"apply twice the same", "POST", "/v1/apply", `{"resources":[{"kind":"node","spec":{"name":"a"}},{"kind":"node","spec":{"name":"a"}}]}`, 400, "resources[1]"},
		{"apply unknown kind", "POST", "/v1/apply", `{"resources":[{"kind":"nod","spec":{"name":"a"}}]}`, 400, "resources[0].kind"},
	} {
		t.Run(c.name, func(t *testing.T) {
			status, body := call(t, c.method, w.url+c.path, w.token, c.body)
			if status != c.status || !strings.Contains(body, c.says) {
				t.Errorf("%s %s: %d %s, want %d and %q", c.method, c.path, status, body, c.status, c.says)
			}
		})
	}
}

func TestApplyIsAllOrNothing(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	good := `{"kind":"node","spec":{"name":"vm-a","services":["web"]}}`
	bad := `{"kind":"intention","spec":{"source":"web","destination":"nowhere/api","action":"allow"}}`
	w.do(t, http.MethodPost, "/v1/apply", `{"resources":[`+good+`,`+bad+`]}`, http.StatusNotFound, nil)
	w.do(t, http.MethodGet, "/v1/nodes/vm-a", "", http.StatusNotFound, nil)
	var dry client.Result
	w.do(t, http.MethodPost, "/v1/apply", `{"dry_run":true,"resources":[`+good+`]}`, http.StatusOK, &dry)
	if !dry.DryRun || dry.Changes[0].Change != client.ChangeCreated {
		t.Errorf("dry run: %+v", dry)
	}
	w.do(t, http.MethodGet, "/v1/nodes/vm-a", "", http.StatusNotFound, nil)
	// The namespace comes last in the request and is written first.
	ns := `{"kind":"namespace","spec":{"name":"nowhere"}}`
	var done client.Result
	w.do(t, http.MethodPost, "/v1/apply", `{"resources":[`+good+`,`+bad+`,`+ns+`]}`, http.StatusOK, &done)
	if len(done.Changes) != 3 || done.Changes[0].Kind != client.KindNamespace {
		t.Errorf("apply: %+v", done.Changes)
	}
}

func TestCheckAndExplain(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.do(t, http.MethodPut, "/v1/services/default/api", `{"name":"api","ports":[{"name":"http","protocol":"http"}]}`, http.StatusOK, nil)
	w.do(t, http.MethodPut, "/v1/intentions/default/api/default/web",
		`{"source":"web","destination":"api","rules":[{"action":"allow","methods":["GET","HEAD"],"path_prefix":"/v1/"}]}`, http.StatusOK, nil)
	for _, c := range []struct {
		question string
		allowed  bool
		reason   string
	}{
		{`{"source":"web","destination":"api","method":"GET","path":"/v1/x"}`, true, "rule"},
		{`{"source":"web","destination":"api","method":"GET","path":"/v1/%2e%2e/x"}`, false, "no-rule-matched"},
		{`{"source":"web","destination":"api","method":"POST","path":"/v1/x"}`, false, "no-rule-matched"},
		{`{"source":"web","destination":"api"}`, false, client.ReasonDepends},
		{`{"source":"cron","destination":"api"}`, false, "no-intention"},
		{`{"source":"spiffe://other.example/ns/default/svc/web","destination":"api","method":"GET","path":"/v1/x"}`, false, "no-intention"},
	} {
		var got client.Access
		w.do(t, http.MethodPost, "/v1/intentions/check", c.question, http.StatusOK, &got)
		if got.Allowed != c.allowed || got.Reason != c.reason {
			t.Errorf("check %s: %+v, want %v, %s", c.question, got, c.allowed, c.reason)
		}
	}
	var e client.Explanation
	w.do(t, http.MethodPost, "/v1/explain", `{"source":"web","destination":"api","method":"POST","path":"/v1/jobs"}`, http.StatusOK, &e)
	if e.Verdict != "DENIED by policy" || len(e.Next) == 0 || e.Next[len(e.Next)-1] != `meshctl intention allow web api --http "POST /v1/jobs" --add` {
		t.Errorf("explain: %+v", e)
	}
}

func TestRolloutWaits(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.fleet.rollout = client.Rollout{Done: true, Services: []client.RolloutService{{Service: "api", Applied: 2, Total: 2}}}
	var r client.Rollout
	w.do(t, http.MethodGet, "/v1/rollout?generation=g&revision=7&service=api&wait=30s", "", http.StatusOK, &r)
	if !r.Done || r.Position.Revision != 7 || r.Services[0].Total != 2 {
		t.Errorf("rollout: %+v", r)
	}
	w.fleet.rollout.Done = false
	w.do(t, http.MethodGet, "/v1/rollout?generation=g&revision=7&service=api&wait=10ms", "", http.StatusOK, &r)
	if r.Done {
		t.Errorf("rollout after its wait: %+v", r)
	}
	w.fleet.rollout = client.Rollout{Done: true}
	w.fleet.callers = []catalog.Name{{Namespace: "default", Name: "web"}, {Namespace: "batch", Name: "cron"}}
	w.do(t, http.MethodGet, "/v1/rollout?generation=g&revision=7&callers_of=api&wait=10ms", "", http.StatusOK, &r)
	if len(r.Services) != 2 || r.Services[1].Service != "batch/cron" {
		t.Errorf("of the callers: %+v", r)
	}
	w.do(t, http.MethodGet, "/v1/rollout?generation=g&revision=7&callers_of=A", "", http.StatusBadRequest, nil)
}

func TestHeldNodesAreReleased(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.fleet.held = []string{"vm-1", "vm-2"}
	var st client.Status
	w.do(t, http.MethodGet, "/v1/status", "", http.StatusOK, &st)
	if !slices.Equal(st.Held, w.fleet.held) {
		t.Errorf("status: %v", st.Held)
	}
	for _, want := range []string{`{"nodes":["vm-1","vm-2"]}`, `{"nodes":[]}`} {
		if status, body := call(t, http.MethodPost, w.url+"/v1/held-nodes/release", w.token, ""); status != http.StatusOK || strings.TrimSpace(body) != want {
			t.Errorf("%d %s, want %s", status, body, want)
		}
	}
}

func TestStatusTellsWhoIsInTouch(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.fleet.proxies = []client.ProxyStatus{{Node: "vm-a", Proxy: "p"}, {Node: "vm-b", Proxy: "p"}, {Node: "vm-c", Proxy: "p"}}
	w.update(t, func(tx *state.Tx) error {
		if err := state.Leases.Put(tx, "vm-a", catalog.Lease{Server: "s1"}); err != nil {
			return err
		}
		return state.Leases.Put(tx, "vm-b", catalog.Lease{Server: "s1", Lost: true})
	})
	var st client.Status
	w.do(t, http.MethodGet, "/v1/status", "", http.StatusOK, &st)
	var connected []bool
	for _, p := range st.Proxies {
		connected = append(connected, p.Connected)
	}
	if !slices.Equal(connected, []bool{true, false, false}) {
		t.Errorf("connected: %v, want the proxy of vm-a only", connected)
	}
}

func TestJoinTokenIsStoredAsHash(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	var token client.JoinToken
	w.do(t, http.MethodPost, "/v1/join-tokens", `{"node":"vm-a","services":["web"],"ttl":"5m"}`, http.StatusOK, &token)
	parsed, err := ca.ParseJoinToken(token.Token)
	if err != nil {
		t.Fatal(err)
	}
	rec, ok := state.JoinTokens.Get(w.state.Snapshot(), acl.Hash(parsed.Secret.Reveal()))
	if !ok || rec.Value.Node != "vm-a" || parsed.Roots.IsZero() || len(parsed.Servers) != 1 {
		t.Errorf("record %+v, token %v", rec.Value, parsed)
	}
	if strings.Contains(string(rec.Raw), string(parsed.Secret.Reveal())) {
		t.Error("the secret is in the store")
	}
}

func TestSnapshotRestores(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.do(t, http.MethodPut, "/v1/nodes/vm-a", `{"name":"vm-a"}`, http.StatusOK, nil)
	status, snapshot := call(t, http.MethodGet, w.url+"/v1/snapshot", w.token, "")
	if status != http.StatusOK {
		t.Fatalf("save: %d %s", status, snapshot)
	}
	w.do(t, http.MethodDelete, "/v1/nodes/vm-a", "", http.StatusOK, nil)
	old := w.state.Snapshot().Position()
	for name, damaged := range map[string]string{"cut": snapshot[:len(snapshot)-3], "flipped": snapshot[:20] + "~" + snapshot[21:], "empty": ""} {
		status, body := call(t, http.MethodPut, w.url+"/v1/snapshot", w.token, damaged)
		if status != http.StatusBadRequest {
			t.Errorf("restore of a %s snapshot: %d %s", name, status, body)
		}
	}
	w.do(t, http.MethodGet, "/v1/nodes/vm-a", "", http.StatusNotFound, nil)
	w.do(t, http.MethodPut, "/v1/snapshot", snapshot, http.StatusOK, nil)
	w.do(t, http.MethodGet, "/v1/nodes/vm-a", "", http.StatusOK, nil)
	if now := w.state.Snapshot().Position(); now.Generation == old.Generation {
		t.Errorf("the generation is still %s", now.Generation)
	}
}
