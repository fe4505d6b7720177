package acl_test

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/acl"
)

// policies are those of the tests.
func policies() []catalog.Policy {
	list := func(words ...string) []string { return words }
	return []catalog.Policy{
		{Name: "shop", Rules: []catalog.PolicyRule{{Kinds: list("service", "instance", "intention"), Namespace: "shop", Name: "*", Verbs: list("write")}}},
		{Name: "api", Rules: []catalog.PolicyRule{{Kinds: list("service", "intention"), Namespace: "default", Name: "api-*", Verbs: list("read", "write")}}},
		{Name: "watcher", Rules: []catalog.PolicyRule{{Kinds: list("service"), Namespace: "default", Name: "api", Verbs: list("tap")}}},
		{Name: "joiner", Rules: []catalog.PolicyRule{{Kinds: list("node", "join_token"), Name: "vm-*", Verbs: list("write")}}},
		{Name: "future", Rules: []catalog.PolicyRule{
			{Kinds: list("service", "gateway"), Namespace: "*", Name: "*", Verbs: list("read")},
			{Kinds: list("node"), Name: "*", Verbs: list("read", "own")},
		}},
		{Name: "admin"}, // the built-in one stays as it is
	}
}

func book() *acl.Book {
	return acl.NewBook(policies(), []catalog.Role{{Name: "team", Policies: []string{"api", "watcher"}}, {Name: "ghost", Policies: []string{"gone"}}})
}

func bearer(policies []string, roles ...string) acl.Identity {
	return acl.Identity{Subject: acl.Bearer, Name: "a1", Rights: book().Rights(policies, roles)}
}

// callers are those whom the tests know.
func callers() map[string]acl.Identity {
	return map[string]acl.Identity{
		"anonymous": {},
		"admin":     bearer([]string{"admin"}),
		"read-only": bearer([]string{"read-only"}),
		"powerless": {Subject: acl.Bearer, Name: "a2"},
		"gone":      bearer([]string{"gone"}, "nowhere", "ghost"),
		"shop":      bearer([]string{"shop"}),
		"api":       bearer([]string{"api"}),
		"team":      bearer(nil, "team"),
		"joiner":    bearer([]string{"joiner"}),
		"future":    bearer([]string{"future"}),
		"local":     {Subject: acl.Local, Name: "root"},
		"vm-a":      {Subject: acl.Host, Name: "vm-a"},
		"nameless":  {Subject: acl.Host},
		"strange":   {Subject: 99, Name: "x", Rights: book().Rights([]string{"admin"}, nil)},
	}
}

func TestAuthorize(t *testing.T) {
	t.Parallel()
	all := callers()
	everybody := make([]string, 0, len(all))
	for name := range all {
		everybody = append(everybody, name)
	}
	in := func(verb acl.Verb, resource acl.Resource, namespace, name string) acl.Request {
		return acl.Request{Verb: verb, Resource: resource, Namespace: namespace, Name: name}
	}
	readers := []string{"admin", "local", "read-only"}
	for _, row := range []struct {
		request acl.Request
		allowed []string
	}{
		{in(acl.Read, acl.Health, "", ""), everybody},
		{in(acl.Read, acl.Roots, "", ""), everybody},
		{in(acl.Write, acl.Join, "", ""), everybody},
		{in(acl.Write, acl.Health, "", ""), []string{"admin", "local"}},
		{in(acl.Read, acl.Join, "", ""), []string{"admin", "local"}},
		{in(acl.Write, acl.Each, "", ""), []string{"admin", "local", "read-only", "powerless", "gone", "shop", "api", "team", "joiner", "future"}},
		{in(acl.Read, acl.Self, "", ""), []string{"admin", "local", "read-only", "powerless", "gone", "shop", "api", "team", "joiner", "future"}},

		{in(acl.Read, acl.Service, "default", "api-1"), append(readers, "api", "team")},
		{in(acl.Read, acl.Service, "default", "api"), readers}, // "api-*" is not "api"
		{in(acl.Read, acl.Service, "default", "apix"), readers},
		{in(acl.Read, acl.Service, "shop", "api-1"), append(readers, "shop")}, // write includes read
		{in(acl.Write, acl.Service, "shop", "api-1"), []string{"admin", "local", "shop"}},
		{in(acl.Write, acl.Service, "shop", "*"), []string{"admin", "local", "shop"}},
		{in(acl.Write, acl.Service, "shop", ""), []string{"admin", "local", "shop"}},
		{in(acl.Write, acl.Service, "default", "*"), []string{"admin", "local"}},
		{in(acl.Read, acl.Service, "", ""), readers},
		{in(acl.Read, acl.Service, "*", "*"), readers},
		{in(acl.Read, acl.Service, "", "api-1"), readers},
		{in(acl.Tap, acl.Service, "default", "api"), []string{"admin", "local", "team"}},
		{in(acl.Tap, acl.Service, "default", "api-1"), []string{"admin", "local"}}, // write does not include tap
		{in(acl.Read, acl.Service, "default", "web"), readers},                     // a rule with an unknown kind allows nothing
		{in(acl.Read, acl.Node, "", "vm-a"), append(readers, "joiner")},            // nor one with an unknown verb
		{in(acl.Tap, acl.Node, "", "vm-a"), nil},
		{in(acl.Tap, acl.Health, "", ""), nil},

		{in(acl.Write, acl.Intention, "default", "api-1"), []string{"admin", "local", "api", "team"}},
		{in(acl.Write, acl.Intention, "*", "*"), []string{"admin", "local"}},
		{in(acl.Write, acl.Intention, "default", "*"), []string{"admin", "local"}},
		{
			acl.Request{Verb: acl.Read, Resource: acl.Intention, Namespace: "default", Name: "db", SourceNamespace: "shop", Source: "cart"},
			append(readers, "shop"),
		},
		{
			acl.Request{Verb: acl.Write, Resource: acl.Intention, Namespace: "default", Name: "db", SourceNamespace: "shop", Source: "cart"},
			[]string{"admin", "local"},
		},
		{acl.Request{Verb: acl.Read, Resource: acl.Intention, Namespace: "default", Name: "db"}, readers}, // another mesh's source
		{
			acl.Request{Verb: acl.Read, Resource: acl.Service, Namespace: "default", Name: "db", SourceNamespace: "shop", Source: "cart"},
			readers, // only intentions have two sides
		},

		{acl.Request{Verb: acl.Read, Resource: acl.Service, Some: true}, append(readers, "shop", "api", "team")},
		{acl.Request{Verb: acl.Read, Resource: acl.Service, Some: true, Namespace: "shop"}, append(readers, "shop")},
		{acl.Request{Verb: acl.Read, Resource: acl.Intention, Some: true, Namespace: "other"}, append(readers, "shop", "api", "team")},
		{acl.Request{Verb: acl.Write, Resource: acl.Intention, Some: true, Namespace: "other"}, []string{"admin", "local"}},
		{acl.Request{Verb: acl.Tap, Resource: acl.Service, Some: true}, []string{"admin", "local", "team"}},
		{acl.Request{Verb: acl.Write, Resource: acl.JoinTokens, Some: true}, []string{"admin", "local", "joiner"}},
		{acl.Request{Verb: acl.Read, Resource: acl.Tokens, Some: true}, []string{"admin", "local"}},

		{in(acl.Write, acl.Node, "", "vm-a"), []string{"admin", "local", "joiner"}},
		{in(acl.Write, acl.Node, "", "db-a"), []string{"admin", "local"}},
		{in(acl.Write, acl.JoinTokens, "", "vm-a"), []string{"admin", "local", "joiner"}},
		{in(acl.Read, acl.Tokens, "", ""), []string{"admin", "local"}},
		{in(acl.Read, acl.Policies, "", "x"), readers},
		{in(acl.Read, acl.Roles, "", "x"), readers},
		{in(acl.Read, acl.Set, "", "x"), readers},
		{in(acl.Read, acl.Namespace, "", "x"), readers},
		{in(acl.Read, acl.Operator, "", ""), readers},
		{in(acl.Write, acl.Operator, "", ""), []string{"admin", "local"}},
		{in(acl.Read, acl.Snapshot, "", ""), []string{"admin", "local"}},
		{in(acl.Read, acl.Audit, "", ""), []string{"admin", "local"}},

		{in(acl.Write, acl.Sync, "", "vm-a"), []string{"vm-a"}},
		{in(acl.Write, acl.Register, "", "vm-a"), []string{"vm-a"}},
		{in(acl.Write, acl.Sign, "", "vm-b"), nil},
		{in(acl.Write, acl.Leave, "", ""), nil},
		{in(acl.Write, acl.Watch, "", "vm-a"), []string{"vm-a"}},
		{in("own", acl.Sync, "", "vm-a"), nil},
		{in(acl.Write, "mistyped", "", ""), []string{"admin", "local"}},
		{in("", acl.Intention, "", ""), nil},
		{acl.Request{}, nil},
	} {
		for name, who := range all {
			err := acl.Authorize(who, row.request)
			if (err == nil) != slices.Contains(row.allowed, name) {
				t.Errorf("%s, %v: %v", name, row.request, err)
			}
			if (err == nil) != acl.May(who, row.request) {
				t.Errorf("%s, %v: May and Authorize do not agree", name, row.request)
			}
			if err == nil {
				continue
			}
			sentinel := acl.ErrDenied
			if name == "anonymous" {
				sentinel = acl.ErrUnauthenticated
			}
			if !errors.Is(err, sentinel) || !strings.Contains(err.Error(), row.request.String()) {
				t.Errorf("%s, %v: error %q", name, row.request, err)
			}
		}
	}
}

func TestRefusalNamesThePermission(t *testing.T) {
	t.Parallel()
	ci := acl.Identity{Subject: acl.Bearer, Name: "1a2b3c4d", Title: "deploy-ci"}
	untitled := acl.Identity{Subject: acl.Bearer, Name: "1a2b3c4d"}
	for _, row := range []struct {
		who  acl.Identity
		what acl.Request
		want string
	}{
		{
			ci,
			acl.Request{Verb: acl.Write, Resource: acl.Intention, Namespace: "default", Name: "payments"},
			`permission denied: token deploy-ci (accessor 1a2b3c4d) may not write intention default/payments; ` +
				`it needs a policy with { kinds = ["intention"], namespace = "default", name = "payments", verbs = ["write"] }`,
		},
		{
			untitled,
			acl.Request{Verb: acl.Read, Resource: acl.Node, Some: true},
			`permission denied: token 1a2b3c4d may not read any node; it needs a policy with { kinds = ["node"], name = "*", verbs = ["read"] }`,
		},
		{
			untitled,
			acl.Request{Verb: acl.Read, Resource: acl.Service, Some: true, Namespace: "shop"},
			`permission denied: token 1a2b3c4d may not read any service in shop; it needs a policy with { kinds = ["service"], namespace = "shop", name = "*", verbs = ["read"] }`,
		},
		{
			untitled,
			acl.Request{Verb: acl.Read, Resource: acl.Snapshot},
			`permission denied: token 1a2b3c4d may not read snapshot; it needs a policy with { kinds = ["snapshot"], verbs = ["read"] }`,
		},
		{
			acl.Identity{},
			acl.Request{Verb: acl.Write, Resource: acl.Tokens},
			`not authenticated: to write token * takes a policy with { kinds = ["token"], name = "*", verbs = ["write"] }`,
		},
		{acl.Identity{}, acl.Request{Verb: acl.Write, Resource: acl.Each}, `not authenticated: to do this takes a token`},
		{
			untitled,
			acl.Request{Verb: acl.Write, Resource: acl.Sign, Name: "vm-a"},
			`permission denied: token 1a2b3c4d may not write sign vm-a; it needs the certificate of node vm-a`,
		},
		{untitled, acl.Request{Verb: acl.Read, Resource: "mistyped"}, `permission denied: token 1a2b3c4d may not read mistyped */*; it needs a token with the policy admin`},
	} {
		if got := acl.Authorize(row.who, row.what); got == nil || got.Error() != row.want {
			t.Errorf("%v:\n got %v\nwant %s", row.what, got, row.want)
		}
		rule, ok := row.what.Needs()
		if !ok {
			continue
		}
		if err := rule.Validate(); err != nil {
			t.Errorf("%v: the rule that it names is not valid: %v", row.what, err)
		}
		named := acl.NewBook([]catalog.Policy{{Name: "named", Rules: []catalog.PolicyRule{rule}}}, nil)
		if who := (acl.Identity{Subject: acl.Bearer, Rights: named.Rights([]string{"named"}, nil)}); !acl.May(who, row.what) {
			t.Errorf("%v: the rule that it names does not allow it: %v", row.what, rule)
		}
	}
}

// TestEveryKindOfPoliciesIsAResource: what rules can be about is what requests are
// about, and the other way round.
func TestEveryKindOfPoliciesIsAResource(t *testing.T) {
	t.Parallel()
	want := []string{
		string(acl.Namespace), string(acl.Node), string(acl.Service), string(acl.Instance), string(acl.Intention), string(acl.Set),
		string(acl.Policies), string(acl.Roles), string(acl.Tokens), string(acl.JoinTokens), string(acl.Operator), string(acl.Snapshot), string(acl.Audit),
	}
	if diff := cmp.Diff(want, catalog.PolicyKinds()); diff != "" {
		t.Errorf("-resources +kinds\n%s", diff)
	}
}

// TestNobodyGivesWhatHeDoesNotHave is what keeps permissions from growing.
func TestNobodyGivesWhatHeDoesNotHave(t *testing.T) {
	t.Parallel()
	rule := func(kinds, namespace, name, verbs string) catalog.PolicyRule {
		return catalog.PolicyRule{Kinds: strings.Split(kinds, ","), Namespace: namespace, Name: name, Verbs: strings.Split(verbs, ",")}
	}
	all := callers()
	for _, row := range []struct {
		rule   catalog.PolicyRule
		givers []string
	}{
		{rule("*", "*", "*", "read,write,tap"), []string{"admin", "local"}},
		{rule("*", "*", "*", "read"), []string{"admin", "local"}},
		{rule("service", "*", "*", "read"), []string{"admin", "local", "read-only"}},
		{rule("service", "shop", "*", "read"), []string{"admin", "local", "read-only", "shop"}},
		{rule("service", "shop", "*", "write"), []string{"admin", "local", "shop"}},
		{rule("service", "shop", "*", "write,tap"), []string{"admin", "local"}},
		{rule("service,instance", "shop", "cart-*", "write"), []string{"admin", "local", "shop"}},
		{rule("service,intention", "default", "api-*", "write"), []string{"admin", "local", "api", "team"}},
		{rule("service,intention", "default", "api-v2-*", "write"), []string{"admin", "local", "api", "team"}},
		{rule("service,instance", "default", "api-v2", "write"), []string{"admin", "local"}},
		{rule("service", "default", "api*", "write"), []string{"admin", "local"}},
		{rule("service", "default", "*", "write"), []string{"admin", "local"}},
		{rule("service", "default", "api", "tap"), []string{"admin", "local", "team"}},
		{rule("node", "", "vm-a", "read,write"), []string{"admin", "local", "joiner"}},
		{rule("node", "", "*", "read"), []string{"admin", "local", "read-only"}},
		{rule("snapshot", "", "", "read"), []string{"admin", "local"}},
		{rule("gateway", "*", "*", "read"), []string{"local"}}, // nobody can write it: it is refused before
	} {
		for name, who := range all {
			if got := who.Covers(row.rule); got != slices.Contains(row.givers, name) {
				t.Errorf("%s gives %v: %v", name, row.rule, got)
			}
		}
	}
}

func TestWhatAllows(t *testing.T) {
	t.Parallel()
	team := bearer([]string{"shop"}, "team")
	policy, rule, ok := team.AllowedBy(acl.Request{Verb: acl.Tap, Resource: acl.Service, Namespace: "default", Name: "api"})
	if !ok || policy != "watcher" || rule.Verbs[0] != "tap" {
		t.Errorf("%s, %v, %v", policy, rule, ok)
	}
	if _, _, ok := team.AllowedBy(acl.Request{Verb: acl.Write, Resource: acl.Snapshot}); ok {
		t.Error("something allows a restore")
	}
	if n := len(team.Rules()); n != 3 {
		t.Errorf("%d rules, want those of shop, api and watcher", n)
	}
	if n := len(bearer([]string{"future"}).Rules()); n != 0 {
		t.Errorf("%d rules of what is not understood", n)
	}
	one := book()
	if x, y := one.Rights([]string{"api"}, nil), one.Rights([]string{"shop"}, nil); !x.SameBook(y) || x.SameBook(nil) || x.SameBook(book().Rights(nil, nil)) {
		t.Error("books are mistaken for each other")
	}
}

func TestAuthorizeAllocatesNothing(t *testing.T) {
	who := bearer([]string{"api", "shop", "joiner", "admin"})
	what := acl.Request{Verb: acl.Write, Resource: acl.Tokens, Name: "x"}
	if n := testing.AllocsPerRun(100, func() {
		if !acl.May(who, what) {
			t.Fatal("denied")
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkIdentity(b *testing.B) {
	token, _ := acl.NewToken("api", "bench", time.Now())
	all, now := book(), time.Now()
	what := acl.Request{Verb: acl.Write, Resource: acl.Intention, Namespace: "default", Name: "api-7"}
	b.ReportAllocs()
	for b.Loop() {
		if !acl.May(token.Identity(now, all), what) {
			b.Fatal("denied")
		}
	}
}

func TestTokens(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	token, secret := acl.NewToken(acl.PolicyAdmin, "first", now)
	other, otherSecret := acl.NewToken(acl.PolicyAdmin, "second", now)
	if secret == otherSecret || token.Accessor == other.Accessor || len(secret) < acl.MinSecret {
		t.Errorf("tokens are not unique: %q, %q", token.Accessor, other.Accessor)
	}
	if _, err := acl.AdoptToken(secret, acl.PolicyAdmin, "", now); err != nil {
		t.Errorf("a made token is not good enough to be adopted: %v", err)
	}
	for _, bad := range []string{"", "short", strings.Repeat("a b", 20), strings.Repeat("ü", 40), strings.Repeat("a", 40) + "\n"} {
		if _, err := acl.AdoptToken(bad, acl.PolicyAdmin, "", now); !errors.Is(err, acl.ErrToken) {
			t.Errorf("AdoptToken(%q) = %v", bad, err)
		}
	}
	anything := acl.Request{Verb: acl.Write, Resource: acl.Snapshot}
	until := now.Add(time.Hour)
	token.Expires = &until
	for _, row := range []struct {
		at   time.Time
		good bool
	}{{now, true}, {until.Add(-1), true}, {until, false}, {until.Add(time.Hour), false}} {
		who := token.Identity(row.at, book())
		if acl.May(who, anything) != row.good || (who.Subject == acl.Bearer) != row.good || token.Expired(row.at) == row.good {
			t.Errorf("at %v: %v", row.at, who)
		}
	}
	who := token.Identity(now, book())
	later := until.Add(1)
	if who.Outlives(&until) || !who.Outlives(&later) || !who.Outlives(nil) || other.Identity(now, book()).Outlives(nil) {
		t.Error("who ends when is mistaken")
	}
	old := acl.Token{Accessor: "a", Role: "admin"}
	if !acl.May(old.Identity(now, book()), anything) {
		t.Error("an admin's token of before policies may do nothing")
	}
	if acl.May(acl.Token{Accessor: "a", Role: "other"}.Identity(now, book()), anything) {
		t.Error("an unknown role may do something")
	}
}

func TestTokensAreValidated(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		token acl.Token
		says  string // "": it is valid
	}{
		{acl.Token{Policies: []string{"a"}, Roles: []string{"a"}, Description: "ci: deploys (ü)"}, ""},
		{acl.Token{}, "may do nothing"},
		{acl.Token{Policies: []string{"A"}}, "policies[0]"},
		{acl.Token{Policies: []string{"a", "a"}}, "policies[1]: \"a\" is listed twice"},
		{acl.Token{Roles: []string{""}}, "roles[0]"},
		{acl.Token{Policies: []string{"a"}, Description: "two\nlines"}, "description"},
		{acl.Token{Policies: []string{"a"}, Description: strings.Repeat("x", 300)}, "description"},
		{acl.Token{Policies: make([]string, 40)}, "at most"},
	} {
		err := row.token.Validate()
		if row.says == "" && err != nil || row.says != "" && (err == nil || !strings.Contains(err.Error(), row.says)) {
			t.Errorf("%+v: %v, want %q", row.token, err, row.says)
		}
	}
}

func TestJoinTokens(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for _, row := range []struct{ ttl, want time.Duration }{
		{0, acl.DefaultJoinTTL}, {time.Minute, time.Minute}, {acl.MaxJoinTTL, acl.MaxJoinTTL}, {acl.MaxJoinTTL + 1, 0}, {-1, 0},
	} {
		token, secret, err := acl.NewJoinToken("vm-a", []string{"web"}, row.ttl, false, now)
		if row.want == 0 {
			if !errors.Is(err, acl.ErrToken) {
				t.Errorf("ttl %v: %v", row.ttl, err)
			}
			continue
		}
		if err != nil || len(secret) != acl.SecretBytes || token.Expires.Sub(now) != row.want || token.Used != nil {
			t.Errorf("ttl %v: %+v, %d bytes, %v", row.ttl, token, len(secret), err)
		}
		if len(acl.Hash(secret)) != 64 || acl.Hash(secret) == acl.Hash(nil) {
			t.Errorf("hash %q", acl.Hash(secret))
		}
	}
}

// TestCoversIsWhatItSays: one rule covers another exactly if it allows all that the
// other one does.
func TestCoversIsWhatItSays(t *testing.T) {
	t.Parallel()
	patterns := []string{"*", "a*", "ab*", "ab-*", "a", "ab", "b"}
	spaces := []string{"*", "a", "b"}
	names := []string{"a", "ab", "abc", "ab-c", "b", "*"}
	verbs := [][]string{{"read"}, {"write"}, {"tap"}, {"read", "tap"}, {"read", "write"}}
	asked := []acl.Verb{acl.Read, acl.Write, acl.Tap}
	var rules []catalog.PolicyRule
	for _, space := range spaces {
		for _, name := range patterns {
			for _, v := range verbs {
				rules = append(rules, catalog.PolicyRule{Kinds: []string{"service"}, Namespace: space, Name: name, Verbs: v})
			}
		}
	}
	who := make([]acl.Identity, len(rules))
	for i, r := range rules {
		b := acl.NewBook([]catalog.Policy{{Name: "p", Rules: []catalog.PolicyRule{r}}}, nil)
		who[i] = acl.Identity{Subject: acl.Bearer, Rights: b.Rights([]string{"p"}, nil)}
	}
	for i := range rules {
		for j := range rules {
			more := true // whether i allows all that j does
			for _, space := range append(spaces, "c") {
				for _, name := range append(names, "ab-", "z") {
					for _, verb := range asked {
						what := acl.Request{Verb: verb, Resource: acl.Service, Namespace: space, Name: name}
						more = more && (acl.May(who[i], what) || !acl.May(who[j], what))
					}
				}
			}
			if got := who[i].Covers(rules[j]); got != more {
				t.Fatalf("%v covers %v: %v, but allows as much: %v", rules[i], rules[j], got, more)
			}
		}
	}
}
