//go:build unix && (race || !linux || !(amd64 || arm64))

package sock

import "syscall"

// direct says that the functions below are there.
const direct = true

// Read reads from a socket that does not block. It returns syscall.EAGAIN if
// nothing is there, and 0 and nil at the end of the stream. Package syscall
// tells the race detector that bytes order what both ends do.
func Read(fd uintptr, p []byte) (int, error) { return call(syscall.Read, fd, p) }

// write writes to a socket that does not block what fits.
func write(fd uintptr, p []byte) (int, error) { return call(syscall.Write, fd, p) }

// Peek looks at the first byte that waits, without taking it. It returns
// what [Read] does.
func Peek(fd uintptr) (int, error) {
	var one [1]byte
	return call(func(fd int, p []byte) (int, error) {
		n, _, err := syscall.Recvfrom(fd, p, syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		return n, err
	}, fd, one[:])
}

func call(f func(int, []byte) (int, error), fd uintptr, p []byte) (int, error) {
	for {
		n, err := f(int(fd), p)
		if err != syscall.EINTR { //nolint:errorlint // an errno as the kernel returns it
			return max(n, 0), err
		}
	}
}

// vectors are of no use here.
type vectors struct{}

// write writes what fits of the first part that is left.
func (g *gather) write(fd uintptr) (int, error) {
	for _, p := range g.parts {
		if len(p) > 0 {
			return write(fd, p)
		}
	}
	return 0, nil
}
