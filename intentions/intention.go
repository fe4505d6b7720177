package intentions

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/meshd/meshd/catalog"
)

// ErrInvalid is wrapped by every error about an intention, a key or a rule that
// cannot be understood.
var ErrInvalid = errors.New("invalid intention")

// An Action is what an intention or a rule does. The zero value does nothing:
// it neither allows nor is it valid in a rule.
type Action string

// The actions.
const (
	Allow Action = "allow"
	Deny  Action = "deny"
)

// An Intention says what a source may do at a destination. Its JSON is both the
// stored and the API form.
type Intention struct {
	// Source is "web" (in the default namespace), "ns/web", "ns/*" or "*", of
	// this mesh's trust domain; or with a trust domain
	// "spiffe://td/ns/x/svc/y", "spiffe://td/ns/x/svc/*" or "spiffe://td/*".
	Source string `json:"source"`
	// Destination is "api", "ns/api", "ns/*" or "*".
	Destination string `json:"destination"`
	// Action decides all traffic alike. Exactly one of Action and Rules is set.
	Action Action `json:"action,omitempty"`
	// Rules decide HTTP requests one by one, the first match winning. Traffic
	// that is not HTTP is denied.
	Rules []Rule `json:"rules,omitempty"`
	// Ports names the destination's ports that are covered; none means all. A
	// request to another port is denied: no other intention is asked.
	Ports []string `json:"ports,omitempty"`
	// Reason is for people: a ticket, a name.
	Reason string `json:"reason,omitempty"`
	// Expires is when the intention ceases to exist, as far as decisions go;
	// nil means never.
	Expires *time.Time `json:"expires,omitempty"`
}

// A Rule decides the HTTP requests that meet all of its conditions. A rule
// without conditions decides every request.
//
// At most one of Path, PathPrefix and PathRegex is set. All are compared byte
// by byte with the normalized path, without the query. In a deny they are
// compared also with the path as a careless application may read it: every
// percent-encoding decoded once, parameters (";x" to the end of a segment)
// dropped. So a deny of "/admin" covers "/admin;x" and a deny of "/a:b" covers
// "/a%3Ab", and an allow does not.
type Rule struct {
	Action Action `json:"action"`
	// Methods lists the methods; none means any. HEAD is not implied by GET.
	Methods []string `json:"methods,omitempty"`
	// Path is the whole path.
	Path string `json:"path,omitempty"`
	// PathPrefix is what the path starts with, as bytes: "/v1" covers "/v10"
	// too, "/v1/" does not.
	PathPrefix string `json:"path_prefix,omitempty"`
	// PathRegex is an RE2 expression for the whole path, at most MaxRegex long.
	PathRegex string `json:"path_regex,omitempty"`
	// Headers are conditions that must hold together.
	Headers []HeaderMatch `json:"headers,omitempty"`
}

// A HeaderMatch is a condition on one header. Exactly one of Present, Exact,
// Prefix, Suffix and Regex is set.
//
// A header may have several values. In an allow, every value must meet the
// condition and there must be one; in a deny, any one value that meets it is
// enough. Invert turns the condition on each value around: in an allow no
// value may meet it, in a deny one value that does not meet it is enough, and
// both hold for an absent header. Present with Invert means absent. Values are
// compared byte by byte as they were sent; a list in one value is not split.
type HeaderMatch struct {
	// Name is compared without regard to case.
	Name    string `json:"name"`
	Present bool   `json:"present,omitzero"`
	Exact   string `json:"exact,omitempty"`
	Prefix  string `json:"prefix,omitempty"`
	Suffix  string `json:"suffix,omitempty"`
	// Regex is an RE2 expression for the whole value, at most MaxRegex long.
	Regex  string `json:"regex,omitempty"`
	Invert bool   `json:"invert,omitzero"`
}

// Limits of one intention.
const (
	// MaxRegex is the longest regular expression, in bytes.
	MaxRegex = 1024
	// MaxRules, MaxHeaders and MaxMethods bound what one request may cost.
	MaxRules   = 128
	MaxHeaders = 16
	MaxMethods = 32
	maxPorts   = 64
	maxReason  = 512
	maxPath    = 2048
	maxValue   = 1024
)

// Validate reports every problem of the intention as catalog.FieldErrors. It
// compiles the regular expressions.
func (i Intention) Validate() error {
	var p catalog.Problems
	if _, _, _, err := parseSource(i.Source); err != nil {
		p.Add("source", "%v", err)
	}
	if _, err := parseName(i.Destination); err != nil {
		p.Add("destination", "%v", destinationHint(i.Destination, err))
	}
	switch {
	case i.Action == "" && len(i.Rules) == 0:
		p.Add("action", "missing: write action = \"allow\" or \"deny\", or rules for HTTP requests")
	case i.Action != "" && len(i.Rules) > 0:
		p.Add("action", "action and rules exclude each other: put the action into a last rule without conditions")
	case i.Action != "":
		checkAction(&p, "action", i.Action)
	}
	if len(i.Rules) > MaxRules {
		p.Add("rules", "%d rules, at most %d are allowed: use path_prefix or path_regex", len(i.Rules), MaxRules)
	}
	for n, r := range i.Rules {
		p.Under(fmt.Sprintf("rules[%d]", n), r.Validate())
	}
	i.validatePorts(&p)
	checkText(&p, "reason", i.Reason, maxReason)
	if i.Expires != nil && (i.Expires.Year() < 1970 || i.Expires.Year() > 9999) {
		p.Add("expires", "%s is out of range: write a time such as \"2030-01-31T18:00:00Z\"", i.Expires.Format(time.RFC3339))
	}
	return p.Err()
}

func (i Intention) validatePorts(p *catalog.Problems) {
	if len(i.Ports) > maxPorts {
		p.Add("ports", "%d ports, at most %d are allowed", len(i.Ports), maxPorts)
	}
	if len(i.Ports) > 0 && i.Action == Deny {
		p.Add("ports", "a deny covers every port, for nothing else would allow the others: "+
			"remove ports, or write an allow that lists the ports to keep open")
	}
	for n, port := range i.Ports {
		at := fmt.Sprintf("ports[%d]", n)
		if err := catalog.CheckLabel(port); err != nil {
			p.Add(at, "%v; write the name of a port of the destination", err)
		} else if slices.Contains(i.Ports[:n], port) {
			p.Add(at, "%q is listed twice: remove one", port)
		}
	}
}

// Validate reports every problem of the rule as catalog.FieldErrors.
func (r Rule) Validate() error {
	var p catalog.Problems
	if r.Action == "" {
		p.Add("action", "missing: write \"allow\" or \"deny\"")
	} else {
		checkAction(&p, "action", r.Action)
	}
	if len(r.Methods) > MaxMethods {
		p.Add("methods", "%d methods, at most %d are allowed", len(r.Methods), MaxMethods)
	}
	for n, m := range r.Methods {
		at := fmt.Sprintf("methods[%d]", n)
		switch {
		case m == "*":
			p.Add(at, "\"*\" is no method: remove methods to cover them all")
		case !isToken(m):
			p.Add(at, "%q is no HTTP method", m)
		case strings.ToUpper(m) != m:
			p.Add(at, "%q: methods are case-sensitive, write %q", m, strings.ToUpper(m))
		case slices.Contains(r.Methods[:n], m):
			p.Add(at, "%q is listed twice: remove one", m)
		}
	}
	r.validatePath(&p)
	if len(r.Headers) > MaxHeaders {
		p.Add("headers", "%d conditions, at most %d are allowed", len(r.Headers), MaxHeaders)
	}
	for n, h := range r.Headers {
		p.Under(fmt.Sprintf("headers[%d]", n), h.Validate())
	}
	return p.Err()
}

func (r Rule) validatePath(p *catalog.Problems) {
	set := 0
	for _, v := range []string{r.Path, r.PathPrefix, r.PathRegex} {
		if v != "" {
			set++
		}
	}
	if set > 1 {
		p.Add("path", "path, path_prefix and path_regex exclude each other: keep one")
	}
	checkPath(p, "path", r.Path)
	checkPath(p, "path_prefix", r.PathPrefix)
	if r.PathRegex != "" {
		if _, err := compileRegex(r.PathRegex); err != nil {
			p.Add("path_regex", "%v", err)
		}
	}
}

// Validate reports every problem of the condition as catalog.FieldErrors.
func (h HeaderMatch) Validate() error {
	var p catalog.Problems
	if !isToken(h.Name) {
		p.Add("name", "%q is no header name: write one such as \"x-team\"", h.Name)
	}
	set := 0
	if h.Present {
		set++
	}
	for _, v := range []struct{ at, text string }{
		{"exact", h.Exact},
		{"prefix", h.Prefix},
		{"suffix", h.Suffix},
		{"regex", h.Regex},
	} {
		if v.text == "" {
			continue
		}
		set++
		if v.at != "regex" {
			checkText(&p, v.at, v.text, maxValue)
		} else if _, err := compileRegex(v.text); err != nil {
			p.Add(v.at, "%v", err)
		}
	}
	if set != 1 {
		p.Add("", "write exactly one of present, exact, prefix, suffix and regex (present with invert = true means absent)")
	}
	return p.Err()
}

func checkAction(p *catalog.Problems, at string, a Action) {
	if a == Allow || a == Deny {
		return
	}
	hint := ""
	if c := catalog.Closest(strings.ToLower(string(a)), []string{string(Allow), string(Deny)}); c != "" {
		hint = fmt.Sprintf(" (did you mean %q?)", c)
	}
	p.Add(at, "%q is no action%s: write \"allow\" or \"deny\"", a, hint)
}

// checkPath records why v, a path or a prefix of one, would never equal a
// normalized path.
func checkPath(p *catalog.Problems, at, v string) {
	if v == "" {
		return
	}
	if len(v) > maxPath {
		p.Add(at, "%d bytes, at most %d are allowed", len(v), maxPath)
		return
	}
	if path, _, ok := strings.Cut(v, "?"); ok {
		p.Add(at, "%q: a path has no query: write %q", v, path)
		return
	}
	normal, err := NormalizePath(v)
	switch {
	case err != nil:
		p.Add(at, "%s", problemOf(err))
	case normal != v && at == "path_prefix" && isDotPrefix(v):
		p.Add(at, "%q ends in a dot segment, which no normalized path has: write %q", v, normal)
	case normal != v:
		p.Add(at, "%q never matches, for paths are normalized first: write %q", v, normal)
	}
}

// isDotPrefix reports whether the last segment of v is "." or "..".
func isDotPrefix(v string) bool {
	last := v[strings.LastIndexByte(v, '/')+1:]
	return last == "." || last == ".."
}

// isToken reports whether s is a token as RFC 9110, section 5.6.2 has it.
func isToken(s string) bool {
	for i := range len(s) {
		c := s[i]
		if c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte("!#$%&'*+-.^_`|~", c) >= 0 {
			continue
		}
		return false
	}
	return s != ""
}

// checkText records why s is no text of one line and at most limit bytes.
func checkText(p *catalog.Problems, at, s string, limit int) {
	switch {
	case len(s) > limit:
		p.Add(at, "%d bytes, at most %d are allowed", len(s), limit)
	case !utf8.ValidString(s):
		p.Add(at, "is not UTF-8: write it in that encoding")
	case strings.ContainsFunc(s, unicode.IsControl):
		p.Add(at, "holds control characters such as a tab or the end of a line: write one line of text")
	}
}

// Summary is what the intention decides, in one line: its action, or its rules in
// their order, and the ports.
func (i Intention) Summary() string {
	text := string(i.Action)
	if len(i.Rules) > 0 {
		var b strings.Builder
		for _, r := range i.Rules {
			b.WriteString(r.String() + "; ")
		}
		text = b.String() + "else deny"
	}
	if len(i.Ports) > 0 {
		text += " on port " + strings.Join(i.Ports, ", ")
	}
	return text
}
