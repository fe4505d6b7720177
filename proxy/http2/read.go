package http2

import (
	"encoding/binary"

	"github.com/meshd/meshd/proxy/l7"
)

// dataFrame is a DATA frame whose payload is coming.
type dataFrame struct {
	id   uint32 // 0 if nobody wants it
	left int
	pad  int
	end  bool
	open bool
}

// headBlock is a header block whose CONTINUATION is to come.
type headBlock struct {
	id    uint32
	end   bool
	parts int
	since int64
	b     []byte
}

// violation is a connection error.
func violation(code ErrCode, err error) error { return &ConnError{Code: code, Err: err} }

// consume takes what was read, up to an unfinished frame.
func (c *conn) consume() error {
	b := c.in
	if c.prefix < len(preface) {
		n := min(len(preface)-c.prefix, b.w-b.r)
		if string(b.b[b.r:b.r+n]) != preface[c.prefix:c.prefix+n] {
			return violation(ProtocolError, errPreface)
		}
		b.r += n
		c.prefix += n
	}
	for b.r < b.w {
		if c.frame.open {
			if err := c.payload(); err != nil {
				return err
			}
			continue
		}
		again, err := c.nextFrame()
		if err != nil {
			return err
		}
		if !again {
			break
		}
	}
	switch {
	case b.r == b.w:
		c.in = nil
		b.release()
	case b.r > 0:
		b.w = copy(b.b, b.b[b.r:b.w])
		b.r = 0
	}
	return nil
}

// nextFrame takes one frame, of DATA only the header. It reports false if more must be
// read before.
func (c *conn) nextFrame() (bool, error) {
	b := c.in
	rest := b.b[b.r:b.w]
	if len(rest) < headerSize {
		return false, nil
	}
	h := parseHeader(rest)
	switch {
	case h.length > maxFrame:
		return false, violation(FrameSizeError, errTooLong)
	case !c.greeted && (h.kind != frameSettings || h.flags&flagAck != 0):
		return false, violation(ProtocolError, errFirstSettings)
	case c.block.id != 0 && (h.kind != frameContinuation || h.stream != c.block.id):
		return false, violation(ProtocolError, errContinuation)
	}
	if h.kind == frameData {
		return c.beginData(h, rest[headerSize:])
	}
	if len(rest) < headerSize+h.length {
		return false, nil
	}
	b.r += headerSize + h.length
	return true, c.take(h, rest[headerSize:headerSize+h.length])
}

// take handles every frame but DATA.
func (c *conn) take(h frameHeader, p []byte) error {
	switch h.kind {
	case frameHeaders:
		return c.takeHeaders(h, p)
	case frameContinuation:
		return c.takeContinuation(h, p)
	case framePriority:
		return c.takePriority(h, p)
	case frameReset:
		return c.takeReset(h, p)
	case frameSettings:
		return c.takeSettings(h, p)
	case framePush:
		return violation(ProtocolError, errPush)
	case framePing:
		return c.takePing(h, p)
	case frameGoAway:
		if h.stream != 0 {
			return violation(ProtocolError, errNotOnZero)
		}
		if len(p) < 8 {
			return violation(FrameSizeError, errFrameSize)
		}
		c.role.goAway(binary.BigEndian.Uint32(p)&lastStream, ErrCode(binary.BigEndian.Uint32(p[4:])), p[8:])
		return c.spend()
	case frameWindowUpdate:
		return c.takeWindowUpdate(h, p)
	default:
		return c.spend() // RFC 9113 section 4.1: unknown ones are ignored
	}
}

// beginData takes the header of a DATA frame.
func (c *conn) beginData(h frameHeader, p []byte) (bool, error) {
	if h.stream == 0 {
		return false, violation(ProtocolError, errOnZero)
	}
	used, left, pad := headerSize, h.length, 0
	if h.flags&flagPadded != 0 {
		switch {
		case h.length == 0:
			return false, violation(FrameSizeError, errFrameSize)
		case len(p) == 0:
			return false, nil
		}
		pad = int(p[0])
		used++
		if left--; pad > left {
			return false, violation(ProtocolError, errPadding)
		}
		left -= pad
	}
	c.in.r += used
	end := h.flags&flagEndStream != 0
	id, err := c.admit(h, left, end)
	if err != nil {
		return false, err
	}
	c.frame = dataFrame{id: id, left: left, pad: pad, end: end, open: left+pad > 0}
	if !c.frame.open {
		return true, c.endData()
	}
	return true, nil
}

// admit counts a DATA frame against the windows, and returns its stream's number
// if that is open for it, else 0.
func (c *conn) admit(h frameHeader, data int, end bool) (uint32, error) {
	c.mu.Lock()
	s := c.streams[h.stream]
	switch {
	case s == nil && !c.used(h.stream):
		defer c.mu.Unlock()
		if h.stream > c.highest {
			return 0, violation(ProtocolError, errIdle)
		}
		return 0, violation(StreamClosed, errClosedStream)
	case int64(h.length) > c.recvWindow:
		defer c.mu.Unlock()
		return 0, violation(FlowControlError, errOverrun)
	}
	c.recvWindow -= int64(h.length)
	if waste := h.length - data; waste > 0 { // the pad, and its length
		c.grant(nil, waste)
	}
	var code ErrCode
	switch {
	case s == nil:
		c.grant(nil, data)
		if h.stream <= c.resetUpTo { // it may have been on its way
			c.mu.Unlock()
			return 0, c.spend()
		}
		c.mu.Unlock()
		return 0, c.refuse(h.stream, StreamClosed)
	case s.byPeer:
		c.grant(nil, data)
		c.mu.Unlock()
		return 0, c.refuse(h.stream, StreamClosed)
	case s.ended:
		code = StreamClosed
	case int64(h.length) > s.recvWindow:
		code = FlowControlError
	default:
		s.recvWindow -= int64(h.length)
		s.got += int64(data)
		if s.expect >= 0 && (s.got > s.expect || end && s.got != s.expect) {
			code = ProtocolError
		}
	}
	if code != NoError {
		c.grant(nil, data)
		c.mu.Unlock()
		return 0, c.malformed(s, h.stream, code)
	}
	if data > 0 {
		c.spare = min(c.spare+sparePerData, 4*c.limits.Control)
	}
	c.mu.Unlock()
	if data == 0 && !end {
		return h.stream, c.spend()
	}
	return h.stream, nil
}

// payload takes what is there of a DATA frame's payload.
func (c *conn) payload() error {
	b, f := c.in, &c.frame
	if n := min(f.left, b.w-b.r); n > 0 {
		if f.id != 0 {
			c.put(f.id, b.b[b.r:b.r+n])
		}
		f.left -= n
		b.r += n
	}
	n := min(f.pad, b.w-b.r)
	f.pad -= n
	b.r += n
	if f.left+f.pad > 0 {
		return nil
	}
	return c.endData()
}

func (c *conn) endData() error {
	id, end := c.frame.id, c.frame.end
	c.frame = dataFrame{}
	if id != 0 && end {
		c.end(id, nil)
	}
	return nil
}

func (c *conn) takeHeaders(h frameHeader, p []byte) error {
	if h.stream == 0 {
		return violation(ProtocolError, errOnZero)
	}
	pad := 0
	if h.flags&flagPadded != 0 {
		if len(p) == 0 {
			return violation(FrameSizeError, errFrameSize)
		}
		pad = int(p[0])
		p = p[1:]
	}
	selfish := false
	if h.flags&flagPriority != 0 {
		if len(p) < 5 {
			return violation(FrameSizeError, errFrameSize)
		}
		selfish = binary.BigEndian.Uint32(p)&lastStream == h.stream
		p = p[5:]
	}
	if pad > len(p) {
		return violation(ProtocolError, errPadding)
	}
	if selfish {
		return violation(ProtocolError, errSelf)
	}
	p = p[:len(p)-pad]
	end := h.flags&flagEndStream != 0
	if h.flags&flagEndHeaders != 0 {
		return c.giveHead(h.stream, p, end)
	}
	c.block = headBlock{id: h.stream, end: end, since: l7.Instant(), b: append(c.block.b[:0], p...)}
	return nil
}

func (c *conn) takeContinuation(h frameHeader, p []byte) error {
	if c.block.id == 0 {
		return violation(ProtocolError, errContinuation)
	}
	// A compressed block is hardly ever longer than what it means.
	c.block.parts++
	if c.block.parts > c.limits.Continuations || len(c.block.b)+len(p) > int(c.lists.ListSize)+maxFrame {
		return violation(EnhanceYourCalm, ErrContinuations)
	}
	c.block.b = append(c.block.b, p...)
	if h.flags&flagEndHeaders == 0 {
		return nil
	}
	id, block, end := c.block.id, c.block.b, c.block.end
	c.block = headBlock{}
	return c.giveHead(id, block, end)
}

// giveHead gives a header block to the role.
func (c *conn) giveHead(id uint32, block []byte, end bool) error {
	c.mu.Lock()
	s := c.streams[id]
	c.mu.Unlock()
	return c.role.head(id, s, block, end)
}

// skipHead decodes a block that nobody wants, so that the table stays right.
func (c *conn) skipHead(block []byte) error {
	c.dec.Begin(block, nil, c.lists)
	if _, err := c.dec.End(); err != nil && !isListTooLarge(err) {
		return violation(CompressionError, err)
	}
	return nil
}

func (c *conn) takePriority(h frameHeader, p []byte) error {
	switch {
	case h.stream == 0:
		return violation(ProtocolError, errOnZero)
	case len(p) != 5:
		return c.wrongFrame(h.stream, FrameSizeError)
	case binary.BigEndian.Uint32(p)&lastStream == h.stream:
		return c.wrongFrame(h.stream, ProtocolError)
	}
	return c.spend()
}

// wrongFrame is a stream error on a stream of any state.
func (c *conn) wrongFrame(id uint32, code ErrCode) error {
	c.mu.Lock()
	s := c.streams[id]
	idle := id > c.highest
	c.mu.Unlock()
	switch {
	case s != nil:
		return c.malformed(s, id, code)
	case idle: // a reset of a stream that was never opened is an error itself
		return violation(code, errSelf)
	}
	return c.refuse(id, code)
}

func (c *conn) takeReset(h frameHeader, p []byte) error {
	switch {
	case h.stream == 0:
		return violation(ProtocolError, errOnZero)
	case len(p) != 4:
		return violation(FrameSizeError, errFrameSize)
	}
	c.mu.Lock()
	s := c.streams[h.stream]
	idle := h.stream > c.highest
	if s != nil {
		s.byPeer = true
	}
	c.mu.Unlock()
	switch {
	case idle:
		return violation(ProtocolError, errIdle)
	case s == nil:
		return c.spend()
	}
	code := ErrCode(binary.BigEndian.Uint32(p))
	c.kill(s, h.stream, &l7.Error{Reason: c.lost, Err: &ResetError{Code: code}}, nil)
	if c.client {
		return nil
	}
	return c.countReset()
}

func (c *conn) takePing(h frameHeader, p []byte) error {
	switch {
	case h.stream != 0:
		return violation(ProtocolError, errNotOnZero)
	case len(p) != 8:
		return violation(FrameSizeError, errFrameSize)
	case h.flags&flagAck != 0:
		c.role.pong(binary.BigEndian.Uint64(p))
		return c.spend()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.control = appendPing(c.control, true, p)
	return c.answered(headerSize + 8)
}

func (c *conn) takeWindowUpdate(h frameHeader, p []byte) error {
	if len(p) != 4 {
		return violation(FrameSizeError, errFrameSize)
	}
	n := int64(binary.BigEndian.Uint32(p) & maxWindow)
	c.mu.Lock()
	if h.stream == 0 {
		defer c.mu.Unlock()
		switch {
		case n == 0:
			return violation(ProtocolError, errNoIncrement)
		case c.sendWindow+n > maxWindow:
			return violation(FlowControlError, errWindow)
		}
		c.sendWindow += n
		c.feed(n)
		return c.spendLocked()
	}
	s := c.streams[h.stream]
	idle := h.stream > c.highest
	switch {
	case idle:
		c.mu.Unlock()
		return violation(ProtocolError, errIdle)
	case s == nil:
	case n == 0:
		c.mu.Unlock()
		return c.malformed(s, h.stream, ProtocolError)
	case s.sendWindow+n > maxWindow:
		c.mu.Unlock()
		return c.malformed(s, h.stream, FlowControlError)
	default:
		s.sendWindow += n
		if s.starved && s.sendWindow > 0 {
			c.enqueue(s)
		}
	}
	defer c.mu.Unlock()
	return c.spendLocked()
}

// feed makes the streams ready that waited for the connection's window.
func (c *conn) feed(grown int64) {
	if c.sendWindow <= 0 || c.sendWindow-grown > 0 {
		return // it was open before
	}
	for _, s := range c.streams {
		if s.starved && s.sendWindow > 0 {
			c.enqueue(s)
		}
	}
}
