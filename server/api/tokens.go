package api

import (
	"cmp"
	"fmt"
	"iter"
	"net/http"
	"slices"
	"time"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/acl"
	"github.com/meshd/meshd/server/client"
	"github.com/meshd/meshd/server/state"
)

const (
	// forgetExpired is how long a token is remembered that has ended, so that people
	// can see what became of it.
	forgetExpired = 7 * 24 * time.Hour
	// maxForgotten is how many of them are removed at most while a token is made.
	maxForgotten = 8
)

// tokenRoutes are about tokens, and what callers ask about themselves.
func (a *API) tokenRoutes() []route {
	one := func(req *http.Request) acl.Request { return named(req.PathValue("accessor")) }
	return []route{
		{http.MethodGet, "/v1/tokens", acl.Read, acl.Tokens, some, a.tokens, 0},
		{http.MethodPost, "/v1/tokens", acl.Write, acl.Tokens, nil, a.createToken, 0},
		{http.MethodGet, "/v1/tokens/{accessor}", acl.Read, acl.Tokens, one, a.token, 0},
		{http.MethodDelete, "/v1/tokens/{accessor}", acl.Write, acl.Tokens, one, a.deleteToken, 0},
		{http.MethodPost, "/v1/tokens/{accessor}/rotate", acl.Write, acl.Tokens, one, a.rotateToken, 0},
		{http.MethodGet, "/v1/whoami", acl.Read, acl.Self, nil, a.whoami, 0},
		{http.MethodPost, "/v1/can-i", acl.Read, acl.Self, nil, a.canI, 0},
	}
}

// records yields the secrets of one token by their hashes: the one that it has, and
// old ones that have not been forgotten.
func records(r state.Reader, accessor string) iter.Seq2[string, acl.Token] {
	return func(yield func(string, acl.Token) bool) {
		for hash, rec := range state.Tokens.All(r) {
			if rec.Err == nil && rec.Value.Accessor == accessor && !yield(hash, rec.Value) {
				return
			}
		}
	}
}

// show makes one token of the records of its secrets; ok is false if none is the
// token itself.
func (a *API) show(r state.Reader, accessor string) (out client.Token, rec acl.Token, ok bool) {
	now := a.cfg.Now()
	var old *time.Time
	for _, t := range records(r, accessor) {
		switch {
		case !t.Superseded:
			out, rec, ok = shape(t, now), t, true
		case !t.Expired(now) && (old == nil || t.Expires.After(*old)):
			old = t.Expires
		}
	}
	out.OldSecretUntil = old
	return out, rec, ok
}

func shape(t acl.Token, now time.Time) client.Token {
	return client.Token{
		Accessor: t.Accessor, Description: t.Description, Policies: t.AllPolicies(), Roles: t.Roles, Created: t.Created, Expires: t.Expires,
		CreatedBy: t.CreatedBy, Rotated: t.Rotated, Expired: t.Expired(now),
	}
}

func (a *API) tokens(c *call) (any, error) {
	s, err := a.fresh(c)
	if err != nil {
		return nil, err
	}
	out := client.Tokens{Position: s.Position(), Tokens: []client.Token{}}
	now, old := a.cfg.Now(), map[string]*time.Time{}
	for _, rec := range state.Tokens.All(s) {
		t := rec.Value
		switch {
		case rec.Err != nil || !c.may(acl.Read, acl.Tokens, named(t.Accessor)):
		case !t.Superseded:
			out.Tokens = append(out.Tokens, shape(t, now))
		case !t.Expired(now) && (old[t.Accessor] == nil || t.Expires.After(*old[t.Accessor])):
			old[t.Accessor] = t.Expires
		}
	}
	for i := range out.Tokens {
		out.Tokens[i].OldSecretUntil = old[out.Tokens[i].Accessor]
	}
	slices.SortFunc(out.Tokens, func(x, y client.Token) int { return cmp.Compare(x.Accessor, y.Accessor) })
	return out, nil
}

func (a *API) token(c *call) (any, error) {
	s, err := a.fresh(c)
	if err != nil {
		return nil, err
	}
	out, _, ok := a.show(s, c.PathValue("accessor"))
	if !ok {
		return nil, a.noToken(c, s)
	}
	return out, nil
}

// noToken says that the token of the URL does not exist.
func (a *API) noToken(c *call, r state.Reader) error {
	var have []string
	for _, rec := range state.Tokens.All(r) {
		if rec.Err == nil && c.may(acl.Read, acl.Tokens, named(rec.Value.Accessor)) {
			have = append(have, rec.Value.Accessor)
		}
	}
	e := notFound("token", c.PathValue("accessor"), have)
	if e.Next == "" {
		e.Next = "tokens are named by their accessor: meshctl token list"
	}
	return e
}

func (a *API) createToken(c *call) (any, error) {
	raw, err := readBody(c)
	if err != nil {
		return nil, err
	}
	var req client.TokenRequest
	if err := decodeBody("token", raw, &req); err != nil {
		return nil, err
	}
	now := a.cfg.Now().UTC()
	t, secret := acl.NewToken("", req.Description, now)
	t.Policies, t.Roles, t.CreatedBy = req.Policies, req.Roles, c.who.String()
	if err := t.Validate(); err != nil {
		return nil, invalid("token", err)
	}
	if t.Expires, err = expiry(c.who, now, time.Duration(req.TTL)); err != nil {
		return nil, err
	}
	c.what.Name = t.Accessor
	pos, err := a.cfg.State.Update(c.Context(), func(tx *state.Tx) error {
		if err := mayHold(tx, c.who, t); err != nil {
			return err
		}
		forgetTokens(tx, now)
		return state.Tokens.Put(tx, acl.Hash([]byte(secret)), t)
	})
	if err != nil {
		return nil, err
	}
	c.revision = pos.Revision
	return client.NewToken{Token: shape(t, now), Secret: secret}, nil
}

// expiry is when a token ends that somebody makes: not after his own.
func expiry(who acl.Identity, now time.Time, ttl time.Duration) (*time.Time, error) {
	var ends *time.Time
	switch {
	case ttl < 0:
		return nil, badField("ttl", "%v: a token can't end before it begins", ttl)
	case ttl > 0:
		t := now.Add(ttl)
		ends = &t
	case !who.Expires.IsZero():
		t := who.Expires.UTC()
		ends = &t
	}
	return ends, outlives(who, ends)
}

func outlives(who acl.Identity, ends *time.Time) error {
	if !who.Outlives(ends) {
		return nil
	}
	return fmt.Errorf("%w: %s ends at %s, and may not make a token that goes on after that", acl.ErrDenied, who.Describe(), who.Expires.UTC().Format(time.RFC3339))
}

// mayHold demands that the policies and roles of a token exist, and that somebody
// has all that they allow.
func mayHold(tx *state.Tx, who acl.Identity, t acl.Token) error {
	for i, name := range t.AllPolicies() {
		if err := mayName(tx, who, fmt.Sprintf("policies[%d]", i), name); err != nil {
			return err
		}
	}
	for i, name := range t.Roles {
		field := fmt.Sprintf("roles[%d]", i)
		role, ok := state.Roles.Get(tx, name)
		if !ok || role.Err != nil {
			var known []string
			for other := range state.Roles.All(tx) {
				known = append(known, other)
			}
			return nameless(client.KindRole, field, name, known)
		}
		for _, policy := range role.Value.Policies {
			if err := mayName(tx, who, field, policy); err != nil {
				return err
			}
		}
	}
	return nil
}

// forgetTokens removes some of what has ended long ago.
func forgetTokens(tx *state.Tx, now time.Time) {
	left := maxForgotten
	for hash, rec := range state.Tokens.All(tx) {
		if left == 0 {
			return
		}
		if rec.Err == nil && rec.Value.Expired(now.Add(-forgetExpired)) {
			state.Tokens.Delete(tx, hash)
			left--
		}
	}
}

func (a *API) rotateToken(c *call) (any, error) {
	raw, err := readBody(c)
	if err != nil {
		return nil, err
	}
	var req client.RotateRequest
	if len(raw) > 0 {
		if err := decodeBody("rotation", raw, &req); err != nil {
			return nil, err
		}
	}
	grace := time.Duration(req.Grace)
	if grace < 0 || grace > acl.MaxGrace {
		return nil, badField("grace", "%v: 0 to %v", grace, acl.MaxGrace)
	}
	now, secret := a.cfg.Now().UTC(), acl.NewSecret()
	var out client.Token
	pos, err := a.cfg.State.Update(c.Context(), func(tx *state.Tx) error {
		_, t, ok := a.show(tx, c.PathValue("accessor"))
		if !ok {
			return a.noToken(c, tx)
		}
		if t.Expired(now) {
			return &client.Error{Code: client.CodeConflict, Message: fmt.Sprintf("token %s has expired", t.Label()), Next: "create another one"}
		}
		if err := mayHold(tx, c.who, t); err != nil {
			return err
		}
		if err := outlives(c.who, t.Expires); err != nil {
			return err
		}
		if err := retire(tx, t.Accessor, now, grace); err != nil {
			return err
		}
		t.Rotated = &now
		out = shape(t, now)
		return state.Tokens.Put(tx, acl.Hash([]byte(secret)), t)
	})
	if err != nil {
		return nil, err
	}
	c.revision = pos.Revision
	if shown, _, ok := a.show(a.cfg.State.Snapshot(), out.Accessor); ok {
		out = shown
	}
	return client.NewToken{Token: out, Secret: secret}, nil
}

// retire ends the secrets of a token: at once, or the newest one after a grace.
func retire(tx *state.Tx, accessor string, now time.Time, grace time.Duration) error {
	for hash, old := range records(tx, accessor) {
		if grace == 0 || old.Expired(now) {
			state.Tokens.Delete(tx, hash)
			continue
		}
		until := now.Add(grace)
		if old.Expires == nil || until.Before(*old.Expires) {
			old.Expires = &until
		}
		old.Superseded = true
		if err := state.Tokens.Put(tx, hash, old); err != nil {
			return err
		}
	}
	return nil
}

func (a *API) deleteToken(c *call) (any, error) {
	force := c.URL.Query().Get("force")
	if force != "" && force != "true" && force != "false" {
		return nil, badField("force", "%q: write true or false", force)
	}
	var out client.Token
	pos, err := a.cfg.State.Update(c.Context(), func(tx *state.Tx) error {
		shown, t, ok := a.show(tx, c.PathValue("accessor"))
		if !ok {
			return a.noToken(c, tx)
		}
		out = shown
		if force != "true" && a.lastAdmin(tx, t) {
			return &client.Error{
				Code: client.CodeConflict, Message: fmt.Sprintf("token %s is the last one that may do everything", t.Label()),
				Next: "make another one first, or use --force: then only the admin socket of a server lets anybody in as admin",
			}
		}
		for hash := range records(tx, t.Accessor) {
			state.Tokens.Delete(tx, hash)
		}
		return nil
	})
	c.revision = pos.Revision
	return out, err
}

// lastAdmin reports whether a token may do everything and no other one does.
func (a *API) lastAdmin(tx *state.Tx, t acl.Token) bool {
	now, book := a.cfg.Now(), tx.Snapshot().Access()
	all := catalog.BuiltinPolicies()[0].Rules[0]
	if !t.Identity(now, book).Covers(all) {
		return false
	}
	for _, rec := range state.Tokens.All(tx) {
		other := rec.Value
		if rec.Err == nil && !other.Superseded && other.Accessor != t.Accessor && other.Identity(now, book).Covers(all) {
			return false
		}
	}
	return true
}

func (a *API) whoami(c *call) (any, error) {
	out := client.Whoami{
		Subject: c.who.Subject.String(), Server: a.cfg.Info.Server, TrustDomain: a.cfg.Info.TrustDomain, Rules: c.who.Rules(),
	}
	if c.who.Subject != acl.Bearer {
		return out, nil
	}
	t, _, ok := a.show(a.cfg.State.Snapshot(), c.who.Name)
	if ok {
		out.Token = &t
	}
	return out, nil
}

func (a *API) canI(c *call) (any, error) {
	raw, err := readBody(c)
	if err != nil {
		return nil, err
	}
	var req client.CanRequest
	if err := decodeBody("question", raw, &req); err != nil {
		return nil, err
	}
	rule := catalog.PolicyRule{Kinds: []string{req.Kind}, Namespace: req.Namespace, Name: req.Name, Verbs: []string{req.Verb}}
	namespaced, hasName := catalog.ScopeOfKind(req.Kind)
	if namespaced {
		rule.Namespace = cmp.Or(rule.Namespace, "*")
	}
	if hasName {
		rule.Name = cmp.Or(rule.Name, "*")
	}
	if err := rule.Validate(); err != nil {
		return nil, invalid("question", err)
	}
	who := c.who
	if req.Accessor != "" && req.Accessor != c.who.Name {
		if who, err = a.another(c, req.Accessor); err != nil {
			return nil, err
		}
	}
	what := acl.Request{Verb: acl.Verb(req.Verb), Resource: acl.Resource(req.Kind), Namespace: rule.Namespace, Name: rule.Name}
	if err := acl.Authorize(who, what); err != nil {
		return client.Can{Text: err.Error()}, nil //nolint:nilerr // the refusal is the answer
	}
	out := client.Can{Allowed: true, Text: fmt.Sprintf("%s may %s", who.Describe(), what)}
	if policy, by, ok := who.AllowedBy(what); ok {
		out.Policy, out.Rule = policy, &by
		out.Text += fmt.Sprintf(": policy %s has %s", policy, by)
	}
	return out, nil
}

// another is whom a token makes of its bearer, for those who may read the token.
func (a *API) another(c *call, accessor string) (acl.Identity, error) {
	if err := c.authorize(acl.Read, acl.Tokens, named(accessor)); err != nil {
		return acl.Identity{}, err
	}
	s, err := a.fresh(c)
	if err != nil {
		return acl.Identity{}, err
	}
	_, t, ok := a.show(s, accessor)
	if !ok {
		e := notFound("token", accessor, nil)
		e.Next = "tokens are named by their accessor: meshctl token list"
		return acl.Identity{}, e
	}
	who := t.Identity(a.cfg.Now(), s.Access())
	if who.Subject != acl.Bearer {
		return who, &client.Error{Code: client.CodeConflict, Message: fmt.Sprintf("token %s has expired: it may do nothing", t.Label())}
	}
	return who, nil
}
