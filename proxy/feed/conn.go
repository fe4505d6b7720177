package feed

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// writeTimeout bounds how long the other side may leave a frame unread before the session is given up.
const writeTimeout = 30 * time.Second

// conn is one end of a session. One goroutine reads, one writes.
type conn struct {
	uc *net.UnixConn
	br *bufio.Reader
	// received are descriptors that came in and are not yet claimed by a frame. Only the reader touches them.
	received []*os.File
	oob      []byte
}

func newConn(uc *net.UnixConn) *conn {
	c := &conn{uc: uc, oob: make([]byte, unix.CmsgSpace(4*253))}
	c.br = bufio.NewReaderSize((*socketReader)(c), 64<<10)
	return c
}

// socketReader reads bytes and puts descriptors aside.
type socketReader conn

func (r *socketReader) Read(p []byte) (int, error) {
	n, oobn, flags, _, err := r.uc.ReadMsgUnix(p, r.oob)
	if oobn > 0 {
		if ferr := r.claim(r.oob[:oobn]); ferr != nil {
			return 0, ferr
		}
	}
	if flags&unix.MSG_CTRUNC != 0 {
		return 0, fmt.Errorf("%w: descriptors were lost, the limit of open files may be reached", ErrFrame)
	}
	if n <= 0 && err == nil {
		err = io.EOF
	}
	return max(n, 0), err
}

func (r *socketReader) claim(oob []byte) error {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return fmt.Errorf("%w: control message: %w", ErrFrame, err)
	}
	for i := range messages {
		fds, err := unix.ParseUnixRights(&messages[i])
		if err != nil {
			continue // credentials or the like
		}
		for _, fd := range fds {
			r.received = append(r.received, os.NewFile(uintptr(fd), "feed socket"))
		}
	}
	return nil
}

// read returns the next frame and the descriptors that belong to it, which the caller owns. Only "sockets" frames have any.
func (c *conn) read() (Frame, []*os.File, error) {
	f, err := ReadFrame(c.br)
	if err != nil {
		return Frame{}, nil, err
	}
	if f.Sockets == nil {
		return f, nil, nil
	}
	want := len(f.Sockets.Names)
	if len(c.received) < want {
		return Frame{}, nil, fmt.Errorf("%w: %d sockets are named and %d came", ErrFrame, want, len(c.received))
	}
	files := slices.Clone(c.received[:want])
	c.received = slices.Delete(c.received, 0, want)
	return f, files, nil
}

// write sends one frame with descriptors, which stay the caller's.
func (c *conn) write(f Frame, files []*os.File) error {
	data, err := AppendFrame(nil, f)
	if err != nil {
		return err
	}
	if err := c.uc.SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil {
		return fmt.Errorf("send a frame: %w", err)
	}
	if len(files) > 0 {
		n, err := c.writeWithFiles(data, files)
		if err != nil {
			return err
		}
		data = data[n:]
	}
	if _, err := c.uc.Write(data); err != nil {
		return fmt.Errorf("send a frame: %w", err)
	}
	return nil
}

// writeWithFiles sends the first bytes of a frame with all its descriptors.
func (c *conn) writeWithFiles(data []byte, files []*os.File) (int, error) {
	fds := make([]int, len(files))
	for i, f := range files {
		dup, err := dupFile(f)
		if err != nil {
			return 0, err
		}
		defer dup.Close() //nolint:errcheck // a duplicate that nobody wrote to
		raw, err := dup.SyscallConn()
		if err == nil {
			err = raw.Control(func(fd uintptr) { fds[i] = int(fd) })
		}
		if err != nil {
			return 0, fmt.Errorf("send a socket: %w", err)
		}
	}
	n, _, err := c.uc.WriteMsgUnix(data, unix.UnixRights(fds...), nil)
	if err != nil {
		return n, fmt.Errorf("send %d sockets: %w", len(files), err)
	}
	return n, nil
}

// close ends the session and closes descriptors that no frame claimed. Only after the reader ended, or by it.
func (c *conn) close() {
	_ = c.uc.Close()
	closeFiles(c.received)
	c.received = nil
}

// peerUID returns the user at the other end, as the kernel tells it.
func (c *conn) peerUID() (uint32, error) {
	raw, err := c.uc.SyscallConn()
	if err != nil {
		return 0, fmt.Errorf("peer credentials: %w", err)
	}
	var cred *unix.Ucred
	var credErr error
	err = raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	if err := errors.Join(err, credErr); err != nil {
		return 0, fmt.Errorf("peer credentials: %w", err)
	}
	return cred.Uid, nil
}

// dupFile returns a second descriptor of the same socket.
func dupFile(f *os.File) (*os.File, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("duplicate a socket: %w", err)
	}
	var dup int
	var dupErr error
	err = raw.Control(func(fd uintptr) { dup, dupErr = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0) })
	if err := errors.Join(err, dupErr); err != nil {
		return nil, fmt.Errorf("duplicate a socket: %w", err)
	}
	return os.NewFile(uintptr(dup), f.Name()), nil
}

// socketCookie identifies a socket over all its duplicates, until the host restarts (SO_COOKIE, Linux 4.12).
func socketCookie(f *os.File) (uint64, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return 0, fmt.Errorf("identify a socket: %w", err)
	}
	var cookie uint64
	var cookieErr error
	err = raw.Control(func(fd uintptr) {
		cookie, cookieErr = unix.GetsockoptUint64(int(fd), unix.SOL_SOCKET, unix.SO_COOKIE)
	})
	if err := errors.Join(err, cookieErr); err != nil {
		return 0, fmt.Errorf("identify a socket: %w", err)
	}
	return cookie, nil
}

func closeFiles(files []*os.File) {
	for _, f := range files {
		_ = f.Close()
	}
}
