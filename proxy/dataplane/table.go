package dataplane

import (
	"iter"
	"maps"
	"slices"
	"sync"

	"github.com/prometheus/client_golang/prometheus"
)

// table holds every live connection, from before its policy is asked until after its last byte. A lock is taken when a
// connection starts and ends, not per request.
type table struct {
	mu    sync.Mutex
	links map[*link]struct{}
	// accepted counts connections from when they are accepted: they may not be links yet, or no more.
	accepted int
	waiters  []chan struct{}
	open     map[direction]prometheus.Gauge
}

func (t *table) init(in, out prometheus.Gauge) {
	t.links = map[*link]struct{}{}
	t.open = map[direction]prometheus.Gauge{inbound: in, outbound: out}
}

func (t *table) add(l *link) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.links[l] = struct{}{}
	t.open[l.direction].Inc()
}

func (t *table) remove(l *link) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.links, l)
	t.open[l.direction].Dec()
}

// enter and leave frame what becomes of a connection that was accepted.
func (t *table) enter() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.accepted++
}

func (t *table) leave() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.accepted--; t.accepted == 0 {
		for _, w := range t.waiters {
			close(w)
		}
		t.waiters = nil
	}
}

// left returns how many connections are not over.
func (t *table) left() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.accepted
}

func (t *table) len() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.links)
}

// all yields the connections that are live at the call. The lock is not held while they are looked at.
func (t *table) all() iter.Seq[*link] {
	t.mu.Lock()
	links := slices.Collect(maps.Keys(t.links))
	t.mu.Unlock()
	return slices.Values(links)
}

// empty returns a channel that is closed once every connection that was accepted is over.
func (t *table) empty() <-chan struct{} {
	t.mu.Lock()
	defer t.mu.Unlock()
	w := make(chan struct{})
	if t.accepted == 0 {
		close(w)
	} else {
		t.waiters = append(t.waiters, w)
	}
	return w
}
