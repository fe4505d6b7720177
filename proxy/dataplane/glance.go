package dataplane

import (
	"errors"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/meshd/meshd/proxy/detect"
	"github.com/meshd/meshd/proxy/sock"
)

// glances are what a client's first bytes are copied to. A connection that waits for them has none.
var glances = sync.Pool{New: func() any { return new([detect.Most]byte) }} //nolint:gochecknoglobals // memory, not state

// glance looks at the first bytes of a connection without taking them.
type glance struct {
	raw  syscall.RawConn
	peek func(fd uintptr) bool

	seen     int // bytes that were there at the last look
	ended    bool
	err      error
	protocol detect.Protocol
	name     string // that a TLS client asks for
}

func (g *glance) init(nc *sock.Conn) {
	g.raw, g.err = nc.SyscallConn()
	g.peek = func(fd uintptr) bool { return g.look(int(fd)) }
}

// see blocks until there are more bytes than at the last look, or no more will come. An error is the deadline's or the connection's.
func (g *glance) see() error {
	if g.err != nil {
		return g.err
	}
	if err := g.raw.Read(g.peek); err != nil {
		return err
	}
	return g.err
}

// look reports false while there is nothing new.
func (g *glance) look(fd int) bool {
	buf, _ := glances.Get().(*[detect.Most]byte)
	defer glances.Put(buf)
	n, _, err := unix.Recvfrom(fd, buf[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
	for errors.Is(err, unix.EINTR) {
		n, _, err = unix.Recvfrom(fd, buf[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
	}
	switch {
	case errors.Is(err, unix.EAGAIN):
		return false
	case err != nil:
		g.err = err
		return true
	case n <= g.seen:
		g.ended = n == 0 || closedBy(fd)
		return g.ended
	}
	g.seen = n
	if g.protocol = detect.Of(buf[:n]); g.protocol == detect.TLS {
		if name, ok := detect.ServerName(buf[:n]); ok {
			g.name = string(name)
		}
	}
	return true
}

// closedBy reports whether the peer will send no more. What it sent hides that from a look at the bytes.
func closedBy(fd int) bool {
	one := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}} //nolint:gosec // a descriptor is small
	n, err := unix.Poll(one, 0)
	return err == nil && n == 1 && one[0].Revents&(unix.POLLRDHUP|unix.POLLHUP|unix.POLLERR) != 0
}
