package flow

import (
	"bytes"
	"errors"
	"fmt"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
)

// Bounds of a Query.
const (
	MaxLimit    = 5000
	MinInterval = 500 * time.Millisecond
	MaxInterval = time.Minute
)

// ErrQuery is wrapped by the errors of Validate and ParseQuery.
var ErrQuery = errors.New("invalid query")

// Want is what a Query asks for.
type Want string

// What can be asked for.
const (
	// Records are those of what ends from now on.
	Records Want = "records"
	// Denials are those that are kept of what was not carried, the newest first.
	Denials Want = "denials"
	// Find is the record with the ID.
	Find Want = "find"
	// Edges are samples of counters, one at once and then one per Interval.
	Edges Want = "edges"
	// Stacks are what the goroutines of the proxy do, for a support bundle. The
	// proxy stands still while they are written down.
	Stacks Want = "stacks"
)

// Query selects what somebody wants to see. Its zero fields select all.
type Query struct {
	Want Want `json:"want"`
	// Source and Destination are SERVICE, NAMESPACE/SERVICE, NAMESPACE/* or a
	// SPIFFE ID.
	Source      string `json:"source,omitempty"`
	Destination string `json:"destination,omitempty"`
	// Status is 403, or 4xx for its class.
	Status string `json:"status,omitempty"`
	Method string `json:"method,omitempty"`
	// Path is a prefix.
	Path string `json:"path,omitempty"`
	// Denied leaves only what was denied or refused, and with Failed what failed,
	// too. Denials are always so.
	Denied bool `json:"denied,omitempty"`
	Failed bool `json:"failed,omitempty"`
	// Both shows what both proxies saw of one request; otherwise the caller's side
	// is shown only of what it did not send on.
	Both bool `json:"both,omitempty"`
	// ID is for Find.
	ID string `json:"id,omitempty"`
	// Since leaves out older denials. Limit, if not 0, is how many kept ones are
	// shown.
	Since time.Time `json:"since,omitzero"`
	Limit int       `json:"limit,omitempty"`
	// Interval is between samples; 2 s when zero.
	Interval catalog.Duration `json:"interval,omitzero"`
}

// Validate returns what is wrong with the query, as an error that wraps ErrQuery.
func (q Query) Validate() error {
	_, err := q.Filter()
	return err
}

// Lasting reports whether the answer has no end of its own.
func (q Query) Lasting() bool { return q.Want == Records || q.Want == Edges }

// Values is the query as the parameters of a URL, without Want and ID.
func (q Query) Values() url.Values {
	v := url.Values{}
	set := func(name, value string) {
		if value != "" {
			v.Set(name, value)
		}
	}
	set("src", q.Source)
	set("dst", q.Destination)
	set("status", q.Status)
	set("method", q.Method)
	set("path", q.Path)
	for name, on := range map[string]bool{"denied": q.Denied, "failed": q.Failed, "both": q.Both} {
		if on {
			v.Set(name, "true")
		}
	}
	if !q.Since.IsZero() {
		v.Set("since", q.Since.UTC().Format(time.RFC3339Nano))
	}
	if q.Limit != 0 {
		v.Set("limit", strconv.Itoa(q.Limit))
	}
	if q.Interval != 0 {
		v.Set("interval", time.Duration(q.Interval).String())
	}
	return v
}

// ParseQuery reads the parameters of a URL. A parameter that it does not know is
// an error, so that a typo does not show everything.
func ParseQuery(want Want, v url.Values) (Query, error) {
	q := Query{Want: want}
	for name, values := range v {
		if len(values) != 1 {
			return q, fmt.Errorf("%w: %s is given %d times", ErrQuery, name, len(values))
		}
		if err := q.parameter(name, values[0]); err != nil {
			return q, err
		}
	}
	return q, q.Validate()
}

func (q *Query) parameter(name, value string) error {
	var err error
	switch name {
	case "src":
		q.Source = value
	case "dst":
		q.Destination = value
	case "status":
		q.Status = value
	case "method":
		q.Method = value
	case "path":
		q.Path = value
	case "denied":
		q.Denied, err = strconv.ParseBool(value)
	case "failed":
		q.Failed, err = strconv.ParseBool(value)
	case "both":
		q.Both, err = strconv.ParseBool(value)
	case "since":
		q.Since, err = time.Parse(time.RFC3339Nano, value)
	case "limit":
		q.Limit, err = strconv.Atoi(value)
	case "interval":
		var d time.Duration
		d, err = time.ParseDuration(value)
		q.Interval = catalog.Duration(d)
	default:
		return fmt.Errorf("%w: there is no parameter %q", ErrQuery, name)
	}
	if err != nil {
		return fmt.Errorf("%w: %s=%q: %w", ErrQuery, name, value, err)
	}
	return nil
}

// Filter returns what decides which records the query selects. Errors wrap
// ErrQuery.
func (q Query) Filter() (*Filter, error) {
	f := &Filter{denied: q.Denied, failed: q.Failed, both: q.Both, method: []byte(strings.ToUpper(q.Method)), path: []byte(q.Path)}
	var err error
	switch q.Want {
	case Records, Edges, Stacks:
	case Denials:
		f.denied = true
	case Find:
		if !ValidID(q.ID) {
			return nil, fmt.Errorf("%w: %q is no id: it has six hexadecimal digits", ErrQuery, q.ID)
		}
		f.id = q.ID
	default:
		return nil, fmt.Errorf("%w: nothing is known of %q", ErrQuery, q.Want)
	}
	if f.source, err = parsePattern(q.Source); err != nil {
		return nil, fmt.Errorf("%w: source: %w", ErrQuery, err)
	}
	if f.destination, err = parsePattern(q.Destination); err != nil {
		return nil, fmt.Errorf("%w: destination: %w", ErrQuery, err)
	}
	if f.low, f.high, err = parseStatus(q.Status); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrQuery, err)
	}
	switch {
	case len(q.Method) > MaxMethod || len(q.Path) > MaxPath:
		return nil, fmt.Errorf("%w: a method has at most %d bytes, the prefix of a path %d", ErrQuery, MaxMethod, MaxPath)
	case q.Path != "" && q.Path[0] != '/':
		return nil, fmt.Errorf("%w: path %q: it begins with a slash", ErrQuery, q.Path)
	case q.Limit < 0 || q.Limit > MaxLimit:
		return nil, fmt.Errorf("%w: limit %d: 0 to %d", ErrQuery, q.Limit, MaxLimit)
	}
	if d := time.Duration(q.Interval); d != 0 && (d < MinInterval || d > MaxInterval) {
		return nil, fmt.Errorf("%w: interval %s: %s to %s", ErrQuery, d, MinInterval, MaxInterval)
	}
	return f, nil
}

// parseStatus reads "403", "4xx" or nothing; high 0 is everything.
func parseStatus(s string) (low, high int, err error) {
	if s == "" {
		return 0, 0, nil
	}
	if class, ok := strings.CutSuffix(s, "xx"); ok && len(class) == 1 && '1' <= class[0] && class[0] <= '5' {
		low = int(class[0]-'0') * 100
		return low, low + 99, nil
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 100 || n > 599 {
		return 0, 0, fmt.Errorf("status %q: write 403, or 4xx for all of its class", s)
	}
	return n, n, nil
}

// Filter decides which records a query selects. It is immutable, and allocates
// nothing.
type Filter struct {
	source, destination  pattern
	method, path         []byte
	low, high            int
	denied, failed, both bool
	id                   string
}

// Match reports whether the query selects a record.
func (f *Filter) Match(s *Seen) bool {
	switch {
	case f.id != "": // whoever knows of it
		return s.Told
	case f.denied && (s.Verdict == Passed || s.Verdict == Failed && !f.failed):
		return false
	case !f.both && s.Direction == Outbound && s.Verdict == Passed:
		return false
	case f.high != 0 && (s.Status < f.low || s.Status > f.high):
		return false
	case len(f.method) != 0 && !bytes.Equal(s.Method, f.method):
		return false
	case !bytes.HasPrefix(s.Path, f.path):
		return false
	}
	return f.source.match(s.Source) && f.destination.match(s.Destination)
}

// MatchRecord is Match, and looks at the ID of Find, too.
func (f *Filter) MatchRecord(r *Record) bool {
	seen := r.Seen()
	return (f.id == "" || f.id == r.ErrorID) && f.Match(&seen)
}

// Between reports whether a pair of services is selected, whatever passes there.
func (f *Filter) Between(source, destination spiffe.ID) bool {
	return f.source.match(source) && f.destination.match(destination)
}

// pattern is one side of a Query; the zero pattern is everybody.
type pattern struct {
	id   spiffe.ID
	name catalog.Name // its name may be "*"
}

func parsePattern(s string) (pattern, error) {
	if s == "" || s == "*" {
		return pattern{}, nil
	}
	if strings.HasPrefix(s, "spiffe://") {
		id, err := spiffe.Parse(s)
		return pattern{id: id}, err //nolint:wrapcheck // the caller says which side
	}
	name, err := ParseServices(s)
	return pattern{name: name}, err
}

// ParseServices reads SERVICE, NAMESPACE/SERVICE or NAMESPACE/*; the name is "*"
// then. Nothing, "*" and a SPIFFE ID of no service are the zero name.
func ParseServices(s string) (catalog.Name, error) {
	if s == "" || s == "*" {
		return catalog.Name{}, nil
	}
	if strings.HasPrefix(s, "spiffe://") {
		id, err := spiffe.Parse(s)
		return Service(id), err //nolint:wrapcheck // the caller says which side
	}
	if ns, ok := strings.CutSuffix(s, "/*"); ok {
		return catalog.Name{Namespace: ns, Name: "*"}, catalog.CheckLabel(ns) //nolint:wrapcheck // the caller says which side
	}
	return catalog.ParseName(s) //nolint:wrapcheck // the caller says which side
}

func (p *pattern) match(id spiffe.ID) bool {
	switch {
	case !p.id.IsZero():
		return id == p.id
	case p.name.IsZero():
		return true
	case id.Kind != spiffe.KindService || id.Namespace != p.name.Namespace:
		return false
	default:
		return p.name.Name == "*" || p.name.Name == id.Name
	}
}
