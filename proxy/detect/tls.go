package detect

import "encoding/binary"

// Of RFC 8446: the type of a record that carries a handshake (section 5.1), of a handshake message that is a ClientHello
// (section 4), and of the extension that names the server (RFC 6066, section 3), with the one type of name that there is.
const (
	recordHandshake = 22
	clientHello     = 1
	extensionName   = 0
	hostName        = 0
)

const (
	recordHeader  = 5
	messageHeader = 4
	// maxName is the length of a DNS name in text form (RFC 1035, section 2.3.4).
	maxName = 253
)

// hello decides about bytes that begin like a record with a handshake.
func hello(b []byte) Protocol {
	for i, c := range b[:min(len(b), recordHeader+1)] {
		switch {
		case i == 1 && c != 3, i == 2 && c > 4, i == recordHeader && c != clientHello:
			return Opaque
		}
	}
	if len(b) <= recordHeader {
		return Undecided
	}
	return TLS
}

// ServerName returns the name that a TLS client asks for, a view of b, and false if b does not have it: it asks for none, it
// encrypts it, or b ends before. A name may be spread over several records; then only what the first one has is looked at.
func ServerName(b []byte) ([]byte, bool) {
	if len(b) < recordHeader || b[0] != recordHandshake {
		return nil, false
	}
	length := int(binary.BigEndian.Uint16(b[3:]))
	r := reader{b: b[recordHeader:min(len(b), recordHeader+length)]}
	if typ := r.take(1); len(typ) != 1 || typ[0] != clientHello {
		return nil, false
	}
	r.skip(messageHeader - 1 + 2 + 32) // length, version, random
	r.skip(r.number(1))                // session
	r.skip(r.number(2))                // cipher suites
	r.skip(r.number(1))                // compression
	r.skip(2)                          // the length of all extensions, of which perhaps not all are here
	for !r.short && len(r.b) > 0 {
		typ := r.number(2)
		data := r.take(r.number(2))
		if typ == extensionName && !r.short {
			return nameIn(data)
		}
	}
	return nil, false
}

// nameIn reads the extension's content.
func nameIn(data []byte) ([]byte, bool) {
	r := reader{b: data}
	r.skip(2) // the length of the list
	if r.number(1) != hostName {
		return nil, false
	}
	name := r.take(r.number(2))
	if r.short || len(name) == 0 || len(name) > maxName {
		return nil, false
	}
	for _, c := range name {
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '-' && c != '.' && c != '_' {
			return nil, false
		}
	}
	return name, true
}

// reader takes bytes apart, and notes when there were not enough of them.
type reader struct {
	b     []byte
	short bool
}

func (r *reader) take(n int) []byte {
	if n > len(r.b) {
		r.b, r.short = nil, true
		return nil
	}
	taken := r.b[:n]
	r.b = r.b[n:]
	return taken
}

func (r *reader) skip(n int) { r.take(n) }

func (r *reader) number(size int) int {
	n := 0
	for _, c := range r.take(size) {
		n = n<<8 | int(c)
	}
	return n
}
