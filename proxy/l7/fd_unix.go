//go:build unix

package l7

import "syscall"

const errWouldBlock = syscall.EAGAIN

// readFD reads what is there.
func readFD(fd uintptr, p []byte) (int, error) {
	for {
		n, err := syscall.Read(int(fd), p)
		if err != syscall.EINTR {
			return max(n, 0), err
		}
	}
}

// peekFD looks at the first byte that waits, without taking it. 0 and no error
// is the end of the stream.
func peekFD(fd uintptr) (int, error) {
	var one [1]byte
	for {
		n, _, err := syscall.Recvfrom(int(fd), one[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		if err != syscall.EINTR {
			return max(n, 0), err
		}
	}
}
