package http1

import "iter"

// Known is a small index of the field names that the codec and its users
// treat specially, so that a name is compared once, when it is parsed.
// The zero value is any other name.
type Known uint8

// The known field names.
const (
	Other Known = iota
	Host
	Connection
	ContentLength
	TransferEncoding
	Expect
	Upgrade
	TE
	Trailer
	KeepAlive
	ProxyConnection
	ProxyAuthenticate
	ProxyAuthorization
	HTTP2Settings
	ForwardedClientCert // x-forwarded-client-cert, Envoy's name for it
	MeshHeader          // any name that begins with mesh-
	Authorization
	ContentType
	Date
	numKnown
)

// Field is one field line. Name keeps the peer's spelling; Value has no
// surrounding white space. Both are views, usually into a connection's buffer.
type Field struct {
	Name  []byte
	Value []byte
	ID    Known
	// Sensitive says that HTTP/2's field compression carried the field as one
	// that must never be indexed, which then holds for whoever sends it on (RFC
	// 7541 section 7.1.3). HTTP/1.1 cannot say it.
	Sensitive bool
}

// Fields is a list of field lines in the order in which they were received.
// Views stay valid as long as the buffer that they point into.
type Fields []Field

// Lookup returns the index of name, whatever its case, or [Other].
func Lookup(name []byte) Known { return lookup(name) }

// Get returns the first value of name, compared without regard to case.
func (f Fields) Get(name string) ([]byte, bool) {
	for i := range f {
		if equalFold(f[i].Name, name) {
			return f[i].Value, true
		}
	}
	return nil, false
}

// Values yields every value of name in order, one per field line, compared
// without regard to case. It does not allocate.
func (f Fields) Values(name string) iter.Seq[[]byte] {
	return func(yield func([]byte) bool) {
		for i := range f {
			if equalFold(f[i].Name, name) && !yield(f[i].Value) {
				return
			}
		}
	}
}

// Value returns the value of the i-th field line of name, counted from 0 and
// compared without regard to case.
func (f Fields) Value(name string, i int) ([]byte, bool) {
	for k := range f {
		if equalFold(f[k].Name, name) {
			if i == 0 {
				return f[k].Value, true
			}
			i--
		}
	}
	return nil, false
}

// Known returns the first value of a known name.
func (f Fields) Known(id Known) ([]byte, bool) {
	for i := range f {
		if f[i].ID == id {
			return f[i].Value, true
		}
	}
	return nil, false
}

// Del removes every field line of name, in place.
func (f *Fields) Del(name string) {
	*f = del(*f, name)
}

func del[T string | []byte](f Fields, name T) Fields {
	kept := f[:0]
	for i := range f {
		if !equalFold(f[i].Name, name) {
			kept = append(kept, f[i])
		}
	}
	return kept
}

// Add appends a field line. The bytes are not copied.
func (f *Fields) Add(name, value []byte) {
	*f = append(*f, Field{Name: name, Value: value, ID: lookup(name)})
}

// Set replaces every field line of name by one. The bytes are not copied.
func (f *Fields) Set(name, value []byte) {
	*f = del(*f, name)
	f.Add(name, value)
}

// knownNames lists the lower-case spelling of each index.
//
//nolint:gochecknoglobals // a constant table
var knownNames = [numKnown]string{
	Host:                "host",
	Connection:          "connection",
	ContentLength:       "content-length",
	TransferEncoding:    "transfer-encoding",
	Expect:              "expect",
	Upgrade:             "upgrade",
	TE:                  "te",
	Trailer:             "trailer",
	KeepAlive:           "keep-alive",
	ProxyConnection:     "proxy-connection",
	ProxyAuthenticate:   "proxy-authenticate",
	ProxyAuthorization:  "proxy-authorization",
	HTTP2Settings:       "http2-settings",
	ForwardedClientCert: "x-forwarded-client-cert",
	Authorization:       "authorization",
	ContentType:         "content-type",
	Date:                "date",
}

// byLength maps a name's length to the indexes with that length, so that a
// lookup compares against two names at most.
//
//nolint:gochecknoglobals // a constant table
var byLength = [24][2]Known{
	2:  {TE},
	4:  {Host, Date},
	6:  {Expect},
	7:  {Upgrade, Trailer},
	10: {Connection, KeepAlive},
	12: {ContentType},
	13: {Authorization},
	14: {ContentLength, HTTP2Settings},
	16: {ProxyConnection},
	17: {TransferEncoding},
	18: {ProxyAuthenticate},
	19: {ProxyAuthorization},
	23: {ForwardedClientCert},
}

func lookup(name []byte) Known {
	if len(name) < len(byLength) {
		for _, id := range byLength[len(name)] {
			if id != Other && equalFold(name, knownNames[id]) {
				return id
			}
		}
	}
	if len(name) > 5 && (name[0]|0x20) == 'm' && equalFold(name[:5], "mesh-") {
		return MeshHeader
	}
	return Other
}

// equalFold compares ASCII without regard to case.
func equalFold[T string | []byte](b []byte, s T) bool {
	if len(b) != len(s) {
		return false
	}
	for i := range b {
		if b[i] != s[i] && lower(b[i]) != lower(s[i]) {
			return false
		}
	}
	return true
}

func lower(c byte) byte {
	if 'A' <= c && c <= 'Z' {
		return c | 0x20
	}
	return c
}
