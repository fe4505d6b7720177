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
