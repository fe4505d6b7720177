package l7

import (
	"errors"
	"io"
	"os"
	"sync/atomic"
	"time"

	"github.com/meshd/meshd/proxy/http1"
)

// minRate is how many bytes a second a client must send of a body with a known
// length, after the grace. Others may be streams, which say little for long.
const minRate = 1 << 10

// source reads one body off an HTTP/1 connection, for either end. It holds
// what head parsing left in buf; the head in front of it stays untouched until
// the exchange is over.
type source struct {
	link    *link
	buf     *buffer // where the head is; unread bytes, those of a next request included
	large   *buffer // for long bodies; unread bytes of this body only
	base    int     // in buf: end of the head
	framing http1.Framing
	left    int64 // Sized: bytes to come
	chunks  http1.ChunkDecoder
	pending []byte // Chunked: decoded, not yet returned
	full    bool   // the last read filled much of a buffer: it is a long body
	done    bool   // everything was decoded; pending may remain
	bytes   int64  // of body, returned so far
	err     *Error

	limits   *http1.Limits
	idle     time.Duration
	deadline int64         // of the exchange; 0 is none
	progress *atomic.Int64 // when bytes last moved in the exchange, either way
	look     func() error
	grace    time.Duration // Sized: how long the peer may be slower than minRate; 0 is for ever
	asked    int64         // when the running read began
	waited   int64         // how long earlier reads took
	lost     Reason        // what an unexpected end or error of the connection means
	slow     Reason        // what silence means
	eof      atomic.Bool
}

// start makes s ready for a body whose head ends at buf.r.
func (s *source) start(framing http1.Framing, length int64) {
	s.base = s.buf.r
	s.framing, s.left = framing, length
	s.pending, s.done, s.full, s.err, s.bytes = nil, false, false, nil, 0
	s.asked, s.waited = 0, 0
	s.chunks.Reset()
	s.eof.Store(framing == http1.NoBody || framing == http1.Sized && length == 0)
}

// next is Body.Next.
func (s *source) next(limit int, w Waker) ([]byte, error) {
	if s.err != nil {
		return nil, s.err
	}
	if s.eof.Load() {
		return nil, io.EOF
	}
	var view []byte
	var err error
	if s.framing == http1.Chunked {
		view, err = s.nextChunked(limit, w)
	} else {
		view, err = s.nextRaw(limit, w)
	}
	s.bytes += int64(len(view))
	return view, err
}

func (s *source) nextRaw(limit int, w Waker) ([]byte, error) {
	from := s.buf
	if s.large != nil && s.large.r < s.large.w {
		from = s.large
	}
	if from.r == from.w {
		if w != nil {
			return nil, ErrPending
		}
		from = s.room()
		n, err := s.fill(from.b[from.r:s.wanted(from)])
		if err != nil {
			if s.framing == http1.UntilClose && errors.Is(err, io.EOF) {
				s.eof.Store(true)
				return nil, io.EOF
			}
			return nil, s.fail(err)
		}
		from.w = from.r + n
		s.full = n >= (bufferSize-s.base)/2
	}
	n := min(from.w-from.r, limit)
	if s.framing == http1.Sized {
		n = int(min(int64(n), s.left))
	}
	view := from.b[from.r : from.r+n : from.r+n]
	from.r += n
	if s.framing == http1.Sized {
		if s.left -= int64(n); s.left == 0 {
			s.eof.Store(true)
			return view, io.EOF
		}
	}
	return view, nil
}

// wanted bounds a read: of a sized body never a byte more than it has, so that
// what follows stays in the connection or in buf.
func (s *source) wanted(b *buffer) int {
	if s.framing == http1.Sized {
		return int(min(int64(len(b.b)), int64(b.r)+s.left))
	}
	return len(b.b)
}

// room returns an empty buffer to read body bytes into.
func (s *source) room() *buffer {
	const least = 4 << 10
	s.buf.r, s.buf.w = s.base, s.base
	long := s.full && (s.framing == http1.UntilClose || s.left > bufferSize)
	switch {
	case s.large == nil && (long || len(s.buf.b)-s.base < least):
		s.large = getLarge()
	case s.large != nil && !s.full && len(s.buf.b)-s.base >= least:
		s.large.release() // what trickles, a quiet tunnel for example, holds little
		s.large = nil
	}
	if s.large != nil {
		s.large.r, s.large.w = 0, 0
		return s.large
	}
	return s.buf
}

func (s *source) nextChunked(limit int, w Waker) ([]byte, error) {
	for len(s.pending) == 0 && !s.done {
		data, used, err := s.chunks.Decode(s.buf.b[s.buf.r:s.buf.w], s.limits)
		s.buf.r += used
		s.pending = data
		switch {
		case ended(err):
			s.done = true
			continue
		case err != nil:
			return nil, s.fail(err)
		case len(data) > 0:
			continue
		}
		if w != nil {
			return nil, ErrPending
		}
		if err := s.more(); err != nil {
			return nil, s.fail(err)
		}
	}
	n := min(len(s.pending), limit)
	view := s.pending[:n:n]
	s.pending = s.pending[n:]
	if s.done && len(s.pending) == 0 {
		s.eof.Store(true)
		return view, io.EOF
	}
	return view, nil
}

// more reads behind the undecoded bytes of a chunked body, which are few: part
// of a size line or of the trailers.
func (s *source) more() error {
	b := s.buf
	switch {
	case b.r == b.w:
		b.r, b.w = s.base, s.base
	case b.w == len(b.b) && b.r > s.base:
		b.w = s.base + copy(b.b[s.base:], b.b[b.r:b.w])
		b.r = s.base
	}
	if len(b.b)-b.w < 1<<10 {
		// The head is in this buffer: it keeps the old bytes alive.
		if !b.grow(s.base + s.limits.HeadBytes + bufferSize) {
			return &http1.Error{Status: 431, Reason: "trailers are longer than the limit", Limit: http1.LimitHeadBytes}
		}
	}
	n, err := s.fill(b.b[b.w:])
	b.w += n
	return err
}

// fill blocks until bytes came, or the exchange's end.
func (s *source) fill(p []byte) (int, error) {
	s.asked = instant()
	n, err := s.link.read(p, s.deadline, s.look)
	now := instant()
	s.waited += now - s.asked
	if n > 0 {
		s.progress.Store(now)
	}
	return n, err
}

// silent is asked by waits about once a second.
func (s *source) silent() error {
	if s.idle > 0 && instant()-s.progress.Load() > int64(s.idle) {
		return os.ErrDeadlineExceeded
	}
	if s.grace > 0 && s.framing == http1.Sized {
		// Only the time in which we waited for the peer counts.
		waited := time.Duration(s.waited+instant()-s.asked) - s.grace
		if waited > 0 && s.bytes < int64(waited.Seconds()*minRate) {
			return os.ErrDeadlineExceeded
		}
	}
	return nil
}

// fail turns an error of the connection or of the decoder into the body's.
func (s *source) fail(err error) *Error {
	err = unexpected(err)
	var refused *http1.Error
	switch {
	case errors.As(err, &refused):
		reason := BadRequest
		if s.lost == UpstreamReset {
			reason = UpstreamProtocol
		}
		s.err = &Error{Reason: reason, Status: refused.Status, Detail: refused.Reason, Err: err}
		if reason == UpstreamProtocol {
			s.err.Status = 502
		}
	case errors.Is(err, errGone):
		s.err = &Error{Reason: ClientGone, Err: err}
	case errors.Is(err, os.ErrDeadlineExceeded):
		reason := s.slow
		if s.deadline != 0 && instant() >= s.deadline {
			reason = Timeout
		}
		s.err = &Error{Reason: reason, Err: err}
	default:
		s.err = &Error{Reason: s.lost, Err: err}
	}
	return s.err
}

// trailers is Body.Trailers.
func (s *source) trailers() http1.Fields {
	if s.framing != http1.Chunked || !s.chunks.Done() {
		return nil
	}
	return s.chunks.Trailers()
}

// raw turns s into the bytes of a tunnel.
func (s *source) raw() {
	s.framing, s.bytes = http1.UntilClose, 0
	s.pending, s.done, s.full, s.err = nil, false, false, nil
	s.eof.Store(false)
}

// release gives the buffers back.
func (s *source) release() {
	s.buf.release()
	s.large.release()
	s.buf, s.large, s.pending = nil, nil, nil
}

// unexpected keeps io.EOF, the proper end of a body, out of an *Error.
func unexpected(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// ended reports a body's proper end.
func ended(err error) bool {
	return err == io.EOF //nolint:errorlint // bodies return it as it is; an error that wraps it is a failure
}

// noWait is the Waker of who wants only what is there already.
type noWait struct{}

// Wake does nothing.
func (noWait) Wake() {}
