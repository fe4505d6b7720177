//go:build !unix

package l7

import "errors"

var errWouldBlock = errors.New("would block")

// readFD is never reached: connections are read in the ordinary way.
func readFD(uintptr, []byte) (int, error) { return 0, errors.ErrUnsupported }

// peekFD makes every kept connection unfit for reuse, where it cannot be asked.
func peekFD(uintptr) (int, error) { return 0, errors.ErrUnsupported }
