// Package detect tells from the first bytes of a client what it speaks: HTTP/1,
// HTTP/2, or something else. It decides at the earliest byte that rules the
// others out, so that nobody waits for more than is needed, and it never takes a
// decision back when more bytes come.
package detect

import "bytes"

// Protocol is what a client speaks, as far as its bytes tell.
type Protocol uint8

// The protocols.
const (
	// Undecided needs more bytes.
	Undecided Protocol = iota
	HTTP1
	HTTP2
	// TLS is a handshake of TLS: bytes that nobody on the way can read.
	TLS
	// Opaque is anything else.
	Opaque
)

// String returns the name as metrics and logs have it.
func (p Protocol) String() string {
	switch p {
	case HTTP1:
		return "http1"
	case HTTP2:
		return "http2"
	case TLS:
		return "tls"
	case Opaque:
		return "tcp"
	default:
		return "undecided"
	}
}

// HTTP reports whether it is HTTP of any version.
func (p Protocol) HTTP() bool { return p == HTTP1 || p == HTTP2 }

const (
	// Most is after how many bytes at the latest a decision is made.
	Most = 4 << 10
	// maxMethod bounds a method that is not one of RFC 9110: the longest registered ones have 17 letters.
	maxMethod = 24
	// preface is the beginning of RFC 9113, section 3.4, up to where nothing else can be meant. What is wrong behind it is for HTTP/2
	// to refuse.
	preface = "PRI * HTTP/2"
)

// Of tells from all that a client has sent so far. It keeps nothing of b.
func Of(b []byte) Protocol {
	if len(b) == 0 {
		return Undecided
	}
	switch c := b[0]; {
	case c == recordHandshake:
		return hello(b)
	case c < 'A' || c > 'Z': // every method in use is in capitals, and RFC 9110 has them case-sensitive
		return Opaque
	}
	if len(b) >= len(preface) && string(b[:len(preface)]) == preface {
		return HTTP2
	}
	if len(b) < len(preface) && preface[:len(b)] == string(b) {
		return Undecided
	}
	return request(b)
}

// request decides about bytes that begin with a capital letter and are no preface of HTTP/2, whole or in part.
func request(b []byte) Protocol {
	space := bytes.IndexByte(b[:min(len(b), maxMethod+1)], ' ')
	method := b[:min(len(b), maxMethod+1)]
	if space >= 0 {
		method = b[:space]
	}
	for _, c := range method {
		if (c < 'A' || c > 'Z') && c != '-' && c != '_' {
			return Opaque
		}
	}
	if len(method) > maxMethod {
		return Opaque
	}
	if space < 0 {
		return Undecided
	}
	return target(string(method), b[space+1:])
}

// target decides by what follows a method and a space. RTSP, SIP and ICAP have methods of HTTP's names; their targets tell, or
// their version at the end of the line.
func target(method string, b []byte) Protocol {
	switch {
	case len(b) == 0:
		return Undecided
	case b[0] == '/' && standard(method):
		return HTTP1
	case b[0] == '/', b[0] == '*', method == "CONNECT":
		return line(b)
	}
	for _, scheme := range []string{"http://", "https://"} {
		n := min(len(b), len(scheme))
		if bytes.EqualFold(b[:n], []byte(scheme[:n])) {
			if n < len(scheme) {
				return Undecided
			}
			return HTTP1
		}
	}
	return Opaque
}

// standard names the methods of RFC 9110 and RFC 5789.
func standard(method string) bool {
	switch method {
	case "GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH":
		return true
	default:
		return false
	}
}

// line decides by the version at the end of a request line, of which b is what follows the method.
func line(b []byte) Protocol {
	const version = "HTTP/1."
	target, rest, ended := bytes.Cut(b, []byte{' '})
	for _, c := range target {
		if c <= ' ' || c == 0x7f {
			return Opaque
		}
	}
	if !ended {
		if len(b) >= Most-maxMethod-1 {
			return Opaque // no request line that HTTP/1 would take is so long
		}
		return Undecided
	}
	n := min(len(rest), len(version))
	switch {
	case string(rest[:n]) != version[:n]:
		return Opaque
	case n < len(version):
		return Undecided
	}
	return HTTP1
}
