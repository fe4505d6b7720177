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

func policies() collection {
	return &table[string, catalog.Policy]{
		name: client.KindPolicy, res: acl.Policies, segments: []string{"name"}, table: state.Policies,
		key:     oneName,
		keyOf:   func(p catalog.Policy) (string, error) { return p.Name, nil },
		ref:     func(k string) client.Ref { return client.Ref{Kind: client.KindPolicy, Parts: []string{k}} },
		show:    plain,
		scope:   named,
		builtin: catalog.BuiltinPolicies,
		before: func(_ *state.Tx, who acl.Identity, _ string, p catalog.Policy) ([]string, error) {
			return nil, mayAllow(who, p)
		},
		beforeRemove: func(tx *state.Tx, k string) error {
			users := tokensWith(tx, func(t acl.Token) []string { return t.Policies }, k)
			for name, rec := range state.Roles.All(tx) {
				if _, still := state.Roles.Get(tx, name); still && slices.Contains(rec.Value.Policies, k) {
					users = append(users, "role "+name)
				}
			}
			return unused(client.KindPolicy, k, users)
		},
	}
}

func roles() collection {
	return &table[string, catalog.Role]{
		name: client.KindRole, res: acl.Roles, segments: []string{"name"}, table: state.Roles,
		key:   oneName,
		keyOf: func(r catalog.Role) (string, error) { return r.Name, nil },
		ref:   func(k string) client.Ref { return client.Ref{Kind: client.KindRole, Parts: []string{k}} },
		show:  plain,
		scope: named,
		before: func(tx *state.Tx, who acl.Identity, _ string, r catalog.Role) ([]string, error) {
			for i, name := range r.Policies {
				if err := mayName(tx, who, fmt.Sprintf("policies[%d]", i), name); err != nil {
					return nil, err
				}
			}
			return nil, nil
		},
		beforeRemove: func(tx *state.Tx, k string) error {
			return unused(client.KindRole, k, tokensWith(tx, func(t acl.Token) []string { return t.Roles }, k))
		},
	}
}

// mayAllow demands that somebody has all that a policy allows.
func mayAllow(who acl.Identity, p catalog.Policy) error {
	for _, rule := range p.Rules {
		if !who.Covers(rule) {
			return fmt.Errorf("%w: %s may not give what it does not have itself: policy %s allows %s", acl.ErrDenied, who.Describe(), p.Name, rule)
		}
	}
	return nil
}

// mayName demands that a policy exists, and that somebody has all that it allows.
// The transaction comes to depend on it.
func mayName(tx *state.Tx, who acl.Identity, field, name string) error {
	p, err := policyOf(tx, field, name)
	if err != nil {
		return err
	}
	return mayAllow(who, p)
}

func policyOf(r state.Reader, field, name string) (catalog.Policy, error) {
	known := []string{}
	for _, p := range catalog.BuiltinPolicies() {
		if p.Name == name {
			return p, nil
		}
		known = append(known, p.Name)
	}
	rec, ok := state.Policies.Get(r, name)
	switch {
	case ok && rec.Err == nil:
		return rec.Value, nil
	case ok:
		return catalog.Policy{}, &client.Error{
			Code: client.CodeConflict, Message: fmt.Sprintf("policy %s can't be read, and allows nothing: %v", name, rec.Err), Next: "write it anew",
		}
	}
	for other := range state.Policies.All(r) {
		known = append(known, other)
	}
	return catalog.Policy{}, nameless(client.KindPolicy, field, name, known)
}

// nameless says that something names what does not exist.
func nameless(kind client.Kind, field, name string, known []string) error {
	e := notFound(kind, name, known)
	e.Fields = []client.Field{{Field: field, Problem: fmt.Sprintf("names a %s that does not exist", kind)}}
	return e
}

// tokensWith lists the tokens that have a policy, or role, for people.
func tokensWith(r state.Reader, names func(acl.Token) []string, name string) []string {
	var users []string
	for _, rec := range state.Tokens.All(r) {
		if rec.Err == nil && !rec.Value.Superseded && slices.Contains(names(rec.Value), name) {
			users = append(users, "token "+rec.Value.Label())
		}
	}
	return users
}

func unused(kind client.Kind, name string, users []string) error {
	if len(users) == 0 {
		return nil
	}
	const most = 5
	text := strings.Join(users[:min(len(users), most)], ", ")
	if len(users) > most {
		text += fmt.Sprintf(" and %d more", len(users)-most)
	}
	return &client.Error{
		Code: client.CodeConflict, Message: fmt.Sprintf("%s %s is in use by %s", kind, name, text),
		Next: "delete these first, or write the " + string(kind) + " without what it should no longer allow",
	}
}
