package dataplane

import (
	"runtime"
	"strings"

	"github.com/meshd/meshd/proxy/flow"
)

const (
	// firstStacks and maxStacks bound what is written down of the goroutines. A connection has one or two, of about 1 KiB.
	firstStacks = 1 << 20
	maxStacks   = 16 << 20
	// stacksPiece is how much travels at a time.
	stacksPiece = 256 << 10
)

// tellStacks hands emit what all goroutines do: functions, lines and addresses, no contents of memory.
func tellStacks(emit func(flow.Answer) error) error {
	buf := make([]byte, firstStacks)
	n := runtime.Stack(buf, true)
	for n == len(buf) && n < maxStacks { // it did not fit
		buf = make([]byte, min(4*len(buf), maxStacks))
		n = runtime.Stack(buf, true)
	}
	for text := strings.ToValidUTF8(string(buf[:n]), "?"); text != ""; {
		piece := text[:min(len(text), stacksPiece)]
		text = text[len(piece):]
		if err := emit(flow.Answer{Stacks: piece}); err != nil {
			return err
		}
	}
	return nil
}
