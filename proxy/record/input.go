package record

import (
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"

	"github.com/meshd/meshd/proxy/sock"
)

const (
	// maxIdle is how many records in a row may carry no data, as in crypto/tls: empty ones, key updates.
	maxIdle = 16
	// maxMessage is the longest handshake message that is put together: a ticket, which we have no use for.
	maxMessage = 1 << 16
)

// role is which side of the session we are.
type role uint8

const (
	server role = iota
	client
)

// input is the direction that a Conn reads. It belongs to the goroutine that reads.
type input struct {
	role role
	keys protection
	buf  *buffer // nil while nothing is under way
	// bulk says that the last read filled its buffer.
	bulk  bool
	plain []byte // opened, in buf, and not read yet
	hand  []byte // of a handshake message that is not whole yet
	idle  int    // records without data in a row
	asked bool   // the peer wants our key changed
	asker sock.Asker
	err   error // why nothing comes any more; io.EOF is the peer's goodbye
}

// Read reads what is there, and blocks until something is. It returns io.EOF after the peer's goodbye only: a connection that
// ends without is io.ErrUnexpectedEOF.
func (c *Conn) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	defer c.in.settle()
	n := 0
	for {
		m := copy(p[n:], c.in.plain)
		n, c.in.plain = n+m, c.in.plain[m:]
		switch {
		case n == len(p):
			return n, nil
		case c.in.err != nil || n > 0 && !c.in.whole():
			if n > 0 {
				return n, nil
			}
			return 0, c.in.err
		case c.in.whole():
			n += c.open(p[n:])
		default:
			if err := c.fill(); err != nil {
				return 0, err
			}
		}
	}
}

// ReadLent is Read into what l lends once there are bytes. While it waits nothing is lent, and nothing is held.
func (c *Conn) ReadLent(l sock.Lender) (int, error) {
	for len(c.in.plain) == 0 && c.in.err == nil {
		if c.in.whole() {
			c.open(nil)
			continue
		}
		c.in.settle()
		if err := c.fill(); err != nil {
			return 0, err
		}
	}
	if len(c.in.plain) == 0 {
		c.in.settle()
		return 0, c.in.err
	}
	return c.Read(l.Lend())
}

// AskLent is that of sock.Conn: q asks, and lends memory for the answer.
func (c *Conn) AskLent(q sock.Asker) (int, error) {
	if c.Buffered() {
		return 0, sock.ErrBusy
	}
	c.in.asker = q
	n, err := c.t.AskLent((*lender)(c))
	c.in.asker = nil
	if n == 0 {
		return 0, c.ended(err)
	}
	c.in.buf.w = n
	c.in.bulk = n == len(c.in.buf.b)
	return c.ReadLent(q)
}

// Buffered reports whether there is something of the peer's, data or not, that was taken off the connection and not read yet.
// It is for who would read next.
func (c *Conn) Buffered() bool { return c.in.buf != nil || c.in.err != nil }

// settle gives the buffer back if nothing of it is left.
func (in *input) settle() {
	if b := in.buf; b != nil && b.r == b.w && len(in.plain) == 0 {
		giveBack(b, &smallIn, &largeIn)
		in.buf, in.plain = nil, nil
	}
}

// payloadSize reads it off a record's header.
func payloadSize(header []byte) int { return int(binary.BigEndian.Uint16(header[3:headerSize])) }

// whole reports whether the next record is here, or enough of it to refuse it.
func (in *input) whole() bool {
	b := in.buf
	if b == nil || b.w-b.r < headerSize {
		return false
	}
	size := payloadSize(b.b[b.r:])
	return b.w-b.r >= headerSize+size || size > maxPayload
}

// fill reads more of the wire. An error that is final is kept.
func (c *Conn) fill() error {
	in := &c.in
	var n, room int
	var err error
	if in.buf == nil {
		n, err = c.t.ReadLent((*lender)(c))
		if n > 0 {
			in.buf.w, room = n, len(in.buf.b)
		}
	} else {
		b := in.spacious()
		room = len(b.b) - b.w
		n, err = c.t.Read(b.b[b.w:])
		b.w += n
	}
	if n > 0 {
		in.bulk = n == room
		return nil
	}
	return c.ended(err)
}

// ended keeps an error of the transport that is final, and names an end without a goodbye.
func (c *Conn) ended(err error) error {
	if err == nil || errors.Is(err, sock.ErrBusy) || errors.Is(err, sock.ErrUnasked) {
		return err
	}
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	if timeout, ok := errors.AsType[net.Error](err); !ok || !timeout.Timeout() {
		c.in.err = err
	}
	return err
}

// lender gives a Conn's own buffer to a read that has something to put there.
type lender Conn

// Lend implements sock.Lender.
func (l *lender) Lend() []byte {
	l.in.buf = borrow(&smallIn, &largeIn, l.in.bulk)
	return l.in.buf.b
}

// Ask implements sock.Asker.
func (l *lender) Ask() bool { return l.in.asker.Ask() }

// Return implements sock.Lender.
func (l *lender) Return() {
	giveBack(l.in.buf, &smallIn, &largeIn)
	l.in.buf = nil
}

// spacious returns the buffer with room for the rest of a record. What is in it moves to the front, or to a larger one if
// there is much to come. Nothing of it is waiting to be read.
func (in *input) spacious() *buffer {
	b := in.buf
	if in.bulk && len(b.b) < largeSize {
		large := borrow(&smallIn, &largeIn, true)
		large.w = copy(large.b, b.b[b.r:b.w])
		giveBack(b, &smallIn, &largeIn)
		in.buf = large
		return large
	}
	b.w = copy(b.b, b.b[b.r:b.w])
	b.r = 0
	return b
}

// refusal is a record that ends the session, and the alert that tells the peer. It wraps ErrRecord.
type refusal struct {
	alert byte
	text  string
}

// Error implements error.
func (r *refusal) Error() string { return ErrRecord.Error() + ": " + r.text }

// Unwrap implements errors.Unwrap.
func (*refusal) Unwrap() error { return ErrRecord }

// open opens the next record, which is whole. Data goes to p if that has room for all of it, and open returns how much it was;
// otherwise to plain.
func (c *Conn) open(p []byte) int {
	n, err := c.in.next(p)
	if c.in.asked {
		c.in.asked = false
		c.out.asked.Store(true)
	}
	if err == nil {
		return n
	}
	c.in.err = err
	if refused, ok := errors.AsType[*refusal](err); ok {
		c.out.complain(c.t, refused.alert)
	}
	return 0
}

func (in *input) next(p []byte) (int, error) {
	b := in.buf
	header := b.b[b.r:][:headerSize]
	size := payloadSize(header)
	switch {
	case header[0] != typeData:
		return 0, &refusal{alertUnexpectedMessage, fmt.Sprintf("content type %d without protection", header[0])}
	case size > maxPayload:
		return 0, &refusal{alertRecordOverflow, fmt.Sprintf("%d bytes, at most %d are allowed", size, maxPayload)}
	}
	payload := b.b[b.r+headerSize:][:size]
	b.r += headerSize + size
	to := payload[:0]
	direct := len(p) >= size-tagSize
	if direct {
		to = p[:0]
	}
	inner, err := in.keys.aead.Open(to, in.keys.next(), payload, header)
	if err != nil {
		return 0, &refusal{alertBadRecordMAC, "it was changed on its way, or is not of this session"}
	}
	end := len(inner) - 1 // where the type is, behind which there may be zeros
	for end >= 0 && inner[end] == 0 {
		end--
	}
	switch {
	case end < 0:
		return 0, &refusal{alertUnexpectedMessage, "no content type"}
	case end > maxPlain:
		return 0, &refusal{alertRecordOverflow, fmt.Sprintf("%d bytes of content, at most %d are allowed", end, maxPlain)}
	case inner[end] == typeData && end > 0 && len(in.hand) == 0:
		in.idle = 0
		if direct {
			return end, nil
		}
		in.plain = inner[:end]
		return 0, nil
	}
	return 0, in.control(inner[end], inner[:end])
}

// control takes a record that carries no data.
func (in *input) control(typ byte, content []byte) error {
	in.idle++
	switch {
	case in.idle > maxIdle:
		return &refusal{alertUnexpectedMessage, fmt.Sprintf("%d records in a row without data", in.idle)}
	case len(in.hand) > 0 && typ != typeHandshake:
		return &refusal{alertUnexpectedMessage, fmt.Sprintf("content type %d within a handshake message", typ)}
	case typ == typeData:
		return nil
	case typ == typeHandshake && len(content) > 0:
		return in.messages(content)
	case typ == typeAlert && len(content) == 2 && content[1] == alertCloseNotify:
		return io.EOF
	case typ == typeAlert && len(content) == 2 && content[1] == alertUserCanceled:
		return nil // the goodbye follows
	case typ == typeAlert && len(content) == 2:
		return &net.OpError{Op: "remote error", Err: tls.AlertError(content[1])}
	default:
		return &refusal{alertUnexpectedMessage, fmt.Sprintf("%d bytes of content type %d", len(content), typ)}
	}
}

// messages takes what the peer says about the session itself (RFC 8446 section 4.6).
func (in *input) messages(content []byte) error {
	in.hand = append(in.hand, content...)
	for len(in.hand) >= messageHeader {
		size := messageHeader + int(in.hand[1])<<16 + int(in.hand[2])<<8 + int(in.hand[3])
		if size > maxMessage {
			return &refusal{alertUnexpectedMessage, fmt.Sprintf("a handshake message of %d bytes, at most %d are read", size, maxMessage)}
		}
		if len(in.hand) < size {
			return nil
		}
		message := in.hand[:size]
		in.hand = in.hand[size:]
		switch {
		case message[0] == messageTicket && in.role == client: // sessions are never resumed
		case message[0] == messageKeyUpdate && size == messageHeader+1 && message[messageHeader] <= 1 && len(in.hand) == 0:
			if err := in.keys.update(); err != nil {
				return err
			}
			in.asked = message[messageHeader] == 1
		default:
			return &refusal{alertUnexpectedMessage, fmt.Sprintf("handshake message %d of %d bytes", message[0], size)}
		}
	}
	if len(in.hand) == 0 {
		in.hand = nil
	}
	return nil
}
