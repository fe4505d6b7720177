// Package sock reads and writes TCP connections with less of the runtime in
// between than package net: a system call on a socket that cannot block is
// made without telling the scheduler. proxy/DESIGN.md has what that saves.
package sock

import (
	"io"
	"net"
	"os"
	"syscall"
)

// Conn is a TCP connection whose Read and Write are cheaper; everything else
// is that of the embedded one. One goroutine at a time may read, and one write.
// Make it with [New].
type Conn struct {
	*net.TCPConn
	raw syscall.RawConn
	in  half
	out half
}

// half is one direction's system call, and what it is to do. The function is
// made once, so that calling it allocates nothing.
type half struct {
	try  func(fd uintptr) bool
	view []byte
	n    int
	err  error
}

// New returns tc as a Conn, which owns it. It does no I/O.
func New(tc *net.TCPConn) *Conn {
	c := &Conn{TCPConn: tc}
	raw, err := tc.SyscallConn()
	if err != nil || !direct {
		return c // Read and Write are those of tc
	}
	c.raw = raw
	c.in.try = func(fd uintptr) bool {
		c.in.n, c.in.err = Read(fd, c.in.view)
		return c.in.err != syscall.EAGAIN //nolint:errorlint // an errno as the kernel returns it
	}
	c.out.try = func(fd uintptr) bool { return c.out.writeAll(fd) }
	return c
}

// Read reads what is there, and blocks until something is.
func (c *Conn) Read(p []byte) (int, error) {
	if c.raw == nil || len(p) == 0 {
		return c.TCPConn.Read(p)
	}
	c.in.view, c.in.n, c.in.err = p, 0, nil
	err := c.raw.Read(c.in.try)
	c.in.view = nil
	switch {
	case err != nil: // a deadline, or closed
		return 0, err
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
		return c.TCPConn.Write(p)
	}
	c.out.view, c.out.n, c.out.err = p, 0, nil
	err := c.raw.Write(c.out.try)
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

// failure looks like package net's.
func (c *Conn) failure(op string, err error) error {
	return &net.OpError{
		Op: op, Net: "tcp", Source: c.LocalAddr(), Addr: c.RemoteAddr(), Err: os.NewSyscallError(op, err),
	}
}
