package hpack

import (
	"slices"

	"github.com/meshd/meshd/proxy/http1"
)

// staticLen is the number of entries of the static table.
const staticLen = 61

// staticEntry is one line of RFC 7541 appendix A. The slices are views of
// constant strings and must not be written to.
type staticEntry struct {
	name, value []byte
	meta        meta
	// same is how many entries, this one included, follow with this name.
	same uint8
}

//nolint:gochecknoglobals // a constant table
var static = staticTable()

func staticTable() (t [staticLen + 1]staticEntry) {
	lines := [staticLen][2]string{
		{":authority"},
		{":method", "GET"},
		{":method", "POST"},
		{":path", "/"},
		{":path", "/index.html"},
		{":scheme", "http"},
		{":scheme", "https"},
		{":status", "200"},
		{":status", "204"},
		{":status", "206"},
		{":status", "304"},
		{":status", "400"},
		{":status", "404"},
		{":status", "500"},
		{"accept-charset"},
		{"accept-encoding", "gzip, deflate"},
		{"accept-language"},
		{"accept-ranges"},
		{"accept"},
		{"access-control-allow-origin"},
		{"age"},
		{"allow"},
		{"authorization"},
		{"cache-control"},
		{"content-disposition"},
		{"content-encoding"},
		{"content-language"},
		{"content-length"},
		{"content-location"},
		{"content-range"},
		{"content-type"},
		{"cookie"},
		{"date"},
		{"etag"},
		{"expect"},
		{"expires"},
		{"from"},
		{"host"},
		{"if-match"},
		{"if-modified-since"},
		{"if-none-match"},
		{"if-range"},
		{"if-unmodified-since"},
		{"last-modified"},
		{"link"},
		{"location"},
		{"max-forwards"},
		{"proxy-authenticate"},
		{"proxy-authorization"},
		{"range"},
		{"referer"},
		{"refresh"},
		{"retry-after"},
		{"server"},
		{"set-cookie"},
		{"strict-transport-security"},
		{"transfer-encoding"},
		{"user-agent"},
		{"vary"},
		{"via"},
		{"www-authenticate"},
	}
	for i, line := range lines {
		name := slices.Clip([]byte(line[0]))
		e := staticEntry{name: name, value: slices.Clip([]byte(line[1]))}
		e.meta = meta{id: http1.Lookup(name)}
		if name[0] == ':' {
			e.meta.pseudo = pseudoOf(name)
		}
		for _, other := range lines[i:] {
			if other[0] == line[0] {
				e.same++
			}
		}
		t[i+1] = e
	}
	return t
}

// Indexes of the static table that the encoder treats specially. Each is the
// first with its name.
const (
	staticAuthority          = 1
	staticMethod             = 2
	staticPath               = 4
	staticScheme             = 6
	staticStatus             = 8
	staticAuthorization      = 23
	staticContentLength      = 28
	staticCookie             = 32
	staticProxyAuthorization = 49
	staticSetCookie          = 55
)

// staticSlots maps the hash of a name to the first entry with it. The
// multipliers of staticHash were searched for until no two names met.
//
//nolint:gochecknoglobals // a constant table
var staticSlots = staticIndexes()

func staticIndexes() (t [128]uint8) {
	for i := staticLen; i > 0; i-- {
		t[staticHash(static[i].name)] = uint8(i)
	}
	return t
}

func staticHash(name []byte) int {
	n := len(name)
	return (n*53 + int(name[0])*48 + int(name[n-1])*40 + int(name[n/2])*22) & 127
}

// staticName returns the first entry of the static table with name, or 0.
func staticName(name []byte) uint32 {
	if len(name) == 0 {
		return 0
	}
	i := staticSlots[staticHash(name)]
	if i != 0 && string(static[i].name) == string(name) {
		return uint32(i)
	}
	return 0
}

// staticPair returns the entry with the name of entry first and value, or 0.
func staticPair(first uint32, value []byte) uint32 {
	for i := first; i < first+uint32(static[first].same); i++ {
		if string(static[i].value) == string(value) {
			return i
		}
	}
	return 0
}
