package load

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// What a backend answers to, and with how many bytes.
const (
	SmallPath   = "/100"
	SmallLength = 100
	LargePath   = "/10k"
	LargeLength = 10 << 10
	// EchoPath answers with the request's head, to see what arrived.
	EchoPath = "/head"
)

// chunk is how much of an endless stream is written at a time.
const chunk = 256 << 10

// peer is a connection to the backend.
type peer struct {
	stream bool
	h2     *h2peer // if it is HTTP/2's
	begun  []byte  // of a head that has not come whole
	out    []byte  // to be written still
	full   bool    // the socket took not all of it
}

// backend answers on two sockets.
type backend struct {
	poll                  *poller
	http, stream, h2      int
	peers                 map[int]*peer
	small, large          []byte
	endless, buf          []byte
	message, largeMessage []byte // of gRPC
}

// Serve answers HTTP/1.1 GET requests on one listening socket, with responses
// that are ready in memory, and writes zeros without end to whoever sends a
// byte to the other; the third is for HTTP/2 with prior knowledge, and gRPC. It
// blocks until something fails; clients that go are no failure.
func Serve(http, stream, h2 *os.File) error {
	poll, err := newPoller()
	if err != nil {
		return err
	}
	b := &backend{
		poll: poll, peers: map[int]*peer{}, http: int(http.Fd()), stream: int(stream.Fd()), h2: int(h2.Fd()),
		small: response(strings.Repeat("b", SmallLength)), large: response(strings.Repeat("b", LargeLength)),
		endless: make([]byte, chunk), buf: make([]byte, 64<<10), message: message(SmallLength), largeMessage: message(LargeLength),
	}
	defer runtime.KeepAlive([]*os.File{http, stream, h2}) // they close themselves when nothing leads to them
	for _, fd := range []int{b.http, b.stream, b.h2} {
		if err := unix.SetNonblock(fd, true); err != nil {
			return err
		}
		if err := poll.add(fd, fd); err != nil {
			return err
		}
	}
	for {
		events, err := poll.wait(-1)
		if err != nil {
			return err
		}
		for _, e := range events {
			if fd := int(e.Fd); fd == b.http || fd == b.stream || fd == b.h2 {
				err = b.accept(fd)
			} else if b.serve(fd, e.Events) != nil {
				delete(b.peers, fd)
				err = unix.Close(fd)
			}
			if err != nil {
				return err
			}
		}
	}
}

// message is one of gRPC: its prefix, and zeros.
func message(length int) []byte {
	out := make([]byte, grpcPrefix+length)
	binary.BigEndian.PutUint32(out[1:], uint32(length))
	return out
}

// response is one as common servers write it.
func response(body string) []byte {
	return fmt.Appendf(nil, "HTTP/1.1 200 OK\r\nServer: backend\r\nDate: Thu, 01 Jan 2026 00:00:00 GMT\r\n"+
		"Content-Type: text/plain; charset=utf-8\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
}

func (b *backend) accept(listener int) error {
	fd, _, err := unix.Accept4(listener, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
	switch err {
	case nil:
	case unix.EAGAIN, unix.EINTR, unix.ECONNABORTED:
		return nil
	default:
		return fmt.Errorf("accept: %w", err)
	}
	b.peers[fd] = &peer{stream: listener == b.stream}
	if listener == b.h2 {
		b.peers[fd].h2 = newH2Peer(fd, b)
	}
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil {
		return fmt.Errorf("accept: %w", err)
	}
	return b.poll.add(fd, fd)
}

// serve does what a connection is ready for. An error means that it is over.
func (b *backend) serve(fd int, events uint32) error {
	p := b.peers[fd]
	if p.h2 != nil {
		return p.h2.serve(b.poll, b.buf)
	}
	if events&unix.EPOLLIN != 0 {
		n, err := read(fd, b.buf)
		switch {
		case err == errAgain: //nolint:errorlint // our own, never wrapped
			return nil
		case err != nil:
			return err
		case n == 0:
			return net.ErrClosed
		case p.stream:
			return b.poll.set(fd, fd, unix.EPOLLOUT)
		}
		if err := b.answer(p, b.buf[:n]); err != nil {
			return err
		}
	} else if events&(unix.EPOLLERR|unix.EPOLLHUP) != 0 {
		return net.ErrClosed
	}
	if p.stream {
		_, err := write(fd, b.endless)
		if err == errAgain { //nolint:errorlint // our own, never wrapped
			return nil
		}
		return err
	}
	return b.flush(fd, p)
}

// answer takes a part of what a client sent and queues responses to whole heads.
func (b *backend) answer(p *peer, data []byte) error {
	if len(p.begun) > 0 {
		p.begun = append(p.begun, data...)
		data = p.begun
	}
	for {
		end := bytes.Index(data, []byte("\r\n\r\n"))
		if end < 0 {
			p.begun = append(p.begun[:0:0], data...)
			return nil
		}
		head := data[:end+4]
		data = data[end+4:]
		path, _, _ := bytes.Cut(bytes.TrimPrefix(head, []byte("GET ")), []byte(" "))
		var out []byte
		switch string(path) {
		case SmallPath:
			out = b.small
		case LargePath:
			out = b.large
		case EchoPath:
			out = response(string(head))
		default:
			return fmt.Errorf("no such path: %q", path)
		}
		if len(data) == 0 && len(p.out) == 0 {
			p.out, p.begun = out, nil // as nearly always: no copy
			return nil
		}
		p.out = append(slices.Clip(p.out), out...)
		if len(data) == 0 {
			p.begun = nil
			return nil
		}
	}
}

func (b *backend) flush(fd int, p *peer) error {
	if len(p.out) == 0 {
		return nil
	}
	n, err := write(fd, p.out)
	if err != nil && err != errAgain { //nolint:errorlint // our own, never wrapped
		return err
	}
	p.out = p.out[n:]
	if full := len(p.out) > 0; full != p.full {
		p.full = full
		events := uint32(unix.EPOLLIN)
		if full {
			events |= unix.EPOLLOUT
		}
		return b.poll.set(fd, fd, events)
	}
	return nil
}
