package api

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"time"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/intentions"
	"github.com/meshd/meshd/server/acl"
	"github.com/meshd/meshd/server/client"
	"github.com/meshd/meshd/server/state"
)

const (
	defaultHistory = 100
	maxHistory     = 1000
)

// historyRoutes tell what became of intentions, and undo it.
func (a *API) historyRoutes() []route {
	return []route{
		{http.MethodGet, "/v1/intentions/history", acl.Read, acl.Intention, some, a.history, 0},
		{http.MethodPost, "/v1/intentions/undo", acl.Write, acl.Each, nil, a.undo, 0}, // each intention is authorized by itself
	}
}

// update is State.Update for a caller, whose name the history of intentions gets.
func (a *API) update(c *call, note string, fn func(*state.Tx) error) (catalog.Position, error) {
	return a.cfg.State.Update(c.Context(), a.signed(c, note, fn))
}

// signed makes fn sign its transactions.
func (a *API) signed(c *call, note string, fn func(*state.Tx) error) func(*state.Tx) error {
	author, now := state.Author{ID: c.who.String(), Name: c.who.Title}, a.cfg.Now()
	return func(tx *state.Tx) error {
		tx.Sign(author, now, note)
		return fn(tx)
	}
}

// historyQuery is what a history is limited to; empty keys mean all.
type historyQuery struct {
	namespace           string // of the destination
	source, destination string // as intentions.Key spells them
	since               time.Time
	limit               int
	before              uint64 // number of a transaction, 0: none
}

var historyParameters = []string{"continue", "destination", "limit", "max_stale", "namespace", "since", "source", "stale"}

func (a *API) parseHistoryQuery(q url.Values) (historyQuery, error) {
	out := historyQuery{limit: defaultHistory, namespace: q.Get("namespace")}
	var p catalog.Problems
	for _, name := range slices.Sorted(maps.Keys(q)) {
		if !slices.Contains(historyParameters, name) {
			text := "there is no such parameter"
			if near := catalog.Closest(name, historyParameters); near != "" {
				text += "; did you mean " + near + "?"
			}
			p.Add(name, "%s", text)
		}
	}
	if text := q.Get("source"); text != "" {
		key, err := intentions.ParseKey(text, "*")
		if err != nil {
			p.Add("source", "%v", err)
		}
		out.source = key.In(a.cfg.Info.TrustDomain).SourceString()
	}
	if text := q.Get("destination"); text != "" {
		key, err := intentions.ParseKey("*", text)
		if err != nil {
			p.Add("destination", "%v", err)
		}
		out.destination = key.DestinationString()
	}
	var err error
	if text := q.Get("since"); text != "" {
		if out.since, err = time.Parse(time.RFC3339, text); err != nil {
			p.Add("since", "%q: write a time such as 2026-11-22T02:47:00Z", text)
		}
	}
	if text := q.Get("limit"); text != "" {
		if out.limit, err = strconv.Atoi(text); err != nil || out.limit < 1 || out.limit > maxHistory {
			p.Add("limit", "%q: write a number from 1 to %d", text, maxHistory)
		}
	}
	if text := q.Get("continue"); text != "" {
		if out.before, err = strconv.ParseUint(text, 10, 64); err != nil {
			p.Add("continue", "it is not what the page before said")
		}
	}
	if err := p.Err(); err != nil {
		return out, invalid("request", err)
	}
	return out, nil
}

func (q historyQuery) selects(key intentions.Key) bool {
	return (q.namespace == "" || q.namespace == key.DestinationNamespace) && (q.source == "" || q.source == key.SourceString()) && (q.destination == "" || q.destination == key.DestinationString())
}

func (a *API) history(c *call) (any, error) {
	q, err := a.parseHistoryQuery(c.URL.Query())
	if err != nil {
		return nil, err
	}
	s, err := a.fresh(c)
	if err != nil {
		return nil, err
	}
	out := client.History{Position: s.Position(), Transactions: []client.Transaction{}}
	last := uint64(0)
	for key, rec := range s.NewestEdits() {
		if rec.Err != nil || q.before != 0 && key.Number >= q.before || rec.Value.At.Before(q.since) {
			continue
		}
		changes := editChanges(c, rec.Value.Intentions, q)
		if len(changes) == 0 {
			continue
		}
		// Parts of one transaction come one after the other, the last one first.
		if n := len(out.Transactions); n > 0 && key.Number == last {
			t := &out.Transactions[n-1]
			t.Changes, t.Revision = append(changes, t.Changes...), state.RevisionOf(rec)
			continue
		}
		if len(out.Transactions) == q.limit {
			out.Continue = strconv.FormatUint(last, 10)
			break
		}
		last = key.Number
		out.Transactions = append(out.Transactions, client.Transaction{
			Revision: state.RevisionOf(rec), At: rec.Value.At, By: rec.Value.By.ID, ByName: rec.Value.By.Name, Note: rec.Value.Note, Changes: changes,
		})
	}
	if len(out.Transactions) == 0 { // a namespace that is gone may have a history
		return out, namespaceExists(s, q.namespace)
	}
	return out, nil
}

func editChanges(c *call, edits []state.Edit, q historyQuery) []client.Change {
	var out []client.Change
	for _, e := range edits {
		key, err := state.ParseKeyText(e.Key)
		if err != nil || !q.selects(key) || !c.may(acl.Read, acl.Intention, scopeOfIntention(key)) {
			continue
		}
		change := client.Change{Kind: client.KindIntention, Name: key.String(), Change: client.ChangeUpdated, Before: e.Before, After: e.After}
		switch {
		case e.Before == nil:
			change.Change = client.ChangeCreated
		case e.After == nil:
			change.Change = client.ChangeDeleted
		}
		out = append(out, change)
	}
	return out
}

// lastEdit finds the newest change of an intention.
func lastEdit(s *state.Snapshot, key intentions.Key) (state.Edit, state.Record[state.Edits], bool) {
	text := state.KeyText(key)
	for _, rec := range s.NewestEdits() {
		for _, e := range rec.Value.Intentions {
			if e.Key == text {
				return e, rec, true
			}
		}
	}
	return state.Edit{}, state.Record[state.Edits]{}, false
}

// blamed is what the history knows of a decision.
type blamed struct {
	text string // to follow the decision's; may be empty
	undo uint64 // the change that took a permission away; 0: none did
}

// blame tells when that was changed last which decided, and whether it was what
// took a permission away: a change of the intention that decided, or the deletion
// of the one of this very pair.
func (a *API) blame(s *state.Snapshot, q question, access client.Access) blamed {
	var out blamed
	if access.Intention != nil {
		var decided intentions.Intention
		if json.Unmarshal(access.Intention.Spec, &decided) == nil {
			if key, err := decided.Key(); err == nil {
				out = a.blameKey(s, q, access, key.In(a.cfg.Info.TrustDomain))
			}
		}
	}
	own, err := intentions.ParseKey(a.short(q.source), q.destination.String())
	own = own.In(a.cfg.Info.TrustDomain)
	if _, there := state.Intentions.Get(s, own); err == nil && !there && out.undo == 0 {
		if deleted := a.blameKey(s, q, access, own); deleted.undo > 0 || out.text == "" {
			return deleted
		}
	}
	return out
}

func (a *API) blameKey(s *state.Snapshot, q question, access client.Access, key intentions.Key) blamed {
	edit, rec, ok := lastEdit(s, key)
	if !ok {
		return blamed{}
	}
	did, before := "created", ""
	switch {
	case edit.After == nil:
		did, before = "intention "+key.String()+" was deleted", " (before: "+summaryOf(edit.Before)+")"
	case edit.Before != nil:
		did, before = "changed", " (before: "+summaryOf(edit.Before)+")"
	}
	out := blamed{text: fmt.Sprintf("; %s %s by %s", did, rec.Value.At.UTC().Format("2006-01-02 15:04 UTC"), rec.Value.By)}
	var after intentions.Intention
	if edit.After != nil && json.Unmarshal(edit.After, &after) == nil && after.Reason != "" {
		out.text += ", " + after.Reason
	}
	out.text += before
	if !access.Allowed && a.allowedBefore(s, q, key, edit.Before) {
		out.undo = state.RevisionOf(rec)
	}
	return out
}

// allowedBefore reports whether the request would be allowed with another spec
// under key, or, if before is nil, with none.
func (a *API) allowedBefore(s *state.Snapshot, q question, key intentions.Key, before []byte) bool {
	var all []intentions.Intention
	for k, rec := range s.IntentionsFor(q.destination) {
		if k == key {
			continue
		}
		if rec.Err != nil {
			return false
		}
		all = append(all, rec.Value)
	}
	if before != nil {
		old, err := state.Intentions.Read(key, before)
		if err != nil {
			return false
		}
		all = append(all, old)
	}
	policy, err := intentions.Compile(a.cfg.Info.TrustDomain, q.destination, all)
	return err == nil && policy.Decide(q.request).Allowed
}

// summaryOf says in a line what a stored intention decides.
func summaryOf(raw []byte) string {
	if raw == nil {
		return "none"
	}
	var i intentions.Intention
	if json.Unmarshal(raw, &i) != nil {
		return "unreadable"
	}
	text := cmp.Or(i.Summary(), "unreadable")
	if i.Expires != nil {
		text += ", until " + i.Expires.UTC().Format(time.RFC3339)
	}
	if i.Reason != "" {
		text += fmt.Sprintf(", reason %q", i.Reason)
	}
	return text
}

// undo restores what was before the changes of one transaction, all or none.
func (a *API) undo(c *call) (any, error) {
	raw, err := readBody(c)
	if err != nil {
		return nil, err
	}
	var req client.UndoRequest
	if err := decodeBody("undo request", raw, &req); err != nil {
		return nil, err
	}
	if req.Revision == 0 {
		return nil, badField("revision", "which change? GET /v1/intentions/history lists them")
	}
	if _, err := a.cfg.State.Fresh(c.Context()); err != nil {
		return nil, err
	}
	var out client.Result
	var written []resource
	pos, err := a.cfg.State.UpdateAtAnySize(c.Context(), a.signed(c, fmt.Sprintf("undo %d", req.Revision), func(tx *state.Tx) error {
		u := undoing{api: a, tx: tx, who: c.who, force: req.Force, out: &out}
		out = client.Result{DryRun: req.DryRun, Changes: []client.Change{}, Position: tx.Snapshot().Position()}
		edits, err := editsAt(tx.Snapshot(), req.Revision)
		if err == nil {
			err = u.all(edits, req.Revision)
		}
		written = u.written
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
	a.fillRevisions(&out, written)
	return out, nil
}

// editsAt returns the edits of the newest transaction of a revision. The parts of a
// large one may have revisions of their own, each of which means all.
func editsAt(s *state.Snapshot, revision uint64) ([]state.Edit, error) {
	number, near := uint64(0), uint64(0) // near is the newest one before
	for key, rec := range s.NewestEdits() {
		at := state.RevisionOf(rec)
		if at == revision {
			number = key.Number
			break
		}
		if at < revision {
			near = max(near, at)
		}
	}
	var edits []state.Edit
	first := 0
	for key, rec := range s.NewestEdits() {
		if key.Number == number && number > 0 {
			if rec.Err != nil {
				return nil, &client.Error{Code: client.CodeConflict, Message: fmt.Sprintf("what revision %d changed can't be read: %v", revision, rec.Err)}
			}
			first = key.Part
			edits = append(slices.Clone(rec.Value.Intentions), edits...)
		}
	}
	switch {
	case edits == nil && near > 0:
		return nil, &client.Error{
			Code: client.CodeNotFound, Message: fmt.Sprintf("revision %d changed no intention, or it is forgotten", revision),
			Next: fmt.Sprintf("the newest change before it is %d: meshctl intention history", near),
		}
	case edits == nil:
		return nil, &client.Error{
			Code: client.CodeNotFound, Message: fmt.Sprintf("revision %d changed no intention, or it is forgotten", revision),
			Next: "meshctl intention history",
		}
	case first != 0:
		return nil, &client.Error{
			Code: client.CodeNotFound, Message: fmt.Sprintf("a part of what revision %d changed is forgotten: it can't be undone as a whole", revision),
			Next: "meshctl intention history shows the rest of it",
		}
	}
	return edits, nil
}

// undoing is one undo in one transaction.
type undoing struct {
	api     *API
	tx      *state.Tx
	who     acl.Identity
	force   bool
	out     *client.Result
	written []resource // where there is one for each change
}

func (u *undoing) all(edits []state.Edit, revision uint64) error {
	var since catalog.Problems
	k := u.api.collection(client.KindIntention)
	for _, e := range edits {
		key, err := state.ParseKeyText(e.Key)
		if err != nil {
			return &client.Error{Code: client.CodeConflict, Message: fmt.Sprintf("the history of revision %d can't be read: %v", revision, err)}
		}
		what := acl.Request{Verb: acl.Write, Resource: acl.Intention, Namespace: key.DestinationNamespace, Name: key.Destination}
		if err := acl.Authorize(u.who, what); err != nil {
			return err
		}
		var now []byte
		if rec, ok := state.Intentions.Get(u.tx, key); ok {
			now = rec.Raw
		}
		if !u.force && !sameOrAbsent(now, e.After) && !sameOrAbsent(now, e.Before) {
			since.Add(key.String(), "after revision %d: %s; now: %s; before: %s", revision, summaryOf(e.After), summaryOf(now), summaryOf(e.Before))
			continue
		}
		if err := u.one(k, client.IntentionRef(key), e.Before, now); err != nil {
			return err
		}
	}
	if err := since.Err(); err != nil {
		refusal := invalid("undo", err)
		refusal.Code, refusal.Message = client.CodeConflict, fmt.Sprintf("what revision %d changed was changed again since; nothing is undone", revision)
		refusal.Next = fmt.Sprintf("undo the later changes first (meshctl intention history), or overwrite them: meshctl intention undo %d --force", revision)
		return refusal
	}
	return nil
}

func sameOrAbsent(a, b []byte) bool {
	if a == nil || b == nil {
		return a == nil && b == nil
	}
	return sameJSON(a, b)
}

// one restores one intention.
func (u *undoing) one(k collection, ref client.Ref, before, now []byte) error {
	if before == nil && now == nil {
		return nil
	}
	if before == nil {
		change, err := k.remove(u.tx, ref, client.AnyRevision)
		u.out.Changes, u.written = append(u.out.Changes, change), append(u.written, nil)
		return err
	}
	r, err := k.decode(before)
	if err != nil {
		return &client.Error{
			Code: client.CodeConflict, Message: "what was before is not valid any more: " + toError(err).Message, Fields: toError(err).Fields,
			Next: "write it anew with meshctl intention",
		}
	}
	change, warnings, err := r.write(u.tx, u.who, client.AnyRevision)
	if err != nil {
		return err
	}
	u.out.Changes, u.written = append(u.out.Changes, change), append(u.written, r)
	u.out.Warnings = append(u.out.Warnings, warnings...)
	return nil
}
