package balance

import (
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// failuresToEject is how many attempts in a row must fail. One refused connection is a restart; five are a dead instance.
	failuresToEject = 5
	// leastBackoff is the first ejection's length; each next one lasts twice as long, up to mostBackoff.
	leastBackoff = time.Second
	mostBackoff  = 5 * time.Minute
	// probeWindow is how long a probe may be undecided before another may go. It is longer than a connection may take.
	probeWindow = 10 * time.Second
)

// health is the part of a State that says whether an endpoint is in use. The zero health is.
type health struct {
	failures atomic.Int32 // attempts that failed in a row
	until    atomic.Int64 // unix nanoseconds: when an ejected endpoint may be probed; 0 is not ejected

	// mu is for changes, which are rare.
	mu       sync.Mutex
	probing  bool
	level    int // how often the back-off was doubled
	returned int64
}

// Fail notes that the endpoint could not be connected to. The fifth failure in a row ejects it, and so does the failure of a
// probe; then it says for how long. Failures of an endpoint that is ejected already, and is not probed, say nothing new.
func (h *health) Fail(now time.Time) (backoff time.Duration, ejected bool) {
	if h.until.Load() == 0 && h.failures.Add(1) < failuresToEject {
		return 0, false
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.until.Load() != 0 && !h.probing:
		return 0, false
	case h.until.Load() == 0 && h.failures.Load() < failuresToEject: // it succeeded meanwhile
		return 0, false
	case h.until.Load() == 0 && now.UnixNano()-h.returned > int64(mostBackoff):
		h.level = 0 // it did well for long
	}
	backoff = min(leastBackoff<<h.level, mostBackoff)
	if backoff < mostBackoff {
		h.level++
	}
	// Callers that lost an endpoint at the same moment must not all come back at the same moment.
	backoff -= time.Duration(rand.Int64N(int64(backoff / 4))) //nolint:gosec // no secrecy needed
	h.probing = false
	h.until.Store(now.Add(backoff).UnixNano())
	return backoff, true
}

func (h *health) succeed(now time.Time) (returned bool) {
	if h.failures.Load() == 0 && h.until.Load() == 0 {
		return false
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.failures.Store(0)
	if h.until.Load() == 0 {
		return false
	}
	h.probing = false
	h.returned = now.UnixNano()
	h.until.Store(0)
	return true
}

// Ejected reports whether the endpoint is out of use, a probe of it included.
func (h *health) Ejected() bool { return h.until.Load() != 0 }

// probe reports whether the caller's request shall be the one that finds out whether an ejected endpoint is back.
func (h *health) probe() bool {
	now := time.Now()
	if !h.due(now.UnixNano()) {
		return false
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.due(now.UnixNano()) {
		return false
	}
	h.probing = true
	h.until.Store(now.Add(probeWindow).UnixNano())
	return true
}

// due says that a probe may go. A wait longer than there is comes from a clock that was set back.
func (h *health) due(now int64) bool {
	until := h.until.Load()
	return until != 0 && (until <= now || until-now > int64(mostBackoff))
}
