package figure_test

import (
	"math"
	"math/rand/v2"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/meshd/meshd/tests/bench/figure"
)

func TestOf(t *testing.T) {
	tests := map[string]struct {
		values []float64
		want   figure.Estimate
	}{
		"none":  {nil, figure.Estimate{}},
		"one":   {[]float64{7}, figure.Estimate{Median: 7, Low: 7, High: 7, Coverage: 0, N: 1}},
		"two":   {[]float64{3, 1}, figure.Estimate{Median: 2, Low: 1, High: 3, Coverage: 0.5, N: 2}},
		"five":  {[]float64{5, 1, 4, 2, 3}, figure.Estimate{Median: 3, Low: 1, High: 5, Coverage: 0.9375, N: 5}},
		"six":   {[]float64{6, 1, 5, 2, 4, 3}, figure.Estimate{Median: 3.5, Low: 1, High: 6, Coverage: 1 - 2.0/64, N: 6}},
		"eight": {[]float64{8, 7, 6, 5, 4, 3, 2, 1}, figure.Estimate{Median: 4.5, Low: 1, High: 8, Coverage: 1 - 2.0/256, N: 8}},
		"nine":  {[]float64{9, 8, 7, 6, 5, 4, 3, 2, 1}, figure.Estimate{Median: 5, Low: 2, High: 8, Coverage: 1 - 2.0*10/512, N: 9}},
		"ten, one of them wild": {
			[]float64{1e9, 9, 8, 7, 6, 5, 4, 3, 2, 1},
			figure.Estimate{Median: 5.5, Low: 2, High: 9, Coverage: 1 - 2.0*11/1024, N: 10},
		},
		"twenty": {
			[]float64{20, 19, 18, 17, 16, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1},
			figure.Estimate{Median: 10.5, Low: 6, High: 15, Coverage: 0.958611, N: 20},
		},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			got := figure.Of(tc.values)
			if diff := cmp.Diff(tc.want, got, cmpopts.EquateApprox(0, 1e-6)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestOfLeavesItsArgument(t *testing.T) {
	values := []float64{3, 1, 2}
	figure.Of(values)
	if diff := cmp.Diff([]float64{3, 1, 2}, values); diff != "" {
		t.Error(diff)
	}
}

// The stated coverage must be the real one, for a distribution that is far from
// normal.
func TestCoverage(t *testing.T) {
	const trials = 20_000
	random := rand.New(rand.NewPCG(1, 2))
	for _, n := range []int{5, 6, 10, 20} {
		hits, coverage := 0, 0.0
		values := make([]float64, n)
		for range trials {
			for i := range values {
				values[i] = math.Exp(3 * random.NormFloat64()) // its median is 1
			}
			e := figure.Of(values)
			coverage = e.Coverage
			if e.Low <= 1 && 1 <= e.High {
				hits++
			}
		}
		if got := float64(hits) / trials; math.Abs(got-coverage) > 0.01 {
			t.Errorf("of %d values: covered in %.3f of the trials, stated are %.3f", n, got, coverage)
		}
	}
}

func TestPairs(t *testing.T) {
	a, b := []float64{2, 9, 4, 1}, []float64{1, 3, 0}
	if diff := cmp.Diff([]float64{2, 3}, figure.Ratios(a, b)); diff != "" {
		t.Error("ratios:", diff)
	}
	if diff := cmp.Diff([]float64{1, 6, 4}, figure.Differences(a, b)); diff != "" {
		t.Error("differences:", diff)
	}
}
