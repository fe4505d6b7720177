package api

import (
	"fmt"
	"slices"
	"strings"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/acl"
	"github.com/meshd/meshd/server/client"
	"github.com/meshd/meshd/server/state"
)

// maxLeftNames is how many resources that left their set a warning names.
const maxLeftNames = 5

func sets() collection {
	return &table[string, state.Set]{
		name: client.KindSet, res: acl.Set, segments: []string{"name"}, table: state.Sets,
		key:   oneName,
		keyOf: func(s state.Set) (string, error) { return s.Name, nil },
		ref:   func(k string) client.Ref { return client.Ref{Kind: client.KindSet, Parts: []string{k}} },
		show:  plain,
		scope: named,
		status: func(s *state.Snapshot, k string) any {
			st := client.SetStatus{Members: []client.Ref{}}
			for m := range s.MembersOf(k) {
				st.Members = append(st.Members, memberRef(m))
			}
			return st
		},
		touched: func(s *state.Snapshot, c state.Change) []string {
			m, ok := state.SetMembers.Key(c)
			if !ok {
				return nil
			}
			if rec, ok := state.SetMembers.Get(s, m); ok {
				return []string{rec.Value.Set}
			}
			var all []string // whose it was can't be told any more
			for name := range state.Sets.All(s) {
				all = append(all, name)
			}
			return all
		},
		readOnly: "they are made by apply with a set: meshctl apply --set NAME -f PATH",
	}
}

func memberOf(r client.Ref) state.Member {
	return state.Member{Kind: string(r.Kind), Name: strings.Join(r.Parts, "/")}
}

func memberRef(m state.Member) client.Ref {
	return client.Ref{Kind: client.Kind(m.Kind), Parts: strings.Split(m.Name, "/")}
}

// leaveSet forgets what set a deleted resource belonged to.
func leaveSet(tx *state.Tx, r client.Ref) {
	if _, member := state.SetMembers.Get(tx.Snapshot(), memberOf(r)); member {
		state.SetMembers.Delete(tx, memberOf(r))
	}
}

// applySet writes resources as a set: all or none, however many there are.
func (a *API) applySet(c *call, req client.ApplyRequest, resources []resource) (any, error) {
	if err := c.authorize(acl.Write, acl.Set, named(req.Set)); err != nil {
		return nil, err
	}
	// What is unchanged does not burden the transaction with a check, so that the
	// state has to be as new as the request.
	if _, err := a.cfg.State.Fresh(c.Context()); err != nil {
		return nil, err
	}
	ordered, now := inOrder(resources), a.cfg.Now().UTC()
	var out client.Result
	pos, err := a.cfg.State.UpdateAtAnySize(c.Context(), a.signed(c, "set "+req.Set, func(tx *state.Tx) error {
		out = client.Result{DryRun: req.DryRun, Changes: []client.Change{}, Position: tx.Snapshot().Position()}
		s := &setWriter{api: a, tx: tx, who: c.who, name: req.Set, out: &out}
		err := s.write(ordered)
		if err == nil {
			err = s.left(ordered, req.Prune)
		}
		if err == nil && s.changed {
			err = state.Sets.Put(tx, req.Set, state.Set{Name: req.Set, Updated: now, By: c.who.String()})
		}
		if err == nil && req.DryRun {
			err = errDryRun
		}
		return err
	}))
	if req.DryRun && err == error(errDryRun) { //nolint:errorlint // the very value that was returned above
		return out, nil
	}
	if err != nil {
		return nil, err
	}
	out.Position = pos
	a.fillRevisions(&out, ordered)
	return out, nil
}

// setWriter applies one set in one transaction.
type setWriter struct {
	api     *API
	tx      *state.Tx
	who     acl.Identity
	name    string
	out     *client.Result
	changed bool
}

// write writes the resources and makes them members.
func (s *setWriter) write(ordered []resource) error {
	if _, exists := state.Sets.Get(s.tx, s.name); !exists {
		s.changed = true
	}
	for _, r := range ordered {
		change, same := r.same(s.tx.Snapshot())
		if !same {
			var warnings []string
			var err error
			if change, warnings, err = r.write(s.tx, s.who, client.AnyRevision); err != nil {
				return err
			}
			s.out.Warnings, s.changed = append(s.out.Warnings, warnings...), true
		}
		s.out.Changes = append(s.out.Changes, change)
		if err := s.join(r.ref(), change.Name); err != nil {
			return err
		}
	}
	return nil
}

func (s *setWriter) join(r client.Ref, name string) error {
	m := memberOf(r)
	if rec, is := state.SetMembers.Get(s.tx.Snapshot(), m); is && rec.Value.Set == s.name {
		return nil
	}
	if rec, is := state.SetMembers.Get(s.tx, m); is {
		return &client.Error{
			Code: client.CodeConflict, Message: fmt.Sprintf("%s %s belongs to set %s", r.Kind, name, rec.Value.Set),
			Next: fmt.Sprintf("take it out of one of them; meshctl delete set %s forgets that one and keeps its resources", rec.Value.Set),
		}
	}
	s.changed = true
	return state.SetMembers.Put(s.tx, m, state.Membership{Set: s.name})
}

// left deletes what belongs to the set and is not among the resources, or warns
// of it.
func (s *setWriter) left(ordered []resource, prune bool) error {
	there := map[state.Member]bool{}
	for _, r := range ordered {
		there[memberOf(r.ref())] = true
	}
	var left []client.Ref
	for m := range s.tx.Snapshot().MembersOf(s.name) {
		if !there[m] {
			left = append(left, memberRef(m))
		}
	}
	if prune {
		return s.remove(left)
	}
	if len(left) == 0 {
		return nil
	}
	var names []string
	for _, r := range left[:min(len(left), maxLeftNames)] {
		names = append(names, string(r.Kind)+" "+strings.Join(r.Parts, "/"))
	}
	text := strings.Join(names, ", ")
	if len(left) > maxLeftNames {
		text += fmt.Sprintf(" and %d more", len(left)-maxLeftNames)
	}
	s.out.Warnings = append(s.out.Warnings, fmt.Sprintf("set %s still has what the files no longer name: %s; --prune deletes it", s.name, text))
	return nil
}

// remove deletes members: what refers to others goes before them.
func (s *setWriter) remove(members []client.Ref) error {
	kinds := client.Kinds()
	slices.Reverse(kinds)
	for _, kind := range kinds {
		for _, r := range members {
			if r.Kind != kind {
				continue
			}
			change, err := s.removeOne(r)
			if err != nil {
				return err
			}
			state.SetMembers.Delete(s.tx, memberOf(r))
			s.changed = true
			if change != nil {
				s.out.Changes = append(s.out.Changes, *change)
			}
		}
	}
	return nil
}

// removeOne returns nil for what is gone already.
func (s *setWriter) removeOne(r client.Ref) (*client.Change, error) {
	k := s.api.collection(r.Kind)
	if k == nil {
		return nil, &client.Error{Code: client.CodeConflict, Message: fmt.Sprintf("set %s has a %s, which this version does not know", s.name, r.Kind)}
	}
	what, err := k.scopeOf(r)
	if err != nil {
		return nil, err
	}
	what.Verb, what.Resource = acl.Write, k.resource()
	if err := acl.Authorize(s.who, what); err != nil {
		return nil, err
	}
	change, err := k.remove(s.tx, r, client.AnyRevision)
	if client.CodeOf(err) == client.CodeNotFound {
		return nil, nil //nolint:nilnil // as the comment says
	}
	return &change, err
}

// deleteSet forgets a set; with ?prune=true it deletes what belongs to it, too.
func (a *API) deleteSet(c *call) (any, error) {
	name, q := c.PathValue("name"), c.URL.Query()
	if text := q.Get("prune"); text != "" && text != "true" && text != "false" {
		return nil, badField("prune", "%q: write true or false", text)
	}
	if q.Has("revision") {
		return nil, badField("revision", "a set is deleted whatever its revision")
	}
	var out client.Result
	pos, err := a.cfg.State.UpdateAtAnySize(c.Context(), a.signed(c, "delete set "+name, func(tx *state.Tx) error {
		out = client.Result{Changes: []client.Change{}}
		old, ok := state.Sets.Get(tx, name)
		if !ok {
			return missing(c, a.collection(client.KindSet), tx.Snapshot(), client.Ref{Kind: client.KindSet, Parts: []string{name}})
		}
		members := slices.Collect(tx.Snapshot().MembersOf(name))
		if q.Get("prune") == "true" {
			refs := make([]client.Ref, 0, len(members))
			for _, m := range members {
				refs = append(refs, memberRef(m))
			}
			s := &setWriter{api: a, tx: tx, who: c.who, name: name, out: &out}
			if err := s.remove(refs); err != nil {
				return err
			}
		}
		for _, m := range members {
			state.SetMembers.Delete(tx, m)
		}
		state.Sets.Delete(tx, name)
		out.Changes = append(out.Changes, client.Change{Kind: client.KindSet, Name: name, Change: client.ChangeDeleted, Before: old.Raw})
		return nil
	}))
	out.Position = pos
	return out, err
}

// checkSet finds what is wrong with how a request names its set.
func checkSet(req client.ApplyRequest, p *catalog.Problems) {
	switch {
	case req.Set != "":
		if err := catalog.CheckLabel(req.Set); err != nil {
			p.Add("set", "%v", err)
		}
		if len(req.Resources) == 0 {
			p.Add("resources", "a set without resources would be empty; delete it instead")
		}
	case req.Prune:
		p.Add("prune", "only what belongs to a set can be pruned: name the set")
	}
}
