package record

import "sync"

const (
	headerSize = 5
	// maxPlain is how much a record carries, maxPayload how much it may take on the wire behind its header (RFC 8446 sections 5.1 and 5.2).
	maxPlain   = 1 << 14
	maxPayload = maxPlain + 256
	// ours is what a record of our own making takes beyond its content: header, type and tag.
	ours    = headerSize + 1 + tagSize
	tagSize = 16 // of every suite

	// A small buffer holds any one record, a large one several: fewer system calls for bulk.
	smallSize  = headerSize + maxPayload
	largeCount = 4
	largeSize  = largeCount * smallSize
)

// buffer holds bytes b[r:w] of the wire.
type buffer struct {
	b    []byte
	r, w int
}

//nolint:gochecknoglobals // memory, not state: a buffer belongs to no connection. What comes in is kept apart from what goes out
var (
	smallIn  = sync.Pool{New: func() any { return &buffer{b: make([]byte, smallSize)} }}
	largeIn  = sync.Pool{New: func() any { return &buffer{b: make([]byte, largeSize)} }}
	smallOut = sync.Pool{New: func() any { return &buffer{b: make([]byte, maxPlain+ours)} }}
	largeOut = sync.Pool{New: func() any { return &buffer{b: make([]byte, largeCount*(maxPlain+ours))} }}
)

func borrow(small, large *sync.Pool, bulk bool) *buffer {
	pool := small
	if bulk {
		pool = large
	}
	b, ok := pool.Get().(*buffer)
	if !ok {
		panic("record: the buffer pool holds something else")
	}
	b.r, b.w = 0, 0
	return b
}

func giveBack(b *buffer, small, large *sync.Pool) {
	if len(b.b) >= largeCount*maxPlain {
		large.Put(b)
	} else {
		small.Put(b)
	}
}
