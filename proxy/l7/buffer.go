package l7

import "sync"

// A head and the beginning of a body share a buffer of the first size. Long
// bodies are read with the second: fewer system calls, and only while the
// bytes run.
const (
	bufferSize = 16 << 10
	largeSize  = 64 << 10
)

// buffer holds unread bytes b[r:w]. What lies before r stays as it was until
// the buffer is given back.
type buffer struct {
	b    []byte
	r, w int
}

//nolint:gochecknoglobals // pools are shared by design: a buffer belongs to no connection
var (
	buffers      = sync.Pool{New: func() any { return &buffer{b: make([]byte, bufferSize)} }}
	largeBuffers = sync.Pool{New: func() any { return &buffer{b: make([]byte, largeSize)} }}
)

func getBuffer() *buffer {
	b, ok := buffers.Get().(*buffer)
	if !ok {
		panic("l7: the buffer pool holds something else")
	}
	return b
}

func getLarge() *buffer {
	b, ok := largeBuffers.Get().(*buffer)
	if !ok {
		panic("l7: the buffer pool holds something else")
	}
	return b
}

// release gives b back to the pool of its size. Others, grown for a large
// head, are left to the collector.
func (b *buffer) release() {
	if b == nil {
		return
	}
	b.r, b.w = 0, 0
	switch len(b.b) {
	case bufferSize:
		buffers.Put(b)
	case largeSize:
		largeBuffers.Put(b)
	}
}

// grow doubles the buffer, up to limit, and reports whether there is more room.
// The bytes move: views into them are void.
func (b *buffer) grow(limit int) bool {
	size := min(2*len(b.b), limit)
	if size <= len(b.b) {
		return false
	}
	// Sizes of the pools would give a grown buffer to a stranger.
	next := make([]byte, size+1)
	copy(next, b.b[:b.w])
	b.b = next
	return true
}
