package api

import (
	"context"
	"net/http"
	"slices"

	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/intentions"
	"github.com/meshd/meshd/proxy/flow"
	"github.com/meshd/meshd/server/acl"
	"github.com/meshd/meshd/server/client"
	"github.com/meshd/meshd/server/state"
)

// defaultDenials is how many denials are listed unless the caller says otherwise.
const defaultDenials = 100

// flowRoutes show what happens in the mesh: who sees single requests needs the
// verb tap for the destination. Who names no destination sees those that he may.
func (a *API) flowRoutes() []route {
	return []route{
		{http.MethodGet, "/v1/tap", acl.Tap, acl.Service, tapped, a.tap, 0},
		{http.MethodGet, "/v1/denials", acl.Tap, acl.Service, tapped, a.denials, 0},
		{http.MethodGet, "/v1/explain/{id}", acl.Tap, acl.Service, some, a.explainID, 0},
		{http.MethodGet, "/v1/top", acl.Read, acl.Service, some, a.top, 0},
	}
}

// tapped is the destination that a query is about; if it names no single one, those
// are meant that the caller may tap.
func tapped(req *http.Request) acl.Request {
	n, err := flow.ParseServices(req.URL.Query().Get("dst"))
	switch {
	case err != nil: // none, or one that is wrong, as the handler says to those who may tap any
		return acl.Request{Some: true}
	case n.Name == "*" || n.Name == "":
		return acl.Request{Some: true, Namespace: n.Namespace}
	default:
		return acl.Request{Namespace: n.Namespace, Name: n.Name}
	}
}

// serviceOf is what authorization sees of one side of a request: a service of this
// mesh, or what only those may see who may see all.
func (a *API) serviceOf(id spiffe.ID) acl.Request {
	if id.Kind != spiffe.KindService || id.TrustDomain != a.cfg.Info.TrustDomain {
		return acl.Request{}
	}
	return acl.Request{Namespace: id.Namespace, Name: id.Name}
}

// shown leaves of an answer what the caller may see: single requests to services
// that he may tap, and counters of services that he may read, on either side.
func (a *API) shown(c *call, all flow.Answer) flow.Answer {
	all.Records = slices.DeleteFunc(slices.Clone(all.Records), func(r flow.Record) bool {
		return !c.may(acl.Tap, acl.Service, a.serviceOf(r.Destination))
	})
	if all.Sample != nil {
		sample := *all.Sample
		sample.Edges = slices.DeleteFunc(slices.Clone(sample.Edges), func(e flow.Edge) bool {
			return !c.may(acl.Read, acl.Service, a.serviceOf(e.Destination)) && !c.may(acl.Read, acl.Service, a.serviceOf(e.Source))
		})
		all.Sample = &sample
	}
	return all
}

// flowQuery reads what is asked for.
func flowQuery(c *call, want flow.Want) (flow.Query, error) {
	q, err := flow.ParseQuery(want, c.URL.Query())
	if err != nil {
		return q, &client.Error{Code: client.CodeInvalid, Message: err.Error(), Next: "see docs/reference/api.md"}
	}
	return q, nil
}

func (a *API) tap(c *call) (any, error) { return a.streamAnswers(c, flow.Records) }

func (a *API) top(c *call) (any, error) { return a.streamAnswers(c, flow.Edges) }

// streamAnswers sends the hosts' answers as they come.
func (a *API) streamAnswers(c *call, want flow.Want) (any, error) {
	q, err := flowQuery(c, want)
	if err != nil {
		return nil, err
	}
	return stream(a, c, func(ctx context.Context, emit func(flow.Answer) error) error {
		return a.cfg.Ask(ctx, q, emit)
	}, func(piece flow.Answer) flow.Answer { return a.shown(c, piece) })
}

// collect waits for the answers to a query that has an end.
func (a *API) collect(c *call, q flow.Query) (flow.Answer, error) {
	all := flow.Answer{Records: []flow.Record{}}
	err := a.cfg.Ask(c.Context(), q, func(piece flow.Answer) error {
		all = piece
		return nil
	})
	if err != nil {
		return all, &client.Error{Code: client.CodeUnavailable, Message: err.Error(), Next: "try again in a moment"}
	}
	if all = a.shown(c, all); all.Records == nil {
		all.Records = []flow.Record{}
	}
	return all, nil
}

func (a *API) denials(c *call) (any, error) {
	q, err := flowQuery(c, flow.Denials)
	if err != nil {
		return nil, err
	}
	if q.Limit == 0 {
		q.Limit = defaultDenials
	}
	return a.collect(c, q)
}

// explainID explains what a proxy did not carry, by the id that it told its client.
// The record says what was so then, and the newest intentions what is so now.
func (a *API) explainID(c *call) (any, error) {
	q := flow.Query{Want: flow.Find, ID: c.PathValue("id")}
	if err := q.Validate(); err != nil {
		return nil, badField("id", "%v", err)
	}
	found, err := a.collect(c, q)
	if err != nil {
		return nil, err
	}
	if len(found.Records) == 0 {
		return nil, client.UnknownID(q.ID, found)
	}
	s, err := a.fresh(c)
	if err != nil {
		return nil, err
	}
	r := client.Telling(found.Records)
	e := client.Recount(r, a.cfg.Info.TrustDomain, a.cfg.Now())
	e.Records = found.Records // of both sides, and by chance of two requests
	e.Position = s.Position()
	if r.Verdict == flow.Denied {
		a.explainNow(s, r, &e)
	}
	return e, nil
}

// explainNow adds to a denial what would become of the same request now.
func (a *API) explainNow(s *state.Snapshot, r flow.Record, e *client.Explanation) {
	if r.Source.Kind != spiffe.KindService || r.Destination.Kind != spiffe.KindService || len(r.Path) >= flow.MaxPath {
		return
	}
	q := question{source: r.Source, destination: catalog.Name{Namespace: r.Destination.Namespace, Name: r.Destination.Name}}
	q.request = intentions.Request{Source: r.Source, Destination: q.destination, Port: r.Port, Now: a.cfg.Now()}
	if r.Kind == flow.HTTP {
		q.request.HTTP = &intentions.HTTPRequest{Method: r.Method, Path: r.Path, Headers: headers(nil)}
		q.text = r.Method + " " + r.Path
	}
	access := a.decide(s, &q)
	changed := a.blame(s, q, access)
	e.Access, e.Next = access, nil
	fact := client.Fact{Mark: client.FactFail, Text: "now: " + access.Text + changed.text}
	if access.Allowed {
		fact.Mark = client.FactOK
		fact.Text += ": it has been allowed since, or by other headers; try again"
	} else {
		e.Next = a.next(s, q, access, changed)
	}
	e.Facts = append(e.Facts, fact)
}
