package main

import (
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
)

// serverHeap is how far a server's heap may grow before it is collected, however
// little of it lives. Go's own rule, twice what lives, would collect the few MiB of
// a small mesh several times a second while it writes: three servers that share two
// CPUs took a tenth less CPU per write with this. What a large mesh takes stays
// as it is.
const serverHeap = 96 << 20

// keepHeap lets the heap grow to the floor between collections, or to Go's own
// target where that is more. It does nothing if GOGC is set: then the operator has
// decided.
func keepHeap(floor uint64) {
	if _, decided := os.LookupEnv("GOGC"); !decided {
		afterCollection(func() { debug.SetGCPercent(gcPercent(liveHeap(), floor)) })
	}
}

// gcPercent is by how much more than what lives the heap may grow: Go's default of
// 100, unless the floor is more.
func gcPercent(live, floor uint64) int {
	live = max(live, 1<<20)
	if 2*live >= floor {
		return 100
	}
	return int((floor - live) * 100 / live) //nolint:gosec // at most the floor in KiB
}

// liveHeap is what the last collection found to live.
func liveHeap() uint64 {
	live := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
	metrics.Read(live)
	if live[0].Value.Kind() != metrics.KindUint64 {
		return 1 << 62 // unknown: Go's own rule
	}
	return live[0].Value.Uint64()
}

// collected is something that nobody holds, so that every collection finds it.
type collected struct{ _ [4]*int }

// afterCollection calls a function after each collection, and never at the same
// time twice.
func afterCollection(do func()) {
	runtime.AddCleanup(&collected{}, func(struct{}) {
		do()
		afterCollection(do)
	}, struct{}{})
}
