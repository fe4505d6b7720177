package balance

import (
	"math/rand/v2"
	"slices"
)

// leastRequest takes two different random endpoints of the best tier and picks the one with fewer outstanding requests
// (M. Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", 1996). It needs to know nothing but its own
// requests, and many proxies that do the same do not all pick the same endpoint, as the least loaded of all would make them.
type leastRequest struct {
	candidates []Candidate // sorted by tier
	place      []int       // the caller's index of each
	tiers      []int       // end of each tier in candidates
}

func newLeastRequest(sorted []Candidate, place []int) Picker {
	p := &leastRequest{candidates: sorted, place: place}
	for i := range sorted {
		if i+1 == len(sorted) || sorted[i+1].Tier != sorted[i].Tier {
			p.tiers = append(p.tiers, i+1)
		}
	}
	return p
}

// Pick implements Picker.
func (p *leastRequest) Pick(tried []int) int {
	start := 0
	for _, end := range p.tiers {
		if i := p.pickIn(start, end, tried); i >= 0 {
			return p.place[i]
		}
		start = end
	}
	return -1
}

// pickIn picks from one tier.
func (p *leastRequest) pickIn(start, end int, tried []int) int {
	n := end - start
	if len(tried) == 0 {
		if n == 1 {
			return start
		}
		a := start + rand.IntN(n)   //nolint:gosec // load, not secrecy
		b := start + rand.IntN(n-1) //nolint:gosec // load, not secrecy
		if b >= a {
			b++
		}
		return p.less(a, b)
	}
	// Another try, after a failure: rare, so look at all that are left.
	offset := rand.IntN(n) //nolint:gosec // load, not secrecy
	best := -1
	for k := range n {
		i := start + (offset+k)%n
		switch {
		case slices.Contains(tried, p.place[i]):
		case best < 0:
			best = i
		default:
			best = p.less(best, i)
		}
	}
	return best
}

func (p *leastRequest) less(a, b int) int {
	if p.candidates[b].State.Outstanding() < p.candidates[a].State.Outstanding() {
		return b
	}
	return a
}
