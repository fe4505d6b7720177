package client

import (
	"io"
	"iter"
)

// ReadEvents is the reader of server-sent events.
func ReadEvents(r io.Reader, alive func()) iter.Seq2[Event, error] {
	return readStream(r, alive, decodeEvent)
}
