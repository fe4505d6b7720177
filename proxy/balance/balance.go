// Package balance picks the endpoint for the next request or connection. An algorithm is one file and one line in the table
// of this one; what it may rely on is here.
//
// What is known of an endpoint at run time (State) is apart from the choice among endpoints (Picker): pickers are made anew
// with every plan and share the states of endpoints that both plans have, so that a change of plan forgets nothing. See
// Registry for how long a state lives.
package balance

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"
)

// ErrAlgorithm is wrapped when an algorithm is asked for that is not in the table.
var ErrAlgorithm = errors.New("unknown balancing algorithm")

// State is what is known of one endpoint at run time. It is safe for concurrent use. The zero State is that of an endpoint
// that was never used.
type State struct {
	outstanding atomic.Int64
	health
	warmth
	// The counter is written on every request: keep other endpoints' off its cache line.
	_ [56]byte
}

// Begin notes that a request or connection was given to the endpoint. End must follow exactly once.
func (s *State) Begin() { s.outstanding.Add(1) }

// Succeed notes that the endpoint took a connection or answered, and reports whether that ended its ejection. An endpoint that
// came back gets its share little by little.
func (s *State) Succeed(now time.Time) (returned bool) {
	if !s.succeed(now) {
		return false
	}
	s.start(now)
	return true
}

// End notes that it is over.
func (s *State) End() { s.outstanding.Add(-1) }

// Outstanding returns how many have begun and not ended.
func (s *State) Outstanding() int64 { return s.outstanding.Load() }

// Candidate is one endpoint to choose from.
type Candidate struct {
	State *State
	// Tier orders use: a candidate is picked only when no candidate of a lower tier is left.
	Tier int
	// Weight is how much of the traffic it gets in proportion to others; 0 means 1.
	Weight int
	// Far says that it is in another zone than the caller, where others of its tier may be nearby.
	Far bool
}

func (c *Candidate) weight() int { return max(c.Weight, 1) }

// Picker chooses among the candidates that it was made from. It is safe for concurrent use, takes no lock that requests share,
// and does not allocate.
type Picker interface {
	// Pick returns the index of a candidate that is not in tried, or -1 if none is left. tried are indexes that Pick returned
	// before for the same request; the slice is not kept. Ejected candidates are left out, but for two cases: the pick is the
	// probe of one whose time has come, or all that are left are ejected. Whoever picked tells State.Fail or State.Succeed.
	Pick(tried []int) int
}

// Algorithm names a way to choose. The empty Algorithm is the default.
type Algorithm string

// The algorithms.
const (
	// LeastRequest takes the less loaded of two random endpoints.
	LeastRequest Algorithm = "least_request"
)

// factory makes a picker for candidates that are sorted by tier, those nearby first; place maps its indexes back.
type factory func(sorted []Candidate, place []int, zoneWeight int) Picker

// algorithms is the table.
func algorithms() map[Algorithm]factory {
	return map[Algorithm]factory{
		"":           newLeastRequest,
		LeastRequest: newLeastRequest,
	}
}

// New returns a picker by the algorithm. It takes no reference to candidates; an empty list gives a picker that always says
// -1. zoneWeight is the weight of all that the caller's zone has when all is well: while less of it is among the candidates,
// some of the traffic goes far. 0 is the weight of those candidates that are not far. Errors wrap ErrAlgorithm.
func New(algorithm Algorithm, candidates []Candidate, zoneWeight int) (Picker, error) {
	build, ok := algorithms()[algorithm]
	if !ok {
		return nil, fmt.Errorf("%w: %q", ErrAlgorithm, algorithm)
	}
	place := make([]int, len(candidates))
	for i := range place {
		place[i] = i
	}
	slices.SortStableFunc(place, func(a, b int) int {
		return cmp.Or(cmp.Compare(candidates[a].Tier, candidates[b].Tier), cmp.Compare(far(candidates[a]), far(candidates[b])))
	})
	sorted := make([]Candidate, len(candidates))
	for i, from := range place {
		sorted[i] = candidates[from]
	}
	return build(sorted, place, zoneWeight), nil
}

func far(c Candidate) int {
	if c.Far {
		return 1
	}
	return 0
}
