package api

import (
	"encoding"
	"encoding/json"
	"net/http"
	"reflect"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/intentions"
	"github.com/meshd/meshd/proxy/flow"
	"github.com/meshd/meshd/server/acl"
	"github.com/meshd/meshd/server/client"
	"github.com/meshd/meshd/server/state"
)

// An operation describes a route in the OpenAPI document. Its shapes are those of
// the Go types that the handlers use.
type operation struct {
	summary string
	body    any // nil: none
	answer  any // nil: not JSON
	media   string
	query   []parameter
	errors  []client.Code // beyond those that every route may answer
}

type parameter struct {
	name, says string
	schema     object
}

type object = map[string]any

var (
	text      = object{"type": "string"}
	boolean   = object{"type": "boolean"}
	revisions = parameter{"revision", "the resource must be at this revision; 0: it must not exist", object{"type": "integer", "minimum": 0}}
	stale     = parameter{"stale", "answer with what this server has, without asking the others", boolean}
	maxStale  = parameter{"max_stale", "with stale=true: how old the answer may be, such as 5s (which is the default)", text}
	foreign   = parameter{"trust_domain", "the source's trust domain, if it is another one", text}
)

// operations describes the routes that are no collection's, by method and pattern.
func operations() map[string]operation {
	type req = client.AccessRequest
	missing, denied := []client.Code{client.CodeNotFound}, []client.Code{client.CodeNotFound, client.CodeConflict}
	drained := operation{answer: client.Result{}, errors: []client.Code{client.CodeNotFound}}
	with := func(o operation, summary string, body any) operation {
		o.summary, o.body = summary, body
		return o
	}
	return map[string]operation{
		"GET /v1/healthz":      {summary: "Tell that the server lives", answer: map[string]string{}},
		"GET /v1/readyz":       {summary: "Tell whether it has the state and knows a leader", answer: map[string]string{}},
		"GET /v1/openapi.json": {summary: "This document", answer: object{}},
		"GET /v1/ca/roots":     {summary: "The roots of every trust domain, DER in base64", answer: map[string][][]byte{}},
		"GET /v1/status":       {summary: "The server that answers, and what it serves", answer: client.Status{}, query: []parameter{stale, maxStale}},
		"GET /v1/metrics":      {summary: "Metrics of this server, for Prometheus", media: "text/plain"},
		"GET /v1/debug/{part}": {summary: "A part of a support bundle: config, goroutines or heap", media: "application/octet-stream", errors: []client.Code{client.CodeNotFound}},
		"GET /v1/prometheus/sd": {
			summary: "Where Prometheus finds the metrics of the hosts", answer: []client.TargetGroup{},
			query: []parameter{{"port", "where the hosts serve metrics, if not at 7490", text}, stale, maxStale},
		},
		"GET /v1/rollout": {summary: "Wait until proxies have applied a position", answer: client.Rollout{}, query: []parameter{
			{"generation", "of the position", text},
			{"revision", "of the position", object{"type": "integer", "minimum": 0}},
			{"service", "NAMESPACE/SERVICE that is served or called; may be repeated", object{"type": "array", "items": text}},
			{"callers_of", "NAMESPACE/SERVICE whose callers are meant; may be repeated", object{"type": "array", "items": text}},
			{"wait", "how long, such as 30s; at most 60s", text},
		}},
		"GET /v1/tap":          {summary: "Requests and TCP sessions, as they end", media: "text/event-stream", query: flowParameters("src", "dst", "status", "method", "path", "denied", "failed", "both")},
		"GET /v1/denials":      {summary: "What the proxies did not carry, the newest first", answer: flow.Answer{}, query: flowParameters("src", "dst", "status", "method", "path", "failed", "since", "limit")},
		"GET /v1/top":          {summary: "What the proxies count between services, sampled", media: "text/event-stream", query: flowParameters("src", "dst", "interval")},
		"GET /v1/explain/{id}": {summary: "Explain a denial or error by its mesh-error-id", answer: client.Explanation{}, errors: []client.Code{client.CodeNotFound}},

		"POST /v1/held-nodes/release": {summary: "Let nodes be declared out of touch that are held back", answer: client.Released{}},
		"POST /v1/apply":              {summary: "Write resources, all or none", body: client.ApplyRequest{}, answer: client.Result{}, errors: denied},
		"POST /v1/intentions/check":   {summary: "Decide a request as a proxy would", body: req{}, answer: client.Access{}, query: []parameter{stale, maxStale}},
		"GET /v1/intentions/history": {summary: "What became of intentions, the newest first", answer: client.History{}, query: []parameter{
			{"namespace", "only of intentions whose destination is in it", text},
			{"source", "only of intentions with this source", text},
			{"destination", "only of intentions with this destination", text},
			{"since", "only after this time", object{"type": "string", "format": "date-time"}},
			{"limit", "at most so many transactions; 100 if not given", object{"type": "integer", "minimum": 1, "maximum": maxHistory}},
			{"continue", "the page after the one that said so", text},
			stale, maxStale,
		}},
		"POST /v1/intentions/undo": {summary: "Restore what was before a change of intentions", body: client.UndoRequest{}, answer: client.Result{}, errors: denied},
		"POST /v1/explain":         {summary: "Say what would become of a request, and why", body: req{}, answer: client.Explanation{}, query: []parameter{stale, maxStale}},
		"POST /v1/join-tokens":     {summary: "Make a one-time token that admits a node", body: client.JoinTokenRequest{}, answer: client.JoinToken{}},
		"GET /v1/snapshot":         {summary: "Save the whole state, encrypted under the cluster key", media: "application/octet-stream"},
		"GET /v1/audit": {summary: "Who asked for what, and what became of it, the oldest first", answer: client.AuditLog{}, query: []parameter{
			{"server", "only that server's log", text},
			{"who", "a caller, or what people call it", text},
			{"kind", "a resource, or the kind of what was changed", text},
			{"outcome", "allowed, denied or failed", text},
			{"request_id", "of one request", text},
			{"since", "nothing older, RFC 3339", object{"type": "string", "format": "date-time"}},
			{"after", "only records with a higher number, the lowest first; with server", object{"type": "integer", "minimum": 0}},
			{"limit", "at most so many; 100 if not given", object{"type": "integer", "minimum": 1, "maximum": client.MaxAudit}},
			{"follow", "answer with server-sent events: these, then all that come", boolean},
		}},
		"PUT /v1/snapshot": {summary: "Replace the whole state", media: "application/octet-stream", body: []byte{}, answer: client.Restored{}, errors: []client.Code{client.CodeConflict}},

		"GET /v1/members":                         {summary: "The servers, each asked for what it knows of itself", answer: client.Members{}},
		"POST /v1/operator/raft/transfer":         {summary: "Hand the leadership to another server", body: client.TransferRequest{}, answer: client.Transferred{}, errors: denied},
		"DELETE /v1/operator/raft/servers/{name}": {summary: "Take a server out of the cluster for good", answer: client.Member{}, errors: denied},

		"GET /v1/tokens":                    {summary: "The tokens that the caller may see", answer: client.Tokens{}, query: []parameter{stale}},
		"POST /v1/tokens":                   {summary: "Make a token, that may do no more than the caller", body: client.TokenRequest{}, answer: client.NewToken{}, errors: missing},
		"GET /v1/tokens/{accessor}":         {summary: "One token", answer: client.Token{}, query: []parameter{stale}, errors: missing},
		"DELETE /v1/tokens/{accessor}":      {summary: "End a token at once", answer: client.Token{}, query: []parameter{{"force", "even if it is the last that may do everything", boolean}}, errors: denied},
		"POST /v1/tokens/{accessor}/rotate": {summary: "Give a token another secret", body: client.RotateRequest{}, answer: client.NewToken{}, errors: denied},
		"GET /v1/whoami":                    {summary: "Who calls, and what he may do", answer: client.Whoami{}},
		"POST /v1/can-i":                    {summary: "Tell whether something may be done", body: client.CanRequest{}, answer: client.Can{}, errors: missing},

		"PUT /v1/nodes/{name}/drain":                                   with(drained, "Let a node take no new work", client.DrainRequest{}),
		"DELETE /v1/nodes/{name}/drain":                                with(drained, "Take back a node's drain", nil),
		"POST /v1/nodes/{name}/leave":                                  {summary: "Remove the instances of a node that is out of touch", answer: client.Result{}, errors: denied},
		"PUT /v1/instances/{namespace}/{service}/{node}/{id}/drain":    with(drained, "Let an instance take no new work", client.DrainRequest{}),
		"DELETE /v1/instances/{namespace}/{service}/{node}/{id}/drain": with(drained, "Take back an instance's drain", nil),
	}
}

// flowParameters describes those parameters of a flow.Query that are named.
func flowParameters(names ...string) []parameter {
	all := map[string]parameter{
		"src":      {"src", "the source: SERVICE, NAMESPACE/SERVICE, NAMESPACE/* or a SPIFFE ID", text},
		"dst":      {"dst", "the destination, likewise", text},
		"status":   {"status", "403, or 4xx for its class", text},
		"method":   {"method", "of HTTP", text},
		"path":     {"path", "how the path begins", text},
		"denied":   {"denied", "only what was denied, or refused on the mesh port", boolean},
		"failed":   {"failed", "with what is denied also what a proxy failed by itself", boolean},
		"both":     {"both", "what both proxies saw of a request, not the destination's side alone", boolean},
		"since":    {"since", "nothing older, RFC 3339", object{"type": "string", "format": "date-time"}},
		"limit":    {"limit", "at most so many", object{"type": "integer", "minimum": 1, "maximum": flow.MaxLimit}},
		"interval": {"interval", "between samples, such as 2s; 0.5 s to 1 min", text},
	}
	out := make([]parameter, 0, len(names))
	for _, name := range names {
		out = append(out, all[name])
	}
	return out
}

// specOf is what a user writes of a kind.
func specOf(k client.Kind) any {
	switch k {
	case client.KindNamespace:
		return catalog.Namespace{}
	case client.KindNode:
		return catalog.Node{}
	case client.KindService:
		return catalog.Service{}
	case client.KindInstance:
		return catalog.Instance{}
	case client.KindIntention:
		return intentions.Intention{}
	case client.KindSet:
		return state.Set{}
	case client.KindPolicy:
		return catalog.Policy{}
	case client.KindRole:
		return catalog.Role{}
	default:
		return nil
	}
}

// describe returns the operation of a route; ok is false if nobody has described
// it.
func (a *API) describe(method, pattern string) (operation, bool) {
	if o, ok := operations()[method+" "+pattern]; ok {
		return o, true
	}
	for _, k := range a.kinds {
		base, name := "/v1/"+k.kind().Collection(), string(k.kind())
		missing := []client.Code{client.CodeNotFound}
		var one []parameter
		if k.kind() == client.KindIntention {
			one = []parameter{foreign}
		}
		switch {
		case pattern == base:
			return operation{summary: "List or watch " + k.kind().Collection(), answer: client.List{}, query: listParametersOf(k)}, method == http.MethodGet
		case pattern != base+k.pattern():
			continue
		case method == http.MethodGet:
			return operation{summary: "One " + name, answer: client.Item{}, query: append(one, stale, maxStale), errors: missing}, true
		case method == http.MethodPut:
			return operation{
				summary: "Write one " + name, body: specOf(k.kind()), answer: client.Result{}, query: append(one, revisions),
				errors: append(missing, client.CodeConflict),
			}, true
		case method == http.MethodDelete:
			query := append(one, revisions)
			if k.kind() == client.KindSet {
				query = []parameter{{"prune", "delete what belongs to the set, too", boolean}}
			}
			return operation{summary: "Delete one " + name, answer: client.Result{}, query: query, errors: append(missing, client.CodeConflict)}, true
		}
	}
	return operation{}, false
}

func listParametersOf(k collection) []parameter {
	out := []parameter{
		{"limit", "at most so many items", object{"type": "integer", "minimum": 1, "maximum": maxPage}},
		{"continue", "the page after the one that said so", text},
		{"prefix", "names that begin so", text},
		{"watch", "answer with server-sent events: the state, then every change", boolean},
		stale, maxStale,
	}
	if k.namespaced() {
		out = append(out, parameter{"namespace", "only those of the namespace", text})
	}
	if k.labeled() {
		out = append(out, parameter{"label", "NAME=VALUE, or NAME for any value; may be repeated", object{"type": "array", "items": text}})
	}
	return out
}

var pathParameter = regexp.MustCompile(`\{(\w+)\}`)

// openAPI makes the document from the route table, so that it has every route and
// no other.
func (a *API) openAPI(*call) (any, error) {
	s := &schemas{types: map[string]reflect.Type{}, all: object{}}
	failure := s.of(reflect.TypeFor[struct {
		Error *client.Error `json:"error"`
	}]())
	paths := map[string]object{}
	for _, r := range a.routes() {
		o, _ := a.describe(r.method, r.pattern)
		if paths[r.pattern] == nil {
			paths[r.pattern] = object{}
		}
		paths[r.pattern][strings.ToLower(r.method)] = s.operation(r, o, failure)
	}
	return object{
		"openapi": "3.1.0",
		"info":    object{"title": "meshd", "version": a.cfg.Info.Version, "description": "The HTTP API of a meshd server."},
		"paths":   paths,
		"components": object{
			"schemas":         s.all,
			"securitySchemes": object{"token": object{"type": "http", "scheme": "bearer"}},
		},
	}, nil
}

func (s *schemas) operation(r route, o operation, failure object) object {
	var parameters []object
	for _, m := range pathParameter.FindAllStringSubmatch(r.pattern, -1) {
		parameters = append(parameters, object{"name": m[1], "in": "path", "required": true, "schema": text})
	}
	for _, p := range o.query {
		parameters = append(parameters, object{"name": p.name, "in": "query", "description": p.says, "schema": p.schema})
	}
	media := "application/json"
	if o.media != "" {
		media = o.media
	}
	ok := object{"description": "done", "content": object{media: object{}}}
	if o.answer != nil {
		content := object{"application/json": object{"schema": s.of(reflect.TypeOf(o.answer))}}
		if _, list := o.answer.(client.List); list {
			content["text/event-stream"] = object{"schema": text}
		}
		ok["content"] = content
	}
	responses := object{"200": ok}
	every := []client.Code{client.CodeInvalid, client.CodeUnauthorized, client.CodePermission, client.CodeInternal, client.CodeUnavailable}
	if r.method != http.MethodGet {
		every = append(every, client.CodeTooLarge, client.CodeDiskFull, client.CodeUnknown)
	}
	for _, code := range append(every, o.errors...) {
		responses[strconv.Itoa(statusOf(code))] = object{"description": string(code), "content": object{"application/json": object{"schema": failure}}}
	}
	out := object{"summary": o.summary, "operationId": operationID(r), "responses": responses, "description": "Needs " + permission(r) + "."}
	if len(parameters) > 0 {
		out["parameters"] = parameters
	}
	if o.body != nil {
		content := object{media: object{}}
		if o.media == "" {
			content[media] = object{"schema": s.of(reflect.TypeOf(o.body))}
		}
		out["requestBody"] = object{"content": content}
	}
	if r.resource != acl.Health && r.resource != acl.Roots {
		out["security"] = []object{{"token": []string{}}}
	}
	return out
}

// permission is what a route takes, for people.
func permission(r route) string {
	switch r.resource {
	case acl.Health, acl.Roots:
		return "no token"
	case acl.Self:
		return "a token"
	case acl.Each:
		return "write on each resource"
	default:
		return string(r.resource) + ":" + string(r.verb)
	}
}

// operationID is a name made of method and path: "put_nodes_name_drain".
func operationID(r route) string {
	path := strings.TrimPrefix(r.pattern, "/v1/")
	return strings.ToLower(r.method) + "_" + strings.NewReplacer("/", "_", "{", "", "}", "", "-", "_", ".", "_").Replace(path)
}

// schemas makes JSON schemas of Go types, and keeps those of named structs.
type schemas struct {
	types map[string]reflect.Type
	all   object
}

func (s *schemas) of(t reflect.Type) object {
	switch t {
	case reflect.TypeFor[time.Time]():
		return object{"type": "string", "format": "date-time"}
	case reflect.TypeFor[json.RawMessage]():
		return object{}
	case reflect.TypeFor[ca.Bundle]():
		return object{"type": "object"}
	case reflect.TypeFor[catalog.Duration]():
		return object{"type": "string", "examples": []string{"10m"}}
	}
	if t.Kind() != reflect.Pointer && t.Implements(reflect.TypeFor[encoding.TextMarshaler]()) {
		return text
	}
	switch t.Kind() {
	case reflect.Pointer:
		return s.of(t.Elem())
	case reflect.String:
		return text
	case reflect.Bool:
		return boolean
	case reflect.Float32, reflect.Float64:
		return object{"type": "number"}
	case reflect.Slice, reflect.Array:
		if t.Elem().Kind() == reflect.Uint8 {
			return object{"type": "string", "contentEncoding": "base64"}
		}
		return object{"type": "array", "items": s.of(t.Elem())}
	case reflect.Map:
		return object{"type": "object", "additionalProperties": s.of(t.Elem())}
	case reflect.Struct:
		return s.named(t)
	case reflect.Interface:
		return object{}
	default:
		return object{"type": "integer"}
	}
}

// named describes a struct once and refers to it. Two types of one name are told
// apart by their packages.
func (s *schemas) named(t reflect.Type) object {
	name := t.Name()
	if name == "" {
		return s.fields(t)
	}
	if other, taken := s.types[name]; taken && other != t {
		name = t.String()
	}
	if _, done := s.types[name]; !done {
		s.types[name] = t
		s.all[name] = s.fields(t)
	}
	return object{"$ref": "#/components/schemas/" + name}
}

func (s *schemas) fields(t reflect.Type) object {
	properties, required := object{}, []string{}
	for _, f := range reflect.VisibleFields(t) {
		name, options, _ := strings.Cut(f.Tag.Get("json"), ",")
		if !f.IsExported() || f.Anonymous || name == "-" {
			continue
		}
		if name == "" {
			name = f.Name
		}
		properties[name] = s.of(f.Type)
		if options == "" {
			required = append(required, name)
		}
	}
	out := object{"type": "object", "properties": properties}
	if len(required) > 0 {
		out["required"] = required
	}
	return out
}
