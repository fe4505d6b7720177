package catalog

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// A Policy is a named list of permissions. Tokens have policies; whoever has none
// may do nothing. Policies only allow: there is no rule that takes a permission
// away, so that what one rule says never depends on another.
type Policy struct {
	Name        string       `json:"name"`
	Description string       `json:"description,omitempty"`
	Rules       []PolicyRule `json:"rules"`
}

// A PolicyRule permits verbs on what all of its fields match.
type PolicyRule struct {
	// Kinds are some of PolicyKinds, or "*" alone: all kinds, also those of later
	// versions.
	Kinds []string `json:"kinds"`
	// Namespace is that of services, instances, and the destinations of intentions:
	// a name, or "*". Other kinds have none.
	Namespace string `json:"namespace,omitempty"`
	// Name is "api", "api-*" (whatever begins with "api-") or "*". For instances it
	// is that of the service, for intentions that of the destination, for join
	// tokens that of the node, for tokens the accessor. The kinds operator, snapshot
	// and audit have none.
	Name string `json:"name,omitempty"`
	// Verbs are "read", "write", which includes read, and, for services, "tap".
	Verbs []string `json:"verbs"`
}

// A Role is a named list of policies.
type Role struct {
	Name        string   `json:"name"`
	Description string   `json:"description,omitempty"`
	Policies    []string `json:"policies"`
}

// The verbs of rules.
const (
	VerbRead  = "read"
	VerbWrite = "write"
	VerbTap   = "tap"
)

// A scope says by what the resources of a kind are told apart in rules.
type scope uint8

const (
	scopeSingle     scope = iota // there is one
	scopeNamed                   // by name
	scopeNamespaced              // by namespace and name
)

// policyKind is one kind of PolicyKinds.
type policyKind struct {
	name  string
	scope scope
}

// policyKinds lists what rules can be about.
func policyKinds() []policyKind {
	return []policyKind{
		{"namespace", scopeNamed},
		{"node", scopeNamed},
		{"service", scopeNamespaced},
		{"instance", scopeNamespaced},
		{"intention", scopeNamespaced},
		{"set", scopeNamed},
		{"policy", scopeNamed},
		{"role", scopeNamed},
		{"token", scopeNamed},
		{"join_token", scopeNamed},
		{"operator", scopeSingle},
		{"snapshot", scopeSingle},
		{"audit", scopeSingle},
	}
}

// PolicyKinds returns what rules can be about.
func PolicyKinds() []string {
	var names []string
	for _, k := range policyKinds() {
		names = append(names, k.name)
	}
	return names
}

// ScopeOfKind tells whether rules about a kind have a namespace and a name. An
// unknown kind, such as "*", is taken for one that has both.
func ScopeOfKind(kind string) (namespace, name bool) {
	for _, k := range policyKinds() {
		if k.name == kind {
			return k.scope == scopeNamespaced, k.scope != scopeSingle
		}
	}
	return true, true
}

// Names of the built-in policies. They always exist and can't be changed.
const (
	PolicyAdmin    = "admin"
	PolicyReadOnly = "read-only"
)

// BuiltinPolicies returns the policies that exist in every cluster: one that
// permits everything, and one that permits to read all but secrets.
func BuiltinPolicies() []Policy {
	return []Policy{
		{
			Name: PolicyAdmin, Description: "everything (built in)",
			Rules: []PolicyRule{{Kinds: []string{"*"}, Namespace: "*", Name: "*", Verbs: []string{VerbRead, VerbWrite, VerbTap}}},
		},
		{
			Name: PolicyReadOnly, Description: "read all but tokens, snapshots, the audit log and others' requests (built in)",
			Rules: []PolicyRule{
				{Kinds: []string{"service", "instance", "intention"}, Namespace: "*", Name: "*", Verbs: []string{VerbRead}},
				{Kinds: []string{"namespace", "node", "set", "policy", "role"}, Name: "*", Verbs: []string{VerbRead}},
				{Kinds: []string{"operator"}, Verbs: []string{VerbRead}},
			},
		},
	}
}

// IsBuiltinPolicy reports whether a policy of that name is built in.
func IsBuiltinPolicy(name string) bool { return name == PolicyAdmin || name == PolicyReadOnly }

// Limits of policies and roles.
const (
	maxRules        = 64
	maxRolePolicies = 32
	maxDescription  = 256
)

// Validate reports every problem of the spec; see FieldErrors.
func (p Policy) Validate() error {
	var out Problems
	out.label("name", p.Name)
	out.description("description", p.Description)
	if len(p.Rules) > maxRules {
		out.Add("rules", "%d rules, at most %d are allowed: split the policy", len(p.Rules), maxRules)
	}
	for i, r := range p.Rules {
		out.Under(fmt.Sprintf("rules[%d]", i), r.Validate())
	}
	return out.Err()
}

// Validate reports every problem of the rule; see FieldErrors.
func (r PolicyRule) Validate() error {
	var p Problems
	if len(r.Kinds) == 0 {
		p.Add("kinds", "missing: write some of %s, or \"*\"", strings.Join(PolicyKinds(), ", "))
	}
	for i, kind := range r.Kinds {
		at := fmt.Sprintf("kinds[%d]", i)
		switch {
		case slices.Contains(r.Kinds[:i], kind):
			p.Add(at, "%q is listed twice: remove one", kind)
		case kind == "*" && len(r.Kinds) > 1:
			p.Add(at, "\"*\" covers every kind: remove it or the others")
		case kind == "*" && (r.Namespace != "*" || r.Name != "*"):
			p.Add(at, "\"*\" goes with namespace = \"*\" and name = \"*\" only: list the kinds that you mean")
		case kind != "*" && !slices.Contains(PolicyKinds(), kind):
			p.Add(at, "%q is no kind%s: write some of %s, or \"*\"", kind, didYouMean(kind, PolicyKinds()), strings.Join(PolicyKinds(), ", "))
		case kind != "*":
			r.checkScope(&p, kind)
		}
	}
	checkPart(&p, "namespace", r.Namespace, false)
	checkPart(&p, "name", r.Name, true)
	r.checkVerbs(&p)
	return p.Err()
}

// checkScope compares what the rule names with what the kind has.
func (r PolicyRule) checkScope(p *Problems, kind string) {
	namespaced, named := ScopeOfKind(kind)
	switch {
	case namespaced && r.Namespace == "":
		p.Add("namespace", "missing: which namespace of %ss? write \"*\" for all", kind)
	case !namespaced && r.Namespace != "":
		p.Add("namespace", "%s is in no namespace: give it a rule of its own without one", kind)
	}
	switch {
	case named && r.Name == "":
		p.Add("name", "missing: write a name, \"prefix*\", or \"*\" for all")
	case !named && r.Name != "":
		p.Add("name", "%s has no names: give it a rule of its own without one", kind)
	}
}

// checkPart checks a name, or a pattern.
func checkPart(p *Problems, field, s string, prefix bool) {
	if s == "" || s == "*" {
		return
	}
	base, starred := strings.CutSuffix(s, "*")
	if !starred {
		if err := CheckLabel(s); err != nil {
			p.Add(field, "%v", err)
		}
		return
	}
	if !prefix {
		p.Add(field, "%q: write one name, or \"*\" for all", s)
		return
	}
	if err := CheckLabel(strings.TrimRight(base, "-") + "x"); err != nil {
		p.Add(field, "%q: the star goes after the beginning of a name, as in \"api-*\": %v", s, err)
	}
}

func (r PolicyRule) checkVerbs(p *Problems) {
	known := []string{VerbRead, VerbWrite, VerbTap}
	if len(r.Verbs) == 0 {
		p.Add("verbs", "missing: write some of %s", strings.Join(known, ", "))
	}
	for i, verb := range r.Verbs {
		at := fmt.Sprintf("verbs[%d]", i)
		switch {
		case slices.Contains(r.Verbs[:i], verb):
			p.Add(at, "%q is listed twice: remove one", verb)
		case !slices.Contains(known, verb):
			p.Add(at, "%q is no verb%s: write some of %s", verb, didYouMean(verb, known), strings.Join(known, ", "))
		case verb == VerbTap && slices.ContainsFunc(r.Kinds, func(k string) bool { return k != "service" && k != "*" }):
			p.Add(at, "only services can be tapped: give them a rule of their own")
		}
	}
}

// String returns the rule as it is written in HCL.
func (r PolicyRule) String() string {
	s := "{ kinds = " + listText(r.Kinds)
	if r.Namespace != "" {
		s += ", namespace = " + strconv.Quote(r.Namespace)
	}
	if r.Name != "" {
		s += ", name = " + strconv.Quote(r.Name)
	}
	return s + ", verbs = " + listText(r.Verbs) + " }"
}

func listText(words []string) string {
	quoted := make([]string, len(words))
	for i, w := range words {
		quoted[i] = strconv.Quote(w)
	}
	return "[" + strings.Join(quoted, ", ") + "]"
}

// Validate reports every problem of the spec; see FieldErrors. Whether the
// policies exist is for others to know.
func (r Role) Validate() error {
	var p Problems
	p.label("name", r.Name)
	p.description("description", r.Description)
	if len(r.Policies) == 0 {
		p.Add("policies", "missing: a role is a list of policies")
	}
	if len(r.Policies) > maxRolePolicies {
		p.Add("policies", "%d policies, at most %d are allowed", len(r.Policies), maxRolePolicies)
	}
	for i, name := range r.Policies {
		at := fmt.Sprintf("policies[%d]", i)
		p.label(at, name)
		if slices.Contains(r.Policies[:i], name) {
			p.Add(at, "%q is listed twice: remove one", name)
		}
	}
	return p.Err()
}

// description records the problems of a text for people.
func (p *Problems) description(path, s string) {
	switch {
	case len(s) > maxDescription:
		p.Add(path, "%d bytes, at most %d are allowed", len(s), maxDescription)
	case !printable(s):
		p.Add(path, "control characters and invalid UTF-8 are not allowed: remove them")
	}
}

// CheckDescription reports why s can't describe a thing to people.
func CheckDescription(s string) error {
	var p Problems
	p.description("", s)
	return p.Err()
}
