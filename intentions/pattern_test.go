package intentions_test

import (
	"regexp"
	"testing"

	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/intentions"
)

// matches asks a policy whose only rule has the expression.
func matches(tb testing.TB, expr, path string) (allowed, valid bool) {
	tb.Helper()
	p, err := intentions.Compile(td, catalog.Name{Namespace: "default", Name: "api"}, []intentions.Intention{{
		Source: "web", Destination: "api", Rules: []intentions.Rule{{Action: intentions.Allow, PathRegex: expr}},
	}})
	if err != nil {
		return false, false
	}
	r := request(spiffe.Service(td, "default", "web"))
	r.HTTP = &intentions.HTTPRequest{Method: "GET", Path: path}
	return p.Decide(r).Allowed, true
}

var patterns = []struct{ expr, path string }{
	{"/v1/[a-z]+/[0-9]+", "/v1/jobs/4711"},
	{"/v1/[a-z]+/[0-9]+", "/v1/jobs/"},
	{"/v1/[a-z]+/[0-9]+", "/v1/jobs/47x"},
	{"/v1/[^/]+/log", "/v1/größe/log"},
	{"/v1/[^/]+/log", "/v1/a b/log"},
	{"/v1/[^/]log", "/v1/ölog"},
	{"/[a-z]*a", "/bba"},
	{"/[a-z]*[0-9]?[a-z]", "/bba"},
	{"/a?b?c", "/c"},
	{"/a?b?a", "/a"},
	{"/.*", "/\x80\xff"},
	{"/.*", "/a\nb"},
	{"(?s)/.*", "/a\nb"},
	{"(?i)/ks", "/\u212a\u017f"},
	{"/(a|b)+", "/abab"},
	{"/a{2,4}b", "/aaab"},
	{"/a{2,4}a", "/aaa"},
	{"(/x)", "/x"},
	{"^/x$", "/x"},
	{"/\\bx", "/x"},
	{"/x[^\\x00-\\x7f]", "/xé"},
	{"/[[:word:]]+\\.(?:json)", "/report.json"},
}

// expected is package regexp's answer.
func expected(expr, path string) bool {
	re, err := regexp.Compile(`\A(?:` + expr + `)\z`)
	return err == nil && re.MatchString(path)
}

func TestPatterns(t *testing.T) {
	for _, c := range patterns {
		if got, valid := matches(t, c.expr, c.path); !valid || got != expected(c.expr, c.path) {
			t.Errorf("%q on %q is %v (valid %v), want %v", c.expr, c.path, got, valid, expected(c.expr, c.path))
		}
	}
}

// FuzzPattern compares every expression that a rule may have with package regexp.
func FuzzPattern(f *testing.F) {
	for _, c := range patterns {
		f.Add(c.expr, c.path[1:])
	}
	f.Fuzz(func(t *testing.T, expr, path string) {
		if _, err := regexp.Compile(expr); err != nil || expr == "" || len(path) > 200 { // empty is any path
			return
		}
		if got, valid := matches(t, expr, "/"+path); valid && got != expected(expr, "/"+path) {
			t.Errorf("%q on %q is %v", expr, "/"+path, got)
		}
	})
}
