package intentions

import (
	"fmt"
	"regexp"
	"regexp/syntax"
	"slices"
	"strings"
	"unsafe"
)

// maxProgram bounds the compiled size of an expression, for time to match is
// that size times the length of the text: at 8 KiB, the longest path, at worst
// a tenth of a second. A literal of MaxRegex bytes fits.
const maxProgram = 2000

// compileRegex compiles an RE2 expression that must match a whole text.
func compileRegex(text string) (*pattern, error) {
	if len(text) > MaxRegex {
		return nil, fmt.Errorf("%d bytes, at most %d are allowed", len(text), MaxRegex)
	}
	// Parsed alone first, so that "a)|(b" and an open "\Q" cannot escape the
	// anchors around the expression.
	parsed, err := syntax.Parse(text, syntax.Perl)
	if err != nil {
		return nil, fmt.Errorf("%q is no RE2 expression: %w", text, err)
	}
	expr := parsed.String()
	program, err := syntax.Compile(parsed.Simplify())
	if err != nil {
		return nil, fmt.Errorf("%q is no RE2 expression: %w", text, err)
	}
	if n := len(program.Inst); n > maxProgram {
		return nil, fmt.Errorf("%q is too large to match quickly (%d steps, at most %d): use smaller repetitions", text, n, maxProgram)
	}
	re, err := regexp.Compile(`\A(?:` + expr + `)\z`)
	if err != nil {
		return nil, fmt.Errorf("%q is no RE2 expression: %w", text, err)
	}
	return newPattern(parsed.Simplify(), re), nil
}

// regexes shares compiled expressions among the rules of one policy: many
// intentions of one destination tend to use the same few, and each holds
// kilobytes that would compete for the processor's cache.
type regexes map[string]*pattern

func (r regexes) get(text string) (*pattern, error) {
	if re, ok := r[text]; ok {
		return re, nil
	}
	re, err := compileRegex(text)
	if err == nil {
		r[text] = re
	}
	return re, err
}

// A condition is a part of a rule, as far as it can fail.
type condition int

const (
	condNone   condition = -1 // all hold
	condMethod condition = -2
	condPath   condition = -3
	// 0 and up: the index of the header condition that fails
)

// A rule is a compiled Rule.
type rule struct {
	action  Action
	methods []string
	path    pathMatch
	headers []headerMatch
}

type matchKind uint8

const (
	matchAny matchKind = iota
	matchExact
	matchPrefix
	matchSuffix
	matchRegex
)

type pathMatch struct {
	kind  matchKind
	text  string
	loose string // text as loosen returns it, empty where only text counts
	re    *pattern
}

type headerMatch struct {
	name   string // lower case
	kind   matchKind
	text   string
	re     *pattern
	invert bool
}

func compileRule(r Rule, shared regexes) (rule, error) {
	c := rule{action: r.Action, methods: r.Methods}
	switch {
	case r.Path != "":
		c.path = pathMatch{kind: matchExact, text: r.Path, loose: looseText(r.Path)}
	case r.PathPrefix != "":
		c.path = pathMatch{kind: matchPrefix, text: r.PathPrefix, loose: looseText(r.PathPrefix)}
	case r.PathRegex != "":
		re, err := shared.get(r.PathRegex)
		if err != nil {
			return rule{}, err
		}
		c.path = pathMatch{kind: matchRegex, re: re}
	}
	for _, h := range r.Headers {
		m := headerMatch{name: strings.ToLower(h.Name), invert: h.Invert}
		switch {
		case h.Exact != "":
			m.kind, m.text = matchExact, h.Exact
		case h.Prefix != "":
			m.kind, m.text = matchPrefix, h.Prefix
		case h.Suffix != "":
			m.kind, m.text = matchSuffix, h.Suffix
		case h.Regex != "":
			re, err := shared.get(h.Regex)
			if err != nil {
				return rule{}, err
			}
			m.kind, m.re = matchRegex, re
		}
		c.headers = append(c.headers, m)
	}
	return c, nil
}

// mismatch returns the first condition of the rule that the request fails, or
// condNone.
func (r *rule) mismatch(h *HTTPRequest, loose *loosePath) condition {
	if len(r.methods) > 0 && !slices.Contains(r.methods, h.Method) {
		return condMethod
	}
	if !r.path.matches(h.Path) && (r.action != Deny || !r.path.matchesLoosely(h.Path, loose)) {
		return condPath
	}
	for i := range r.headers {
		if !r.headers[i].holds(h.Headers, r.action == Deny) {
			return condition(i)
		}
	}
	return condNone
}

func (m *pathMatch) matches(path string) bool {
	switch m.kind {
	case matchExact:
		return path == m.text
	case matchPrefix:
		return strings.HasPrefix(path, m.text)
	case matchRegex:
		return m.re.match(path)
	case matchAny, matchSuffix:
		return true
	default:
		return false
	}
}

// matchesLoosely compares with the path as a careless application may read it.
func (m *pathMatch) matchesLoosely(path string, loose *loosePath) bool {
	if m.kind != matchRegex && m.loose == "" {
		return false
	}
	if !isLoose(path) && m.loose == m.text {
		return false
	}
	l := loose.of(path)
	switch m.kind {
	case matchExact:
		return l == m.loose
	case matchPrefix:
		return strings.HasPrefix(l, m.loose)
	case matchRegex:
		return m.re.match(l)
	case matchAny, matchSuffix:
		return true
	default:
		return true
	}
}

// holds reports whether the condition is met, read so that doubt denies: an
// allow needs all values, a deny needs one.
func (m *headerMatch) holds(headers HeaderLookup, deny bool) bool {
	n := 0
	for ; headers != nil; n++ {
		v, ok := headers.HeaderValue(m.name, n)
		if !ok {
			break
		}
		if m.kind == matchAny {
			return !m.invert
		}
		if met := m.met(v) != m.invert; met == deny {
			return deny
		}
	}
	if n == 0 {
		return m.invert
	}
	// Every value was looked at: an allow found none that fails, a deny none
	// that hits.
	return !deny
}

func (m *headerMatch) met(v []byte) bool {
	switch m.kind {
	case matchExact:
		return string(v) == m.text
	case matchPrefix:
		return len(v) >= len(m.text) && string(v[:len(m.text)]) == m.text
	case matchSuffix:
		return len(v) >= len(m.text) && string(v[len(v)-len(m.text):]) == m.text
	case matchRegex:
		return m.re.match(unsafe.String(unsafe.SliceData(v), len(v))) //nolint:gosec // match keeps nothing
	case matchAny:
		return true
	default:
		return false
	}
}

// A loosePath makes the loose form of a path once, when first asked.
type loosePath struct {
	text string
	done bool
}

func (l *loosePath) of(path string) string {
	if !l.done {
		l.text, l.done = loosen(path), true
	}
	return l.text
}

// isLoose reports whether a careless application may read the path otherwise.
func isLoose(path string) bool {
	return strings.IndexByte(path, ';') >= 0 || strings.IndexByte(path, '%') >= 0
}

// looseText returns what the loose form of a path is compared with: the loose
// form of a rule's own text, or nothing when that speaks of parameters itself.
func looseText(text string) string {
	if strings.Contains(text, ";") || strings.Contains(text, "%3B") {
		return ""
	}
	return loosen(text)
}

// loosen returns a normalized path as an application reads it that decodes
// every percent-encoding once and drops the parameters of segments.
func loosen(path string) string {
	if !isLoose(path) {
		return path
	}
	b := make([]byte, 0, len(path))
	skip := false
	for i := 0; i < len(path); i++ {
		c := path[i]
		if c == '%' && i+2 < len(path) {
			c = unhex(path[i+1])<<4 | unhex(path[i+2])
			i += 2
		}
		switch {
		case path[i] == '/':
			skip = false
			if len(b) == 0 || b[len(b)-1] != '/' {
				b = append(b, '/')
			}
		case c == ';':
			skip = true
		case !skip:
			b = append(b, c)
		}
	}
	return string(b)
}

// ParseHTTPRule reads the short form of a rule, "METHODS PATH", as in
// "GET,HEAD /v1/*":
//
//   - METHODS is a comma-separated list, or "*" for any;
//   - PATH is a whole path; "/v1/*" is everything that starts with "/v1/";
//     "~" before it makes it an RE2 expression; "*" is any path.
//
// The rule is valid; errors wrap ErrInvalid.
func ParseHTTPRule(action Action, text string) (Rule, error) {
	methods, path, ok := strings.Cut(strings.TrimSpace(text), " ")
	path = strings.TrimLeft(path, " ")
	if !ok || path == "" {
		return Rule{}, fmt.Errorf("%w: rule %q: write METHODS and PATH, such as \"GET,HEAD /v1/*\"", ErrInvalid, text)
	}
	r := Rule{Action: action}
	if methods != "*" {
		r.Methods = strings.Split(methods, ",")
	}
	switch {
	case path == "*":
	case path[0] == '~':
		if r.PathRegex = path[1:]; r.PathRegex == "" {
			return Rule{}, fmt.Errorf("%w: rule %q: write an RE2 expression after \"~\"", ErrInvalid, text)
		}
	case strings.Contains(path[:len(path)-1], "*"):
		return Rule{}, fmt.Errorf("%w: rule %q: \"*\" may only end a path: write an RE2 expression after \"~\"", ErrInvalid, text)
	case strings.HasSuffix(path, "*"):
		r.PathPrefix = strings.TrimSuffix(path, "*")
	default:
		r.Path = path
	}
	if err := r.Validate(); err != nil {
		return Rule{}, fmt.Errorf("%w: rule %q: %w", ErrInvalid, text, err)
	}
	return r, nil
}

// String returns the rule in one line: the action, then what ParseHTTPRule
// reads, then conditions on headers in brackets.
func (r Rule) String() string {
	var b strings.Builder
	b.WriteString(string(r.Action))
	b.WriteByte(' ')
	b.WriteString(r.HTTP())
	for _, h := range r.Headers {
		b.WriteString(" [" + h.String() + "]")
	}
	return b.String()
}

// HTTP returns methods and path in the form that ParseHTTPRule reads. A path
// that contains "*" is written as an expression, for the form has no other way
// to say it.
func (r Rule) HTTP() string {
	methods, path := "*", "*"
	if len(r.Methods) > 0 {
		methods = strings.Join(r.Methods, ",")
	}
	switch {
	case r.PathRegex != "":
		path = "~" + r.PathRegex
	case r.Path != "" && strings.Contains(r.Path, "*"):
		path = "~" + regexp.QuoteMeta(r.Path)
	case r.Path != "":
		path = r.Path
	case strings.Contains(r.PathPrefix, "*"):
		path = "~" + regexp.QuoteMeta(r.PathPrefix) + ".*"
	case r.PathPrefix != "":
		path = r.PathPrefix + "*"
	}
	return methods + " " + path
}

// String returns the condition in one line, such as `x-team exact "batch"`.
func (h HeaderMatch) String() string {
	not := ""
	if h.Invert {
		not = "not "
	}
	switch {
	case h.Exact != "":
		return fmt.Sprintf("%s %sexact %q", h.Name, not, h.Exact)
	case h.Prefix != "":
		return fmt.Sprintf("%s %sprefix %q", h.Name, not, h.Prefix)
	case h.Suffix != "":
		return fmt.Sprintf("%s %ssuffix %q", h.Name, not, h.Suffix)
	case h.Regex != "":
		return fmt.Sprintf("%s %sregex %q", h.Name, not, h.Regex)
	default:
		return h.Name + " " + not + "present"
	}
}
