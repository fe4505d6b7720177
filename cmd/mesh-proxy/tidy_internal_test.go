package main

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// TestTidyOnlyWhenIdle gives the CPU time that is used between looks, in ms, and a collection's own cost.
func TestTidyOnlyWhenIdle(t *testing.T) {
	const collection = 200 * time.Millisecond
	for name, c := range map[string]struct {
		began bool // the start is still to be tidied up after
		used  []int
		want  []bool
	}{
		"the start, whatever it took":      {began: true, used: []int{0, 3, 0, 0}, want: []bool{true, true, true, false}},
		"a start into traffic: after that": {began: true, used: []int{4000, 3, 3, 3, 3}, want: []bool{false, true, true, true, false}},
		"a burst, then silence: three passes, once": {
			used: []int{4000, 4000, 3, 3, 3, 3, 3, 3},
			want: []bool{false, false, true, true, true, false, false, false},
		},
		"busy all the time: never":         {used: []int{4000, 300, 4000, 251}, want: []bool{false, false, false, false}},
		"a trickle: when it adds up":       {used: []int{20, 20, 20, 20}, want: []bool{false, false, true, true}},
		"traffic again before it was done": {used: []int{4000, 3, 4000, 3, 3, 3, 3}, want: []bool{false, true, false, true, true, true, false}},
		"nothing ever":                     {used: []int{0, 0, 0}, want: []bool{false, false, false}},
	} {
		t.Run(name, func(t *testing.T) {
			var tt tidier
			if c.began {
				tt = newTidier()
			}
			var cpu time.Duration
			var got []bool
			for _, ms := range c.used {
				cpu += time.Duration(ms) * time.Millisecond
				due := tt.due(cpu)
				if due {
					cpu += collection
					tt.done(cpu)
				}
				got = append(got, due)
			}
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Errorf("collections (-want +got):\n%s", diff)
			}
		})
	}
}

func TestCPUTimeAdvances(t *testing.T) {
	before := cpuTime()
	spins := 0
	for ; cpuTime() == before; spins++ {
	}
	if cpuTime() < before {
		t.Errorf("CPU time went back after %d looks", spins)
	}
}
