package http2

import (
	"encoding/binary"
	"runtime"

	"github.com/meshd/meshd/proxy/l7"
)

// takeSettings takes the peer's SETTINGS, or its acknowledgement of ours.
func (c *conn) takeSettings(h frameHeader, p []byte) error {
	switch {
	case h.stream != 0:
		return violation(ProtocolError, errNotOnZero)
	case h.flags&flagAck != 0 && len(p) != 0, len(p)%settingSize != 0:
		return violation(FrameSizeError, errFrameSize)
	case h.flags&flagAck != 0:
		c.acked = true
		return c.spend()
	}
	c.greeted = true
	c.mu.Lock()
	for ; len(p) > 0; p = p[settingSize:] {
		if err := c.set(binary.BigEndian.Uint16(p), binary.BigEndian.Uint32(p[2:])); err != nil {
			c.mu.Unlock()
			return err
		}
	}
	c.acks++
	err := c.answered(headerSize)
	c.mu.Unlock()
	if err == nil {
		c.role.settings()
	}
	return err
}

// set takes one setting.
func (c *conn) set(id uint16, v uint32) error {
	switch id {
	case settingTableSize:
		c.tableSize = v // for the writer, at the acknowledgement
	case settingPush:
		if v > 1 || c.client && v == 1 {
			return violation(ProtocolError, errSetting)
		}
	case settingMaxStreams:
		c.peer.maxStreams = v
	case settingWindow:
		if v > maxWindow {
			return violation(FlowControlError, errWindow)
		}
		return c.setWindow(int64(v))
	case settingFrameSize:
		if v < smallestMaxFrame || v > largestMaxFrameSize {
			return violation(ProtocolError, errSetting)
		}
		c.peer.frame = int(v)
	case settingConnect:
		if v > 1 || v == 0 && c.peer.connect {
			return violation(ProtocolError, errSetting)
		}
		c.peer.connect = v == 1
	}
	return nil
}

// setWindow changes the windows of all streams, perhaps to less than nothing
// (RFC 9113 section 6.9.2).
func (c *conn) setWindow(v int64) error {
	grown := v - c.peer.window
	c.peer.window = v
	for _, s := range c.streams {
		if s.sendWindow += grown; s.sendWindow > maxWindow {
			return violation(FlowControlError, errWindow)
		}
		if s.starved && s.sendWindow > 0 {
			c.enqueue(s)
		}
	}
	return nil
}

// yieldResets is after how many resets the reader lets others go on.
const yieldResets = 32

// floods counts what costs us more than the peer.
type floods struct {
	since  int64
	resets int
}

// look lets old sins go, and ends what was begun and not finished.
func (f *floods) look(c *conn, now int64) error {
	if now-f.since >= resetPeriod {
		f.since, f.resets = now, 0
		c.mu.Lock()
		c.spare = max(c.spare, c.limits.Control)
		c.mu.Unlock()
	}
	if c.headTimeout <= 0 {
		return nil
	}
	if !c.greeted && now-c.began > int64(c.headTimeout) || c.block.id != 0 && now-c.block.since > int64(c.headTimeout) {
		return violation(ProtocolError, ErrHeadTimeout)
	}
	return nil
}

// countReset counts a stream that was reset before it was over.
func (c *conn) countReset() error {
	if c.calm.resets++; c.calm.resets > c.limits.Resets {
		now := l7.Instant()
		if now-c.calm.since < resetPeriod {
			return violation(EnhanceYourCalm, ErrResets)
		}
		c.calm.since, c.calm.resets = now, 1
	}
	if c.calm.resets%yieldResets == 0 {
		runtime.Gosched() // else the writer, who buries what was reset, comes late, and much of it is held
	}
	return nil
}

// spend counts a frame that brings nothing.
func (c *conn) spend() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.spendLocked()
}

func (c *conn) spendLocked() error {
	if c.spare--; c.spare < 0 {
		return violation(EnhanceYourCalm, ErrControl)
	}
	return nil
}

// answered counts a frame whose answer, n bytes, was put into control. c.mu must
// be held.
func (c *conn) answered(n int) error {
	c.ring()
	if c.answers += n; c.answers > c.limits.Answers {
		return violation(EnhanceYourCalm, ErrAnswers)
	}
	return c.spendLocked()
}

// refuse resets a stream that is not known (any more), because of what came on
// it.
func (c *conn) refuse(id uint32, code ErrCode) error {
	if err := c.decline(id, code); err != nil {
		return err
	}
	return c.countReset()
}

// decline resets a stream that is not known, as the peer could not know better.
func (c *conn) decline(id uint32, code ErrCode) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.control = appendReset(c.control, id, code)
	c.resetUpTo = max(c.resetUpTo, id)
	return c.answered(headerSize + 4)
}

// malformed resets a stream because of what came on it.
func (c *conn) malformed(s *stream, id uint32, code ErrCode) error {
	c.count.Malformed.Add(1)
	c.kill(s, id, &l7.Error{Reason: c.wrong, Err: &ConnError{Code: code, Err: errMalformed}}, &code)
	return c.countReset()
}
