package catalog

import (
	"slices"
	"time"
)

// Health is the verdict of a check, or of all checks of an instance.
type Health string

// The verdicts. HealthUnknown is that of an instance of which nothing was
// reported yet; the zero value means the same.
const (
	HealthPassing  Health = "passing"
	HealthWarning  Health = "warning"
	HealthCritical Health = "critical"
	HealthUnknown  Health = "unknown"
)

// Usable reports whether an instance with this health may receive traffic:
// passing or warning. What this build does not know is not usable.
func (h Health) Usable() bool { return h == HealthPassing || h == HealthWarning }

// severity orders verdicts from best to worst.
func (h Health) severity() int {
	switch h {
	case HealthPassing:
		return 0
	case HealthWarning:
		return 1
	case HealthCritical:
		return 3
	case HealthUnknown:
		return 2
	default:
		return 2
	}
}

// WorstHealth returns the health of an instance from its checks: the worst
// wins (critical, unknown, warning, passing), and no checks is passing.
func WorstHealth(checks []CheckState) Health {
	worst := HealthPassing
	for _, c := range checks {
		if c.Health.severity() > worst.severity() {
			worst = c.Health
			if worst.severity() == HealthUnknown.severity() {
				worst = HealthUnknown
			}
		}
	}
	return worst
}

// An InstanceStatus is what an agent observed of an instance, under its own
// key. Only transitions are stored.
type InstanceStatus struct {
	Health Health       `json:"health"`
	Checks []CheckState `json:"checks,omitempty"`
	// Drain says that the instance takes no new work.
	Drain bool `json:"drain,omitzero"`
}

// A CheckState is the verdict of one check at its latest transition.
type CheckState struct {
	Name   string `json:"name"`
	Health Health `json:"health"`
	// Output is what the check said at the transition, cut to 4 KiB.
	Output string    `json:"output,omitempty"`
	Since  time.Time `json:"since"`
}

// An Endpoint is an instance together with what is known of its state.
type Endpoint struct {
	Instance Instance
	Status   InstanceStatus
	// Stale says that the lease of the instance's node is lost.
	Stale bool
}

// A Tier is how good an endpoint is. Traffic goes to the best tier that is not
// empty.
type Tier uint8

// The tiers. The zero value is refused, so an endpoint of unknown state gets
// nothing.
const (
	// TierRefused endpoints get no new work: critical, unknown or draining.
	TierRefused Tier = iota
	// TierStale endpoints were usable when their node was last heard of. They
	// are used while nothing better exists: a lost lease says more often that
	// the control plane is cut off than that the host is dead.
	TierStale
	// TierServing endpoints are usable and their node holds its lease.
	TierServing
)

// String returns "refused", "stale" or "serving".
func (t Tier) String() string {
	switch t {
	case TierServing:
		return "serving"
	case TierStale:
		return "stale"
	case TierRefused:
		return "refused"
	default:
		return "refused"
	}
}

// Tier returns the tier of the endpoint.
func (e Endpoint) Tier() Tier {
	switch {
	case e.Status.Drain || !e.Status.Health.Usable():
		return TierRefused
	case e.Stale:
		return TierStale
	default:
		return TierServing
	}
}

// SelectEndpoints picks from all endpoints of a service those to use, which are
// the ones of the best tier that has any, and spare ones: usable, but of a
// lower tier, for when all of use fail. Refused endpoints are in neither. Both
// are ordered by InstanceKey, so equal input in any order gives equal output;
// all is left as it was.
func SelectEndpoints(all []Endpoint) (use, spare []Endpoint) {
	var serving, stale []Endpoint
	for _, e := range all {
		switch e.Tier() {
		case TierServing:
			serving = append(serving, e)
		case TierStale:
			stale = append(stale, e)
		case TierRefused:
		}
	}
	byKey := func(a, b Endpoint) int { return a.Instance.Key().Compare(b.Instance.Key()) }
	slices.SortFunc(serving, byKey)
	slices.SortFunc(stale, byKey)
	if len(serving) == 0 {
		return stale, nil
	}
	return serving, stale
}
