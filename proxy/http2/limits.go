package http2

import (
	"sync/atomic"
	"time"
)

// Limits bound what a peer may make us hold and do. A zero field takes its
// default.
type Limits struct {
	// Streams is how many exchanges the peer may have under way; 100. Those that
	// it has reset count until they are over here, too.
	Streams int
	// StreamWindow bounds what we hold of one stream's data; 64 KiB.
	StreamWindow int
	// Window bounds what we hold of a connection's data; 1 MiB.
	Window int
	// Resets is how many streams may be reset within 30 s, by the peer before they
	// were over, or by us because of what the peer sent on them; 100. A request whose
	// head is larger than the limit counts as one.
	Resets int
	// Control is how many frames may come that bring nothing (PING, SETTINGS,
	// PRIORITY, WINDOW_UPDATE, DATA without data, unknown ones). Each stream and
	// each frame of data, both ways, allows some more, and so does time: all of it
	// comes back within 30 s; 1000.
	Control int
	// Continuations is how many CONTINUATION frames a header block may have; 32.
	Continuations int
	// Answers is how many bytes of answers to PING, SETTINGS and wrong frames may
	// wait for the peer to read them; 16 KiB.
	Answers int
}

// resetPeriod is the time within which [Limits.Resets] and [Limits.Control]
// count.
const resetPeriod = int64(30 * time.Second)

// What a stream and a frame with data allow of frames that bring nothing. A
// peer may well send a PING and two WINDOW_UPDATEs for each frame of data.
const (
	sparePerStream = 20
	sparePerData   = 5
)

// WithDefaults returns l with its zero fields filled.
func (l Limits) WithDefaults() Limits {
	def := func(v *int, d int) {
		if *v == 0 {
			*v = d
		}
	}
	def(&l.Streams, 100)
	def(&l.StreamWindow, 64<<10)
	def(&l.Window, 1<<20)
	def(&l.Resets, 100)
	def(&l.Control, 1000)
	def(&l.Continuations, 32)
	def(&l.Answers, 16<<10)
	l.Window = max(l.Window, initialWindow)
	return l
}

// Counters count what limits refused, and what the peers did wrong. They may be
// shared by many connections, and read at any time.
type Counters struct {
	Refused       atomic.Uint64 // streams beyond [Limits.Streams]
	Resets        atomic.Uint64 // connections ended by [ErrResets]
	Control       atomic.Uint64 // by [ErrControl]
	Continuations atomic.Uint64 // by [ErrContinuations]
	Answers       atomic.Uint64 // by [ErrAnswers]
	HeadTimeouts  atomic.Uint64 // by [ErrHeadTimeout]
	Stalled       atomic.Uint64 // exchanges ended by [ErrStalled]
	HeadTooLarge  atomic.Uint64 // requests or responses whose head, or one field of it, was larger than the limit
	Malformed     atomic.Uint64 // streams that were reset because of what came on them
	Violations    atomic.Uint64 // connections ended because of what came on them, those above not included
	Waiting       atomic.Uint64 // exchanges that a [Pool] ended as they had no stream: too many waited, or for too long
	Idle          atomic.Uint64 // exchanges whose request did not come in time
}
