package load

import (
	"errors"
	"fmt"
	"net/netip"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// poller waits for sockets, each known by a number. Raw system calls keep the
// scheduler out of it: it would hand the thread's place to another at each wait.
type poller struct {
	fd     int
	events [128]unix.EpollEvent
}

func newPoller() (*poller, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("epoll: %w", err)
	}
	return &poller{fd: fd}, nil
}

func (p *poller) close() error { return unix.Close(p.fd) }

// add waits for bytes from fd from now on.
func (p *poller) add(fd, number int) error {
	return unix.EpollCtl(p.fd, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(number)})
}

// set changes what is waited for.
func (p *poller) set(fd, number int, events uint32) error {
	return unix.EpollCtl(p.fd, unix.EPOLL_CTL_MOD, fd, &unix.EpollEvent{Events: events, Fd: int32(number)})
}

// wait returns what is ready, after at most so many milliseconds. The slice is
// valid until the next call.
func (p *poller) wait(milliseconds int) ([]unix.EpollEvent, error) {
	n, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(p.fd), uintptr(unsafe.Pointer(&p.events[0])),
		uintptr(len(p.events)), uintptr(milliseconds), 0, 0)
	switch {
	case errno == unix.EINTR:
		return nil, nil
	case errno != 0:
		return nil, fmt.Errorf("epoll: %w", errno)
	}
	return p.events[:n], nil
}

// errAgain is that a socket has nothing, or takes nothing, now.
var errAgain = errors.New("not now")

// read reads from a socket that does not block; 0 bytes are the end.
func read(fd int, into []byte) (int, error) {
	return result(unix.RawSyscall(unix.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(&into[0])), uintptr(len(into))))
}

// write writes to a socket that does not block.
func write(fd int, from []byte) (int, error) {
	return result(unix.RawSyscall(unix.SYS_WRITE, uintptr(fd), uintptr(unsafe.Pointer(&from[0])), uintptr(len(from))))
}

func result(n, _ uintptr, errno unix.Errno) (int, error) {
	if errno == unix.EAGAIN || errno == unix.EINTR {
		return 0, errAgain
	}
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

// dial connects to an IPv4 address.
func dial(address string) (fd int, err error) {
	ap, err := netip.ParseAddrPort(address)
	if err != nil {
		return 0, fmt.Errorf("connect: %w", err)
	}
	fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("connect to %s: %w", address, err)
	}
	err = errors.Join(
		unix.Connect(fd, &unix.SockaddrInet4{Port: int(ap.Port()), Addr: ap.Addr().As4()}),
		unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1), unix.SetNonblock(fd, true),
	)
	if err != nil {
		return 0, fmt.Errorf("connect to %s: %w", address, errors.Join(err, unix.Close(fd)))
	}
	return fd, nil
}

// alarm is a timer that can be waited for like a socket, exact to microseconds.
type alarm struct{ fd int }

func newAlarm() (alarm, error) {
	fd, err := unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_NONBLOCK|unix.TFD_CLOEXEC)
	if err != nil {
		return alarm{}, fmt.Errorf("timerfd: %w", err)
	}
	return alarm{fd}, nil
}

// set makes it ring after d; it replaces what was set.
func (a alarm) set(d time.Duration) error {
	return unix.TimerfdSettime(a.fd, 0, &unix.ItimerSpec{Value: unix.NsecToTimespec(max(1, d.Nanoseconds()))}, nil)
}

// quiet takes note of a ring.
func (a alarm) quiet() {
	var rings [8]byte
	_, _ = read(a.fd, rings[:]) // it may have been set anew meanwhile
}
