package intentions_test

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	strict "github.com/go-json-experiment/json"
	"github.com/google/go-cmp/cmp"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/intentions"
)

func TestParseHTTPRule(t *testing.T) {
	t.Parallel()
	a := intentions.Allow
	for text, want := range map[string]intentions.Rule{
		"GET,HEAD /v1/*":     {Action: a, Methods: []string{"GET", "HEAD"}, PathPrefix: "/v1/"},
		"GET /v1":            {Action: a, Methods: []string{"GET"}, Path: "/v1"},
		"GET /v1*":           {Action: a, Methods: []string{"GET"}, PathPrefix: "/v1"},
		"* /*":               {Action: a, PathPrefix: "/"},
		"* *":                {Action: a},
		"POST *":             {Action: a, Methods: []string{"POST"}},
		`GET ~/jobs/[0-9]+`:  {Action: a, Methods: []string{"GET"}, PathRegex: "/jobs/[0-9]+"},
		`GET ~/a b|/c`:       {Action: a, Methods: []string{"GET"}, PathRegex: "/a b|/c"},
		"GET /caf%C3%A9/a;b": {Action: a, Methods: []string{"GET"}, Path: "/caf%C3%A9/a;b"},
	} {
		got, err := intentions.ParseHTTPRule(a, text)
		if err != nil {
			t.Errorf("%q: %v", text, err)
			continue
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%q (-want +got):\n%s", text, diff)
		}
		if got.HTTP() != text || got.String() != "allow "+text {
			t.Errorf("%q is written as %q", text, got)
		}
	}
	if got, err := intentions.ParseHTTPRule(intentions.Deny, "  GET   /v1 "); err != nil || got.HTTP() != "GET /v1" {
		t.Errorf("with spaces: %q, %v", got, err)
	}
	for _, bad := range []string{
		"", "GET", "/v1", "GET ", "get /v1", "GET,GET /v1", "GET, /v1", ",GET /v1", "GET,* /v1", "GET v1", "GET /a*b", "GET /*/b", "GET **", "GET ~", "GET ~(",
		"GET /a/../b", "GET /a?b", "GET /a b", "GET /%61", "GET /a%2fb", "G@T /v1", "GET ~" + strings.Repeat("a", intentions.MaxRegex+1),
	} {
		if got, err := intentions.ParseHTTPRule(a, bad); !errors.Is(err, intentions.ErrInvalid) {
			t.Errorf("ParseHTTPRule(%q) = %+v, %v, want ErrInvalid", bad, got, err)
		}
	}
	if _, err := intentions.ParseHTTPRule("", "GET /"); !errors.Is(err, intentions.ErrInvalid) {
		t.Errorf("without an action: %v", err)
	}
}

func TestRuleString(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		rule intentions.Rule
		want string
	}{
		{intentions.Rule{Action: intentions.Deny}, "deny * *"},
		{intentions.Rule{Action: intentions.Allow, Path: "/a*"}, `allow * ~/a\*`},
		{intentions.Rule{Action: intentions.Allow, PathPrefix: "/a*"}, `allow * ~/a\*.*`},
		{
			intentions.Rule{Action: intentions.Allow, Headers: []intentions.HeaderMatch{
				{Name: "a", Present: true, Invert: true}, {Name: "b", Prefix: "x"}, {Name: "c", Suffix: "y", Invert: true}, {Name: "d", Regex: "z+"},
			}},
			`allow * * [a not present] [b prefix "x"] [c not suffix "y"] [d regex "z+"]`,
		},
	} {
		if got := tc.rule.String(); got != tc.want {
			t.Errorf("got %s, want %s", got, tc.want)
		}
	}
}

// FuzzParseHTTPRule: what is read is valid, and is written so that it is read
// as the same.
func FuzzParseHTTPRule(f *testing.F) {
	for _, s := range []string{"GET,HEAD /v1/*", "* *", "* ~/a|b", "POST /x", "GET ~~", "* ~ ", "A *  "} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		r, err := intentions.ParseHTTPRule(intentions.Allow, text)
		if err != nil {
			return
		}
		if err := r.Validate(); err != nil {
			t.Fatalf("%q: %v", text, err)
		}
		again, err := intentions.ParseHTTPRule(intentions.Allow, r.HTTP())
		if err != nil || cmp.Diff(r, again) != "" {
			t.Fatalf("%q is written as %q and read as %+v, %v", text, r.HTTP(), again, err)
		}
	})
}

func TestValidateLimits(t *testing.T) {
	t.Parallel()
	good := intentions.Intention{Source: "web", Destination: "api", Action: intentions.Allow}
	many := func(n int, r intentions.Rule) []intentions.Rule {
		out := make([]intentions.Rule, n)
		for i := range out {
			out[i] = r
		}
		return out
	}
	year := func(y int) *time.Time {
		at := time.Date(y, 1, 1, 0, 0, 0, 0, time.UTC)
		return &at
	}
	rule := intentions.Rule{Action: intentions.Allow}
	for _, tc := range []struct {
		name   string
		change func(*intentions.Intention)
		want   string // the field complained of
	}{
		{"good", func(*intentions.Intention) {}, ""},
		{"most rules", func(i *intentions.Intention) { i.Action, i.Rules = "", many(intentions.MaxRules, rule) }, ""},
		{"rules", func(i *intentions.Intention) { i.Action, i.Rules = "", many(intentions.MaxRules+1, rule) }, "rules"},
		{"headers", func(i *intentions.Intention) {
			r := rule
			for range intentions.MaxHeaders + 1 {
				r.Headers = append(r.Headers, intentions.HeaderMatch{Name: "a", Present: true})
			}
			i.Action, i.Rules = "", many(1, r)
		}, "rules[0].headers"},
		{"longest regex", func(i *intentions.Intention) {
			i.Action, i.Rules = "", many(1, intentions.Rule{Action: "deny", PathRegex: strings.Repeat("a", intentions.MaxRegex)})
		}, ""},
		{"regex", func(i *intentions.Intention) {
			i.Action, i.Rules = "", many(1, intentions.Rule{Action: "deny", PathRegex: strings.Repeat("a", intentions.MaxRegex+1)})
		}, "rules[0].path_regex"},
		{"regex that explodes", func(i *intentions.Intention) {
			i.Action, i.Rules = "", many(1, intentions.Rule{Action: "deny", PathRegex: "((a{100}){100}){100}"})
		}, "rules[0].path_regex"},
		{"regex that is large", func(i *intentions.Intention) {
			i.Action, i.Rules = "", many(1, intentions.Rule{Action: "deny", PathRegex: strings.Repeat(".{999}", 100)})
		}, "rules[0].path_regex"},
		{"path", func(i *intentions.Intention) {
			i.Action, i.Rules = "", many(1, intentions.Rule{Action: "deny", Path: "/" + strings.Repeat("a", 2048)})
		}, "rules[0].path"},
		{"reason", func(i *intentions.Intention) { i.Reason = strings.Repeat("a", 513) }, "reason"},
		{"reason not UTF-8", func(i *intentions.Intention) { i.Reason = "\xff" }, "reason"},
		{"expires too early", func(i *intentions.Intention) { i.Expires = year(1) }, "expires"},
		{"expires too late", func(i *intentions.Intention) { i.Expires = year(10000) }, "expires"},
		{"ports", func(i *intentions.Intention) { i.Ports = strings.Split(strings.Repeat("a,", 64)+"b", ",") }, "ports"},
	} {
		i := good
		tc.change(&i)
		got := ""
		if fs := catalog.FieldErrors(i.Validate()); len(fs) > 0 {
			got = fs[0].Field
		}
		if got != tc.want {
			t.Errorf("%s: complains of %q, want %q", tc.name, got, tc.want)
		}
	}
}

// TestIntentionJSON: field names are the surface's, and what is written is read
// back by both decoders.
func TestIntentionJSON(t *testing.T) {
	t.Parallel()
	at := time.Date(2030, 1, 31, 18, 0, 0, 0, time.UTC)
	in := intentions.Intention{
		Source: "web", Destination: "api", Ports: []string{"http"}, Reason: "OPS-77", Expires: &at,
		Rules: []intentions.Rule{
			{Action: intentions.Deny, PathPrefix: "/v1/admin"},
			{Action: intentions.Allow, Methods: []string{"POST"}, PathRegex: "/x", Headers: []intentions.HeaderMatch{
				{Name: "a", Present: true, Invert: true}, {Name: "b", Exact: "c"}, {Name: "d", Prefix: "e"}, {Name: "f", Suffix: "g"}, {Name: "h", Regex: "i"},
			}},
			{Action: intentions.Allow, Path: "/y"},
		},
	}
	const want = `{"source":"web","destination":"api","rules":[{"action":"deny","path_prefix":"/v1/admin"},{"action":"allow","methods":["POST"],` +
		`"path_regex":"/x","headers":[{"name":"a","present":true,"invert":true},{"name":"b","exact":"c"},{"name":"d","prefix":"e"},` +
		`{"name":"f","suffix":"g"},{"name":"h","regex":"i"}]},{"action":"allow","path":"/y"}],"ports":["http"],"reason":"OPS-77","expires":"2030-01-31T18:00:00Z"}`
	if text, err := json.Marshal(in); err != nil || string(text) != want {
		t.Errorf("got %s, %v\nwant %s", text, err, want)
	}
	if text, err := strict.Marshal(in); err != nil || string(text) != want {
		t.Errorf("strict: got %s, %v", text, err)
	}
	var again intentions.Intention
	if err := strict.Unmarshal([]byte(want), &again, strict.RejectUnknownMembers(true)); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(in, again); diff != "" {
		t.Error(diff)
	}
}
