package cluster

import (
	"slices"
	"time"
)

// Measured tells how long something took, several times, beside its target for the
// median and the most. Only what took longer than never fails the test: a machine
// that others use, too, proves nothing about the target.
func (r *Run) Measured(what string, took []time.Duration, p50, p99, never time.Duration) {
	r.Helper()
	if len(took) == 0 {
		r.Errorf("%s: nothing was measured", what)
		return
	}
	took = slices.Sorted(slices.Values(took))
	at := func(percent int) time.Duration { return took[(len(took)-1)*percent/100] }
	worst := took[len(took)-1]
	if n := len(took); n >= 50 {
		worst = at(99)
	}
	r.Logf("MEASURED %s: median %s, p99 %s of %d (targets %s, %s)%s", what,
		at(50).Round(time.Millisecond), worst.Round(time.Millisecond), len(took), p50, p99, missed(at(50) > p50 || worst > p99))
	if took[len(took)-1] > never {
		r.Errorf("%s: %s, want %s at most even on a machine that is busy", what, took[len(took)-1], never)
	}
}

// Count tells how often something happened beside how often it may, as a target.
func (r *Run) Count(what string, n, target, never int) {
	r.Helper()
	r.Logf("MEASURED %s: %d (target %d)%s", what, n, target, missed(n > target))
	if n > never {
		r.Errorf("%s: %d, want %d at most even on a machine that is busy", what, n, never)
	}
}

// Share tells a share, in percent, beside the least that it should be.
func (r *Run) Share(what string, part, whole float64, target, never int) {
	r.Helper()
	percent := 0
	if whole > 0 {
		percent = int(100 * part / whole)
	}
	r.Logf("MEASURED %s: %d %% (%.0f of %.0f; target %d %%)%s", what, percent, part, whole, target, missed(percent < target))
	if percent < never {
		r.Errorf("%s: %d %%, want %d %% at least even on a machine that is busy", what, percent, never)
	}
}

func missed(yes bool) string {
	if yes {
		return " MISSED"
	}
	return ""
}
