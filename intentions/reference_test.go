package intentions_test

import (
	"net/url"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/intentions"
)

// This file holds a second evaluator of intentions. It is written from the
// documented words, is slow and plain, and shares no code with the package: it
// compares texts where the package compares parsed keys, lists candidates where
// the package looks them up. Keep it so: its worth is that it errs differently.

const td = "mesh.example"

// refAnswer is what the reference says of a request.
type refAnswer struct {
	allowed bool
	reason  string
}

// reference decides a request by the words of the package comment.
func reference(all []intentions.Intention, r intentions.Request) refAnswer {
	best, expired := -1, false
	var deciders []intentions.Intention
	for _, i := range all {
		score := refScore(i, r)
		if score < 0 {
			continue
		}
		if i.Expires != nil && !r.Now.Before(*i.Expires) {
			expired = true
			continue
		}
		if score > best {
			best, deciders = score, nil
		}
		if score == best {
			deciders = append(deciders, i)
		}
	}
	if len(deciders) == 0 {
		if expired {
			return refAnswer{reason: "expired"}
		}
		return refAnswer{reason: "no-intention"}
	}
	first := refOne(deciders[0], r)
	for _, i := range deciders {
		if one := refOne(i, r); !one.allowed {
			return one
		}
	}
	return first
}

// refScore is how specific the intention is for the request, -1 where it does
// not cover it. The destination weighs more than the source.
func refScore(i intentions.Intention, r intentions.Request) int {
	find := func(all [][]string, text string) int {
		for level, texts := range all {
			if slices.Contains(texts, text) {
				return level
			}
		}
		return -1
	}
	levels := func(ns, name string) [][]string {
		exact := []string{ns + "/" + name}
		if ns == "default" {
			exact = append(exact, name)
		}
		return [][]string{{"*"}, {ns + "/*"}, exact}
	}
	sources := [][]string{{}, {}, {}}
	if r.Source.TrustDomain == td {
		sources = levels(r.Source.Namespace, r.Source.Name)
	}
	domain := "spiffe://" + r.Source.TrustDomain
	namespace := domain + "/ns/" + r.Source.Namespace + "/svc/"
	sources[0] = append(sources[0], domain+"/*")
	sources[1] = append(sources[1], namespace+"*")
	sources[2] = append(sources[2], namespace+r.Source.Name)
	source, destination := find(sources, i.Source), find(levels(r.Destination.Namespace, r.Destination.Name), i.Destination)
	if source < 0 || destination < 0 {
		return -1
	}
	return destination*10 + source
}

// refOne is the word of one intention that covers the request.
func refOne(i intentions.Intention, r intentions.Request) refAnswer {
	switch {
	case len(i.Ports) > 0 && !slices.Contains(i.Ports, r.Port):
		return refAnswer{reason: "port-not-covered"}
	case i.Action != "":
		return refAnswer{allowed: i.Action == "allow", reason: "action"}
	case r.HTTP == nil:
		return refAnswer{reason: "not-http"}
	}
	for _, rule := range i.Rules {
		if refRule(rule, *r.HTTP) {
			return refAnswer{allowed: rule.Action == "allow", reason: "rule"}
		}
	}
	return refAnswer{reason: "no-rule-matched"}
}

func refRule(rule intentions.Rule, h intentions.HTTPRequest) bool {
	deny := rule.Action == "deny"
	if len(rule.Methods) > 0 && !strings.Contains(","+strings.Join(rule.Methods, ",")+",", ","+h.Method+",") {
		return false
	}
	if !refPath(rule, h.Path, false) && (!deny || !refPath(rule, refLoose(h.Path), true)) {
		return false
	}
	headers, _ := h.Headers.(headerMap)
	for _, c := range rule.Headers {
		if !refHeader(c, headers[strings.ToLower(c.Name)], deny) {
			return false
		}
	}
	return true
}

func refPath(rule intentions.Rule, path string, loose bool) bool {
	read := func(text string) string {
		if loose {
			return refLoose(text)
		}
		return text
	}
	// A rule that speaks of parameters is compared with them only.
	params := strings.Contains(refDecode(rule.Path+rule.PathPrefix), ";")
	switch {
	case loose && params:
		return false
	case rule.Path != "":
		return path == read(rule.Path)
	case rule.PathPrefix != "":
		return strings.Index(path, read(rule.PathPrefix)) == 0
	case rule.PathRegex != "":
		return refRegex(rule.PathRegex, path)
	}
	return true
}

func refDecode(s string) string {
	out, err := url.PathUnescape(s)
	if err != nil {
		panic(err) // the generator makes valid paths only
	}
	return out
}

// refLoose is the path as a careless application reads it: decoded once,
// without parameters.
func refLoose(path string) string {
	segments := strings.Split(path, "/")
	for i, s := range segments {
		segments[i], _, _ = strings.Cut(refDecode(s), ";")
	}
	out := strings.Join(segments, "/")
	for strings.Contains(out, "//") {
		out = strings.ReplaceAll(out, "//", "/")
	}
	return out
}

// refRegex reports whether the expression matches the whole text.
func refRegex(expr, text string) bool {
	re := regexp.MustCompile(expr)
	re.Longest()
	at := re.FindStringIndex(text)
	return at != nil && at[0] == 0 && at[1] == len(text)
}

func refHeader(c intentions.HeaderMatch, values []string, deny bool) bool {
	if c.Present {
		return (len(values) > 0) == !c.Invert
	}
	meets := 0
	for _, v := range values {
		ok := false
		switch {
		case c.Exact != "":
			ok = v == c.Exact
		case c.Prefix != "":
			ok = strings.HasPrefix(v, c.Prefix)
		case c.Suffix != "":
			ok = strings.HasSuffix(v, c.Suffix)
		case c.Regex != "":
			ok = refRegex(c.Regex, v)
		}
		if ok {
			meets++
		}
	}
	all, fails := len(values), len(values)-meets
	switch {
	case deny && c.Invert:
		return all == 0 || fails > 0
	case deny:
		return meets > 0
	case c.Invert:
		return meets == 0
	default:
		return all > 0 && fails == 0
	}
}

// headerMap is a HeaderLookup over lower-case names.
type headerMap map[string][]string

func (h headerMap) HeaderValue(name string, i int) ([]byte, bool) {
	if vs := h[name]; i < len(vs) {
		return []byte(vs[i]), true
	}
	return nil, false
}

// The generators draw from small vocabularies, so that things collide.
var (
	base  = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	local = []string{"web", "web", "default/web", "default/api", "batch/web", "batch/*", "default/*", "*"}
	other = []string{
		"spiffe://mesh.example/ns/default/svc/web", "spiffe://mesh.example/ns/batch/svc/*", "spiffe://mesh.example/*",
		"spiffe://other.example/ns/default/svc/web", "spiffe://other.example/ns/default/svc/*", "spiffe://other.example/*",
	}
	paths = []string{
		"/", "/v1", "/v1/", "/v1/a", "/v1/admin", "/v1/admin;x", "/v1/admin;x/y", "/v1;p/admin", "/v1%3Bp/admin", "/v1/a%20b",
		"/v1/a:b", "/v1/a%3Ab", "/v10", "/v1/%C3%A9", "/;/v1", "/v1/%2541", "/v1/a@b", "/v1/a%40b",
	}
	regexes = []string{"/v1/.*", "/v[0-9]+", "/v1|/v1/a", "/v1/admin", `/v1/\w+`, "(?i)/V1", "/v1/a b", ".*;.*", "x|/v1|y"}
	values  = []string{"", "batch", "batch-1", "web", "1-batch"}
)

func drawIntention(t *rapid.T) intentions.Intention {
	i := intentions.Intention{
		Source:      rapid.SampledFrom(slices.Concat(local, local, other)).Draw(t, "source"),
		Destination: rapid.SampledFrom([]string{"api", "default/api", "batch/api", "default/*", "batch/*", "*", "web"}).Draw(t, "destination"),
	}
	switch rapid.IntRange(0, 3).Draw(t, "form") {
	case 0:
		i.Action = intentions.Deny
	case 1:
		i.Action = intentions.Allow
		i.Ports = rapid.SampledFrom([][]string{nil, nil, {"http"}, {"http", "grpc"}}).Draw(t, "ports")
	default:
		i.Rules = rapid.SliceOfN(rapid.Custom(drawRule), 1, 4).Draw(t, "rules")
	}
	if rapid.IntRange(0, 3).Draw(t, "expires") == 0 {
		at := base.Add(time.Duration(rapid.IntRange(-1, 1).Draw(t, "at")) * time.Second)
		i.Expires = &at
	}
	return i
}

func drawRule(t *rapid.T) intentions.Rule {
	r := intentions.Rule{
		Action:  rapid.SampledFrom([]intentions.Action{intentions.Allow, intentions.Deny}).Draw(t, "action"),
		Methods: rapid.SampledFrom([][]string{nil, {"GET"}, {"GET", "HEAD"}}).Draw(t, "methods"),
	}
	switch rapid.IntRange(0, 3).Draw(t, "path") {
	case 1:
		r.Path = rapid.SampledFrom(paths).Draw(t, "exact")
	case 2:
		r.PathPrefix = rapid.SampledFrom(paths).Draw(t, "prefix")
	case 3:
		r.PathRegex = rapid.SampledFrom(regexes).Draw(t, "regex")
	}
	for range rapid.IntRange(0, 2).Draw(t, "headers") {
		h := intentions.HeaderMatch{
			Name:   rapid.SampledFrom([]string{"x-team", "X-Team", "x-other"}).Draw(t, "name"),
			Invert: rapid.Bool().Draw(t, "invert"),
		}
		switch rapid.IntRange(0, 4).Draw(t, "kind") {
		case 0:
			h.Present = true
		case 1:
			h.Exact = "batch"
		case 2:
			h.Prefix = "batch"
		case 3:
			h.Suffix = "batch"
		case 4:
			h.Regex = "batch(-[0-9])?"
		}
		r.Headers = append(r.Headers, h)
	}
	return r
}

func drawRequest(t *rapid.T, destination catalog.Name) intentions.Request {
	r := intentions.Request{
		Source: spiffe.Service(
			rapid.SampledFrom([]string{td, td, "other.example"}).Draw(t, "trust domain"),
			rapid.SampledFrom([]string{"default", "default", "batch"}).Draw(t, "namespace"),
			rapid.SampledFrom([]string{"web", "web", "api", "db"}).Draw(t, "name"),
		),
		Destination: destination,
		Port:        rapid.SampledFrom([]string{"http", "admin", ""}).Draw(t, "port"),
		Now:         base,
	}
	if rapid.IntRange(0, 5).Draw(t, "http") > 0 {
		h := headerMap{}
		for _, name := range []string{"x-team", "x-other"} {
			if vs := rapid.SliceOfN(rapid.SampledFrom(values), 0, 3).Draw(t, name); len(vs) > 0 {
				h[name] = vs
			}
		}
		r.HTTP = &intentions.HTTPRequest{
			Method:  rapid.SampledFrom([]string{"GET", "HEAD", "POST", "get"}).Draw(t, "method"),
			Path:    rapid.SampledFrom(paths).Draw(t, "path"),
			Headers: h,
		}
	}
	return r
}

// agree is the property: Decide, Explain and MayAllow against the reference.
func agree(t *rapid.T) {
	destination := catalog.Name{
		Namespace: rapid.SampledFrom([]string{"default", "batch"}).Draw(t, "destination namespace"), Name: "api",
	}
	all := rapid.SliceOfN(rapid.Custom(drawIntention), 0, 12).Draw(t, "all")
	p, err := intentions.Compile(td, destination, all)
	if err != nil {
		t.Fatal(err)
	}
	for range 64 {
		r := drawRequest(t, destination)
		want, got := reference(all, r), p.Decide(r)
		if got.Allowed != want.allowed {
			t.Fatalf("%+v: Decide says %v, the reference %+v", r, got, want)
		}
		// On a tie more than one reason may be right.
		if string(got.Reason) != want.reason && want.allowed {
			t.Fatalf("%+v: Decide gives reason %q, the reference %q", r, got.Reason, want.reason)
		}
		if e := p.Explain(r); e.Decision != got || e.String() == "" {
			t.Fatalf("%+v: Explain says %v, Decide %v", r, e.Decision, got)
		}
		if got.Allowed && !p.MayAllow(r.Source) {
			t.Fatalf("%+v: allowed, but MayAllow(%v) is false", r, r.Source)
		}
	}
}

func TestDecideAgreesWithReference(t *testing.T) {
	t.Parallel()
	for _, part := range []string{"a", "b", "c", "d"} { // rapid checks 100 cases of each
		t.Run(part, func(t *testing.T) {
			t.Parallel()
			rapid.Check(t, agree)
		})
	}
}

func FuzzDecide(f *testing.F) { f.Fuzz(rapid.MakeFuzz(agree)) }
