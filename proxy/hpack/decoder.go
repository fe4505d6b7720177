package hpack

import (
	"slices"

	"github.com/meshd/meshd/proxy/http1"
)

// initialTable is the size that both ends assume until SETTINGS say otherwise
// (RFC 9113 section 6.5.2).
const initialTable = 4096

// Limits bound one field list. A zero field takes the default of
// [http1.Limits].
type Limits struct {
	// ListSize bounds the list as SETTINGS_MAX_HEADER_LIST_SIZE counts it:
	// bytes of names and values, and 32 for each field.
	ListSize uint32
	// Fields bounds the number of fields, pseudo-header fields included.
	Fields int
}

// Decoder decodes the header blocks of one connection, in their order. It is
// one goroutine's, and holds no memory of size before the first field that is
// indexed.
type Decoder struct {
	table table
	limit uint32 // what the peer may set the table to

	block   []byte
	arena   []byte
	limits  Limits
	size    uint32
	fields  int
	started bool // a field was seen: no more size updates
	over    bool
	err     error
}

// NewDecoder returns a Decoder with an empty table of the 4096 bytes that
// every connection begins with.
func NewDecoder() *Decoder {
	return &Decoder{limit: initialTable, table: table{max: initialTable}}
}

// SetLimit changes the largest table that the peer may use, at the moment when
// it acknowledged our SETTINGS_HEADER_TABLE_SIZE. If its table is larger, its next
// block must begin with a size update.
func (d *Decoder) SetLimit(table uint32) { d.limit = table }

// Begin starts with a complete header block. Fields are appended to arena, or
// are views of constant memory; they stay valid as long as the caller leaves
// the arena's bytes alone, also those of an arena that had to be replaced by a
// larger one. None is a view of block or of the table.
func (d *Decoder) Begin(block, arena []byte, limits Limits) {
	if limits.ListSize == 0 {
		limits.ListSize = http1.DefaultHeadBytes
	}
	if limits.Fields == 0 {
		limits.Fields = http1.DefaultFields
	}
	d.block, d.arena, d.limits = block, arena, limits
	d.size, d.fields, d.started, d.over = 0, 0, false, false
}

// Next decodes one field into f. It returns false at the block's end, when the
// list is too large, and when the block is malformed; End tells which.
func (d *Decoder) Next(f *Field) bool {
	for d.err == nil && !d.over && len(d.block) > 0 {
		if d.step(f) {
			return true
		}
	}
	return false
}

// End walks over what Next was not asked for, so that the table is right, and
// returns the arena with the list's error: [ErrListTooLarge], an
// [ErrCompression], after which every block fails, or nil. It must be called
// once for each Begin.
func (d *Decoder) End() (arena []byte, err error) {
	over := d.over
	d.over = true
	for d.err == nil && len(d.block) > 0 {
		if d.started {
			d.skipIndexed()
		}
		if len(d.block) > 0 {
			d.step(nil)
		}
	}
	arena = d.arena
	d.block, d.arena = nil, nil
	if d.err == nil && over {
		return arena, ErrListTooLarge
	}
	return arena, d.err
}

// skipIndexed passes over indexed fields of one byte: a block may be nothing else,
// each of which stands for much, and must not cost more than its bytes.
func (d *Decoder) skipIndexed() {
	last := 0x80 + byte(min(staticLen+d.table.len(), 0x7e))
	i := 0
	for i < len(d.block) && 0x80 < d.block[i] && d.block[i] <= last {
		i++
	}
	d.block = d.block[i:]
}

// step decodes one instruction, and reports whether it gave a field. While
// over, it only does what changes the table.
func (d *Decoder) step(f *Field) bool {
	b := d.block[0]
	if b&0xe0 == 0x20 {
		d.resize()
		return false
	}
	if !d.started {
		d.started = true
		if d.table.max > d.limit {
			d.err = ErrTableSize
			return false
		}
	}
	switch {
	case b >= 0x80:
		return d.indexed(f)
	case b >= 0x40:
		return d.literal(f, 6)
	default:
		return d.literal(f, 4)
	}
}

// resize is a dynamic table size update (RFC 7541 section 6.3).
func (d *Decoder) resize() {
	n, rest, err := readInt(d.block, 5)
	switch {
	case err != nil:
		d.err = err
	case d.started || n > d.limit:
		d.err = ErrTableSize
	default:
		d.block = rest
		d.table.setMax(n)
	}
}

// count counts a field of n bytes, and reports whether it may be returned.
func (d *Decoder) count(n int) bool {
	if d.over || d.fields >= d.limits.Fields || n+overhead > int(d.limits.ListSize-d.size) {
		d.over = true
		return false
	}
	d.fields++
	d.size += uint32(n) + overhead //nolint:gosec // compared above
	return true
}

// indexed is an indexed field (RFC 7541 section 6.1).
func (d *Decoder) indexed(f *Field) bool {
	i, rest, err := readInt(d.block, 7)
	if err != nil {
		d.err = err
		return false
	}
	d.block = rest
	if i-1 < staticLen {
		s := &static[i]
		if !d.count(len(s.name) + len(s.value)) {
			return false
		}
		f.give(s.name, s.value, s.meta)
		return true
	}
	e := d.dynamic(i)
	if e == nil || !d.count(int(e.name+e.value)) {
		return false
	}
	name, value := d.table.pair(e)
	at := len(d.arena)
	d.arena = append(append(d.arena, name...), value...)
	split := at + len(name)
	f.give(d.arena[at:split:split], d.arena[split:len(d.arena):len(d.arena)], e.meta)
	return true
}

// dynamic returns an entry of the dynamic table, by its index in the protocol.
func (d *Decoder) dynamic(i uint32) *entry {
	back := i - staticLen // 1 is the newest
	if i == 0 || back > d.table.len() {
		d.err = ErrIndex
		return nil
	}
	return d.table.entry(d.table.next - back)
}

// literal is a literal field (RFC 7541 section 6.2). With six bits of name
// index it enters the table.
func (d *Decoder) literal(f *Field, bits uint) bool {
	index, never := bits == 6, d.block[0]&0xf0 == 0x10
	i, rest, err := readInt(d.block, bits)
	if err != nil {
		d.err = err
		return false
	}
	d.block = rest
	// More bytes than these fit neither into the list nor into the table, and
	// are not materialized.
	room := 0
	if !d.over {
		room = int(d.limits.ListSize - d.size)
	}
	if index {
		room = max(room, int(d.table.max))
	}
	room = max(room-overhead, 0)
	mark := len(d.arena)
	name, m, fits := d.name(i, room)
	if d.err != nil {
		return false
	}
	at := len(d.arena)
	if !d.str(room-len(name), fits) || d.err != nil {
		if d.err == nil {
			d.tooLong(index, mark)
		}
		return false
	}
	value := d.arena[at:len(d.arena):len(d.arena)]
	if index || !d.over {
		m = m.withValue(value)
	}
	if index {
		d.table.add(name, value, m)
	}
	if !d.count(len(name) + len(value)) {
		d.arena = d.arena[:mark]
		return false
	}
	f.give(name, value, m)
	f.Sensitive = never
	return true
}

// tooLong drops a literal that fits nowhere.
func (d *Decoder) tooLong(index bool, mark int) {
	d.arena = d.arena[:mark]
	if index {
		d.table.clear()
	}
	d.over = true
}

// name reads a literal's name, or takes it from a table. fits is false if it
// has more than room bytes.
func (d *Decoder) name(i uint32, room int) (name []byte, m meta, fits bool) {
	switch at := len(d.arena); {
	case i == 0:
		fits = d.str(room, true)
		name = d.arena[at:len(d.arena):len(d.arena)]
		return name, describe(name), fits
	case i <= staticLen:
		s := &static[i]
		return s.name, s.meta, len(s.name) <= room
	default:
		e := d.dynamic(i)
		if e == nil || int(e.name) > room {
			return nil, meta{}, false
		}
		// Adding the field may evict the entry that has its name.
		name, _ = d.table.pair(e)
		d.arena = append(d.arena, name...)
		m = e.meta
		if m.flaw == BadValue {
			m = describe(name)
		}
		return d.arena[at:len(d.arena):len(d.arena)], m, true
	}
}

// str appends a string literal (RFC 7541 section 5.2) to the arena. It returns
// false, having passed over it, if it has more than room bytes or is not
// wanted.
func (d *Decoder) str(room int, wanted bool) bool {
	if len(d.block) == 0 {
		d.err = ErrTruncated
		return false
	}
	coded := d.block[0] >= 0x80
	n, rest, err := readInt(d.block, 7)
	if err != nil {
		d.err = err
		return false
	}
	if int64(n) > int64(len(rest)) {
		d.err = ErrTruncated
		return false
	}
	src := rest[:n]
	d.block = rest[n:]
	switch {
	case !wanted || room < 0:
		return false
	case coded:
		d.arena, wanted, d.err = decodeHuffman(d.arena, src, room)
		return wanted
	case len(src) > room:
		return false
	}
	d.arena = append(slices.Grow(d.arena, len(src)), src...)
	return true
}
