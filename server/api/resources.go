package api

import (
	"fmt"
	"strconv"

	"github.com/go-json-experiment/json"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/catalog/manifest"
	"github.com/meshd/meshd/server/acl"
	"github.com/meshd/meshd/server/client"
	"github.com/meshd/meshd/server/state"
)

func (a *API) get(k collection) func(*call) (any, error) {
	return func(c *call) (any, error) {
		s, err := a.fresh(c)
		if err != nil {
			return nil, err
		}
		ref := client.Ref{Kind: k.kind(), Parts: k.parts(c.Request)}
		item, err := k.get(s, ref)
		if err != nil {
			return nil, err
		}
		if item == nil {
			return nil, missing(c, k, s, ref)
		}
		return item, nil
	}
}

// missing says what does not exist, and what has a similar name, of what the
// caller may see.
func missing(c *call, k collection, s *state.Snapshot, ref client.Ref) error {
	var have []string
	for _, i := range k.list(s) {
		if what, err := k.scopeOf(i.Ref); err == nil && c.may(acl.Read, k.resource(), what) {
			have = append(have, i.Name)
		}
	}
	name := ref.Parts[len(ref.Parts)-1]
	switch {
	case k.kind() == client.KindIntention:
		name = ref.Parts[3] + " → " + ref.Parts[1]
	case len(ref.Parts) == 2:
		name = catalog.Name{Namespace: ref.Parts[0], Name: ref.Parts[1]}.Short()
	}
	return notFound(k.kind(), name, have)
}

func (a *API) put(k collection) func(*call) (any, error) {
	return func(c *call) (any, error) {
		raw, err := readBody(c)
		if err != nil {
			return nil, err
		}
		r, err := k.decode(raw)
		if err != nil {
			return nil, err
		}
		if got, want := r.ref().Path(), (client.Ref{Kind: k.kind(), Parts: k.parts(c.Request)}).Path(); got != want {
			return nil, &client.Error{Code: client.CodeInvalid, Message: fmt.Sprintf("the spec names %s, the URL %s", got, want), Next: "make them the same"}
		}
		revision, err := revisionOf(c)
		if err != nil {
			return nil, err
		}
		return a.write(c, []resource{r}, revision, false)
	}
}

func (a *API) delete(k collection) func(*call) (any, error) {
	return func(c *call) (any, error) {
		revision, err := revisionOf(c)
		if err != nil {
			return nil, err
		}
		var out client.Result
		out.Position, err = a.update(c, "", func(tx *state.Tx) error {
			change, err := k.remove(tx, client.Ref{Kind: k.kind(), Parts: k.parts(c.Request)}, revision)
			out.Changes = []client.Change{change}
			return err
		})
		return out, err
	}
}

func revisionOf(c *call) (uint64, error) {
	text := c.URL.Query().Get("revision")
	if text == "" {
		return client.AnyRevision, nil
	}
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		return 0, badField("revision", "%q is no revision", text)
	}
	return n, nil
}

// apply writes a list of resources, all or none. Each is authorized by itself,
// after all are decoded, so that a refusal names what was refused.
func (a *API) apply(c *call) (any, error) {
	raw, err := readBody(c)
	if err != nil {
		return nil, err
	}
	// Not decodeBody: the bytes of each spec are kept as they came.
	var req client.ApplyRequest
	if err := json.Unmarshal(raw, &req, json.RejectUnknownMembers(true)); err != nil {
		return nil, invalid("apply request", &catalog.FieldError{Problem: err.Error()})
	}
	resources := make([]resource, 0, len(req.Resources))
	seen := map[string]bool{}
	var problems catalog.Problems
	for i, one := range req.Resources {
		at := fmt.Sprintf("resources[%d]", i)
		k := a.collection(one.Kind)
		if k == nil {
			problems.Add(at+".kind", "%q is no kind", one.Kind)
			continue
		}
		r, err := k.decode(one.Spec)
		if err != nil {
			problems.Under(at, flatten(err))
			continue
		}
		if seen[r.ref().Path()] {
			problems.Add(at, "names the same %s as an earlier one: remove one", one.Kind)
		}
		seen[r.ref().Path()] = true
		if err := c.authorize(acl.Write, k.resource(), r.object()); err != nil {
			return nil, err
		}
		resources = append(resources, r)
	}
	checkSet(req, &problems)
	if err := problems.Err(); err != nil {
		return nil, invalid("apply request", err)
	}
	if req.Set != "" {
		return a.applySet(c, req, resources)
	}
	return a.write(c, resources, client.AnyRevision, req.DryRun)
}

// flatten gives back the fields of an error body as field errors.
func flatten(err error) error {
	e := toError(err)
	if len(e.Fields) == 0 {
		return &catalog.FieldError{Problem: e.Message}
	}
	var p catalog.Problems
	for _, f := range e.Fields {
		p.Under(f.Field, &catalog.FieldError{Problem: f.Problem})
	}
	return p.Err()
}

func (a *API) collection(kind client.Kind) collection {
	for _, k := range a.kinds {
		if k.kind() == kind {
			return k
		}
	}
	return nil
}

// errDryRun ends a transaction that must not be committed.
var errDryRun = &client.Error{Code: client.CodeConflict, Message: "dry run"}

func (a *API) write(c *call, resources []resource, revision uint64, dry bool) (any, error) {
	var out client.Result
	ordered := inOrder(resources)
	pos, err := a.update(c, "", func(tx *state.Tx) error {
		out = client.Result{DryRun: dry, Changes: []client.Change{}, Position: tx.Snapshot().Position()}
		for _, r := range ordered {
			change, warnings, err := r.write(tx, c.who, revision)
			if err != nil {
				return err
			}
			out.Changes = append(out.Changes, change)
			out.Warnings = append(out.Warnings, warnings...)
		}
		if dry {
			return errDryRun
		}
		return nil
	})
	if dry && err == error(errDryRun) { //nolint:errorlint // the very value that was returned above
		return out, nil
	}
	if err != nil {
		return nil, err
	}
	out.Position = pos
	a.fillRevisions(&out, ordered)
	return out, nil
}

// inOrder sorts by kind, in the order of dependence: what others refer to is first.
func inOrder(resources []resource) []resource {
	ordered := make([]resource, 0, len(resources))
	for _, k := range client.Kinds() {
		for _, r := range resources {
			if r.ref().Kind == k {
				ordered = append(ordered, r)
			}
		}
	}
	return ordered
}

// fillRevisions tells the writer the revisions for his next compare-and-set. What
// others have written since is not his: for that he is told his own revision, which
// is not the newest any more.
func (a *API) fillRevisions(out *client.Result, written []resource) {
	s := a.cfg.State.Snapshot()
	for i, r := range written {
		if r == nil {
			continue // deleted
		}
		if revision := r.revision(s); revision != 0 {
			out.Changes[i].Revision = min(revision, out.Position.Revision)
		}
	}
}

// decodeBody reads what a user sent, strictly: unknown, repeated and differently
// cased members are refused, and Validate must agree.
func decodeBody(what string, raw []byte, v any) error {
	err := manifest.DecodeConfig("body.json", raw, v)
	if err == nil {
		return nil
	}
	e := &client.Error{Code: client.CodeInvalid, Message: "invalid " + what}
	for _, one := range manifest.Errors(err) {
		e.Fields = append(e.Fields, client.Field{Field: one.Field, Problem: one.Problem})
	}
	return e
}

func (a *API) joinToken(c *call) (any, error) {
	raw, err := readBody(c)
	if err != nil {
		return nil, err
	}
	var req client.JoinTokenRequest
	if err := decodeBody("join token", raw, &req); err != nil {
		return nil, err
	}
	if err := (catalog.Node{Name: req.Node, Services: req.Services}).Validate(); err != nil {
		return nil, invalid("join token", err)
	}
	if err := c.authorize(acl.Write, acl.JoinTokens, named(req.Node)); err != nil {
		return nil, err
	}
	if err := mayGive(c.who, req.Services); err != nil {
		return nil, err
	}
	c.what = acl.Request{Verb: acl.Write, Resource: acl.JoinTokens, Name: req.Node}
	return a.newJoinToken(c, req)
}
