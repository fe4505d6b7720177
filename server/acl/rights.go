package acl

import (
	"slices"
	"strings"

	"github.com/meshd/meshd/catalog"
)

// anything is the pattern that covers every name.
const anything = "*"

// A Book holds the policies and roles of one state, compiled. It is immutable and
// safe for concurrent use. Make one with NewBook.
type Book struct {
	policies map[string]*compiled
	roles    map[string][]string
}

// NewBook compiles policies and roles. The built-in policies are as they always
// are, whatever is given under their names. What can't be read must not be given:
// a policy that is not there allows nothing.
func NewBook(policies []catalog.Policy, roles []catalog.Role) *Book {
	b := &Book{policies: make(map[string]*compiled, len(policies)), roles: make(map[string][]string, len(roles))}
	for _, p := range slices.Concat(policies, catalog.BuiltinPolicies()) {
		b.policies[p.Name] = compile(p)
	}
	for _, r := range roles {
		b.roles[r.Name] = r.Policies
	}
	return b
}

// Rights returns what policies, and those of roles, allow together. Names that
// the book does not have allow nothing.
func (b *Book) Rights(policies, roles []string) *Rights {
	r := &Rights{book: b, parts: make([]*compiled, 0, len(policies)+len(roles))}
	for _, name := range policies {
		r.add(name)
	}
	for _, role := range roles {
		for _, name := range b.roles[role] {
			r.add(name)
		}
	}
	return r
}

// Rights are what a caller may do. A nil Rights allows nothing. They are
// immutable and safe for concurrent use.
type Rights struct {
	book  *Book
	parts []*compiled
}

func (r *Rights) add(policy string) {
	if p, ok := r.book.policies[policy]; ok && !slices.Contains(r.parts, p) {
		r.parts = append(r.parts, p)
	}
}

// SameBook reports whether both come from one book, so that, of one token, they
// allow the same.
func (r *Rights) SameBook(o *Rights) bool {
	if r == nil || o == nil {
		return r == o
	}
	return r.book == o.book
}

// verbs is a set of them.
type verbs uint8

const (
	verbRead verbs = 1 << iota
	verbWrite
	verbTap
)

// verbsOf is what a rule's verb includes; one that is not known includes nothing.
func verbsOf(v string) verbs {
	switch Verb(v) {
	case Read:
		return verbRead
	case Write:
		return verbRead | verbWrite
	case Tap:
		return verbTap
	default:
		return 0
	}
}

// needed is the verb that a request takes.
func needed(v Verb) verbs {
	switch v {
	case Read:
		return verbRead
	case Write:
		return verbWrite
	case Tap:
		return verbTap
	default:
		return 0
	}
}

// grant is what one rule allows with one kind.
type grant struct {
	verbs           verbs
	namespace, name string // patterns
	rule            int    // index in the policy
}

// compiled is one policy: grants by kind, or by "*" for every kind.
type compiled struct {
	catalog.Policy

	grants map[Resource][]grant
}

func compile(p catalog.Policy) *compiled {
	c := &compiled{Policy: p, grants: make(map[Resource][]grant)}
	for i, rule := range p.Rules {
		if rule.Validate() != nil {
			continue // what is not understood allows nothing
		}
		for _, kind := range rule.Kinds {
			g := grantOf(rule, kind)
			g.rule = i
			c.grants[Resource(kind)] = append(c.grants[Resource(kind)], g)
		}
	}
	return c
}

// grantOf is what a rule allows with one of its kinds. What a kind does not have
// is covered.
func grantOf(rule catalog.PolicyRule, kind string) grant {
	g := grant{namespace: rule.Namespace, name: rule.Name}
	namespaced, named := catalog.ScopeOfKind(kind)
	if !namespaced {
		g.namespace = anything
	}
	if !named {
		g.name = anything
	}
	for _, v := range rule.Verbs {
		g.verbs |= verbsOf(v)
	}
	return g
}

// may reports whether any of the policies allows a request.
func (r *Rights) may(what Request) bool {
	p, _ := r.find(what)
	return p != nil
}

// find returns the first policy that allows a request, and its grant; nil if there
// is none.
func (r *Rights) find(what Request) (*compiled, *grant) {
	verb := needed(what.Verb)
	if r == nil || verb == 0 {
		return nil, nil
	}
	for _, p := range r.parts {
		for _, kind := range [...]Resource{what.Resource, anything} {
			for i := range p.grants[kind] {
				if g := &p.grants[kind][i]; g.allows(what, verb) {
					return p, g
				}
			}
		}
	}
	return nil, nil
}

func (r *Rights) allowedBy(what Request) (policy string, rule catalog.PolicyRule, ok bool) {
	p, g := r.find(what)
	if p == nil {
		return "", rule, false
	}
	return p.Name, p.Rules[g.rule], true
}

func (r *Rights) rules() []catalog.PolicyRule {
	all := []catalog.PolicyRule{}
	if r == nil {
		return all
	}
	for _, p := range r.parts {
		for _, rule := range p.Rules {
			if rule.Validate() == nil {
				all = append(all, rule)
			}
		}
	}
	return all
}

func (g *grant) allows(r Request, verb verbs) bool {
	if g.verbs&verb == 0 {
		return false
	}
	if r.Some { // of intentions, the source may be in another namespace
		return r.Namespace == "" || match(g.namespace, r.Namespace) || r.Resource == Intention && r.Verb == Read
	}
	if match(g.namespace, r.Namespace) && match(g.name, r.Name) {
		return true
	}
	return r.Resource == Intention && r.Verb == Read && r.Source != "" && match(g.namespace, r.SourceNamespace) && match(g.name, r.Source)
}

// match reports whether a pattern of a rule covers a name, or another pattern:
// "*" covers everything, "api-*" what begins with "api-", and "" nothing but "".
func match(pattern, name string) bool {
	prefix, starred := strings.CutSuffix(pattern, "*")
	switch {
	case pattern == anything:
		return true
	case pattern == "" || name == "":
		return pattern == name
	case starred:
		return strings.HasPrefix(name, prefix)
	default:
		return pattern == name
	}
}

// covers reports whether for each kind and verb of the rule there is a rule that
// covers all that it names.
func (r *Rights) covers(rule catalog.PolicyRule) bool {
	if r == nil || rule.Validate() != nil {
		return false
	}
	for _, kind := range rule.Kinds {
		want := grantOf(rule, kind)
		for _, verb := range [...]verbs{verbRead, verbWrite, verbTap} {
			if want.verbs&verb != 0 && !r.coversOne(Resource(kind), verb, want) {
				return false
			}
		}
	}
	return true
}

func (r *Rights) coversOne(kind Resource, verb verbs, want grant) bool {
	for _, p := range r.parts {
		for _, k := range [...]Resource{kind, anything} {
			if slices.ContainsFunc(p.grants[k], func(have grant) bool {
				return have.verbs&verb != 0 && match(have.namespace, want.namespace) && match(have.name, want.name)
			}) {
				return true
			}
		}
	}
	return false
}
