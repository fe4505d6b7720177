package intentions_test

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/intentions"
)

var api = catalog.Name{Namespace: "default", Name: "api"}

func compile(tb testing.TB, all ...intentions.Intention) *intentions.Policy {
	tb.Helper()
	p, err := intentions.Compile(td, api, all)
	if err != nil {
		tb.Fatal(err)
	}
	return p
}

func request(source spiffe.ID) intentions.Request {
	return intentions.Request{Source: source, Destination: api, Port: "http", Now: base}
}

func httpRequest(method, path string, h headerMap) intentions.Request {
	r := request(spiffe.Service(td, "default", "web"))
	r.HTTP = &intentions.HTTPRequest{Method: method, Path: path, Headers: h}
	return r
}

func allow(source, destination string) intentions.Intention {
	return intentions.Intention{Source: source, Destination: destination, Action: intentions.Allow}
}

func deny(source, destination string) intentions.Intention {
	return intentions.Intention{Source: source, Destination: destination, Action: intentions.Deny}
}

func rules(rs ...intentions.Rule) intentions.Intention {
	return intentions.Intention{Source: "web", Destination: "api", Rules: rs}
}

// TestPrecedence has a row for each pair of neighbours in the order of
// specificity, with the one that must decide first.
func TestPrecedence(t *testing.T) {
	t.Parallel()
	order := [][2]string{
		{"web", "api"},
		{"default/*", "api"},
		{"*", "api"},
		{"web", "default/*"},
		{"default/*", "default/*"},
		{"*", "default/*"},
		{"web", "*"},
		{"default/*", "*"},
		{"*", "*"},
	}
	r := request(spiffe.Service(td, "default", "web"))
	for i := range order {
		for j := i + 1; j < len(order); j++ {
			first, second := order[i], order[j]
			for _, flip := range []bool{false, true} {
				a, d := allow(first[0], first[1]), deny(second[0], second[1])
				if flip {
					a, d = allow(second[0], second[1]), deny(first[0], first[1])
				}
				for _, all := range [][]intentions.Intention{{a, d}, {d, a}} {
					got := compile(t, all...).Decide(r)
					if got.Allowed == flip || got.Key.SourceString() != first[0] || got.Key.DestinationString() != first[1] {
						t.Errorf("%v before %v, deny first %v: got %v", first, second, flip, got)
					}
				}
			}
		}
	}
}

func TestDecide(t *testing.T) {
	t.Parallel()
	web, webBatch := spiffe.Service(td, "default", "web"), spiffe.Service(td, "batch", "web")
	foreign := spiffe.Service("other.example", "default", "web")
	past, future := base, base.Add(time.Nanosecond)
	expiring := func(i intentions.Intention, at time.Time) intentions.Intention {
		i.Expires = &at
		return i
	}
	ports := func(i intentions.Intention, names ...string) intentions.Intention {
		i.Ports = names
		return i
	}
	for _, tc := range []struct {
		name    string
		all     []intentions.Intention
		source  spiffe.ID
		allowed bool
		reason  intentions.Reason
		key     string // "" for none
	}{
		{"nothing", nil, web, false, intentions.ReasonNoIntention, ""},
		{"other destination", []intentions.Intention{allow("web", "db")}, web, false, intentions.ReasonNoIntention, ""},
		{"other source", []intentions.Intention{allow("cron", "api")}, web, false, intentions.ReasonNoIntention, ""},
		{"same name in another namespace", []intentions.Intention{allow("web", "api")}, webBatch, false, intentions.ReasonNoIntention, ""},
		{"destination in another namespace", []intentions.Intention{allow("web", "batch/api"), allow("web", "batch/*")}, web, false, intentions.ReasonNoIntention, ""},
		{"exact", []intentions.Intention{allow("web", "api")}, web, true, intentions.ReasonAction, "web → api"},
		{"spelt out", []intentions.Intention{allow("default/web", "default/api")}, web, true, intentions.ReasonAction, "web → api"},
		{"own trust domain spelt out", []intentions.Intention{allow("spiffe://mesh.example/ns/default/svc/web", "api")}, web, true, intentions.ReasonAction, "web → api"},
		{"namespace", []intentions.Intention{allow("batch/*", "api")}, webBatch, true, intentions.ReasonAction, "batch/* → api"},
		{"star does not cover a foreign source", []intentions.Intention{allow("*", "*")}, foreign, false, intentions.ReasonNoIntention, ""},
		{"nor does a namespace", []intentions.Intention{allow("default/*", "api"), allow("web", "api")}, foreign, false, intentions.ReasonNoIntention, ""},
		{"foreign exact", []intentions.Intention{allow("spiffe://other.example/ns/default/svc/web", "api")}, foreign, true, intentions.ReasonAction, "spiffe://other.example/ns/default/svc/web → api"},
		{"foreign namespace", []intentions.Intention{allow("spiffe://other.example/ns/default/svc/*", "api"), deny("spiffe://other.example/*", "api")}, foreign, true, intentions.ReasonAction, "spiffe://other.example/ns/default/svc/* → api"},
		{"foreign all", []intentions.Intention{allow("spiffe://other.example/*", "api")}, foreign, true, intentions.ReasonAction, "spiffe://other.example/* → api"},
		{"foreign does not cover own", []intentions.Intention{allow("spiffe://other.example/*", "api")}, web, false, intentions.ReasonNoIntention, ""},
		{"tie: deny wins", []intentions.Intention{allow("web", "api"), deny("default/web", "api")}, web, false, intentions.ReasonAction, "web → api"},
		{"tie: deny wins in any order", []intentions.Intention{deny("spiffe://mesh.example/ns/default/svc/web", "api"), allow("web", "api")}, web, false, intentions.ReasonAction, "web → api"},
		{"expired at its time", []intentions.Intention{expiring(allow("web", "api"), past)}, web, false, intentions.ReasonExpired, "web → api"},
		{"not yet expired", []intentions.Intention{expiring(allow("web", "api"), future)}, web, true, intentions.ReasonAction, "web → api"},
		{"expired deny uncovers the next", []intentions.Intention{expiring(deny("web", "api"), past), allow("*", "api")}, web, true, intentions.ReasonAction, "* → api"},
		{"expired half of a tie", []intentions.Intention{expiring(deny("web", "api"), past), allow("default/web", "api")}, web, true, intentions.ReasonAction, "web → api"},
		{"port covered", []intentions.Intention{ports(allow("web", "api"), "grpc", "http")}, web, true, intentions.ReasonAction, "web → api"},
		{"port not covered, no fall-through", []intentions.Intention{ports(allow("web", "api"), "grpc"), allow("*", "*")}, web, false, intentions.ReasonPort, "web → api"},
		{"rules on a connection", []intentions.Intention{rules(intentions.Rule{Action: intentions.Allow}), allow("*", "*")}, web, false, intentions.ReasonNotHTTP, "web → api"},
		{"node", []intentions.Intention{allow("*", "*")}, spiffe.Node(td, "vm-1"), false, intentions.ReasonSource, ""},
		{"server", []intentions.Intention{allow("*", "*")}, spiffe.Server(td, "s1"), false, intentions.ReasonSource, ""},
		{"nobody", []intentions.Intention{allow("*", "*")}, spiffe.ID{}, false, intentions.ReasonSource, ""},
		{"no trust domain", []intentions.Intention{allow("*", "*")}, spiffe.Service("", "default", "web"), false, intentions.ReasonSource, ""},
		{"a source called star", []intentions.Intention{allow("batch/*", "*")}, spiffe.Service(td, "*", "*"), false, intentions.ReasonNoIntention, ""},
	} {
		d := compile(t, tc.all...).Decide(request(tc.source))
		key := ""
		if !d.Key.IsZero() {
			key = d.Key.String()
		}
		if d.Allowed != tc.allowed || d.Reason != tc.reason || key != tc.key || d.Rule != -1 {
			t.Errorf("%s: got %+v", tc.name, d)
		}
	}
}

func TestDecideWithoutPolicy(t *testing.T) {
	t.Parallel()
	r := request(spiffe.Service(td, "default", "web"))
	var none *intentions.Policy
	if d := none.Decide(r); d.Allowed || d.Reason != intentions.ReasonNoPolicy || none.MayAllow(r.Source) {
		t.Errorf("nil policy: %v", d)
	}
	if d := new(intentions.Policy).Decide(intentions.Request{}); d.Allowed || d.Reason != intentions.ReasonNoPolicy {
		t.Errorf("zero policy: %v", d)
	}
	if d := (intentions.Decision{}); d.Allowed || d.String() != "denied: no decision" {
		t.Errorf("zero decision: %v", d)
	}
	all := compile(t, allow("*", "*"))
	r.Destination.Name = "db"
	if d := all.Decide(r); d.Allowed || d.Reason != intentions.ReasonDestination {
		t.Errorf("other destination: %v", d)
	}
	for _, path := range []string{"", "*", "v1", "http://a/"} {
		if d := all.Decide(httpRequest("GET", path, nil)); d.Allowed || d.Reason != intentions.ReasonPath {
			t.Errorf("path %q: %v", path, d)
		}
	}
}

func TestCompileRefuses(t *testing.T) {
	t.Parallel()
	bad := intentions.Intention{Source: "web", Destination: "api", Rules: []intentions.Rule{{Action: intentions.Allow, PathRegex: "("}}}
	for name, tc := range map[string]struct {
		td   string
		dest catalog.Name
		all  []intentions.Intention
		ok   bool
	}{
		"good":                        {td, api, []intentions.Intention{allow("*", "*")}, true},
		"bad of another destination":  {td, catalog.Name{Namespace: "default", Name: "db"}, []intentions.Intention{bad}, true},
		"bad rule":                    {td, api, []intentions.Intention{allow("*", "*"), bad}, false},
		"no action":                   {td, api, []intentions.Intention{{Source: "web", Destination: "api"}}, false},
		"unknown action":              {td, api, []intentions.Intention{{Source: "web", Destination: "api", Action: "observe"}}, false},
		"bad source":                  {td, api, []intentions.Intention{allow("a b", "api")}, false},
		"bad destination":             {td, api, []intentions.Intention{allow("web", "Api")}, false},
		"no trust domain":             {"", api, nil, false},
		"no destination":              {td, catalog.Name{}, nil, false},
		"destination with a wildcard": {td, catalog.Name{Namespace: "default", Name: "*"}, nil, false},
	} {
		p, err := intentions.Compile(tc.td, tc.dest, tc.all)
		if tc.ok != (err == nil) || tc.ok != (p != nil) || !tc.ok && !errors.Is(err, intentions.ErrInvalid) {
			t.Errorf("%s: got %v, %v", name, p, err)
		}
	}
}

func TestRules(t *testing.T) {
	t.Parallel()
	a, d := intentions.Allow, intentions.Deny
	exact := func(name, v string, invert bool) []intentions.HeaderMatch {
		return []intentions.HeaderMatch{{Name: name, Exact: v, Invert: invert}}
	}
	team := func(vs ...string) headerMap { return headerMap{"x-team": vs} }
	for _, tc := range []struct {
		name    string
		rules   []intentions.Rule
		method  string
		path    string
		headers headerMap
		rule    int // -1: none matches
	}{
		{"any", []intentions.Rule{{Action: a}}, "POST", "/", nil, 0},
		{"first match", []intentions.Rule{{Action: d, PathPrefix: "/v1/admin"}, {Action: a, PathPrefix: "/v1/"}}, "GET", "/v1/admin/x", nil, 0},
		{"second match", []intentions.Rule{{Action: d, PathPrefix: "/v1/admin"}, {Action: a, PathPrefix: "/v1/"}}, "GET", "/v1/x", nil, 1},
		{"no match", []intentions.Rule{{Action: d, PathPrefix: "/v1/admin"}, {Action: a, PathPrefix: "/v1/"}}, "GET", "/v2", nil, -1},
		{"method", []intentions.Rule{{Action: a, Methods: []string{"GET", "HEAD"}}}, "HEAD", "/", nil, 0},
		{"other method", []intentions.Rule{{Action: a, Methods: []string{"GET"}}}, "HEAD", "/", nil, -1},
		{"methods keep case", []intentions.Rule{{Action: a, Methods: []string{"GET"}}}, "get", "/", nil, -1},
		{"exact path", []intentions.Rule{{Action: a, Path: "/v1"}}, "GET", "/v1", nil, 0},
		{"exact path is whole", []intentions.Rule{{Action: a, Path: "/v1"}}, "GET", "/v1/", nil, -1},
		{"prefix is bytes", []intentions.Rule{{Action: a, PathPrefix: "/v1"}}, "GET", "/v10", nil, 0},
		{"prefix with slash", []intentions.Rule{{Action: a, PathPrefix: "/v1/"}}, "GET", "/v1", nil, -1},
		{"regex is whole", []intentions.Rule{{Action: a, PathRegex: "/v1"}}, "GET", "/v1/x", nil, -1},
		{"regex alternatives are whole", []intentions.Rule{{Action: a, PathRegex: "/a|/b"}}, "GET", "/bc", nil, -1},
		{"regex alternatives are anchored", []intentions.Rule{{Action: a, PathRegex: "x|/b"}}, "GET", "/a/b", nil, -1},
		{"regex does not stop at lines", []intentions.Rule{{Action: a, PathRegex: "(?m)^/a$"}}, "GET", "/a", nil, 0},
		{"open quote in regex", []intentions.Rule{{Action: a, PathRegex: `/a\Q.b`}}, "GET", "/a.b", nil, 0},
		{"deny with parameters", []intentions.Rule{{Action: d, Path: "/admin"}, {Action: a}}, "GET", "/admin;x=1", nil, 0},
		{"deny with parameters inside", []intentions.Rule{{Action: d, PathPrefix: "/admin/"}, {Action: a}}, "GET", "/admin;x/y", nil, 0},
		{"deny with encoded parameters", []intentions.Rule{{Action: d, PathPrefix: "/admin/"}, {Action: a}}, "GET", "/admin%3Bx/y", nil, 0},
		{"deny behind an empty segment", []intentions.Rule{{Action: d, PathPrefix: "/admin/"}, {Action: a}}, "GET", "/;x/admin/y", nil, 0},
		{"deny with another encoding", []intentions.Rule{{Action: d, Path: "/a:b"}, {Action: a}}, "GET", "/a%3Ab", nil, 0},
		{"deny written with an encoding", []intentions.Rule{{Action: d, Path: "/a%3Ab"}, {Action: a}}, "GET", "/a:b", nil, 0},
		{"deny by regex", []intentions.Rule{{Action: d, PathRegex: "/a b"}, {Action: a}}, "GET", "/a%20b", nil, 0},
		{"no double decoding", []intentions.Rule{{Action: d, Path: "/A"}, {Action: a}}, "GET", "/%2541", nil, 1},
		{"deny with parameters of its own", []intentions.Rule{{Action: d, Path: "/a;x"}, {Action: a}}, "GET", "/a", nil, 1},
		{"allow is strict", []intentions.Rule{{Action: a, Path: "/admin"}}, "GET", "/admin;x=1", nil, -1},
		{"allow is strict about encodings", []intentions.Rule{{Action: a, Path: "/a:b"}}, "GET", "/a%3Ab", nil, -1},
		{"header", []intentions.Rule{{Action: a, Headers: exact("X-Team", "batch", false)}}, "GET", "/", team("batch"), 0},
		{"header absent", []intentions.Rule{{Action: a, Headers: exact("x-team", "batch", false)}}, "GET", "/", nil, -1},
		{"allow needs all values", []intentions.Rule{{Action: a, Headers: exact("x-team", "batch", false)}}, "GET", "/", team("batch", "web"), -1},
		{"deny needs one value", []intentions.Rule{{Action: d, Headers: exact("x-team", "batch", false)}, {Action: a}}, "GET", "/", team("web", "batch"), 0},
		{"values are not split", []intentions.Rule{{Action: d, Headers: exact("x-team", "batch", false)}, {Action: a}}, "GET", "/", team("web, batch"), 1},
		{"allow, inverted", []intentions.Rule{{Action: a, Headers: exact("x-team", "batch", true)}}, "GET", "/", team("web", "db"), 0},
		{"allow, inverted, one value meets", []intentions.Rule{{Action: a, Headers: exact("x-team", "batch", true)}}, "GET", "/", team("web", "batch"), -1},
		{"allow, inverted, absent", []intentions.Rule{{Action: a, Headers: exact("x-team", "batch", true)}}, "GET", "/", nil, 0},
		{"deny, inverted: all but", []intentions.Rule{{Action: d, Headers: exact("x-team", "batch", true)}, {Action: a}}, "GET", "/", team("batch"), 1},
		{"deny, inverted, one other value", []intentions.Rule{{Action: d, Headers: exact("x-team", "batch", true)}, {Action: a}}, "GET", "/", team("batch", "web"), 0},
		{"deny, inverted, absent", []intentions.Rule{{Action: d, Headers: exact("x-team", "batch", true)}, {Action: a}}, "GET", "/", nil, 0},
		{"present", []intentions.Rule{{Action: a, Headers: []intentions.HeaderMatch{{Name: "x-team", Present: true}}}}, "GET", "/", team(""), 0},
		{"not present", []intentions.Rule{{Action: a, Headers: []intentions.HeaderMatch{{Name: "x-team", Present: true}}}}, "GET", "/", nil, -1},
		{"absent", []intentions.Rule{{Action: a, Headers: []intentions.HeaderMatch{{Name: "x-team", Present: true, Invert: true}}}}, "GET", "/", nil, 0},
		{"not absent", []intentions.Rule{{Action: a, Headers: []intentions.HeaderMatch{{Name: "x-team", Present: true, Invert: true}}}}, "GET", "/", team(""), -1},
		{"prefix and suffix", []intentions.Rule{{Action: a, Headers: []intentions.HeaderMatch{{Name: "x-team", Prefix: "ba"}, {Name: "x-team", Suffix: "ch"}}}}, "GET", "/", team("batch"), 0},
		{"regex is whole value", []intentions.Rule{{Action: a, Headers: []intentions.HeaderMatch{{Name: "x-team", Regex: "ba"}}}}, "GET", "/", team("batch"), -1},
	} {
		got := compile(t, rules(tc.rules...)).Decide(httpRequest(tc.method, tc.path, tc.headers))
		want := intentions.Decision{Rule: tc.rule, Reason: intentions.ReasonNoRule, Key: got.Key}
		if tc.rule >= 0 {
			want.Reason, want.Allowed = intentions.ReasonRule, tc.rules[tc.rule].Action == a
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tc.name, diff)
		}
	}
}

func TestMayAllow(t *testing.T) {
	t.Parallel()
	web := spiffe.Service(td, "default", "web")
	past := base.Add(-time.Hour)
	until := func(i intentions.Intention) intentions.Intention {
		i.Expires = &past
		return i
	}
	onlyDenies := rules(intentions.Rule{Action: intentions.Deny, Path: "/x"}, intentions.Rule{Action: intentions.Deny})
	for _, tc := range []struct {
		name string
		all  []intentions.Intention
		want bool
	}{
		{"nothing", nil, false},
		{"allow", []intentions.Intention{allow("web", "api")}, true},
		{"wider allow", []intentions.Intention{allow("*", "*")}, true},
		{"deny hides the wider allow", []intentions.Intention{deny("web", "api"), allow("*", "*")}, false},
		{"rules that allow", []intentions.Intention{rules(intentions.Rule{Action: intentions.Deny}, intentions.Rule{Action: intentions.Allow})}, true},
		{"rules that only deny", []intentions.Intention{onlyDenies, allow("*", "*")}, false},
		{"a deny that ends", []intentions.Intention{until(deny("web", "api")), allow("*", "*")}, true},
		{"a deny that ends, over nothing", []intentions.Intention{until(deny("web", "api"))}, false},
		{"a tie", []intentions.Intention{allow("web", "api"), deny("default/web", "api")}, false},
		{"a tie with a deny that ends", []intentions.Intention{allow("web", "api"), until(deny("default/web", "api"))}, true},
		{"a tie with an allow that ends", []intentions.Intention{until(allow("web", "api")), deny("default/web", "api"), allow("*", "api")}, false},
	} {
		if got := compile(t, tc.all...).MayAllow(web); got != tc.want {
			t.Errorf("%s: got %v", tc.name, got)
		}
	}
	if compile(t, allow("*", "*")).MayAllow(spiffe.Node(td, "vm-1")) {
		t.Error("a node may be allowed")
	}
}

func TestExplain(t *testing.T) {
	t.Parallel()
	get := intentions.Rule{Action: intentions.Allow, Methods: []string{"GET", "HEAD"}, PathPrefix: "/v1/"}
	batch := intentions.Rule{Action: intentions.Deny, Headers: []intentions.HeaderMatch{{Name: "x-team", Exact: "batch"}}}
	grpc := allow("web", "api")
	grpc.Ports = []string{"grpc", "admin"}
	old := allow("*", "api")
	old.Expires = &base
	for _, tc := range []struct {
		all  []intentions.Intention
		r    intentions.Request
		want string
	}{
		{[]intentions.Intention{rules(get)}, httpRequest("POST", "/v1/jobs", nil), `intention web → api, rule 1 of 1 "allow GET,HEAD /v1/*": POST matches none → deny`},
		{[]intentions.Intention{rules(get)}, httpRequest("GET", "/v2", nil), `intention web → api, rule 1 of 1 "allow GET,HEAD /v1/*": path "/v2" does not match → deny`},
		{[]intentions.Intention{rules(batch, get)}, httpRequest("GET", "/v1/x", nil), `intention web → api, rule 2 of 2 "allow GET,HEAD /v1/*" → allow`},
		{[]intentions.Intention{rules(batch)}, httpRequest("GET", "/v1/x", nil), `intention web → api, rule 1 of 1 "deny * * [x-team exact \"batch\"]": header x-team exact "batch" does not hold → deny`},
		{[]intentions.Intention{rules(get)}, request(spiffe.Service(td, "default", "web")), `intention web → api has HTTP rules, and the traffic is not HTTP → deny`},
		{[]intentions.Intention{allow("*", "api")}, request(spiffe.Service(td, "default", "web")), `intention * → api → allow`},
		{[]intentions.Intention{grpc}, request(spiffe.Service(td, "default", "web")), `intention web → api covers port grpc, admin only → deny`},
		{[]intentions.Intention{old}, request(spiffe.Service(td, "default", "web")), `intention * → api has expired, and no other covers the pair → deny`},
		{nil, request(spiffe.Service(td, "default", "web")), `no intention covers the pair → deny`},
		{nil, request(spiffe.Node(td, "vm")), `the source is not the identity of a service → deny`},
	} {
		if got := compile(t, tc.all...).Explain(tc.r).String(); got != tc.want {
			t.Errorf("got  %s\nwant %s", got, tc.want)
		}
	}
}

func TestKey(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		source, destination string
		want                intentions.Key
		text                string
	}{
		{"web", "api", intentions.Key{"default", "api", "", "default", "web"}, "web → api"},
		{"a/web", "b/api", intentions.Key{"b", "api", "", "a", "web"}, "a/web → b/api"},
		{"a/*", "*", intentions.Key{"*", "*", "", "a", "*"}, "a/* → *"},
		{"default/*", "default/*", intentions.Key{"default", "*", "", "default", "*"}, "default/* → default/*"},
		{"spiffe://o.x/ns/a/svc/b", "api", intentions.Key{"default", "api", "o.x", "a", "b"}, "spiffe://o.x/ns/a/svc/b → api"},
		{"spiffe://o.x/ns/a/svc/*", "api", intentions.Key{"default", "api", "o.x", "a", "*"}, "spiffe://o.x/ns/a/svc/* → api"},
		{"spiffe://o.x/*", "api", intentions.Key{"default", "api", "o.x", "*", "*"}, "spiffe://o.x/* → api"},
	} {
		got, err := intentions.ParseKey(tc.source, tc.destination)
		if err != nil || got != tc.want || got.String() != tc.text {
			t.Errorf("%s → %s: got %+v (%v), %v", tc.source, tc.destination, got, got, err)
			continue
		}
		if again, err := intentions.ParseKey(got.SourceString(), got.DestinationString()); err != nil || again != got {
			t.Errorf("%v is read back as %v, %v", got, again, err)
		}
	}
	local, err := intentions.ParseKey("spiffe://mesh.example/ns/default/svc/web", "api")
	if err != nil || local.In(td) != (intentions.Key{"default", "api", "", "default", "web"}) || local.In("o.x") != local {
		t.Errorf("got %+v, %v", local.In(td), err)
	}
	for _, bad := range [][2]string{
		{"", "api"},
		{"web", ""},
		{"*/web", "api"},
		{"web", "*/*"},
		{"web", "spiffe://o.x/ns/a/svc/b"},
		{"spiffe://o.x/node/a", "api"},
		{"spiffe://*/ns/a/svc/b", "api"},
		{"spiffe://o.x/ns/*/svc/b", "api"},
		{"spiffe://o.x/ns/*/svc/*", "api"},
		{"spiffe:///*", "api"},
		{"spiffe://o.x", "api"},
		{"spiffe://o.x/ns/a/*", "api"},
		{"SPIFFE://o.x/*", "api"},
		{"we*", "api"},
	} {
		if k, err := intentions.ParseKey(bad[0], bad[1]); !errors.Is(err, intentions.ErrInvalid) {
			t.Errorf("%q → %q: got %+v, %v, want ErrInvalid", bad[0], bad[1], k, err)
		}
	}
}

// TestCovers holds the predicates of Key to Decide.
func TestCovers(t *testing.T) {
	t.Parallel()
	for _, source := range append([]string{"*", "web", "batch/*"}, other...) {
		for _, id := range []spiffe.ID{
			spiffe.Service(td, "default", "web"), spiffe.Service(td, "batch", "web"), spiffe.Service("other.example", "default", "web"),
			spiffe.Node(td, "web"),
			{},
			spiffe.Service("", "default", "web"),
		} {
			key, err := intentions.ParseKey(source, "api")
			if err != nil {
				t.Fatal(err)
			}
			want := compile(t, allow(source, "api")).Decide(request(id)).Allowed
			if got := key.CoversSource(td, id); got != want {
				t.Errorf("%s covers %v: %v, but Decide says %v", source, id, got, want)
			}
		}
	}
}

// AllocsPerRun counts what all goroutines do, so this one runs alone.
func TestDecideDoesNotAllocate(t *testing.T) {
	for name, b := range benchmarks(t) {
		i := 0
		if n := testing.AllocsPerRun(1000, func() {
			i++
			if !b.policy.Decide(b.requests[i%len(b.requests)]).Allowed {
				panic("denied")
			}
		}); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}

type bench struct {
	policy   *intentions.Policy
	requests []intentions.Request
}

// fixedHeader is a HeaderLookup that allocates nothing.
type fixedHeader struct {
	name  string
	value []byte
}

func (h *fixedHeader) HeaderValue(name string, i int) ([]byte, bool) {
	return h.value, i == 0 && name == h.name
}

// benchmarks returns policies of 10 and of 10,000 intentions of one
// destination, and for each intention a request that it allows.
func benchmarks(tb testing.TB) map[string]bench {
	tb.Helper()
	out := map[string]bench{}
	for _, n := range []int{10, 10_000} {
		for _, kind := range []string{"action", "prefix", "header-regex"} {
			all := make([]intentions.Intention, n)
			for i := range all {
				all[i] = intentions.Intention{Source: fmt.Sprintf("team-%d/web-%d", i%97, i), Destination: "api"}
				switch kind {
				case "action":
					all[i].Action = intentions.Allow
				case "prefix":
					all[i].Rules = []intentions.Rule{
						{Action: intentions.Deny, PathPrefix: "/v1/admin"},
						{Action: intentions.Allow, Methods: []string{"GET", "HEAD"}, PathPrefix: "/v1/"},
					}
				default:
					all[i].Rules = []intentions.Rule{{
						Action: intentions.Allow, PathRegex: "/v1/[a-z]+/[0-9]+",
						Headers: []intentions.HeaderMatch{{Name: "x-team", Exact: "batch"}},
					}}
				}
			}
			b := bench{policy: compile(tb, all...), requests: make([]intentions.Request, n)}
			for i := range b.requests {
				r := request(spiffe.Service(td, fmt.Sprintf("team-%d", i%97), fmt.Sprintf("web-%d", i)))
				r.HTTP = &intentions.HTTPRequest{Method: "GET", Path: "/v1/jobs/4711", Headers: &fixedHeader{"x-team", []byte("batch")}}
				b.requests[i*7%n] = r // not in the order in which the policy was made
			}
			out[fmt.Sprintf("%s-%d", kind, n)] = b
		}
	}
	return out
}

func BenchmarkDecide(b *testing.B) {
	for name, bb := range benchmarks(b) {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			i := 0
			for b.Loop() {
				i++
				if !bb.policy.Decide(bb.requests[i%len(bb.requests)]).Allowed {
					b.Fatal("denied")
				}
			}
		})
	}
}
