package main

import (
	"context"
	"runtime/debug"
	"syscall"
	"time"
)

// An idle proxy gives memory back. The runtime does so too, but the collector
// runs only after allocations, of which the data path makes none, or after two
// minutes: until then the stacks and buffers of a handshake stay.
const (
	// tidyEvery is how often the process is looked at.
	tidyEvery = 5 * time.Second
	// tidyQuiet is how much CPU time in tidyEvery still is idleness.
	tidyQuiet = tidyEvery / 20
	// tidyWorth is how much CPU time since the last collection makes another worth it.
	tidyWorth = 50 * time.Millisecond
	// tidyPasses is how often it collects then: each time a stack gets smaller by half at most.
	tidyPasses = 3
)

// tidier decides when to collect.
type tidier struct {
	before, last time.Duration // CPU time at the last look, and after the last collection
	passes       int           // to come
}

// newTidier returns one that has seen nothing. What the start left is worth its passes, however little time it took.
func newTidier() tidier { return tidier{passes: tidyPasses} }

// due reports whether the process, which has used cpu by now, is to collect. It is asked each tidyEvery.
func (t *tidier) due(cpu time.Duration) bool {
	used := cpu - t.before
	t.before = cpu
	if cpu-t.last >= tidyWorth {
		t.passes = tidyPasses
	}
	if used > tidyQuiet || t.passes == 0 {
		return false
	}
	t.passes--
	return true
}

// done takes note of what the process had used after a collection.
func (t *tidier) done(cpu time.Duration) { t.before, t.last = cpu, cpu }

// tidy gives memory back to the system whenever the process is idle, until ctx ends.
func tidy(ctx context.Context) {
	ticker := time.NewTicker(tidyEvery)
	defer ticker.Stop()
	t := newTidier()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		if t.due(cpuTime()) {
			debug.FreeOSMemory()
			t.done(cpuTime())
		}
	}
}

// cpuTime is what the process has used so far.
func cpuTime() time.Duration {
	var u syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &u) != nil {
		return 0 // it cannot fail; if it does, nothing is ever due
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
