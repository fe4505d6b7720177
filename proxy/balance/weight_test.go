package balance_test

import (
	"math"
	"testing"

	"github.com/meshd/meshd/proxy/balance"
)

// shares tells how many of n picks each candidate gets while at most busy requests are open at a time, the oldest of which
// ends for each new one.
func shares(t *testing.T, p balance.Picker, candidates []balance.Candidate, n, busy int) []float64 {
	t.Helper()
	out := make([]float64, len(candidates))
	open := make([]*balance.State, 0, busy+1)
	for range n {
		i := p.Pick(nil)
		if i < 0 {
			t.Fatal("nothing was picked")
		}
		out[i] += 1 / float64(n)
		candidates[i].State.Begin()
		if open = append(open, candidates[i].State); len(open) > busy {
			open[0].End()
			open = append(open[:0], open[1:]...)
		}
	}
	return out
}

func weighed(tier, weight int, far bool) balance.Candidate {
	return balance.Candidate{State: new(balance.State), Tier: tier, Weight: weight, Far: far}
}

func TestSharesFollowWeightsAndZones(t *testing.T) {
	tests := map[string]struct {
		candidates []balance.Candidate
		zoneWeight int
		want       []float64
	}{
		"no weight is weight 1":  {[]balance.Candidate{weighed(0, 0, false), weighed(0, 1, false)}, 0, []float64{.5, .5}},
		"a pair":                 {[]balance.Candidate{weighed(0, 1, false), weighed(0, 3, false)}, 0, []float64{.25, .75}},
		"several":                {[]balance.Candidate{weighed(0, 5, false), weighed(0, 10, false), weighed(0, 5, false)}, 0, []float64{.25, .5, .25}},
		"the same zone":          {[]balance.Candidate{weighed(0, 1, true), weighed(0, 1, false), weighed(0, 1, true)}, 0, []float64{0, 1, 0}},
		"the tier before it":     {[]balance.Candidate{weighed(1, 1, false), weighed(0, 1, true)}, 0, []float64{0, 1}},
		"nothing nearby":         {[]balance.Candidate{weighed(0, 1, true), weighed(0, 1, true)}, 4, []float64{.5, .5}},
		"three of four nearby":   {[]balance.Candidate{weighed(0, 3, false), weighed(0, 1, true)}, 4, []float64{1, 0}},
		"half of it nearby":      {[]balance.Candidate{weighed(0, 2, false), weighed(0, 1, true)}, 4, []float64{.7, .3}},
		"a quarter of it nearby": {[]balance.Candidate{weighed(0, 1, false), weighed(0, 5, true)}, 4, []float64{.35, .65}},
		"nothing far":            {[]balance.Candidate{weighed(0, 1, false), weighed(0, 1, false)}, 100, []float64{.5, .5}},
	}
	for name, tt := range tests {
		for _, busy := range []int{0, 200} {
			p, err := balance.New("", tt.candidates, tt.zoneWeight)
			if err != nil {
				t.Fatal(err)
			}
			got := shares(t, p, tt.candidates, 40_000, busy)
			for i := range got {
				// With 40,000 picks, 0.02 is eight standard deviations of the widest.
				if math.Abs(got[i]-tt.want[i]) > .02 {
					t.Errorf("%s, %d open: shares %.3f, want %.3f", name, busy, got, tt.want)
					break
				}
			}
			for _, c := range tt.candidates {
				for c.State.Outstanding() > 0 {
					c.State.End()
				}
			}
		}
	}
}

func TestWeightedPickDoesNotAllocate(t *testing.T) {
	p, err := balance.New("", []balance.Candidate{weighed(0, 1, false), weighed(0, 2, false), weighed(0, 3, true), weighed(0, 4, true)}, 6)
	if err != nil {
		t.Fatal(err)
	}
	tried := []int{1}
	if n := testing.AllocsPerRun(1000, func() { p.Pick(nil); p.Pick(tried) }); n != 0 {
		t.Errorf("Pick allocates %v times", n)
	}
}
