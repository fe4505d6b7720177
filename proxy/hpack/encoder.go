package hpack

import (
	"hash/maphash"
	"math/bits"
	"strconv"

	"github.com/meshd/meshd/proxy/http1"
)

const (
	// shortCookie is the length from which on a cookie is too long to be
	// guessed value by value through the size of what is sent (RFC 7541 section
	// 7.1.3).
	shortCookie = 20
	pairSlots   = 256
	nameSlots   = 64
	seenSlots   = 256

	unchanged = 1<<32 - 1
)

// Encoder encodes the field lists of one connection. It is one goroutine's:
// the writer's, as blocks must be encoded in the order in which they are sent,
// and each that was encoded must be sent, even if nobody wants its stream any
// more.
//
// A list is one call of Begin and then one per field, each appending to the
// block:
//
//	block = e.Begin(block)
//	block = e.Status(block, 200)
//	block = e.Field(block, &field)
type Encoder struct {
	table table
	bound uint32 // the largest table that we want
	low   uint32 // smallest size that was set since the last block, or unchanged
	tell  bool   // the next block begins with a size update
	index *index // nil while nothing was sent that may repeat
	seed  maphash.Seed
	lower []byte
}

// index finds entries by their bytes. It forgets: where two meet in a slot, the
// older one is not found any more, and sent as a literal again.
type index struct {
	pairs [pairSlots]uint32 // hash of name and value to sequence number + 1
	names [nameSlots]uint32 // hash of name to the same
	seen  [seenSlots]uint16 // traces of pairs that were sent once
}

// NewEncoder returns an Encoder whose table has at most bound bytes; 4096 is
// what pays. The peer's settings may make it smaller, never larger.
func NewEncoder(bound uint32) *Encoder {
	e := &Encoder{bound: bound, low: unchanged, seed: maphash.MakeSeed(), table: table{max: initialTable}}
	e.SetLimit(initialTable)
	return e
}

// SetLimit takes the peer's SETTINGS_HEADER_TABLE_SIZE. It must be called
// between blocks, by the writer, when it sends the acknowledgement.
func (e *Encoder) SetLimit(table uint32) {
	n := min(table, e.bound)
	if n == e.table.max {
		return
	}
	e.low = min(e.low, n)
	e.tell = true
	e.table.setMax(n)
}

// Begin begins a block: it appends the size updates that are due. If the table
// was made smaller and larger again, it is emptied: golang.org/x/net, and so
// grpc-go and net/http, takes a second update of one block only then.
func (e *Encoder) Begin(dst []byte) []byte {
	if !e.tell {
		return dst
	}
	if e.low < e.table.max {
		e.table.clear()
		dst = append(dst, 0x20)
	}
	e.tell, e.low = false, unchanged
	return appendInt(dst, 0x20, 5, e.table.max)
}

// Pseudo appends a pseudo-header field. Those come before all others.
func (e *Encoder) Pseudo(dst []byte, p Pseudo, value []byte) []byte {
	switch p {
	case Method:
		return e.pair(dst, staticMethod, static[staticMethod].name, value, false)
	case Path:
		return e.pair(dst, staticPath, static[staticPath].name, value, false)
	case Scheme:
		return e.pair(dst, staticScheme, static[staticScheme].name, value, false)
	case Authority:
		return e.pair(dst, staticAuthority, static[staticAuthority].name, value, false)
	case Status:
		return e.pair(dst, staticStatus, static[staticStatus].name, value, false)
	default:
		return e.Literal(dst, pseudoNames[Protocol], value)
	}
}

// Status appends :status.
func (e *Encoder) Status(dst []byte, code int) []byte {
	var digits [20]byte
	return e.Pseudo(dst, Status, strconv.AppendInt(digits[:0], int64(code), 10))
}

// Length appends content-length.
func (e *Encoder) Length(dst []byte, n int64) []byte {
	var digits [20]byte
	return e.pair(dst, staticContentLength, static[staticContentLength].name, strconv.AppendInt(digits[:0], n, 10), false)
}

// Field appends a field; its name may have any case. Authorization,
// proxy-authorization, short cookies and what is Sensitive are marked as never
// to be indexed by anybody.
func (e *Encoder) Field(dst []byte, f *http1.Field) []byte {
	name := f.Name
	for _, c := range name {
		if 'A' <= c && c <= 'Z' {
			name = e.lowered(name)
			break
		}
	}
	return e.pair(dst, staticName(name), name, f.Value, f.Sensitive)
}

// Literal appends a field whose name is in lower case.
func (e *Encoder) Literal(dst []byte, name string, value []byte) []byte {
	e.lower = append(e.lower[:0], name...)
	return e.pair(dst, staticName(e.lower), e.lower, value, false)
}

func (e *Encoder) lowered(name []byte) []byte {
	e.lower = e.lower[:0]
	for _, c := range name {
		if 'A' <= c && c <= 'Z' {
			c |= 0x20
		}
		e.lower = append(e.lower, c)
	}
	return e.lower
}

// secret reports fields that must not be compressed against what others sent.
func secret(known uint32, value []byte) bool {
	switch known {
	case staticAuthorization, staticProxyAuthorization:
		return true
	case staticCookie, staticSetCookie:
		return len(value) < shortCookie
	default:
		return false
	}
}

// pair appends a field. known is the first entry of the static table with its
// name, or 0.
func (e *Encoder) pair(dst []byte, known uint32, name, value []byte, never bool) []byte {
	if known != 0 && !never {
		if i := staticPair(known, value); i != 0 {
			return append(dst, 0x80|byte(i)) //nolint:gosec // 61 at most
		}
		never = secret(known, value)
	}
	if e.index == nil {
		e.index = &index{}
	}
	named := e.hash(known, name)
	if never {
		return e.literal(dst, 0x10, 4, e.nameIndex(known, named, name), name, value)
	}
	size := len(name) + len(value) + overhead
	if size > int(e.table.max/2) {
		return e.literal(dst, 0, 4, e.nameIndex(known, named, name), name, value)
	}
	pair := bits.RotateLeft64(named, 23) ^ maphash.Bytes(e.seed, value)
	if back := e.find(pair, name, value); back != 0 {
		return appendInt(dst, 0x80, 7, staticLen+back)
	}
	at := e.nameIndex(known, named, name)
	if !e.again(pair) {
		return e.literal(dst, 0, 4, at, name, value)
	}
	dst = e.literal(dst, 0x40, 6, at, name, value)
	e.add(pair, name, value)
	if known == 0 {
		e.index.names[named%nameSlots] = e.table.next
	}
	return dst
}

func (e *Encoder) hash(known uint32, name []byte) uint64 {
	if known != 0 {
		return uint64(known) * 0x9e3779b97f4a7c15
	}
	return maphash.Bytes(e.seed, name)
}

// find returns the distance of a pair's entry from the newest, which is 1, or
// 0 if it is not found.
func (e *Encoder) find(hash uint64, name, value []byte) uint32 {
	slot := hash % pairSlots
	for _, seq := range [2]uint32{e.index.pairs[slot] - 1, e.index.pairs[slot^1] - 1} {
		if back := e.back(seq); back != 0 {
			if en := e.table.entry(seq); en.hash == uint32(hash>>32) {
				if n, v := e.table.pair(en); string(v) == string(value) && string(n) == string(name) {
					return back
				}
			}
		}
	}
	return 0
}

// back returns the distance of a live entry, or 0.
func (e *Encoder) back(seq uint32) uint32 {
	if seq-e.table.first < e.table.len() {
		return e.table.next - seq
	}
	return 0
}

// nameIndex returns the index of an entry with the name, or 0.
func (e *Encoder) nameIndex(known uint32, hash uint64, name []byte) uint32 {
	if known != 0 {
		return known
	}
	seq := e.index.names[hash%nameSlots] - 1
	if back := e.back(seq); back != 0 {
		if n, _ := e.table.pair(e.table.entry(seq)); string(n) == string(name) {
			return staticLen + back
		}
	}
	return 0
}

// again reports that a pair was here before, and not long ago.
func (e *Encoder) again(hash uint64) bool {
	trace := uint16(hash>>48) | 1
	slot := &e.index.seen[hash>>8%seenSlots]
	if *slot == trace {
		*slot = 0
		return true
	}
	*slot = trace
	return false
}

// add enters a pair that fits into the table.
func (e *Encoder) add(pair uint64, name, value []byte) {
	en := e.table.add(name, value, meta{})
	en.hash = uint32(pair >> 32)
	slot := pair % pairSlots
	if first, second := e.back(e.index.pairs[slot]-1), e.back(e.index.pairs[slot^1]-1); first != 0 && (second == 0 || second > first) {
		slot ^= 1 // the other one is free, or older
	}
	e.index.pairs[slot] = e.table.next
}

// literal appends a literal whose kind leaves n bits for the name's index.
func (e *Encoder) literal(dst []byte, kind byte, n uint, at uint32, name, value []byte) []byte {
	dst = appendInt(dst, kind, n, at)
	if at == 0 {
		dst = appendString(dst, name)
	}
	return appendString(dst, value)
}

// appendString appends a string literal, in Huffman code if that is shorter.
func appendString(dst, s []byte) []byte {
	if n := huffmanSize(s); n < len(s) {
		return appendHuffman(appendInt(dst, 0x80, 7, uint32(n)), s) //nolint:gosec // a field's length
	}
	return append(appendInt(dst, 0, 7, uint32(len(s))), s...) //nolint:gosec // a field's length
}
