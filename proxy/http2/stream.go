package http2

import (
	"errors"
	"io"
	"sync/atomic"

	"github.com/meshd/meshd/proxy/hpack"
	"github.com/meshd/meshd/proxy/http1"
	"github.com/meshd/meshd/proxy/l7"
)

// owner is what an end keeps of a stream: an exchange that is served, or one
// that is forwarded. What it sends is pulled by its connection's writer.
type owner interface {
	// sendHead appends the heads that are there, with conn.beginHead and
	// conn.endHead, up to the final one, and on a forwarding end calls conn.open
	// before. end says that the stream's end went with it. l7.ErrPending: what
	// is missing wakes the stream. It is the writer's, without the lock, as are
	// the following.
	sendHead() (end bool, err error)
	// next is l7.Body's Next, with the stream as Waker.
	next(limit int) ([]byte, error)
	// trailers follow io.EOF.
	trailers() http1.Fields
	// broken is told why sendHead or next failed, before the stream is reset with
	// the code that it returns.
	broken(err error) ErrCode
	// over is the writer's last call: the stream's end was sent, or nothing more
	// is to be sent. The stream may be closed from here on with conn.detach.
	over()
	// killed is told, by any goroutine and without the lock, once, that the stream
	// was reset, or its connection lost. It is before over.
	killed(err *l7.Error)
	// recycle is the very last call, after conn.detach: nothing points to the stream.
	recycle()
}

// stream is one stream of a connection. Its inbound half is an l7.Body, filled
// by the reader; its outbound half is pulled from its owner by the writer. It may
// be used again, for another connection, too.
type stream struct {
	conn  atomic.Pointer[conn] // changed only while nobody has it
	owner owner
	id    uint32

	// Inbound; under conn.mu.
	head, tail *chunk
	queued     int // bytes in there
	lent       int // of which so many were returned by the last Next
	recvWindow int64
	unacked    int   // consumed, not yet granted anew
	got        int64 // bytes that came
	expect     int64 // bytes that must come, -1 if unknown
	ended      bool  // its end came
	whole      bool  // and io.EOF was returned
	failed     *l7.Error
	fields     http1.Fields // trailers
	waker      l7.Waker
	sleeping   bool
	hungry     int64 // since when somebody waits, 0 if nobody does
	waited     int64 // how long was waited before
	bell       chan struct{}

	// Outbound; under conn.mu.
	next       *stream // in the list of ready ones
	isReady    bool
	sendWindow int64
	starved    bool // has bytes and no window
	dead       bool // reset, or its connection ended
	detached   bool
	pinned     bool // kill is under way, or the reader asks the source first
	woken      bool // meanwhile somebody woke it
	killedBy   *l7.Error
	byPeer     bool // the peer reset it

	// The writer's.
	headSent bool
	closed   bool // over was called
	held     []byte
	heldEnd  bool
	sent     int64
}

// begin prepares s for a new exchange.
func (s *stream) begin(c *conn, o owner) {
	bell := s.bell
	if bell == nil {
		bell = make(chan struct{}, 1)
	}
	s.owner = o
	s.id, s.head, s.tail, s.queued, s.lent, s.unacked, s.got, s.expect = 0, nil, nil, 0, 0, 0, 0, -1
	s.ended, s.whole, s.failed, s.fields, s.waker, s.sleeping, s.hungry, s.waited = false, false, nil, nil, nil, false, 0, 0
	s.bell = bell
	s.isReady, s.starved, s.dead, s.detached, s.pinned, s.woken, s.killedBy, s.byPeer = false, false, false, false, false, false, nil, false
	s.headSent, s.closed, s.held, s.heldEnd, s.sent = false, false, nil, false, 0
	s.conn.Store(c)
}

// Wake makes s ready for the writer: it is the Waker of what s sends.
func (s *stream) Wake() {
	c := s.conn.Load()
	if c == nil {
		return
	}
	c.mu.Lock()
	if !s.detached && s.conn.Load() == c {
		c.enqueue(s)
	}
	c.mu.Unlock()
}

// Next implements l7.Body.
func (s *stream) Next(limit int, w l7.Waker) ([]byte, error) {
	c := s.conn.Load()
	c.mu.Lock()
	defer c.mu.Unlock()
	s.giveBack(c)
	for {
		switch {
		case s.queued > 0:
			return s.lend(limit)
		case s.failed != nil:
			return nil, s.failed
		case s.ended:
			s.whole = true
			return nil, io.EOF
		}
		if s.hungry == 0 && s.expect >= 0 {
			s.hungry = l7.Instant()
		}
		if w != nil {
			s.waker = w
			return nil, l7.ErrPending
		}
		s.sleeping = true
		c.mu.Unlock()
		<-s.bell
		c.mu.Lock()
	}
}

// lend returns the next bytes.
func (s *stream) lend(limit int) ([]byte, error) {
	h := s.head
	n := min(limit, h.w-h.r)
	view := h.b[h.r : h.r+n : h.r+n]
	h.r += n
	s.queued -= n
	s.lent = n
	if s.queued == 0 && s.ended {
		s.whole = true
		return view, io.EOF
	}
	return view, nil
}

// giveBack grants what was lent, and drops what was used up.
func (s *stream) giveBack(c *conn) {
	if s.lent > 0 {
		c.grant(s, s.lent)
		s.lent = 0
	}
	for h := s.head; h != nil && h.r == h.w; h = s.head {
		s.head = h.next
		h.release()
	}
	if s.head == nil {
		s.tail = nil
	}
}

// Trailers implements l7.Body.
func (s *stream) Trailers() http1.Fields { return s.fields }

// Blocking is false: the connection's reader fills the stream.
func (*stream) Blocking() bool { return false }

// Cancel implements l7.Body, for a body whose end is not awaited any more: what
// comes is dropped.
func (s *stream) Cancel(r l7.Reason) {
	c := s.conn.Load()
	if c == nil || r == l7.None {
		return
	}
	c.mu.Lock()
	if s.whole || s.failed != nil || s.detached {
		c.mu.Unlock()
		return
	}
	s.failed = &l7.Error{Reason: r}
	w := s.drop(c)
	c.mu.Unlock()
	if w != nil {
		w.Wake()
	}
}

// drop throws away what was not lent yet, and returns whom to wake.
func (s *stream) drop(c *conn) l7.Waker {
	if s.queued > 0 {
		c.grant(nil, s.queued)
		s.queued = 0
		for h := s.head; h != nil; h = h.next {
			h.r = h.w
		}
	}
	return s.awake()
}

// awake returns whom to wake, and wakes who sleeps.
func (s *stream) awake() l7.Waker {
	if s.hungry != 0 {
		s.waited += l7.Instant() - s.hungry
		s.hungry = 0
	}
	if s.sleeping {
		s.sleeping = false
		s.bell <- struct{}{}
	}
	w := s.waker
	s.waker = nil
	return w
}

// put queues data that came.
func (c *conn) put(id uint32, data []byte) {
	c.mu.Lock()
	s := c.streams[id]
	if s == nil || s.failed != nil || s.dead {
		c.grant(nil, len(data))
		c.mu.Unlock()
		return
	}
	s.queued += len(data)
	for len(data) > 0 {
		if s.tail == nil || s.tail.w == len(s.tail.b) {
			k := getChunk(len(data))
			if s.tail == nil {
				s.head = k
			} else {
				s.tail.next = k
			}
			s.tail = k
		}
		n := copy(s.tail.b[s.tail.w:], data)
		s.tail.w += n
		data = data[n:]
	}
	w := s.awake()
	c.mu.Unlock()
	if w != nil {
		w.Wake()
	}
}

// end says that no more comes on a stream but trailers, which are kept as they
// are. It reports false if less came than was declared.
func (c *conn) end(id uint32, trailers http1.Fields) bool {
	c.mu.Lock()
	s := c.streams[id]
	if s == nil {
		c.mu.Unlock()
		return true
	}
	if s.expect >= 0 && s.got != s.expect {
		c.mu.Unlock()
		return false
	}
	s.ended, s.fields = true, trailers
	w := s.awake()
	c.mu.Unlock()
	if w != nil {
		w.Wake()
	}
	return true
}

// grant counts n bytes of s as consumed, so that the peer may send more. With a
// nil stream only the connection's window grows. The lock must be held.
func (c *conn) grant(s *stream, n int) {
	if n <= 0 {
		return
	}
	if c.unacked += n; c.unacked >= c.limits.Window/2 {
		if !c.ending {
			c.control = appendWindowUpdate(c.control, 0, c.unacked)
			c.ring()
		}
		c.recvWindow += int64(c.unacked)
		c.unacked = 0
	}
	if s == nil || s.ended || s.dead || s.failed != nil {
		return
	}
	if s.unacked += n; s.unacked >= c.limits.StreamWindow/2 {
		if !c.ending {
			c.control = appendWindowUpdate(c.control, s.id, s.unacked)
			c.ring()
		}
		s.recvWindow += int64(s.unacked)
		s.unacked = 0
	}
}

// kill ends a stream because of err, which its consumer gets unless all came
// already, and with a code resets it. Others may have ended it already.
func (c *conn) kill(s *stream, id uint32, err *l7.Error, code *ErrCode) {
	if w, ok := c.condemn(s, id, err, code); ok {
		c.execute(s, err, w)
	}
}

// condemn is the first half of kill: from here on the stream is dead, and is not used again before execute, which the
// caller must call if it returns true, without a lock. id is 0 for a stream that was not opened yet, of which the caller
// sees to it that it is not detached meanwhile.
func (c *conn) condemn(s *stream, id uint32, err *l7.Error, code *ErrCode) (wake l7.Waker, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if id != 0 && c.streams[id] != s || s.dead || s.detached {
		return nil, false
	}
	s.dead, s.pinned, s.killedBy = true, true, err
	if code != nil && s.id != 0 && !c.ending {
		c.control = appendReset(c.control, s.id, *code)
		c.resetUpTo = max(c.resetUpTo, s.id)
		c.ring()
	}
	if !s.ended && s.failed == nil {
		s.failed = err
		wake = s.drop(c)
	}
	return wake, true
}

// execute is the second half of kill.
func (c *conn) execute(s *stream, err *l7.Error, wake l7.Waker) {
	o := s.owner
	o.killed(err)
	if wake != nil {
		wake.Wake()
	}
	c.mu.Lock()
	s.pinned = false
	if !s.detached {
		c.enqueue(s)
	}
	gone := s.detached && !s.isReady
	c.mu.Unlock()
	if gone {
		o.recycle()
	}
}

// detach takes a stream off its connection, after over and when its consumer is
// done, and recycles it as soon as nothing points to it.
func (c *conn) detach(s *stream) {
	c.mu.Lock()
	if s.id != 0 {
		delete(c.streams, s.id)
		if !s.ended && !s.byPeer {
			c.resetUpTo = max(c.resetUpTo, s.id)
		}
	}
	s.drop(c)
	s.giveBack(c)
	s.detached = true
	gone := !s.isReady && !s.pinned // else the writer, or kill, recycles it
	if len(c.streams) == 0 {
		if c.ending {
			c.ring()
		} else if c.hasty {
			c.link.hurry()
		}
	}
	c.mu.Unlock()
	if gone {
		s.owner.recycle()
	}
}

// enqueue makes s ready for the writer. The lock must be held.
func (c *conn) enqueue(s *stream) {
	s.starved = false
	if s.isReady {
		return
	}
	s.isReady, s.next = true, nil
	if c.last == nil {
		c.first = s
	} else {
		c.last.next = s
	}
	c.last = s
	c.ring()
}

func isListTooLarge(err error) bool { return errors.Is(err, hpack.ErrListTooLarge) }
