package http1

import (
	"bytes"
	"encoding/binary"
	"net/netip"
)

const (
	isToken  = 1 << iota // RFC 9110 section 5.6.2
	isTarget             // visible ASCII
	isHost               // reg-name without percent-encoding and sub-delimiters
	isHex
	isValue // field-vchar, SP, HTAB
)

//nolint:gochecknoglobals // a constant table
var chars = charTable()

func charTable() (t [256]uint8) {
	for c := range 256 {
		b := byte(c)
		alnum := '0' <= b && b <= '9' || 'a' <= b && b <= 'z' || 'A' <= b && b <= 'Z'
		if alnum {
			t[c] |= isToken | isHost
		}
		if '0' <= b && b <= '9' || 'a' <= b && b <= 'f' || 'A' <= b && b <= 'F' {
			t[c] |= isHex
		}
		if b > ' ' && b < 0x7f {
			t[c] |= isTarget
		}
		if b >= ' ' && b != 0x7f || b == '\t' {
			t[c] |= isValue
		}
	}
	for _, b := range []byte("!#$%&'*+-.^_`|~") {
		t[b] |= isToken
	}
	for _, b := range []byte("-._") {
		t[b] |= isHost
	}
	return t
}

func all(b []byte, class uint8) bool {
	for _, c := range b {
		if chars[c]&class == 0 {
			return false
		}
	}
	return len(b) > 0
}

// validValue reports whether b has no control byte but HTAB. Eight bytes are
// looked at together; only a suspicious eight is looked at byte by byte.
func validValue(b []byte) bool {
	const ones, high = 0x0101010101010101, 0x8080808080808080
	for len(b) >= 8 {
		x := binary.LittleEndian.Uint64(b)
		del := x ^ 0x7f*ones
		if ((x-0x20*ones)&^x|(del-ones)&^del)&high != 0 {
			for _, c := range b[:8] {
				if chars[c]&isValue == 0 {
					return false
				}
			}
		}
		b = b[8:]
	}
	for _, c := range b {
		if chars[c]&isValue == 0 {
			return false
		}
	}
	return true
}

// trim removes optional white space (SP, HTAB) from both ends.
func trim(b []byte) []byte {
	for len(b) > 0 && (b[0] == ' ' || b[0] == '\t') {
		b = b[1:]
	}
	for len(b) > 0 && (b[len(b)-1] == ' ' || b[len(b)-1] == '\t') {
		b = b[:len(b)-1]
	}
	return b
}

// nextItem cuts the first element off a comma-separated list. Empty elements
// come out empty.
func nextItem(list []byte) (item, rest []byte) {
	for i, c := range list {
		if c == ',' {
			return trim(list[:i]), list[i+1:]
		}
	}
	return trim(list), nil
}

// validHost checks host[:port] of a Host field or an absolute target.
func validHost(b []byte) bool {
	if len(b) == 0 {
		return false
	}
	rest := b
	if b[0] == '[' {
		end := bytes.IndexByte(b, ']')
		if end < 0 {
			return false
		}
		if ip, err := netip.ParseAddr(string(b[1:end])); err != nil || !ip.Is6() || ip.Zone() != "" {
			return false
		}
		rest = b[end+1:]
	} else {
		end := 0
		for end < len(b) && chars[b[end]]&isHost != 0 {
			end++
		}
		if end == 0 {
			return false
		}
		rest = b[end:]
	}
	if len(rest) == 0 {
		return true
	}
	if rest[0] != ':' || len(rest) < 2 || len(rest) > 6 {
		return false
	}
	port := 0
	for _, c := range rest[1:] {
		if c < '0' || c > '9' {
			return false
		}
		port = port*10 + int(c-'0')
	}
	return port <= 65535
}
