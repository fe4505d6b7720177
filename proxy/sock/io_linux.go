//go:build !race && (amd64 || arm64)

package sock

import (
	"syscall"
	"unsafe"
)

// direct says that the functions below are there.
const direct = true

// Read reads from a socket that does not block. It returns syscall.EAGAIN if
// nothing is there, and 0 and nil at the end of the stream.
//
// syscall.Read would announce a call that may block: the scheduler then gives
// the thread's work to others once the call takes 20 µs, and a thread that was
// merely descheduled comes back to find itself without. And recv and send spare
// the way through the files.
func Read(fd uintptr, p []byte) (int, error) {
	return call(syscall.SYS_RECVFROM, fd, p, 0)
}

// write writes to a socket that does not block what fits.
func write(fd uintptr, p []byte) (int, error) {
	return call(syscall.SYS_SENDTO, fd, p, syscall.MSG_NOSIGNAL)
}

// vectors are a gather's parts as the kernel takes them.
type vectors struct {
	message syscall.Msghdr
	iov     [3]syscall.Iovec
}

// write writes to a socket that does not block what fits of all parts.
func (g *gather) write(fd uintptr) (int, error) {
	used := 0
	for _, p := range g.parts {
		if len(p) > 0 {
			g.iov[used].Base = unsafe.SliceData(p) //nolint:gosec // the parts live for the call
			g.iov[used].SetLen(len(p))
			used++
		}
	}
	g.message.Iov = &g.iov[0]
	g.message.Iovlen = uint64(used)
	for {
		n, _, errno := syscall.RawSyscall(syscall.SYS_SENDMSG, fd, uintptr(unsafe.Pointer(&g.message)), syscall.MSG_NOSIGNAL) //nolint:gosec // as below
		switch errno {
		case 0:
			return int(n), nil
		case syscall.EINTR:
		case syscall.EAGAIN:
			return 0, syscall.EAGAIN
		default:
			return 0, errno
		}
	}
}

// Peek looks at the first byte that waits, without taking it. It returns
// what [Read] does.
func Peek(fd uintptr) (int, error) {
	var one [1]byte
	return call(syscall.SYS_RECVFROM, fd, one[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
}

func call(number, fd uintptr, p []byte, flags uintptr) (int, error) {
	for {
		n, _, errno := syscall.RawSyscall6(number, fd, uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)), flags, 0, 0) //nolint:gosec // the pointer lives for the call
		switch errno {
		case 0:
			return int(n), nil
		case syscall.EINTR:
		case syscall.EAGAIN:
			return 0, syscall.EAGAIN
		default:
			return 0, errno
		}
	}
}
