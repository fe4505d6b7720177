// Package history records what clients of a cluster did and saw, and decides
// whether a correct cluster can have answered so: single keys are linearizable
// registers with compare-and-set, and a watch never misses a deletion.
package history

import (
	"slices"
	"sync"
	"time"
)

// Kind says what an operation does to its key.
type Kind uint8

// The kinds of operations.
const (
	Read Kind = iota + 1
	Write
	Delete
)

// Outcome is what the client was told.
type Outcome uint8

// The outcomes. An operation that certainly did nothing, as no server took it, is
// not recorded at all; a read that was not answered neither.
const (
	OK Outcome = iota + 1
	// Conflict: the key was not as the operation demanded, so nothing was done.
	Conflict
	// Missing: there was nothing to delete.
	Missing
	// Unknown: the operation may have been done, or be done later, or never.
	Unknown
)

// Absent is the value of a key that does not exist. No client writes it.
const Absent = ""

// Op is one operation on one key.
type Op struct {
	Client  int
	Key     string
	Kind    Kind
	Outcome Outcome
	// Any says that a Write or a Delete demands nothing; else the key must hold
	// Expect, or be Absent.
	Any    bool
	Expect string
	// Value is what was written, or read. Each Write of a key writes another value,
	// but for those with Any.
	Value string
	// Revision is that of the value which was written or read, or of the deletion,
	// where the client was told; else 0.
	Revision uint64
	// Invoked and Returned are times on the monotonic clock, since the history began.
	// Returned is meaningless when the outcome is Unknown.
	Invoked, Returned time.Duration
}

// changes reports whether the operation is known to have changed its key.
func (o Op) changes() bool { return o.Outcome == OK && o.Kind != Read }

// History collects operations. Use New; it is safe for concurrent use.
type History struct {
	start time.Time

	mu  sync.Mutex
	ops []Op
}

// New returns an empty history that begins now.
func New() *History { return &History{start: time.Now()} }

// Start is when the history began.
func (h *History) Start() time.Time { return h.start }

// Now is the time since the history began.
func (h *History) Now() time.Duration { return time.Since(h.start) }

// Add records an operation.
func (h *History) Add(o Op) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ops = append(h.ops, o)
}

// Ops returns what was recorded so far, in the order of invocation.
func (h *History) Ops() []Op {
	h.mu.Lock()
	defer h.mu.Unlock()
	ops := slices.Clone(h.ops)
	slices.SortStableFunc(ops, func(a, b Op) int { return int(a.Invoked - b.Invoked) })
	return ops
}

// Acked returns the first write or deletion to be acknowledged of those that were
// invoked at from or later.
func (h *History) Acked(from time.Duration) (first Op, ok bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, o := range h.ops {
		if o.changes() && o.Invoked >= from && (!ok || o.Returned < first.Returned) {
			first, ok = o, true
		}
	}
	return first, ok
}

// Revision is the highest that was acknowledged to anyone so far.
func (h *History) Revision() uint64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	var highest uint64
	for _, o := range h.ops {
		if o.changes() {
			highest = max(highest, o.Revision)
		}
	}
	return highest
}
