// Package api is the HTTP/JSON API of a server. Every route stands in one
// table with what it does to which resource; one middleware authenticates,
// authorizes, and turns errors into the API's error body.
package api

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/proxy/flow"
	"github.com/meshd/meshd/server/acl"
	"github.com/meshd/meshd/server/client"
	"github.com/meshd/meshd/server/state"
)

// Fleet is what the API asks of the streams that agents hold.
type Fleet interface {
	// Rollout tells how far the proxies concerned with the services are, and
	// returns a channel that is closed when that may have changed.
	Rollout(pos catalog.Position, services []catalog.Name) (client.Rollout, <-chan struct{})
	// Callers returns the services that call one of the services, in order, each
	// once.
	Callers(services []catalog.Name) []catalog.Name
	// Proxies returns what each proxy last reported.
	Proxies() []client.ProxyStatus
	// Held returns the nodes that are silent and not declared lost, because too many
	// are. Release lets them be.
	Held() []string
	Release()
}

// Config is what the API serves from. Every field is required, but for Now.
type Config struct {
	State     *state.State
	Authority ca.Authority
	Fleet     Fleet
	Snapshots Snapshots
	Cluster   Cluster
	// Ask puts a question to the hosts that it concerns, and hands emit their
	// answers: one, if the question has an end.
	Ask func(ctx context.Context, q flow.Query, emit func(flow.Answer) error) error
	// Metrics answers GET /v1/metrics, for callers that may.
	Metrics http.Handler
	// Settings are what may be shown of the server's configuration: no secret.
	Settings any
	// Observe is told of each answered request: its route's method and pattern (a
	// path without one has the pattern "other"), the status, and how long it took,
	// watches to their end. It is called by many goroutines; nil: nobody cares.
	Observe func(method, pattern string, status int, took time.Duration)
	// Audit is told of each request that is to be accounted for, see AuditRecord. It
	// is called by many goroutines, before the caller has his answer, which waits
	// for it; nil: nobody keeps account.
	Audit func(AuditRecord)
	// Reserve is called before each write, which it can refuse, and returns what is
	// told of it in place of Audit, once; nil: Audit takes everything.
	Reserve func() (func(AuditRecord), error)
	// AuditLog answers GET /v1/audit; nil: there is no log.
	AuditLog AuditLog
	Log      *slog.Logger
	// Info is what does not change while the server runs: Server, Version,
	// TrustDomain, Started.
	Info client.Status
	// Age tells how old this server's state is at most: 0 for one that leads, or is
	// alone. Nil: always 0.
	Age func() time.Duration
	// Addresses returns host:port of the servers, as join tokens carry them.
	Addresses func() []string
	// Now is time.Now unless a test needs another.
	Now func() time.Time
	// Heartbeat is how often a watch without news says that it lives; 15 s when
	// zero.
	Heartbeat time.Duration
}

// API handles requests. It is safe for concurrent use.
type API struct {
	cfg     Config
	kinds   []collection
	watches chan struct{} // a place for each
	lookup  atomic.Int64  // when an unknown token was looked for last, see newer
	ending  chan struct{} // closed by EndWatches
	end     sync.Once
}

const (
	maxBody     = 512 << 10
	maxApply    = 16 << 20 // a set may have any number of resources
	maxSnapshot = 4 << 30
	maxWait     = time.Minute
)

// New returns the API. Use Handler to serve it.
func New(cfg Config) *API {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Observe == nil {
		cfg.Observe = func(string, string, int, time.Duration) {}
	}
	if cfg.Audit == nil {
		cfg.Audit = func(AuditRecord) {}
	}
	if cfg.Age == nil {
		cfg.Age = func() time.Duration { return 0 }
	}
	if cfg.Heartbeat == 0 {
		cfg.Heartbeat = defaultHeartbeat
	}
	return &API{
		cfg: cfg, kinds: collections(cfg.Info.TrustDomain),
		watches: make(chan struct{}, maxWatches), ending: make(chan struct{}),
	}
}

// A route is one line of the API.
type route struct {
	method, pattern string
	verb            acl.Verb
	resource        acl.Resource
	// object is what the path means, for authorization: all of a request but its
	// verb and resource; nil means all of the resource. Handlers that learn more
	// from the body authorize again.
	object func(*http.Request) acl.Request
	handle func(*call) (any, error)
	// limit is how many bytes of body are read; 0 means maxBody.
	limit int64
}

// A call is one authenticated and authorized request.
type call struct {
	*http.Request
	who  acl.Identity
	what acl.Request
	id   string
	// revision is that of a commit which the answer does not tell.
	revision uint64
	// cut is why a stream was ended, if the caller may not see it any more.
	cut error
	// account takes the record of a write.
	account func(AuditRecord)
	// out takes an answer that is no JSON.
	out http.ResponseWriter
	// allowed tells whether the caller may still do what was asked for, as a token
	// can expire or be taken away while a watch lasts.
	allowed func() error
}

// written is the answer of a handler that has written to call.out.
type written struct{}

func (a *API) routes() []route {
	rs := []route{
		{http.MethodGet, "/v1/healthz", acl.Read, acl.Health, nil, a.health, 0},
		{http.MethodGet, "/v1/readyz", acl.Read, acl.Health, nil, a.ready, 0},
		{http.MethodGet, "/v1/openapi.json", acl.Read, acl.Health, nil, a.openAPI, 0},
		{http.MethodGet, "/v1/ca/roots", acl.Read, acl.Roots, nil, a.roots, 0},
		{http.MethodGet, "/v1/status", acl.Read, acl.Operator, nil, a.status, 0},
		{http.MethodGet, "/v1/metrics", acl.Read, acl.Operator, nil, a.metrics, 0},
		{http.MethodGet, "/v1/debug/{part}", acl.Read, acl.Operator, nil, a.debug, 0},
		{http.MethodGet, "/v1/prometheus/sd", acl.Read, acl.Node, some, a.prometheusTargets, 0},
		{http.MethodGet, "/v1/rollout", acl.Read, acl.Self, nil, a.rollout, 0}, // it shows of each service to those who may see it
		{http.MethodPost, "/v1/held-nodes/release", acl.Write, acl.Operator, nil, a.releaseNodes, 0},
		{http.MethodPost, "/v1/apply", acl.Write, acl.Each, nil, a.apply, maxApply}, // each resource is authorized by itself
		{http.MethodPost, "/v1/intentions/check", acl.Read, acl.Intention, some, a.check, 0},
		{http.MethodPost, "/v1/explain", acl.Read, acl.Intention, some, a.explain, 0},
		{http.MethodPost, "/v1/join-tokens", acl.Write, acl.JoinTokens, some, a.joinToken, 0},
		{http.MethodGet, "/v1/snapshot", acl.Read, acl.Snapshot, nil, a.saveSnapshot, 0},
		{http.MethodPut, "/v1/snapshot", acl.Write, acl.Snapshot, nil, a.restoreSnapshot, maxSnapshot},
		{http.MethodGet, "/v1/audit", acl.Read, acl.Audit, nil, a.auditLog, 0},
	}
	rs = append(rs, a.drainRoutes()...)
	rs = append(rs, a.historyRoutes()...)
	rs = append(rs, a.flowRoutes()...)
	rs = append(rs, a.tokenRoutes()...)
	rs = append(rs, a.clusterRoutes()...)
	for _, k := range a.kinds {
		remove := a.delete(k)
		if k.kind() == client.KindSet {
			remove = a.deleteSet
		}
		base := "/v1/" + k.kind().Collection()
		one := base + k.pattern()
		rs = append(rs,
			route{http.MethodGet, base, acl.Read, k.resource(), some, a.list(k), 0},
			route{http.MethodGet, one, acl.Read, k.resource(), k.object, a.get(k), 0},
			route{http.MethodPut, one, acl.Write, k.resource(), k.object, a.put(k), 0},
			route{http.MethodDelete, one, acl.Write, k.resource(), k.object, remove, 0},
		)
	}
	return rs
}

// Route is one line of the table, for tests and documents.
type Route struct {
	Method, Pattern string
	Verb            acl.Verb
	Resource        acl.Resource
}

// Routes lists every route of the API.
func (a *API) Routes() []Route {
	var out []Route
	for _, r := range a.routes() {
		out = append(out, Route{r.method, r.pattern, r.verb, r.resource})
	}
	return out
}

// Handler serves the API. Local says that callers came over the admin socket
// and were found to be the server's own user or root.
func (a *API) Handler(local bool) http.Handler {
	mux := http.NewServeMux()
	methods := map[string][]string{}
	for _, r := range a.routes() {
		mux.Handle(r.method+" "+r.pattern, a.serve(r, local))
		methods[r.pattern] = append(methods[r.pattern], r.method)
	}
	for pattern, allowed := range methods {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, req *http.Request) {
			w.Header().Set("Allow", strings.Join(allowed, ", "))
			a.refuse(w, &client.Error{
				Code: client.CodeMethod, Message: fmt.Sprintf("%s is not for %s", req.Method, req.URL.Path), Next: "use " + strings.Join(allowed, " or "),
			})
		})
	}
	mux.HandleFunc("/", func(w http.ResponseWriter, req *http.Request) {
		a.refuse(w, &client.Error{
			Code: client.CodeNotFound, Message: fmt.Sprintf("no route %s %s", req.Method, req.URL.Path), Next: "see docs/reference/api.md",
		})
	})
	return mux
}

// refuse answers what is no route.
func (a *API) refuse(w http.ResponseWriter, e *client.Error) {
	began := time.Now()
	writeError(w, newRequestID(), e)
	a.cfg.Observe("other", "other", statusOf(e.Code), time.Since(began))
}

func (a *API) serve(r route, local bool) http.Handler {
	r.handle = a.accounted(r)
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		began, status := time.Now(), http.StatusInternalServerError // if the handler panics
		defer func() { a.cfg.Observe(r.method, r.pattern, status, time.Since(began)) }()
		c := &call{Request: req, id: newRequestID(), out: w}
		w.Header().Set("Mesh-Request-Id", c.id)
		limit := int64(maxBody)
		if r.limit > 0 {
			limit = r.limit
		}
		req.Body = http.MaxBytesReader(w, req.Body, limit)
		audited := false
		defer func() {
			if !audited { // the handler panicked, as when a snapshot could not be sent to its end
				a.audit(c, r, nil, errAborted, status)
			}
		}()
		out, err := a.answer(c, r, local)
		status = http.StatusOK
		if err != nil {
			status = statusOf(toError(err).Code)
		}
		a.audit(c, r, out, err, status)
		audited = true
		if err != nil {
			e := toError(err)
			if e.Code == client.CodeInternal {
				a.cfg.Log.ErrorContext(req.Context(), "request failed", slog.String("request_id", c.id),
					slog.String("method", req.Method), slog.String("path", req.URL.Path), slog.Any("error", err))
			}
			writeError(w, c.id, e)
			return
		}
		if r.verb == acl.Write {
			a.cfg.Log.InfoContext(req.Context(), "changed", slog.String("request_id", c.id), slog.String("who", c.who.String()),
				slog.String("method", req.Method), slog.String("path", req.URL.Path))
		}
		if _, done := out.(written); !done {
			writeJSON(w, http.StatusOK, out)
		}
	})
}

// errAborted is what became of a request whose handler did not return.
var errAborted = errors.New("the answer was aborted")

// EndWatches ends the watches that run, and those that come: a server that stops
// does not wait for them. It may be called more than once.
func (a *API) EndWatches() { a.end.Do(func() { close(a.ending) }) }

func newRequestID() string {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails: crypto/rand.Read ends the process instead
	return hex.EncodeToString(b[:])
}

func writeJSON(w http.ResponseWriter, status int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	_ = enc.Encode(body) // the client is gone: nobody to tell
}

func writeError(w http.ResponseWriter, id string, e *client.Error) {
	shown := *e
	shown.RequestID = id
	writeJSON(w, statusOf(e.Code), struct {
		Error *client.Error `json:"error"`
	}{&shown})
}

func (a *API) roots(c *call) (any, error) { return a.cfg.Authority.Roots(c.Context()) }

func (a *API) status(c *call) (any, error) {
	s, err := a.fresh(c)
	if err != nil {
		return nil, err
	}
	out := a.cfg.Info
	out.Position = s.Position()
	out.FeatureLevel = s.FeatureLevel()
	out.Nodes = state.Nodes.Len(s)
	for _, lease := range state.Leases.All(s) {
		if lease.Err == nil && !lease.Value.Lost {
			out.Connected++
		}
	}
	out.Held = a.cfg.Fleet.Held()
	out.Proxies = a.cfg.Fleet.Proxies()
	for i, p := range out.Proxies {
		lease, ok := state.Leases.Get(s, p.Node)
		out.Proxies[i].Connected = ok && lease.Err == nil && !lease.Value.Lost
	}
	out.Members = a.cfg.Cluster.Members(c.Context(), false)
	return out, nil
}

// releaseNodes lets nodes be declared lost that are held back, as too many fell
// silent at once.
func (a *API) releaseNodes(*call) (any, error) {
	out := client.Released{Nodes: a.cfg.Fleet.Held()}
	if out.Nodes == nil {
		out.Nodes = []string{}
	}
	if len(out.Nodes) > 0 {
		a.cfg.Fleet.Release()
	}
	return out, nil
}

func readBody(c *call) ([]byte, error) {
	data, err := io.ReadAll(c.Body)
	if tooLarge, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return nil, &client.Error{Code: client.CodeTooLarge, Message: fmt.Sprintf("the body has more than %d bytes", tooLarge.Limit), Next: "send fewer resources at once"}
	}
	if err != nil {
		return nil, &client.Error{Code: client.CodeInvalid, Message: "the body did not arrive: " + err.Error()}
	}
	return data, nil
}
