package hpack

// firstBytes is what a table allocates when its first entry comes.
const firstBytes = 512

// table is a dynamic table (RFC 7541 section 2.3.2). Entries have sequence
// numbers; the live ones are first up to next. All arithmetic on numbers and
// positions wraps.
type table struct {
	entries     []entry // ring; its length is a power of two, or 0
	first, next uint32
	size, max   uint32

	// bytes holds names and values in the order of the entries, from position
	// base on. What is dead at its beginning is moved over when it is full.
	bytes []byte
	base  uint32
}

type entry struct {
	at          uint32 // position of the name, which the value follows
	name, value uint32 // lengths
	hash        uint32 // the encoder's
	meta        meta
}

func (e *entry) size() uint32 { return e.name + e.value + overhead }

func (t *table) len() uint32 { return t.next - t.first }

// entry returns the live entry with a sequence number.
func (t *table) entry(seq uint32) *entry {
	return &t.entries[seq&uint32(len(t.entries)-1)] //nolint:gosec // a few thousand at most
}

// pair returns an entry's bytes, valid until the next call of add.
func (t *table) pair(e *entry) (name, value []byte) {
	b := t.bytes[e.at-t.base:]
	return b[:e.name], b[e.name : e.name+e.value]
}

// setMax changes the maximum size and evicts what does not fit.
func (t *table) setMax(n uint32) {
	t.max = n
	t.evict(0)
}

// clear evicts everything.
func (t *table) clear() { t.first, t.size = t.next, 0 }

// evict makes room for an entry of a size that is at most max.
func (t *table) evict(size uint32) {
	for t.size+size > t.max {
		t.size -= t.entry(t.first).size()
		t.first++
	}
}

// add copies an entry into the table and returns it, or nil if it is larger
// than the table, which then is empty (RFC 7541 section 4.4). name and value are
// no views of the table.
func (t *table) add(name, value []byte, m meta) *entry {
	n := len(name) + len(value)
	if n+overhead > int(t.max) {
		t.clear()
		return nil
	}
	size := uint32(n) + overhead //nolint:gosec // compared above
	t.evict(size)
	t.reserve(n)
	if int(t.len()) == len(t.entries) {
		t.grow()
	}
	e := t.entry(t.next)
	*e = entry{at: t.base + uint32(len(t.bytes)), name: uint32(len(name)), value: uint32(len(value)), meta: m} //nolint:gosec // bounded by max
	t.bytes = append(append(t.bytes, name...), value...)
	t.next++
	t.size += size
	return e
}

// reserve makes room for n more bytes. Moving what lives costs less than what
// was added since it was moved last, as a quarter is free afterwards.
func (t *table) reserve(n int) {
	if len(t.bytes)+n <= cap(t.bytes) {
		return
	}
	live := t.bytes[len(t.bytes):]
	if t.len() > 0 {
		live = t.bytes[t.entry(t.first).at-t.base:]
	}
	t.base += uint32(len(t.bytes) - len(live)) //nolint:gosec // bounded by max
	into, size := t.bytes[:0], cap(t.bytes)
	for size < firstBytes || len(live)+n > size-size/4 {
		size = max(firstBytes, 2*size)
	}
	if size > cap(t.bytes) {
		into = make([]byte, 0, size)
	}
	t.bytes = append(into, live...)
}

// grow doubles the ring.
func (t *table) grow() {
	old := *t
	t.entries = make([]entry, max(8, 2*len(old.entries)))
	for seq := old.first; seq != old.next; seq++ {
		*t.entry(seq) = *old.entry(seq)
	}
}
