package api

import (
	"cmp"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/intentions"
	"github.com/meshd/meshd/server/acl"
	"github.com/meshd/meshd/server/client"
	"github.com/meshd/meshd/server/state"
)

// question is a decoded AccessRequest.
type question struct {
	source      spiffe.ID
	destination catalog.Name
	request     intentions.Request
	text        string // for people: "GET /v1/jobs"
}

func (a *API) question(c *call) (question, error) {
	raw, err := readBody(c)
	if err != nil {
		return question{}, err
	}
	var req client.AccessRequest
	if err := decodeBody("request", raw, &req); err != nil {
		return question{}, err
	}
	var p catalog.Problems
	q := question{}
	if q.source, err = sourceID(a.cfg.Info.TrustDomain, req.Source); err != nil {
		p.Add("source", "%v", err)
	}
	if q.destination, err = catalog.ParseName(req.Destination); err != nil {
		p.Add("destination", "%v", err)
	}
	q.request = intentions.Request{Source: q.source, Destination: q.destination, Port: req.Port, Now: a.cfg.Now()}
	switch {
	case (req.Method == "") != (req.Path == ""):
		p.Add("path", "give both a method and a path, or neither")
	case req.Path != "":
		path, _, err := intentions.NormalizeTarget(req.Path)
		if err != nil {
			p.Add("path", "a proxy refuses it with status 400: %v", err)
		}
		q.request.HTTP = &intentions.HTTPRequest{Method: req.Method, Path: path, Headers: headers(req.Headers)}
		q.text = req.Method + " " + path
	case len(req.Headers) > 0:
		p.Add("headers", "headers need a method and a path")
	}
	if err := p.Err(); err != nil {
		return question{}, invalid("request", err)
	}
	return q, nil
}

type headers map[string][]string

// HeaderValue implements intentions.HeaderLookup.
func (h headers) HeaderValue(name string, i int) ([]byte, bool) {
	n := 0
	for k, values := range h {
		if !strings.EqualFold(k, name) {
			continue
		}
		if i < n+len(values) {
			return []byte(values[i-n]), true
		}
		n += len(values)
	}
	return nil, false
}

// decide answers with the evaluator that proxies use, on what they get.
func (a *API) decide(s *state.Snapshot, q *question) client.Access {
	if svc, ok := state.Services.Get(s, q.destination); ok && q.request.Port == "" {
		if p, ok := svc.Value.Port(""); ok {
			q.request.Port = p.Name
		}
	}
	if svc, ok := state.Services.Get(s, q.destination); ok {
		if p, ok := svc.Value.Port(q.request.Port); ok && !carriesRequests(p.Protocol) {
			q.request.HTTP = nil // proxies see a connection there
		}
	}
	policy, err := s.Policy(a.cfg.Info.TrustDomain, q.destination)
	if err != nil {
		return client.Access{Rule: -1, Reason: string(intentions.ReasonNoPolicy), Text: "an intention cannot be read, so all is denied: " + err.Error()}
	}
	x := policy.Explain(q.request)
	d := x.Decision
	out := client.Access{Allowed: d.Allowed, Reason: string(d.Reason), Rule: d.Rule, Text: x.String()}
	if d.Reason == intentions.ReasonNotHTTP && servesHTTP(s, q) {
		out.Reason = client.ReasonDepends
		out.Text = fmt.Sprintf("intention %s decides by request: give a method and a path; its rules: %s", d.Key, ruleList(x.Intention.Rules))
	}
	if !d.Key.IsZero() {
		if item, err := a.collection(client.KindIntention).get(s, client.IntentionRef(d.Key)); err == nil {
			out.Intention = item
		}
	}
	return out
}

// servesHTTP reports whether the port that is asked about carries requests, so
// that a question without one was not complete.
func servesHTTP(s *state.Snapshot, q *question) bool {
	svc, ok := state.Services.Get(s, q.destination)
	if !ok {
		return true // unknown: the question may still be completed
	}
	port, ok := svc.Value.Port(q.request.Port)
	return ok && carriesRequests(port.Protocol)
}

func ruleList(rules []intentions.Rule) string {
	texts := make([]string, len(rules))
	for i, r := range rules {
		texts[i] = strconv.Quote(r.String())
	}
	return strings.Join(texts, ", ")
}

// namespacesExist refuses a question about a namespace that nobody made.
func (a *API) namespacesExist(s *state.Snapshot, q question) error {
	if err := namespaceExists(s, q.destination.Namespace); err != nil {
		return err
	}
	if q.source.TrustDomain != a.cfg.Info.TrustDomain {
		return nil
	}
	return namespaceExists(s, q.source.Namespace)
}

// stateFor returns the state that answers a question, if the caller may ask it:
// about a destination, or a source, whose intentions he may read.
func (a *API) stateFor(c *call, q question) (*state.Snapshot, error) {
	source := a.serviceOf(q.source)
	what := acl.Request{
		Namespace: q.destination.Namespace, Name: q.destination.Name, SourceNamespace: source.Namespace, Source: source.Name,
	}
	if err := c.authorize(acl.Read, acl.Intention, what); err != nil {
		return nil, err
	}
	s, err := a.fresh(c)
	if err == nil {
		err = a.namespacesExist(s, q)
	}
	return s, err
}

func (a *API) check(c *call) (any, error) {
	q, err := a.question(c)
	if err != nil {
		return nil, err
	}
	s, err := a.stateFor(c, q)
	if err != nil {
		return nil, err
	}
	return a.decide(s, &q), nil
}

// explain adds to the decision what else decides whether a request arrives.
func (a *API) explain(c *call) (any, error) {
	q, err := a.question(c)
	if err != nil {
		return nil, err
	}
	s, err := a.stateFor(c, q)
	if err != nil {
		return nil, err
	}
	e := client.Explanation{Position: s.Position(), Works: true}
	fact := func(mark, format string, args ...any) {
		e.Facts = append(e.Facts, client.Fact{Mark: mark, Text: fmt.Sprintf(format, args...)})
		e.Works = e.Works && mark != client.FactFail
	}
	a.sourceFact(s, &e, q, fact)
	a.destinationFact(s, &e, &q, fact)
	a.planFact(s, q, fact)
	e.Access = a.decide(s, &q)
	changed := a.blame(s, q, e.Access)
	if e.Access.Allowed {
		fact(client.FactOK, "%s%s", e.Access.Text, changed.text)
		e.Verdict = "ALLOWED"
		if !e.Works {
			e.Verdict = "ALLOWED, but it cannot be served now"
		}
		return e, nil
	}
	if e.Access.Reason == client.ReasonDepends {
		fact(client.FactWarn, "%s%s", e.Access.Text, changed.text)
		e.Verdict = "DEPENDS on the request"
		e.Next = append(e.Next, "meshctl explain "+a.short(q.source)+" "+q.destination.Short()+" METHOD PATH")
		return e, nil
	}
	fact(client.FactFail, "%s%s", e.Access.Text, changed.text)
	e.Verdict = "DENIED by policy"
	e.Next = append(e.Next, a.next(s, q, e.Access, changed)...)
	return e, nil
}

// next says what would let a denied request through.
func (a *API) next(s *state.Snapshot, q question, access client.Access, changed blamed) []string {
	var next []string
	if changed.undo > 0 {
		next = append(next, fmt.Sprintf("meshctl intention undo %d", changed.undo))
	}
	if access.Reason == string(intentions.ReasonNotHTTP) {
		return append(next, fmt.Sprintf("declare the port of %s as protocol http, which its rules need", q.destination.Short()))
	}
	if _, ok := state.Services.Get(s, q.destination); ok {
		next = append(next, a.allowCommand(q, access))
	}
	return next
}

func (a *API) sourceFact(s *state.Snapshot, e *client.Explanation, q question, fact func(mark, format string, args ...any)) {
	if q.source.Kind != spiffe.KindService || q.source.TrustDomain != a.cfg.Info.TrustDomain {
		fact(client.FactOK, "identity %s", q.source)
		return
	}
	n := catalog.Name{Namespace: q.source.Namespace, Name: q.source.Name}
	if serviceStatus(s, n).Instances > 0 {
		fact(client.FactOK, "service %s runs, identity %s", n.Short(), q.source)
		return
	}
	fact(client.FactWarn, "service %s is not registered on any node%s", n.Short(), didYouMean(s, n))
	e.Next = append(e.Next, "define service "+n.Short()+" in services.d of its host")
}

func (a *API) destinationFact(s *state.Snapshot, e *client.Explanation, q *question, fact func(mark, format string, args ...any)) {
	svc, ok := state.Services.Get(s, q.destination)
	if !ok {
		fact(client.FactFail, "service %s does not exist%s", q.destination.Short(), didYouMean(s, q.destination))
		return
	}
	if len(svc.Value.Ports) == 0 {
		fact(client.FactFail, "service %s has no ports: it only calls others", q.destination.Short())
		return
	}
	if port, ok := svc.Value.Port(q.request.Port); !ok {
		fact(client.FactFail, "service %s has no port %q; it has %s", q.destination.Short(), q.request.Port, portNames(svc.Value))
	} else if q.request.HTTP != nil && !carriesRequests(port.Protocol) {
		fact(client.FactWarn, "port %s of %s is declared %s: the proxies see connections, not requests", port.Name, q.destination.Short(), port.Protocol)
		q.request.HTTP = nil
	}
	st := serviceStatus(s, q.destination)
	switch {
	case st.Instances == 0:
		fact(client.FactFail, "service %s has no instance", q.destination.Short())
		e.Next = append(e.Next, "define service "+q.destination.Short()+" in services.d of a host")
	case st.Healthy > 0:
		fact(client.FactOK, "service %s: %d of %d healthy%s", q.destination.Short(), st.Healthy, st.Instances, outside(s, q.destination))
	case st.Stale > 0:
		fact(client.FactWarn, "service %s: none healthy, %d on nodes that are out of touch are still used", q.destination.Short(), st.Stale)
	default:
		fact(client.FactFail, "service %s: none of %d instances is healthy", q.destination.Short(), st.Instances)
		e.Next = append(e.Next, "meshctl instances")
	}
}

// outside tells what instances stand for outside the mesh, and where; "" if they
// stand for themselves.
func outside(s *state.Snapshot, service catalog.Name) string {
	var all []string
	for key, rec := range s.InstancesOf(service) {
		if rec.Value.External != "" {
			all = append(all, rec.Value.External+" through "+key.Node)
		}
	}
	if len(all) == 0 {
		return ""
	}
	return ", outside the mesh: " + strings.Join(slices.Compact(all), ", ")
}

func (a *API) planFact(s *state.Snapshot, q question, fact func(mark, format string, args ...any)) {
	services := []catalog.Name{q.destination}
	if q.source.Kind == spiffe.KindService && q.source.TrustDomain == a.cfg.Info.TrustDomain {
		services = append(services, catalog.Name{Namespace: q.source.Namespace, Name: q.source.Name})
	}
	r, _ := a.cfg.Fleet.Rollout(s.Position(), services)
	for _, one := range r.Services {
		mark, note := client.FactOK, ""
		if one.Applied < one.Total {
			mark, note = client.FactWarn, ", the others are behind or out of touch"
		}
		if one.Total > 0 {
			fact(mark, "plan of %s: %d of %d proxies have the newest%s", one.Service, one.Applied, one.Total, note)
		}
	}
	for _, text := range r.Refused {
		fact(client.FactFail, "a proxy refused its plan: %s", text)
	}
}

func portNames(s catalog.Service) string {
	var names []string
	for _, p := range s.Ports {
		names = append(names, p.Name)
	}
	if len(names) == 0 {
		return "none: it only calls others"
	}
	return strings.Join(names, ", ")
}

func didYouMean(s *state.Snapshot, n catalog.Name) string {
	var have []string
	for name := range state.Services.All(s) {
		have = append(have, name.Short())
	}
	if near := catalog.Closest(n.Short(), have); near != "" {
		return "; did you mean " + near + "?"
	}
	return ""
}

// short is a source as people write it: the name of a service of this mesh, or
// a SPIFFE ID.
func (a *API) short(id spiffe.ID) string {
	if id.Kind == spiffe.KindService && id.TrustDomain == a.cfg.Info.TrustDomain {
		return catalog.Name{Namespace: id.Namespace, Name: id.Name}.Short()
	}
	return id.String()
}

// allowCommand is the command that would let exactly this request through, in
// the presence of the intention that decided.
func (a *API) allowCommand(q question, access client.Access) string {
	cmd := "meshctl intention allow " + a.short(q.source) + " " + q.destination.Short()
	if q.request.HTTP != nil {
		cmd += fmt.Sprintf(" --http %q", q.text)
	}
	var decided intentions.Intention
	if access.Intention == nil || json.Unmarshal(access.Intention.Spec, &decided) != nil {
		return cmd
	}
	key, err := decided.Key()
	if err != nil || key.Source == "*" || key.Destination == "*" {
		return cmd // a more specific one decides before it
	}
	if q.request.HTTP != nil && len(decided.Rules) > 0 {
		return cmd + " --add"
	}
	return cmd + " --replace"
}

// newJoinToken makes the record and the text that is shown once.
func (a *API) newJoinToken(c *call, req client.JoinTokenRequest) (any, error) {
	bundle, err := a.cfg.Authority.Roots(c.Context())
	if err != nil {
		return nil, err
	}
	rec, secret, err := acl.NewJoinToken(req.Node, req.Services, time.Duration(req.TTL), req.Replace, a.cfg.Now())
	if err != nil {
		return nil, err
	}
	token := ca.JoinToken{Servers: a.cfg.Addresses(), Roots: bundle.Hash(a.cfg.Info.TrustDomain), Secret: ca.NewSecret(secret)}
	text, err := token.Encode()
	if err != nil {
		return nil, err
	}
	pos, err := a.cfg.State.Update(c.Context(), func(tx *state.Tx) error {
		// A record that there is decides what the host may run, not the token.
		if node, ok := state.Nodes.Get(tx, req.Node); ok {
			if err := mayGive(c.who, node.Value.Services); err != nil {
				return err
			}
		}
		return state.JoinTokens.Put(tx, acl.Hash(secret), rec)
	})
	if err != nil {
		return nil, err
	}
	c.revision = pos.Revision
	return client.JoinToken{Token: text, Expires: rec.Expires, Warnings: joinWarnings(a.cfg.State.Snapshot(), req)}, nil
}

// joinWarnings tells what the token will not do.
func joinWarnings(s *state.Snapshot, req client.JoinTokenRequest) []string {
	var warnings []string
	if _, joined := state.NodeStatuses.Get(s, req.Node); joined && !req.Replace {
		warnings = append(warnings, fmt.Sprintf("node %s has joined already: the token admits nobody else without --replace", req.Node))
	}
	if _, ok := state.Nodes.Get(s, req.Node); !ok && len(req.Services) == 0 {
		warnings = append(warnings, fmt.Sprintf("node %s may run no service: give --services, or apply a node with services later", req.Node))
	}
	if rec, ok := state.Nodes.Get(s, req.Node); ok && len(req.Services) > 0 && !slices.Equal(rec.Value.Services, req.Services) {
		warnings = append(warnings, fmt.Sprintf("node %s has a record, which may run %s: the token's services are not used; apply the node to change it",
			req.Node, cmp.Or(strings.Join(rec.Value.Services, ", "), "nothing")))
	}
	return append(warnings, strangeNamespaces(s, req.Services)...)
}
