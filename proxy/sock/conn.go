// Package sock reads and writes stream sockets with less of the runtime in
// between than package net: a system call on a socket that cannot block is
// made without telling the scheduler. proxy/DESIGN.md has what that saves.
package sock

import (
	"errors"
	"io"
	"net"
	"os"
	"syscall"
)

// Stream is what package net makes of a stream socket: *net.TCPConn and
// *net.UnixConn.
type Stream interface {
	net.Conn
	syscall.Conn
	CloseRead() error
	CloseWrite() error
}

// Conn is a stream socket whose Read and Write are cheaper; everything else
// is that of the embedded one. One goroutine at a time may read, and one write.
// Make it with [New].
type Conn struct {
	Stream
	raw syscall.RawConn
	in  half
	out half

	all    gather                // of the write of several parts that runs
	each   func(fd uintptr) bool // writes them
	lender Lender                // of the read that runs
	vain   uint32                // tries of it that found nothing
	lent   func(fd uintptr) bool
	asker  Asker                 // of the question that runs, until it was asked
	ask    func(fd uintptr) bool // asks, then reads
	once   func(fd uintptr) bool
}

// Lender gives memory for one read, once there is something to read.
type Lender interface {
	// Lend returns memory to read into.
	Lend() []byte
	// Return takes back what Lend gave: nothing was read into it.
	Return()
}

// Asker is who asks on a connection that was kept: it sends a question, and lends memory for the answer.
type Asker interface {
	Lender
	// Ask writes to the connection. It must not read from it. If it reports false nobody waits for an answer.
	Ask() bool
}

var (
	// ErrBusy is a connection on which something waits to be read before anything was asked: an end, an error, or bytes.
	ErrBusy = errors.New("there is something to read before anything was asked")
	// ErrUnasked is an Asker's word that it could not ask.
	ErrUnasked = errors.New("nothing was asked")
)

// half is one direction's system call, and what it is to do. The function is
// made once, so that calling it allocates nothing.
type half struct {
	try  func(fd uintptr) bool
	view []byte
	n    int
	err  error
}

// New returns s as a Conn, which owns it. It does no I/O.
func New(s Stream) *Conn {
	c := &Conn{Stream: s}
	raw, err := s.SyscallConn()
	if err != nil || !direct {
		return c // Read and Write are those of s
	}
	c.raw = raw
	c.in.try = func(fd uintptr) bool {
		c.in.n, c.in.err = Read(fd, c.in.view)
		return c.in.err != syscall.EAGAIN //nolint:errorlint // an errno as the kernel returns it
	}
	c.lent = func(fd uintptr) bool {
		if c.in.n, c.in.err = Read(fd, c.lender.Lend()); c.in.n == 0 {
			c.lender.Return()
			c.vain++
		}
		return c.in.err != syscall.EAGAIN //nolint:errorlint // an errno as the kernel returns it
	}
	c.ask = func(fd uintptr) bool {
		if c.asker == nil {
			return c.lent(fd)
		}
		q := c.asker
		c.asker = nil
		if _, err := Peek(fd); err != syscall.EAGAIN { //nolint:errorlint // an errno as the kernel returns it
			c.in.err = ErrBusy
			return true
		}
		if !q.Ask() {
			c.in.err = ErrUnasked
			return true
		}
		return false // the poller remembers what comes since this callback was entered
	}
	c.each = func(fd uintptr) bool {
		for c.all.left() {
			n, err := c.all.write(fd)
			c.out.n += n
			if err == syscall.EAGAIN { //nolint:errorlint // an errno as the kernel returns it
				return false
			}
			if err != nil {
				c.out.err = err
				break
			}
			c.all.drop(n)
		}
		return true
	}
	c.once = func(fd uintptr) bool {
		c.out.writeAll(fd)
		return true
	}
	c.out.try = func(fd uintptr) bool { return c.out.writeAll(fd) }
	return c
}

// Read reads what is there, and blocks until something is.
func (c *Conn) Read(p []byte) (int, error) {
	if c.raw == nil || len(p) == 0 {
		return c.Stream.Read(p)
	}
	c.in.view = p
	n, err := c.read(c.in.try)
	c.in.view = nil
	return n, err
}

// ReadLent is Read into what l lends: l is asked when there may be something to read, so that a connection that waits keeps no
// memory for it. Where n is 0, all was returned.
func (c *Conn) ReadLent(l Lender) (int, error) {
	if c.raw == nil {
		n, err := c.Stream.Read(l.Lend())
		if n == 0 {
			l.Return()
		}
		return n, err
	}
	c.lender = l
	n, err := c.read(c.lent)
	c.lender = nil
	return n, err
}

// Vain counts the tries of ReadLent that found nothing. It is for who reads, and stays 0 where reads are those of the stream.
func (c *Conn) Vain() uint32 { return c.vain }

// AskLent lets q ask, and reads the answer into what q lends. Other than a write and a ReadLent it tries no read before there is
// an answer. It makes sure first that nothing is there; if there is, or the connection cannot tell, it is ErrBusy, and nothing was
// asked. After ErrUnasked nothing was read. After a deadline the answer may be read with ReadLent.
func (c *Conn) AskLent(q Asker) (int, error) {
	if c.raw == nil {
		return 0, ErrBusy
	}
	c.lender, c.asker = q, q
	n, err := c.read(c.ask)
	c.lender, c.asker = nil, nil
	return n, err
}

func (c *Conn) read(try func(fd uintptr) bool) (int, error) {
	c.in.n, c.in.err = 0, nil
	err := c.raw.Read(try)
	switch {
	case err != nil: // a deadline, or closed
		return 0, err
	case c.in.err == ErrBusy, c.in.err == ErrUnasked: //nolint:errorlint // set here
		return 0, c.in.err
	case c.in.err != nil:
		return 0, c.failure("read", c.in.err)
	case c.in.n == 0:
		return 0, io.EOF
	}
	return c.in.n, nil
}

// Write writes all of p, or returns how much of it and why no more.
func (c *Conn) Write(p []byte) (int, error) {
	if c.raw == nil || len(p) == 0 {
		return c.Stream.Write(p)
	}
	c.out.view, c.out.n, c.out.err = p, 0, nil
	err := c.raw.Write(c.out.try)
	c.out.view = nil
	if err == nil && c.out.err != nil {
		err = c.failure("write", c.out.err)
	}
	return c.out.n, err
}

// WriteAll is Write of its arguments one behind the other, in one system call as long as the socket takes them.
func (c *Conn) WriteAll(a, b, d []byte) (int64, error) {
	c.all.parts = [...][]byte{a, b, d}
	defer c.all.clear()
	if c.raw == nil {
		written := int64(0)
		for _, p := range c.all.parts {
			n, err := c.Stream.Write(p)
			if written += int64(n); err != nil {
				return written, err
			}
		}
		return written, nil
	}
	c.out.n, c.out.err = 0, nil
	err := c.raw.Write(c.each)
	if err == nil && c.out.err != nil {
		err = c.failure("write", c.out.err)
	}
	return int64(c.out.n), err
}

// TryWrite writes what fits at once. It returns how much that was, and an error only if the connection is broken or closed.
func (c *Conn) TryWrite(p []byte) (int, error) {
	if c.raw == nil {
		return c.Stream.Write(p)
	}
	c.out.view, c.out.n, c.out.err = p, 0, nil
	err := c.raw.Write(c.once)
	c.out.view = nil
	if err == nil && c.out.err != nil {
		err = c.failure("write", c.out.err)
	}
	return c.out.n, err
}

// writeAll reports false while the socket takes no more.
func (h *half) writeAll(fd uintptr) bool {
	for h.n < len(h.view) {
		n, err := write(fd, h.view[h.n:])
		h.n += n
		if err == syscall.EAGAIN { //nolint:errorlint // an errno as the kernel returns it
			return false
		}
		if err != nil {
			h.err = err
			return true
		}
	}
	return true
}

// SetLinger is that of TCP. Other sockets have no reset: for them it does nothing.
func (c *Conn) SetLinger(sec int) error {
	if l, ok := c.Stream.(interface{ SetLinger(sec int) error }); ok {
		return l.SetLinger(sec)
	}
	return nil
}

// failure looks like package net's.
func (c *Conn) failure(op string, err error) error {
	return &net.OpError{
		Op: op, Net: c.LocalAddr().Network(), Source: c.LocalAddr(), Addr: c.RemoteAddr(), Err: os.NewSyscallError(op, err),
	}
}
