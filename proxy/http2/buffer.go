package http2

import "sync"

// A connection reads with a buffer of the first size, which has room for the
// longest frame, and with one of the second while much comes. It writes with the
// same two. What waits for its consumer is in chunks.
const (
	bufferSize = 18 << 10
	largeSize  = 64 << 10
	smallChunk = 1 << 10
	largeChunk = 16 << 10
)

// buffer holds unread bytes b[r:w].
type buffer struct {
	b    []byte
	r, w int
}

// chunk is a part of a stream's data, b[r:w].
type chunk struct {
	b    []byte
	r, w int
	next *chunk
}

//nolint:gochecknoglobals // pools are shared by design: a buffer belongs to no connection
var (
	buffers      = sync.Pool{New: func() any { return &buffer{b: make([]byte, bufferSize)} }}
	largeBuffers = sync.Pool{New: func() any { return &buffer{b: make([]byte, largeSize)} }}
	smallChunks  = sync.Pool{New: func() any { return &chunk{b: make([]byte, smallChunk)} }}
	largeChunks  = sync.Pool{New: func() any { return &chunk{b: make([]byte, largeChunk)} }}
)

func getBuffer(large bool) *buffer {
	pool := &buffers
	if large {
		pool = &largeBuffers
	}
	b, ok := pool.Get().(*buffer)
	if !ok {
		panic("http2: the buffer pool holds something else")
	}
	return b
}

// release gives b back to the pool of its size.
func (b *buffer) release() {
	if b == nil {
		return
	}
	b.r, b.w = 0, 0
	if len(b.b) == largeSize {
		largeBuffers.Put(b)
		return
	}
	buffers.Put(b)
}

func getChunk(n int) *chunk {
	pool := &smallChunks
	if n > smallChunk {
		pool = &largeChunks
	}
	c, ok := pool.Get().(*chunk)
	if !ok {
		panic("http2: the chunk pool holds something else")
	}
	return c
}

func (c *chunk) release() {
	c.r, c.w, c.next = 0, 0, nil
	if len(c.b) == smallChunk {
		smallChunks.Put(c)
		return
	}
	largeChunks.Put(c)
}
