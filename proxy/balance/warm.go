package balance

import (
	"sync/atomic"
	"time"
)

const (
	// slowStart is how long an endpoint that appears or comes back takes to get its whole share: long enough to fill caches and
	// connection pools, short enough not to make a rolling deployment wait.
	slowStart = 10 * time.Second
	// whole is the part of its weight that an endpoint has after slowStart; it begins with the tenth of it, as in Envoy. With
	// nothing at all it could not get warm.
	whole = 1024
	least = whole / 10
)

// warmth is the part of a State that says how much of its share an endpoint gets. The zero warmth is all of it.
type warmth struct {
	since atomic.Int64 // unix nanoseconds of when it appeared or came back; 0 is long ago
}

func (w *warmth) start(now time.Time) { w.since.Store(now.UnixNano()) }

// part returns how much of its share the endpoint gets now, least to whole.
func (w *warmth) part() int {
	since := w.since.Load()
	if since == 0 {
		return whole
	}
	age := time.Duration(time.Now().UnixNano() - since)
	if age >= slowStart || age < 0 { // below 0 the clock was set back
		w.since.CompareAndSwap(since, 0)
		return whole
	}
	return max(least, int(whole*age/slowStart))
}
