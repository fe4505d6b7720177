package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// hideTyping lets a terminal show nothing of what is typed, until shown is called;
// shown is nil if the file is no terminal.
func hideTyping(f *os.File) (shown func(), err error) {
	fd := int(f.Fd())
	old, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if errors.Is(err, unix.ENOTTY) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EBADF) {
		return nil, nil //nolint:nilnil // no terminal
	}
	if err != nil {
		return nil, fmt.Errorf("look at the terminal: %w", err)
	}
	hidden := *old
	hidden.Lflag &^= unix.ECHO
	if err := unix.IoctlSetTermios(fd, unix.TCSETS, &hidden); err != nil {
		return nil, fmt.Errorf("hide what is typed: %w", err)
	}
	return func() {
		_ = unix.IoctlSetTermios(fd, unix.TCSETS, old) // as it was: there is nothing else to try
		fmt.Fprintln(os.Stderr)
	}, nil
}

// firstLine ends with the first line that is typed.
type firstLine struct{ in io.Reader }

func (l firstLine) Read(p []byte) (int, error) {
	n, err := l.in.Read(p) // a terminal gives a line at a time
	if err == nil && bytes.IndexByte(p[:n], '\n') >= 0 {
		err = io.EOF
	}
	return n, err
}
