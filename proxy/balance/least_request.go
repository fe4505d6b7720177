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
	// zone is the weight of what the zone has when all is well.
	zone int
	// planned is the share while none is ejected.
	planned float64
}

// share is how much of a tier's traffic stays nearby if so much weight there is usable, 0 to 1.
func (t *tier) share(usable int) float64 {
	switch {
	case usable == 0:
		return 0
	case t.far.total == 0:
		return 1
	}
	return min(1, overprovision*float64(usable)/float64(t.zone))
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
		t := tier{near: newGroup(sorted, start, middle), far: newGroup(sorted, middle, end)}
		t.zone = max(zoneWeight, t.near.total)
		t.planned = t.share(t.near.total)
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
	for _, all := range [...]bool{false, true} {
		for i := range p.tiers {
			if at := p.pickTier(&p.tiers[i], tried, all); at >= 0 {
				return p.place[at]
			}
		}
	}
	return -1
}

// pickTier picks from one tier, of all in it or only of those that are not ejected.
func (p *leastRequest) pickTier(t *tier, tried []int, all bool) int {
	if t.planned == 1 || t.planned > 0 && rand.Float64() < t.planned { //nolint:gosec // load, not secrecy
		if at := p.pickIn(&t.near, tried, all, t); at >= 0 {
			return at
		}
	}
	if at := p.pickIn(&t.far, tried, all, nil); at >= 0 {
		return at
	}
	return p.pickIn(&t.near, tried, all, nil)
}

// pickIn picks from one group. With a tier it is the group nearby, and -1 may also mean that this request shall go far.
func (p *leastRequest) pickIn(g *group, tried []int, all bool, t *tier) int {
	switch n := g.end - g.start; {
	case n == 0:
		return -1
	case len(tried) > 0:
		return p.best(g, tried, all)
	case all && n == 1:
		return g.start
	case all:
		a := g.draw(-1)
		return p.less(a, g.draw(a))
	}
	a := g.draw(-1)
	switch p.accept(a) {
	case drawnProbe:
		return a
	case drawnEjected:
		return p.pickUsable(g, t)
	case drawnCold:
		return p.pickUsable(g, nil)
	case drawnUsable:
	}
	if g.end-g.start == 1 {
		return a
	}
	for range drawsOfSecond {
		switch b := g.draw(a); p.accept(b) {
		case drawnProbe:
			return b
		case drawnUsable:
			return p.less(a, b)
		case drawnEjected, drawnCold:
		}
	}
	return a
}

// drawn is what came of a draw.
type drawn int

const (
	drawnUsable  drawn = iota
	drawnProbe         // the request is to find out whether an ejected endpoint is back
	drawnEjected       // not to be used
	drawnCold          // an endpoint that is new and has had its part
)

// accept decides about a draw. Nearly always it is two loads.
func (p *leastRequest) accept(i int) drawn {
	s := p.candidates[i].State
	if s.Ejected() {
		if s.probe() {
			return drawnProbe
		}
		return drawnEjected
	}
	if part := s.part(); part < whole && rand.IntN(whole) >= part { //nolint:gosec // load, not secrecy
		return drawnCold
	}
	return drawnUsable
}

// drawsOfSecond is how often the second of two choices is drawn before the first is taken without one.
const drawsOfSecond = 3

func (p *leastRequest) ejected(i int) bool { return p.candidates[i].State.Ejected() }

// pickUsable is for draws that were not accepted: it draws among the usable ones, by how much of their weight they have. A draw
// that is accepted at once and one that comes here give each the same share.
func (p *leastRequest) pickUsable(g *group, t *tier) int {
	usable, sum := 0, 0
	for i := g.start; i < g.end; i++ {
		if !p.ejected(i) {
			usable += p.candidates[i].weight()
			sum += p.current(i)
		}
	}
	if usable == 0 {
		return -1
	}
	if t != nil && usable < g.total {
		// The part that should leave, of those that come here.
		leave := 1 - t.share(usable)/t.planned
		if rand.Float64() < leave/(1-float64(usable)/float64(g.total)) { //nolint:gosec // load, not secrecy
			return -1
		}
	}
	return p.less(p.drawUsable(g, sum), p.drawUsable(g, sum))
}

// drawUsable is a draw among candidates that are not ejected and weigh so much together now. What changes meanwhile may make it
// return one that was just ejected.
func (p *leastRequest) drawUsable(g *group, weight int) int {
	r, last := rand.IntN(weight), g.start //nolint:gosec // load, not secrecy
	for i := g.start; i < g.end; i++ {
		if p.ejected(i) {
			continue
		}
		last = i
		if r -= p.current(i); r < 0 {
			break
		}
	}
	return last
}

// best looks at all that are left. It is for another try after a failure, which is rare.
func (p *leastRequest) best(g *group, tried []int, all bool) int {
	n := g.end - g.start
	offset := rand.IntN(n) //nolint:gosec // load, not secrecy
	best := -1
	for k := range n {
		i := g.start + (offset+k)%n
		switch {
		case slices.Contains(tried, p.place[i]), !all && p.ejected(i):
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
	ca, cb := p.candidates[a].State.Outstanding(), p.candidates[b].State.Outstanding()
	if cb*int64(p.current(a)) < ca*int64(p.current(b)) {
		return b
	}
	return a
}

// current is a candidate's weight now, in parts of whole.
func (p *leastRequest) current(i int) int {
	return p.candidates[i].weight() * p.candidates[i].State.part()
}
