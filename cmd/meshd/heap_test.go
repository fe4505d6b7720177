package main_test

import (
	"math"
	"runtime"
	"runtime/debug"
	"testing"

	main "github.com/meshd/meshd/cmd/meshd"
)

func TestGCPercent(t *testing.T) {
	const mib = 1 << 20
	for _, c := range []struct {
		live, floor uint64
		want        int
	}{
		{0, 96 * mib, 9500}, // counts as 1 MiB
		{10 * mib, 96 * mib, 860},
		{40 * mib, 96 * mib, 140},
		{48 * mib, 96 * mib, 100},
		{400 * mib, 96 * mib, 100},
		{math.MaxUint64 / 2, 96 * mib, 100},
		{10 * mib, 0, 100},
	} {
		if got := main.GCPercent(c.live, c.floor); got != c.want {
			t.Errorf("%d MiB of %d live: %d %%, want %d %%", c.live/mib, c.floor/mib, got, c.want)
		}
	}
}

// Each collection leads to a new look at what lives.
func TestKeepHeap(t *testing.T) {
	before := debug.SetGCPercent(100)
	defer debug.SetGCPercent(before)
	called := make(chan struct{}, 100)
	main.AfterCollection(func() { called <- struct{}{} })
	for range 3 {
		runtime.GC()
		<-called
	}
}
