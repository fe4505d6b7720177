package catalog

import (
	"maps"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Bounds and defaults of checks; Consul's figures.
const (
	// MinCheckInterval is the shortest interval between two runs of a check.
	MinCheckInterval = Duration(time.Second)
	// DefaultCheckTimeout is how long one run may take.
	DefaultCheckTimeout = Duration(10 * time.Second)
	// maxCheckCount bounds the counts before a transition.
	maxCheckCount = 1000
	// maxCheckSpan bounds interval, timeout and ttl.
	maxCheckSpan = Duration(24 * time.Hour)
)

// A CheckKind is what a check does.
type CheckKind string

// The kinds of checks.
const (
	CheckHTTP CheckKind = "http"
	CheckTCP  CheckKind = "tcp"
	CheckTTL  CheckKind = "ttl"
)

// A Check is a health check of one instance, run by its agent. It has the
// semantics of Consul's check of the same kind: it is critical until its first
// result.
//
//   - http: a request to the URL. 2xx is passing, 429 is warning, all else is
//     critical. Redirects are not followed.
//   - tcp: a connection to host:port. Accepted is passing, else critical.
//   - ttl: the application reports; silence longer than TTL is critical.
type Check struct {
	Name string `json:"name"`
	// HTTP, TCP and TTL: exactly one is set, and says the kind.
	HTTP string   `json:"http,omitempty"`
	TCP  string   `json:"tcp,omitempty"`
	TTL  Duration `json:"ttl,omitzero"`
	// Interval is the time between two runs of an http or tcp check.
	Interval Duration `json:"interval,omitzero"`
	// Timeout is DefaultCheckTimeout when zero.
	Timeout Duration `json:"timeout,omitzero"`
	// Method is GET when empty. Header is sent as it is; "Host" sets the host.
	Method string              `json:"method,omitempty"`
	Header map[string][]string `json:"header,omitempty"`
	// SuccessBeforePassing is how many successes in a row turn the check
	// passing; FailuresBeforeWarning and FailuresBeforeCritical, how many
	// failures in a row turn it warning and critical. Consul counts a
	// threshold of 0 like 1, and FailuresBeforeWarning of 0 like
	// FailuresBeforeCritical.
	SuccessBeforePassing   int `json:"success_before_passing,omitzero"`
	FailuresBeforeWarning  int `json:"failures_before_warning,omitzero"`
	FailuresBeforeCritical int `json:"failures_before_critical,omitzero"`
}

// Kind returns the kind of the check; "" when not exactly one of HTTP, TCP and
// TTL is set, which Validate reports.
func (c Check) Kind() CheckKind {
	kind, n := CheckKind(""), 0
	if c.HTTP != "" {
		kind, n = CheckHTTP, n+1
	}
	if c.TCP != "" {
		kind, n = CheckTCP, n+1
	}
	if c.TTL != 0 {
		kind, n = CheckTTL, n+1
	}
	if n != 1 {
		return ""
	}
	return kind
}

// WithDefaults returns a copy in which every default is written out. Header is
// shared with c.
func (c Check) WithDefaults() Check {
	switch c.Kind() {
	case CheckHTTP:
		if c.Method == "" {
			c.Method = "GET"
		}
	case CheckTCP:
	case CheckTTL:
		return c
	}
	if c.Timeout == 0 {
		c.Timeout = DefaultCheckTimeout
	}
	c.SuccessBeforePassing = max(1, c.SuccessBeforePassing)
	c.FailuresBeforeCritical = max(1, c.FailuresBeforeCritical)
	if c.FailuresBeforeWarning == 0 {
		c.FailuresBeforeWarning = c.FailuresBeforeCritical
	}
	return c
}

// Validate reports every problem of the check; see FieldErrors.
func (c Check) Validate() error {
	var p Problems
	if c.Name == "" || len(c.Name) > maxLabel || !printable(c.Name) || strings.Contains(c.Name, "/") {
		p.Add("name", "%q: write 1 to %d printable characters without \"/\"", c.Name, maxLabel)
	}
	switch c.Kind() {
	case CheckHTTP:
		p.checkURL("http", c.HTTP)
		c.validateHTTP(&p)
		c.validateRuns(&p)
	case CheckTCP:
		p.checkTarget("tcp", c.TCP)
		c.refuse(&p, "a tcp check", "method", "header")
		c.validateRuns(&p)
	case CheckTTL:
		p.span("ttl", c.TTL, MinCheckInterval)
		c.refuse(&p, "a ttl check, which the application reports", "interval", "timeout", "method", "header",
			"success_before_passing", "failures_before_warning", "failures_before_critical")
	default:
		p.Add("", "write exactly one of http, tcp and ttl: it says what the check does")
	}
	return p.Err()
}

func (c Check) validateRuns(p *Problems) {
	if c.Interval == 0 {
		p.Add("interval", "missing: write how often to run the check, such as \"10s\"")
	} else {
		p.span("interval", c.Interval, MinCheckInterval)
	}
	if c.Timeout != 0 {
		p.span("timeout", c.Timeout, Duration(time.Millisecond))
	}
	p.count("success_before_passing", c.SuccessBeforePassing)
	p.count("failures_before_warning", c.FailuresBeforeWarning)
	p.count("failures_before_critical", c.FailuresBeforeCritical)
	if c.FailuresBeforeWarning > max(1, c.FailuresBeforeCritical) {
		p.Add("failures_before_warning", "%d is more than failures_before_critical (%d): a warning comes first",
			c.FailuresBeforeWarning, max(1, c.FailuresBeforeCritical))
	}
}

func (c Check) validateHTTP(p *Problems) {
	if c.Method != "" && (!isToken(c.Method) || strings.ToUpper(c.Method) != c.Method) {
		p.Add("method", "%q is no HTTP method: write it in upper case, such as \"GET\"", c.Method)
	}
	for _, name := range slices.Sorted(maps.Keys(c.Header)) {
		if !isToken(name) {
			p.Add("header", "%q is no header name", name)
			continue
		}
		for _, v := range c.Header[name] {
			if !printable(v) {
				p.Add("header."+name, "%q: control characters are not allowed", v)
			}
		}
	}
}

// refuse records every field of names that is set, as having no effect on what.
func (c Check) refuse(p *Problems, what string, names ...string) {
	set := map[string]bool{
		"interval": c.Interval != 0, "timeout": c.Timeout != 0, "method": c.Method != "", "header": len(c.Header) > 0,
		"success_before_passing": c.SuccessBeforePassing != 0, "failures_before_warning": c.FailuresBeforeWarning != 0,
		"failures_before_critical": c.FailuresBeforeCritical != 0,
	}
	for _, name := range names {
		if set[name] {
			p.Add(name, "has no effect on %s: remove it", what)
		}
	}
}

// span records a problem of the duration v at path.
func (p *Problems) span(path string, v, least Duration) {
	if v < least || v > maxCheckSpan {
		p.Add(path, "%s is out of range: write %s to %s", v, least, maxCheckSpan)
	}
}

// count records a problem of the threshold v at path.
func (p *Problems) count(path string, v int) {
	if v < 0 || v > maxCheckCount {
		p.Add(path, "%d is out of range: write 0 to %d", v, maxCheckCount)
	}
}

// checkURL records a problem of the URL of an http check at path.
func (p *Problems) checkURL(path, v string) {
	u, err := url.Parse(v)
	switch {
	case err != nil || !printable(v) || u.Opaque != "":
		p.Add(path, "%q is no URL: write one such as \"http://127.0.0.1:8080/healthz\"", v)
	case u.Scheme != "http" && u.Scheme != "https":
		p.Add(path, "%q: the URL must start with http:// or https://", v)
	case u.Hostname() == "":
		p.Add(path, "%q: the URL names no host", v)
	case u.User != nil:
		p.Add(path, "the URL carries a password: send it as a header of the check instead")
	default:
		p.target(path, u.Hostname(), u.Port())
	}
}

// checkTarget records a problem of the host:port of a tcp check at path.
func (p *Problems) checkTarget(path, v string) {
	host, port, err := net.SplitHostPort(v)
	if err != nil || host == "" || port == "" || !printable(v) {
		p.Add(path, "%q: write host:port, such as \"127.0.0.1:5432\"", v)
		return
	}
	p.target(path, host, port)
}

// target records that a check must not connect to host and port. Link-local
// addresses are where cloud metadata lives.
func (p *Problems) target(path, host, port string) {
	if a, err := netip.ParseAddr(host); err == nil && (a.Unmap().IsLinkLocalUnicast() || a.IsMulticast()) {
		p.Add(path, "%s is a link-local or multicast address, which checks must not reach: use the instance's own address", host)
	}
	if n, err := strconv.ParseUint(port, 10, 16); port != "" && (err != nil || n == 0) {
		p.Add(path, "port %q: write a number, 1 to 65535", port)
	}
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
