package http1

// Limits bound what a peer may make us hold. A zero field takes its default.
type Limits struct {
	// HeadBytes bounds a whole head or trailer section; 32 KiB.
	HeadBytes int
	// LineBytes bounds one line of it; 8 KiB.
	LineBytes int
	// Fields bounds the number of field lines; 100.
	Fields int
	// AllowUnderscore admits field names with an underscore. CGI and its
	// successors cannot tell x_id from x-id, so by default they are refused.
	AllowUnderscore bool
}

// The defaults of [Limits]; nginx has 4 × 8 KiB, HAProxy 16 KiB and 101 fields.
const (
	DefaultHeadBytes = 32 << 10
	DefaultLineBytes = 8 << 10
	DefaultFields    = 100
)

// WithDefaults returns l with its zero fields filled.
func (l Limits) WithDefaults() Limits {
	if l.HeadBytes == 0 {
		l.HeadBytes = DefaultHeadBytes
	}
	if l.LineBytes == 0 {
		l.LineBytes = DefaultLineBytes
	}
	if l.Fields == 0 {
		l.Fields = DefaultFields
	}
	return l
}

// A Limit is one of [Limits], by the name that metrics have.
type Limit string

// The limits that refuse.
const (
	LimitHeadBytes  Limit = "head-bytes"
	LimitLineBytes  Limit = "line-bytes"
	LimitFields     Limit = "fields"
	LimitUnderscore Limit = "underscore"
)

// AllLimits returns every Limit.
func AllLimits() []Limit {
	return []Limit{LimitHeadBytes, LimitLineBytes, LimitFields, LimitUnderscore}
}
