package http2

import (
	"io"
	"runtime"

	"github.com/meshd/meshd/proxy/http1"
	"github.com/meshd/meshd/proxy/l7"
)

const (
	// headRoom is what must be free in the write buffer before a stream is asked.
	headRoom = 2 << 10
	// leastPull is how much is pulled although no window is open, so that the end
	// of what is sent is found even then.
	leastPull = 1 << 10
)

// ring wakes the writer, or starts it. The lock must be held.
func (c *conn) ring() {
	switch {
	case !c.running:
		c.running, c.leave = true, false
		go c.writeRun()
	case c.asleep:
		c.asleep = false
		c.bell <- struct{}{}
	}
}

// writeLoop writes while there is something to write. It ends when it is told to
// leave, or when the connection ended and all streams are gone.
func (c *conn) writeLoop() {
	c.mu.Lock()
	for {
		for c.first == nil && len(c.control) == 0 && c.acks == 0 {
			if c.ending && len(c.streams) == 0 {
				c.mu.Unlock()
				close(c.done)
				return
			}
			if c.leave {
				c.running, c.leave = false, false
				c.mu.Unlock()
				return
			}
			c.asleep = true
			c.mu.Unlock()
			<-c.bell
			c.mu.Lock()
		}
		c.leave = false
		c.mu.Unlock()
		// While others go on, more becomes ready for the same write: a quarter to a
		// third of the CPU per exchange where many are under way, on two CPUs, too.
		runtime.Gosched()
		c.fill()
		c.flush()
		c.mu.Lock()
	}
}

// fill fills the write buffer with what is ready.
func (c *conn) fill() {
	c.out = getBuffer(c.wide)
	c.writing = c.out.b[:0]
	c.mu.Lock()
	c.takeControl()
	for c.first != nil && len(c.writing)+headRoom <= len(c.out.b) {
		s := c.first
		if c.first = s.next; c.first == nil {
			c.last = nil
		}
		s.next, s.isReady = nil, false
		if s.pinned {
			s.woken = true
			continue
		}
		detached, dead := s.detached, s.dead || c.mute
		c.mu.Unlock()
		if detached {
			s.owner.recycle()
		} else {
			c.advance(s, dead)
		}
		c.mu.Lock()
	}
	c.wide = c.first != nil
	c.mu.Unlock()
}

// takeControl takes the frames that no window holds back.
func (c *conn) takeControl() {
	c.writing = append(c.writing, c.control...)
	c.control, c.answers = c.control[:0], 0
	if cap(c.control) > 4<<10 {
		c.control = nil
	}
	for ; c.acks > 0; c.acks-- {
		c.writing = appendHeader(c.writing, 0, frameSettings, flagAck, 0)
		c.enc.SetLimit(c.tableSize)
	}
}

// flush writes.
func (c *conn) flush() {
	if len(c.writing) > 0 {
		c.mu.Lock()
		mute := c.mute
		c.mu.Unlock()
		if !mute {
			if err := c.link.write(c.writing, c.idle); err != nil {
				c.stop(l7.None)
			}
		}
	}
	c.writing = nil
	c.out.release()
	c.out = nil
}

// stop ends a connection that cannot be written to, or must not be: the reader
// finds out.
func (c *conn) stop(r l7.Reason) {
	c.mu.Lock()
	c.mute = true
	if c.aborted == l7.None {
		c.aborted = r
	}
	c.mu.Unlock()
	c.link.abort()
}

// advance sends what a stream has, at most a frame of data.
func (c *conn) advance(s *stream, dead bool) {
	if s.closed {
		return
	}
	if dead {
		s.close()
		return
	}
	if !s.headSent {
		end, err := s.owner.sendHead()
		switch {
		case err == l7.ErrPending: //nolint:errorlint // as it is, by contract
			return
		case err != nil:
			c.breakOff(s, err)
			return
		}
		s.headSent = true
		if end {
			c.finish(s)
			return
		}
	}
	c.sendBody(s)
}

// close is the end of a stream's outbound half.
func (s *stream) close() {
	s.closed, s.held = true, nil
	s.owner.over()
}

// finish closes a stream whose end was sent.
func (c *conn) finish(s *stream) {
	if !c.client {
		c.mu.Lock()
		early := !s.ended && !s.dead
		if early {
			s.dead = true // RFC 9113 section 8.1: the rest of the request is not wanted
			c.resetUpTo = max(c.resetUpTo, s.id)
		}
		c.mu.Unlock()
		if early {
			c.writing = appendReset(c.writing, s.id, NoError)
		}
	}
	s.close()
}

// breakOff resets a stream whose source failed.
func (c *conn) breakOff(s *stream, err error) {
	code := s.owner.broken(err)
	if s.id != 0 {
		e := l7.AsError(err)
		c.kill(s, s.id, e, &code)
	}
	s.close()
}

// sendBody sends data, up to a full frame, and the end.
func (c *conn) sendBody(s *stream) {
	frame, spent := -1, 0 // where the last frame of data begins; bytes of this turn
	c.mu.Lock()
	window := int(max(min(s.sendWindow, c.sendWindow, maxFrame), 0)) // only the writer takes of it
	c.mu.Unlock()
	for {
		if len(s.held) == 0 && !s.heldEnd {
			view, err := s.owner.next(max(window-spent, leastPull))
			switch {
			case err == io.EOF: //nolint:errorlint // as it is, by contract
				s.held, s.heldEnd = view, true
			case err == l7.ErrPending: //nolint:errorlint // as it is, by contract
				c.spendWindow(s, spent)
				return
			case err != nil:
				c.spendWindow(s, spent)
				c.breakOff(s, err)
				return
			default:
				s.held = view
			}
		}
		if len(s.held) == 0 && s.heldEnd {
			c.spendWindow(s, spent)
			c.sendEnd(s, frame)
			return
		}
		n := min(len(s.held), window-spent, len(c.out.b)-len(c.writing)-headerSize)
		if n <= 0 {
			c.spendWindow(s, spent)
			c.again(s)
			return
		}
		frame = len(c.writing)
		c.writing = append(appendHeader(c.writing, n, frameData, 0, s.id), s.held[:n]...)
		s.held = s.held[n:]
		s.sent += int64(n)
		spent += n
	}
}

// sendEnd sends trailers, or marks the last frame as the stream's end.
func (c *conn) sendEnd(s *stream, frame int) {
	trailers := s.owner.trailers()
	switch {
	case len(trailers) > 0:
		mark := c.beginHead()
		c.writing = c.enc.Begin(c.writing)
		for i := range trailers {
			if !http1.ForbiddenTrailer(trailers[i].ID) {
				c.writing = c.enc.Field(c.writing, &trailers[i])
			}
		}
		c.endHead(mark, s.id, true)
	case frame >= 0:
		c.writing[frame+4] |= flagEndStream
	default:
		c.writing = appendHeader(c.writing, 0, frameData, flagEndStream, s.id)
	}
	c.finish(s)
}

// spendWindow takes what was sent off the windows.
func (c *conn) spendWindow(s *stream, n int) {
	if n == 0 {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	s.sendWindow -= int64(n)
	c.sendWindow -= int64(n)
	c.spare = min(c.spare+sparePerData, 4*c.limits.Control)
}

// again puts s, which has bytes, at the end of the list, or makes it wait for a
// window.
func (c *conn) again(s *stream) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if min(s.sendWindow, c.sendWindow) > 0 {
		c.enqueue(s)
		return
	}
	s.starved = true
}

// beginHead begins a header block in the write buffer: the caller appends to
// c.writing with c.enc, pseudo-header fields first.
func (c *conn) beginHead() (mark int) {
	mark = len(c.writing)
	c.writing = append(c.writing, make([]byte, headerSize)...)
	return mark
}

// endHead makes frames of what was appended since beginHead.
func (c *conn) endHead(mark int, id uint32, end bool) {
	flags := byte(flagEndHeaders)
	if end {
		flags |= flagEndStream
	}
	n := len(c.writing) - mark - headerSize
	if n <= maxFrame {
		putHeader(c.writing[mark:], n, frameHeaders, flags, id)
		return
	}
	block := append([]byte(nil), c.writing[mark+headerSize:]...)
	c.writing = c.writing[:mark]
	kind := byte(frameHeaders)
	for flags &^= flagEndHeaders; ; kind, flags = frameContinuation, 0 {
		part := block[:min(len(block), maxFrame)]
		if block = block[len(part):]; len(block) == 0 {
			flags |= flagEndHeaders
		}
		c.writing = append(appendHeader(c.writing, len(part), kind, flags, id), part...)
		if len(block) == 0 {
			return
		}
	}
}
