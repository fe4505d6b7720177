package hpack

import (
	"encoding/binary"

	"github.com/meshd/meshd/proxy/http1"
)

// Pseudo is one of the pseudo-header fields of HTTP/2.
type Pseudo uint8

// The pseudo-header fields of RFC 9113 section 8.3 and RFC 8441. The zero value is
// a field that is none; PseudoUnknown is a name with a colon that nobody defined.
const (
	NotPseudo Pseudo = iota
	Method
	Path
	Scheme
	Authority
	Status
	Protocol
	PseudoUnknown
)

// Flaw is what makes a field malformed (RFC 9113 section 8.2.1). It concerns
// the message that the field belongs to, not the compression.
type Flaw uint8

// The flaws; the zero value is none.
const (
	NoFlaw     Flaw = iota
	BadName         // empty, upper case, or not a token
	BadValue        // a control byte, or white space at an end
	Underscore      // the name has an underscore; nothing else is wrong
)

// Field is one decoded field line.
type Field struct {
	// Field has the name as it was sent (":path", too), and Sensitive if it was
	// sent as one that must never be indexed.
	http1.Field

	Pseudo Pseudo
	Flaw   Flaw
}

func (f *Field) give(name, value []byte, m meta) {
	f.Name, f.Value, f.Sensitive = name, value, false
	f.ID, f.Pseudo, f.Flaw = m.id, m.pseudo, m.flaw
}

// overhead is what RFC 7541 section 4.1 adds to each entry.
const overhead = 32

// meta is what is known about a name and a value, kept with table entries.
type meta struct {
	id     http1.Known
	pseudo Pseudo
	flaw   Flaw
}

// describe looks at a name that is in no table.
func describe(name []byte) meta {
	if len(name) == 0 {
		return meta{flaw: BadName}
	}
	if name[0] == ':' {
		return meta{pseudo: pseudoOf(name)}
	}
	m := meta{id: http1.Lookup(name)}
	for _, c := range name {
		switch nameClass[c] {
		case 0:
			m.flaw = BadName
			return m
		case 2:
			m.flaw = Underscore
		}
	}
	return m
}

func pseudoOf(name []byte) Pseudo {
	for p := Method; p < PseudoUnknown; p++ {
		if string(name) == pseudoNames[p] {
			return p
		}
	}
	return PseudoUnknown
}

// withValue adds what is wrong with the value. A bad name stays the flaw.
func (m meta) withValue(value []byte) meta {
	if m.flaw != BadName && !validValue(value) {
		m.flaw = BadValue
	}
	return m
}

//nolint:gochecknoglobals // a constant table
var pseudoNames = [PseudoUnknown]string{
	Method: ":method", Path: ":path", Scheme: ":scheme",
	Authority: ":authority", Status: ":status", Protocol: ":protocol",
}

// nameClass is 1 for a byte that a lower-case token may have, 2 for the
// underscore, 0 for the rest.
//
//nolint:gochecknoglobals // a constant table
var nameClass = nameClasses()

func nameClasses() (t [256]uint8) {
	for c := byte('a'); c <= 'z'; c++ {
		t[c] = 1
	}
	for c := byte('0'); c <= '9'; c++ {
		t[c] = 1
	}
	for _, c := range []byte("!#$%&'*+-.^`|~") {
		t[c] = 1
	}
	t['_'] = 2
	return t
}

// validValue reports whether a value has no control byte but HTAB and no white
// space at its ends. Eight bytes are looked at together; only a suspicious
// eight is looked at byte by byte.
func validValue(b []byte) bool {
	const ones, high = 0x0101010101010101, 0x8080808080808080
	if n := len(b); n > 0 && (blank(b[0]) || blank(b[n-1])) {
		return false
	}
	for len(b) >= 8 {
		x := binary.LittleEndian.Uint64(b)
		del := x ^ 0x7f*ones
		if ((x-0x20*ones)&^x|(del-ones)&^del)&high != 0 && !visible(b[:8]) {
			return false
		}
		b = b[8:]
	}
	return visible(b)
}

func visible(b []byte) bool {
	for _, c := range b {
		if c < ' ' && c != '\t' || c == 0x7f {
			return false
		}
	}
	return true
}

func blank(c byte) bool { return c == ' ' || c == '\t' }
