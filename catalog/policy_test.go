package catalog_test

import (
	"strings"
	"testing"

	"github.com/meshd/meshd/catalog"
)

func TestPolicyRules(t *testing.T) {
	t.Parallel()
	list := func(words ...string) []string { return words }
	for _, row := range []struct {
		rule catalog.PolicyRule
		says string // "": it is valid
	}{
		{catalog.PolicyRule{Kinds: list("service", "intention"), Namespace: "shop", Name: "api-*", Verbs: list("read", "write")}, ""},
		{catalog.PolicyRule{Kinds: list("service"), Namespace: "*", Name: "*", Verbs: list("tap")}, ""},
		{catalog.PolicyRule{Kinds: list("node", "join_token"), Name: "vm*", Verbs: list("write")}, ""},
		{catalog.PolicyRule{Kinds: list("operator", "audit"), Verbs: list("read")}, ""},
		{catalog.PolicyRule{Kinds: list("*"), Namespace: "*", Name: "*", Verbs: list("read", "tap")}, ""},

		{catalog.PolicyRule{Namespace: "*", Name: "*", Verbs: list("read")}, "kinds: missing"},
		{catalog.PolicyRule{Kinds: list("services"), Namespace: "*", Name: "*", Verbs: list("read")}, `did you mean "service"`},
		{catalog.PolicyRule{Kinds: list("service", "service"), Namespace: "*", Name: "*", Verbs: list("read")}, "kinds[1]: \"service\" is listed twice"},
		{catalog.PolicyRule{Kinds: list("*", "node"), Namespace: "*", Name: "*", Verbs: list("read")}, "covers every kind"},
		{catalog.PolicyRule{Kinds: list("*"), Namespace: "shop", Name: "*", Verbs: list("read")}, "list the kinds that you mean"},
		{catalog.PolicyRule{Kinds: list("*"), Verbs: list("read")}, "list the kinds that you mean"},
		{catalog.PolicyRule{Kinds: list("service"), Name: "*", Verbs: list("read")}, "namespace: missing"},
		{catalog.PolicyRule{Kinds: list("service"), Namespace: "shop", Verbs: list("read")}, "name: missing"},
		{catalog.PolicyRule{Kinds: list("service", "node"), Namespace: "shop", Name: "*", Verbs: list("read")}, "node is in no namespace"},
		{catalog.PolicyRule{Kinds: list("operator"), Name: "x", Verbs: list("read")}, "operator has no names"},
		{catalog.PolicyRule{Kinds: list("service"), Namespace: "sh*", Name: "*", Verbs: list("read")}, "write one name"},
		{catalog.PolicyRule{Kinds: list("service"), Namespace: "*", Name: "*api", Verbs: list("read")}, "name"},
		{catalog.PolicyRule{Kinds: list("service"), Namespace: "*", Name: "-*", Verbs: list("read")}, ""},
		{catalog.PolicyRule{Kinds: list("service"), Namespace: "*", Name: "a**", Verbs: list("read")}, "the star goes after"},
		{catalog.PolicyRule{Kinds: list("service"), Namespace: "*", Name: "A", Verbs: list("read")}, "use only a-z"},
		{catalog.PolicyRule{Kinds: list("service"), Namespace: "*", Name: "*"}, "verbs: missing"},
		{catalog.PolicyRule{Kinds: list("service"), Namespace: "*", Name: "*", Verbs: list("wirte")}, `did you mean "write"`},
		{catalog.PolicyRule{Kinds: list("service"), Namespace: "*", Name: "*", Verbs: list("read", "read")}, "listed twice"},
		{catalog.PolicyRule{Kinds: list("service", "instance"), Namespace: "*", Name: "*", Verbs: list("tap")}, "only services can be tapped"},
	} {
		err := row.rule.Validate()
		if row.says == "" && err != nil || row.says != "" && (err == nil || !strings.Contains(err.Error(), row.says)) {
			t.Errorf("%v: %v, want %q", row.rule, err, row.says)
		}
	}
}

func TestPoliciesAndRoles(t *testing.T) {
	t.Parallel()
	for _, p := range catalog.BuiltinPolicies() {
		if err := p.Validate(); err != nil || !catalog.IsBuiltinPolicy(p.Name) {
			t.Errorf("the built-in policy %s: %v", p.Name, err)
		}
	}
	one := catalog.PolicyRule{Kinds: []string{"node"}, Name: "*", Verbs: []string{"read"}}
	bad := catalog.PolicyRule{Kinds: []string{"nod"}, Name: "*", Verbs: []string{"read"}}
	for _, row := range []struct {
		value interface{ Validate() error }
		says  string
	}{
		{catalog.Policy{Name: "a", Rules: []catalog.PolicyRule{one}}, ""},
		{catalog.Policy{Name: "a"}, ""}, // it allows nothing
		{catalog.Policy{Name: "A"}, "name"},
		{catalog.Policy{Name: "a", Description: "x\x00"}, "description"},
		{catalog.Policy{Name: "a", Rules: []catalog.PolicyRule{one, bad}}, "rules[1].kinds[0]"},
		{catalog.Policy{Name: "a", Rules: make([]catalog.PolicyRule, 65)}, "at most 64"},
		{catalog.Role{Name: "a", Policies: []string{"b", "c"}}, ""},
		{catalog.Role{Name: "a"}, "policies: missing"},
		{catalog.Role{Name: "", Policies: []string{"b"}}, "name"},
		{catalog.Role{Name: "a", Policies: []string{"b", "b"}}, "policies[1]"},
		{catalog.Role{Name: "a", Policies: []string{"B"}}, "policies[0]"},
	} {
		err := row.value.Validate()
		if row.says == "" && err != nil || row.says != "" && (err == nil || !strings.Contains(err.Error(), row.says)) {
			t.Errorf("%+v: %v, want %q", row.value, err, row.says)
		}
	}
}
