package intentions

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"unicode/utf8"
)

// ErrTarget is wrapped by the errors of NormalizeTarget, NormalizePath and
// NormalizeHost: the request is to be refused with status 400.
var ErrTarget = errors.New("ambiguous request target")

// NormalizeTarget splits a request target in origin form ("/path?query") and
// normalizes its path. The query is returned as it was sent, with its "?"; it
// is empty when there is none, so path+query is what to forward. A query with
// spaces, control bytes or "#" is refused.
func NormalizeTarget(target string) (path, query string, err error) {
	path = target
	if i := strings.IndexByte(target, '?'); i >= 0 {
		path, query = target[:i], target[i:]
		for j := range len(query) {
			if c := query[j]; c <= ' ' || c == 0x7f || c == '#' {
				return "", "", targetError(target, i+j, "byte not allowed in a query")
			}
		}
	}
	path, err = NormalizePath(path)
	return path, query, err
}

// NormalizePath returns the one spelling of a path that starts with "/" and has
// no query:
//
//   - percent-encoded unreserved characters (RFC 3986, section 2.3) are
//     decoded, once; other encodings are kept, in upper case; bytes that a path
//     must not have as they are (RFC 3986, section 3.3), among them those of
//     UTF-8 text, are encoded;
//   - repeated "/" become one, then "." and ".." segments are resolved (RFC
//     3986, section 5.2.4); ".." above the root stays at the root.
//
// It refuses what applications read in different ways: an encoded "/", "\" and
// its encoding, control bytes, NUL and their encodings, spaces, "#" and "?",
// encodings that are cut short, text that is not UTF-8 (overlong forms
// included), and "." or ".." followed by parameters ("/..;x").
//
// The result is normal: NormalizePath returns it unchanged. A path that is
// normal already is returned as it is, without allocation.
func NormalizePath(path string) (string, error) {
	normal, err := scanPath(path)
	if err != nil {
		return "", err
	}
	if normal {
		return path, nil
	}
	return rewritePath(path)
}

// The classes of bytes in a path.
const (
	classPlain   = iota // stays as it is
	classSlash          // ends a segment
	classPercent        // starts an encoding
	classEncode         // is to be encoded
	classHigh           // is part of UTF-8 text, and to be encoded
	classBad            // is refused
)

var pathClass = func() (t [256]uint8) {
	for c := range 256 {
		switch {
		case unreserved(byte(c)) || strings.IndexByte("!$&'()*+,;=:@", byte(c)) >= 0: // pchar
			t[c] = classPlain
		case c == '/':
			t[c] = classSlash
		case c == '%':
			t[c] = classPercent
		case c >= 0x80:
			t[c] = classHigh
		case c <= ' ' || c == 0x7f || c == '\\' || c == '#' || c == '?':
			t[c] = classBad
		default: // " < > [ ] ^ ` { | }
			t[c] = classEncode
		}
	}
	return t
}()

// scanPath refuses what is to be refused, as far as it shows before decoding,
// and reports whether the path is normal already.
func scanPath(path string) (normal bool, err error) {
	if path == "" || path[0] != '/' {
		return false, targetError(path, 0, "a path must start with \"/\"")
	}
	normal = true
	var text utf8Run
	segment := 0 // where the current segment starts
	for i := 0; i < len(path); i++ {
		c := path[i]
		class := pathClass[c]
		if class != classHigh && class != classPercent && text.n > 0 {
			return false, targetError(path, i, "text that is not UTF-8")
		}
		switch class {
		case classPlain:
		case classSlash:
			n, err := checkSegment(path, segment, i)
			if err != nil {
				return false, err
			}
			normal = normal && n && (i == 0 || path[i-1] != '/')
			segment = i + 1
		case classPercent:
			v, canonical, err := decodeAt(path, i)
			if err != nil {
				return false, err
			}
			if v < 0x80 && text.n > 0 || v >= 0x80 && !text.add(v) {
				return false, targetError(path, i, "text that is not UTF-8")
			}
			normal = normal && canonical
			i += 2
		case classHigh:
			if !text.add(c) {
				return false, targetError(path, i, "text that is not UTF-8")
			}
			normal = false
		case classEncode:
			normal = false
		default:
			return false, targetError(path, i, "byte not allowed in a path")
		}
	}
	if text.n > 0 {
		return false, targetError(path, len(path)-1, "text that is not UTF-8")
	}
	n, err := checkSegment(path, segment, len(path))
	return normal && n, err
}

// decodeAt reads the encoding at path[i]. It is canonical when it stays.
func decodeAt(path string, i int) (v byte, canonical bool, err error) {
	if i+2 >= len(path) || !isHex(path[i+1]) || !isHex(path[i+2]) {
		return 0, false, targetError(path, i, "percent-encoding is cut short")
	}
	v = unhex(path[i+1])<<4 | unhex(path[i+2])
	switch {
	case v == '/' || v == '\\':
		return 0, false, targetError(path, i, "encoded slash or backslash")
	case v < ' ' || v == 0x7f:
		return 0, false, targetError(path, i, "encoded control byte")
	}
	return v, !unreserved(v) && path[i+1] < 'a' && path[i+2] < 'a', nil
}

// checkSegment refuses a dot segment with parameters in path[from:to], and
// reports whether the segment is none that is to be resolved.
func checkSegment(path string, from, to int) (normal bool, err error) {
	if from >= to || path[from] != '.' {
		return true, nil
	}
	rest := path[from+1 : to]
	if rest != "" && rest[0] == '.' {
		rest = rest[1:]
	}
	if rest == "" {
		return false, nil
	}
	if rest[0] == ';' || len(rest) >= 3 && (rest[:3] == "%3B" || rest[:3] == "%3b") {
		return false, targetError(path, from, "dot segment with parameters")
	}
	return true, nil
}

// rewritePath normalizes a path that scanPath passed.
func rewritePath(path string) (string, error) {
	b := make([]byte, 0, len(path)+16)
	for i := 0; i < len(path); i++ {
		c := path[i]
		switch pathClass[c] {
		case classPercent:
			c = unhex(path[i+1])<<4 | unhex(path[i+2])
			i += 2
			if unreserved(c) {
				b = append(b, c)
			} else {
				b = appendEncoded(b, c)
			}
		case classEncode, classHigh:
			b = appendEncoded(b, c)
		default:
			b = append(b, c)
		}
	}
	return resolveDots(path, b)
}

// resolveDots merges slashes and resolves dot segments of b in place. The path
// is for the error only.
func resolveDots(path string, b []byte) (string, error) {
	// out ends in "/" before each segment.
	out := b[:1]
	for from := 1; from <= len(b); {
		to := from
		for to < len(b) && b[to] != '/' {
			to++
		}
		segment := b[from:to]
		switch {
		case len(segment) == 0:
			// merged
		case string(segment) == ".":
		case string(segment) == "..":
			if len(out) > 1 {
				out = out[:len(out)-1]
				for out[len(out)-1] != '/' {
					out = out[:len(out)-1]
				}
			}
		default:
			if segment[0] == '.' {
				if _, err := checkSegment(string(segment), 0, len(segment)); err != nil {
					return "", targetError(path, 0, "dot segment with parameters")
				}
			}
			// out never overtakes from: each segment it holds was read.
			out = append(out, segment...)
			if to < len(b) {
				out = append(out, '/')
			}
		}
		from = to + 1
	}
	return string(out), nil
}

// A utf8Run checks text that comes byte by byte. The zero value is ready.
type utf8Run struct {
	b [utf8.UTFMax]byte
	n int // bytes of a character that is not complete
}

// add takes the next byte, at least 0x80, and reports whether the text is still
// UTF-8.
func (u *utf8Run) add(c byte) bool {
	u.b[u.n] = c
	u.n++
	if !utf8.FullRune(u.b[:u.n]) {
		return true
	}
	r, size := utf8.DecodeRune(u.b[:u.n])
	u.n = 0
	return r != utf8.RuneError || size > 1
}

// NormalizeHost returns the one spelling of a host as a Host header or an
// :authority gives it: without port and trailing dot, in lower case. An IPv6
// address keeps its brackets and is written as RFC 5952 has it. A host that is
// normal already is returned as it is, without allocation.
//
// It refuses what is no host: empty labels, bytes other than letters, digits,
// "-", "_" and ".", names longer than 253 bytes, zones, user information, a port
// that is no number.
func NormalizeHost(host string) (string, error) {
	if strings.HasPrefix(host, "[") {
		return normalizeIPv6(host)
	}
	name := host
	if i := strings.IndexByte(host, ':'); i >= 0 {
		name = host[:i]
		if !isPort(host[i+1:]) {
			return "", targetError(host, i, "the port is no number, 1 to 65535")
		}
	}
	name = strings.TrimSuffix(name, ".")
	if name == "" || len(name) > 253 {
		return "", targetError(host, 0, "a host has 1 to 253 bytes")
	}
	upper := false
	for i := range len(name) {
		switch c := name[i]; {
		case c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-' || c == '_':
		case c >= 'A' && c <= 'Z':
			upper = true
		case c == '.' && i > 0 && name[i-1] != '.':
		case c == '.':
			return "", targetError(host, i, "empty label in a host")
		default:
			return "", targetError(host, i, "byte not allowed in a host")
		}
	}
	if name[len(name)-1] == '.' {
		return "", targetError(host, len(name)-1, "empty label in a host")
	}
	if upper {
		name = strings.ToLower(name)
	}
	return name, nil
}

func normalizeIPv6(host string) (string, error) {
	end := strings.IndexByte(host, ']')
	if end < 0 {
		return "", targetError(host, 0, "\"[\" without \"]\"")
	}
	if rest := host[end+1:]; rest != "" && (rest[0] != ':' || !isPort(rest[1:])) {
		return "", targetError(host, end+1, "the port is no number, 1 to 65535")
	}
	a, err := netip.ParseAddr(host[1:end])
	if err != nil || !a.Is6() || a.Zone() != "" {
		return "", targetError(host, 1, "no IPv6 address")
	}
	var buf [64]byte
	text := a.AppendTo(append(buf[:0], '['))
	text = append(text, ']')
	if string(text) == host[:end+1] {
		return host[:end+1], nil
	}
	return string(text), nil
}

func isPort(s string) bool {
	for i := range len(s) {
		if s[i] < '0' || s[i] > '9' {
			return false
		}
	}
	n, err := strconv.ParseUint(s, 10, 16)
	return err == nil && n > 0
}

// A badTarget is an error that wraps ErrTarget.
type badTarget struct {
	text    string
	at      int
	problem string
}

func targetError(text string, at int, problem string) error {
	const shown = 128
	if len(text) > shown {
		text = text[:shown] + "…"
	}
	return &badTarget{text: text, at: at, problem: problem}
}

// Error names the text, the place and the problem.
func (e *badTarget) Error() string {
	return fmt.Sprintf("%v: %q, byte %d: %s", ErrTarget, e.text, e.at, e.problem)
}

// Unwrap returns ErrTarget.
func (e *badTarget) Unwrap() error { return ErrTarget }

// problemOf returns the error of NormalizePath for a path that a person wrote.
func problemOf(err error) string {
	if bad, ok := errors.AsType[*badTarget](err); ok {
		return fmt.Sprintf("%q: %s", bad.text, bad.problem)
	}
	return err.Error()
}

func unreserved(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '.' || c == '_' || c == '~'
}

func isHex(c byte) bool {
	return c >= '0' && c <= '9' || c >= 'a' && c <= 'f' || c >= 'A' && c <= 'F'
}

func unhex(c byte) byte {
	switch {
	case c <= '9':
		return c - '0'
	case c <= 'F':
		return c - 'A' + 10
	default:
		return c - 'a' + 10
	}
}

func appendEncoded(b []byte, c byte) []byte {
	const hex = "0123456789ABCDEF"
	return append(b, '%', hex[c>>4], hex[c&15])
}
