//go:build !unix

package sock

import "syscall"

// direct says that the functions below are of use.
const direct = false

// Read is never called.
func Read(uintptr, []byte) (int, error) { return 0, syscall.EINVAL }

// Peek makes every kept connection unfit for reuse, where it cannot be asked.
func Peek(uintptr) (int, error) { return 0, syscall.EINVAL }

func write(uintptr, []byte) (int, error) { return 0, syscall.EINVAL }

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
