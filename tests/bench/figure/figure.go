// Package figure turns repeated measurements into a figure and how sure of it
// one may be.
package figure

import (
	"math"
	"slices"
)

// confidence is what an interval is to cover, if there are values enough.
const confidence = 0.95

// Estimate is the median of some values, and an interval that holds the true
// median with the probability Coverage.
type Estimate struct {
	Median   float64 `json:"median"`
	Low      float64 `json:"low"`
	High     float64 `json:"high"`
	Coverage float64 `json:"coverage"`
	N        int     `json:"n"`
}

// Of returns the estimate of values, which it leaves as they are; without a
// value all its fields are zero.
//
// The interval lies between the k-th smallest and the k-th largest value. It
// assumes nothing about the distribution: each value is below the true median
// with probability 1/2, so that fewer than k of n are with probability
// P = sum of C(n, i)/2^n over i < k, and the interval covers the median with
// 1 - 2P (David and Nagaraja, Order Statistics, section 7.1). k is the largest
// that covers 95 %; where even the whole range covers less, it is the range.
// Of ten values that is the second smallest to the second largest: 97.9 %.
func Of(values []float64) Estimate {
	n := len(values)
	if n == 0 {
		return Estimate{}
	}
	sorted := slices.Sorted(slices.Values(values))
	k, covered := 1, coverage(n, 1)
	for next := 2; 2*next <= n; next++ {
		c := coverage(n, next)
		if c < confidence {
			break
		}
		k, covered = next, c
	}
	return Estimate{
		Median: (sorted[(n-1)/2] + sorted[n/2]) / 2,
		Low:    sorted[k-1], High: sorted[n-k], Coverage: covered, N: n,
	}
}

// coverage is the probability that the median lies between the k-th smallest
// and the k-th largest of n values.
func coverage(n, k int) float64 {
	term, sum := math.Pow(0.5, float64(n)), 0.0
	for i := range k {
		sum += term
		term *= float64(n-i) / float64(i+1)
	}
	return 1 - 2*sum
}

// Ratios returns a[i]/b[i]: of pairs that were measured side by side. The longer
// list is cut, a pair with a zero divisor is left out.
func Ratios(a, b []float64) []float64 {
	return paired(a, b, func(x, y float64) (float64, bool) { return x / y, y != 0 })
}

// Differences returns a[i]-b[i].
func Differences(a, b []float64) []float64 {
	return paired(a, b, func(x, y float64) (float64, bool) { return x - y, true })
}

func paired(a, b []float64, of func(x, y float64) (float64, bool)) []float64 {
	out := make([]float64, 0, min(len(a), len(b)))
	for i := range min(len(a), len(b)) {
		if v, ok := of(a[i], b[i]); ok {
			out = append(out, v)
		}
	}
	return out
}
