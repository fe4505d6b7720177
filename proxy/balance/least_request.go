package balance

import (
	"math/rand/v2"
	"slices"
	"sort"
)

// leastRequest takes two different random endpoints of the best tier and picks the one with fewer outstanding requests
// (M. Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", 1996). It needs to know nothing but its own
// requests, and many proxies that do the same do not all pick the same endpoint, as the least loaded of all would make them.
//
// Weights count twice. Both are drawn in proportion to weight, and of equals the first drawn is taken, so that endpoints
// without load share by weight; and load is outstanding requests by weight, so that busy ones do, too.
type leastRequest struct {
	candidates []Candidate // sorted by tier, those nearby first
	place      []int       // the caller's index of each
	tiers      []tier
}

// tier is a run of candidates of one tier.
type tier struct {
	near, far group
	// share is how much of the traffic stays nearby while there are both, 0 to 1.
	share float64
}

// group is a run of candidates among which only weight and load decide.
type group struct {
	start, end int
	// sums are the weights up to and including each candidate; nil if all weigh the same.
	sums  []int
	total int // weight
}

// overprovision is how much more than its part a zone is trusted to carry: traffic leaves a zone only when less than 1/1.4 =
// 71 % of its capacity is left, and then only as much as is missing. Envoy has the same factor between priorities.
const overprovision = 1.4

func newLeastRequest(sorted []Candidate, place []int, zoneWeight int) Picker {
	p := &leastRequest{candidates: sorted, place: place}
	for start := 0; start < len(sorted); {
		end := start
		for end < len(sorted) && sorted[end].Tier == sorted[start].Tier {
			end++
		}
		middle := start
		for middle < end && !sorted[middle].Far {
			middle++
		}
		t := tier{near: newGroup(sorted, start, middle), far: newGroup(sorted, middle, end), share: 1}
		if zoneWeight > t.near.total {
			t.share = min(1, overprovision*float64(t.near.total)/float64(zoneWeight))
		}
		p.tiers = append(p.tiers, t)
		start = end
	}
	return p
}

func newGroup(sorted []Candidate, start, end int) group {
	g := group{start: start, end: end}
	same := true
	for i := start; i < end; i++ {
		g.total += sorted[i].weight()
		g.sums = append(g.sums, g.total)
		same = same && sorted[i].weight() == sorted[start].weight()
	}
	if same {
		g.sums = nil
	}
	return g
}

// Pick implements Picker.
func (p *leastRequest) Pick(tried []int) int {
	for i := range p.tiers {
		if at := p.pickTier(&p.tiers[i], tried); at >= 0 {
			return p.place[at]
		}
	}
	return -1
}

func (p *leastRequest) pickTier(t *tier, tried []int) int {
	first, second := &t.near, &t.far
	if t.share < 1 && rand.Float64() >= t.share { //nolint:gosec // load, not secrecy
		first, second = second, first
	}
	if at := p.pickIn(first, tried); at >= 0 {
		return at
	}
	return p.pickIn(second, tried)
}

func (p *leastRequest) pickIn(g *group, tried []int) int {
	switch n := g.end - g.start; {
	case n == 0:
		return -1
	case len(tried) > 0:
		return p.best(g, tried)
	case n == 1:
		return g.start
	}
	a := g.draw(-1)
	return p.less(a, g.draw(a))
}

// best looks at all that are left. It is for another try after a failure, which is rare.
func (p *leastRequest) best(g *group, tried []int) int {
	n := g.end - g.start
	offset := rand.IntN(n) //nolint:gosec // load, not secrecy
	best := -1
	for k := range n {
		i := g.start + (offset+k)%n
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

// draw returns a random candidate by weight, any but except.
func (g *group) draw(except int) int {
	if g.sums == nil {
		n := g.end - g.start
		if except < 0 {
			return g.start + rand.IntN(n) //nolint:gosec // load, not secrecy
		}
		i := g.start + rand.IntN(n-1) //nolint:gosec // load, not secrecy
		if i >= except {
			i++
		}
		return i
	}
	skip, before := 0, 0
	if except >= 0 {
		if except > g.start {
			before = g.sums[except-g.start-1]
		}
		skip = g.sums[except-g.start] - before
	}
	r := rand.IntN(g.total - skip) //nolint:gosec // load, not secrecy
	if except >= 0 && r >= before {
		r += skip
	}
	return g.start + sort.Search(len(g.sums), func(i int) bool { return g.sums[i] > r })
}

// less returns the one with less load, a if they are equal.
func (p *leastRequest) less(a, b int) int {
	ca, cb := &p.candidates[a], &p.candidates[b]
	if cb.State.Outstanding()*int64(ca.weight()) < ca.State.Outstanding()*int64(cb.weight()) {
		return b
	}
	return a
}
