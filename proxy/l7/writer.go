package l7

import (
	"errors"
	"net"
	"sync/atomic"
	"time"

	"github.com/meshd/meshd/proxy/http1"
)

// copyLimit is up to where copying a head and a part of a body together is
// cheaper than a write of several parts.
const copyLimit = 2 << 10

// bodyWriter writes a body behind whatever is in out already, one system call
// per view. It holds a buffer only between begin and the write.
type bodyWriter struct {
	link     *link
	idle     time.Duration
	progress *atomic.Int64
	chunked  bool
	bytes    int64 // of body
	wire     int64 // that the connection took

	out   *buffer
	parts [3][]byte
	vec   net.Buffers
	tail  [2]byte
}

// begin returns a buffer to append a head to; put it back with set.
func (b *bodyWriter) begin() []byte {
	if b.out == nil {
		b.out = getBuffer()
	}
	return b.out.b[:0]
}

// flush writes head alone.
func (b *bodyWriter) flush(head []byte) error {
	err := b.write(head)
	b.drop()
	return err
}

func (b *bodyWriter) drop() {
	b.out.release()
	b.out = nil
}

func (b *bodyWriter) write(p []byte) error {
	if len(p) == 0 {
		return nil
	}
	n, err := b.link.write(p, b.idle)
	return b.wrote(int64(n), err)
}

func (b *bodyWriter) wrote(n int64, err error) error {
	b.wire += n
	b.progress.Store(instant())
	return err
}

// send writes head, then view as the next part of the body, and the body's end
// with last.
func (b *bodyWriter) send(head, view []byte, last bool, trailers http1.Fields) error {
	b.bytes += int64(len(view))
	if b.chunked && len(view) > 0 {
		head = http1.AppendChunkSize(head, len(view))
	}
	if len(head) == 0 && !b.chunked {
		b.drop()
		return b.write(view)
	}
	const endRoom = 2 + 5
	room := bufferSize - endRoom
	switch {
	case b.link.gathers != nil && b.link.plain:
		room = copyLimit
	case b.link.gathers != nil:
		room = 0 // it copies into its records anyway
	}
	if len(head)+len(view) <= room {
		return b.sendCopied(head, view, last, trailers)
	}
	tail := b.tail[:0]
	if b.chunked && len(view) > 0 {
		tail = append(tail, http1.LineEnd...)
	}
	if b.chunked && last {
		tail = http1.AppendLastChunk(tail, trailers)
	}
	b.parts = [3][]byte{head, view, tail}
	n, err := b.link.writeAll(&b.parts, &b.vec, b.idle)
	b.parts, b.vec = [3][]byte{}, nil
	b.drop()
	return b.wrote(n, err)
}

// sendCopied makes one write of a part that fits into the buffer behind head.
func (b *bodyWriter) sendCopied(head, view []byte, last bool, trailers http1.Fields) error {
	head = append(head, view...)
	if b.chunked && len(view) > 0 {
		head = append(head, http1.LineEnd...)
	}
	if b.chunked && last {
		head = http1.AppendLastChunk(head, trailers)
	}
	err := b.write(head)
	b.drop()
	return err
}

// pipe pulls body to its end, writing head with the first bytes that are
// there, and without them if there are none yet. The first error is the
// body's (an *Error), the second the connection's.
func (b *bodyWriter) pipe(head []byte, body Body) (pulled *Error, written error) {
	var w Waker
	if len(head) > 0 {
		w = noWait{} // the head must not wait for the body
	}
	for {
		view, err := body.Next(largeSize, w)
		last := ended(err)
		switch {
		case errors.Is(err, ErrPending):
			if err := b.flush(head); err != nil {
				return nil, err
			}
			head, w = nil, nil
			continue
		case err != nil && !last:
			if len(head) > 0 {
				b.drop()
			}
			return asError(err), nil
		}
		if head == nil {
			head = b.begin()
		}
		var trailers http1.Fields
		if last {
			trailers = body.Trailers()
		}
		if err := b.send(head, view, last, trailers); err != nil || last {
			return nil, err
		}
		head, w = nil, nil
	}
}

// asError returns err as what bodies and responses fail with.
func asError(err error) *Error {
	if e, ok := errors.AsType[*Error](err); ok {
		return e
	}
	return &Error{Reason: Internal, Err: err}
}
