package check

import (
	"strings"
	"time"
	"unicode/utf8"

	"github.com/meshd/meshd/catalog"
)

// MaxOutput is how much of a check's output is kept, in bytes: Consul's figure.
const MaxOutput = 4 << 10

// State is what is known of one check.
type State struct {
	Name string            `json:"name"`
	Kind catalog.CheckKind `json:"kind"`
	// Health is the verdict, thresholds applied.
	Health catalog.Health `json:"health"`
	// Since is when Health became what it is.
	Since time.Time `json:"since"`
	// Reason is the output of the run that brought Health about.
	Reason string `json:"reason,omitempty"`
	// Output is what the newest run said, and Ran when that was; zero before
	// the first.
	Output string    `json:"output,omitempty"`
	Ran    time.Time `json:"ran,omitzero"`
}

// CheckState returns what leaves the agent: the verdict as it was reached.
func (s State) CheckState() catalog.CheckState {
	return catalog.CheckState{Name: s.Name, Health: s.Health, Output: s.Reason, Since: s.Since}
}

// result is the outcome of one run.
type result struct {
	health catalog.Health
	output string
}

// tracker turns results into verdicts. It is pure: the time is given.
type tracker struct {
	check     catalog.Check // with defaults
	state     State
	successes int
	failures  int
}

// newTracker starts from an earlier state of the same check, if there is one:
// a new agent process must not turn what serves into critical.
func newTracker(c catalog.Check, earlier *State, now time.Time) *tracker {
	c = c.WithDefaults()
	t := &tracker{check: c, state: State{
		Name: c.Name, Kind: c.Kind(), Health: catalog.HealthCritical, Since: now,
		Reason: "not checked yet",
	}}
	if earlier != nil && earlier.Name == c.Name && earlier.Kind == c.Kind() {
		t.state = *earlier
	}
	return t
}

// observe takes one result and reports whether the verdict changed.
func (t *tracker) observe(r result, now time.Time) bool {
	output := clip(r.output)
	t.state.Output, t.state.Ran = output, now
	verdict := t.verdict(r.health)
	if verdict == t.state.Health {
		return false
	}
	t.state.Health, t.state.Since, t.state.Reason = verdict, now, output
	return true
}

// verdict applies the thresholds. As in Consul, a warning counts as a success;
// too few equal results leave the verdict as it is.
func (t *tracker) verdict(h catalog.Health) catalog.Health {
	if t.check.Kind() == catalog.CheckTTL {
		return h
	}
	if h.Usable() {
		t.successes, t.failures = t.successes+1, 0
		if t.successes >= t.check.SuccessBeforePassing {
			return h
		}
		return t.state.Health
	}
	t.failures, t.successes = t.failures+1, 0
	switch {
	case t.failures >= t.check.FailuresBeforeCritical:
		return catalog.HealthCritical
	case t.failures >= t.check.FailuresBeforeWarning && t.state.Health == catalog.HealthPassing:
		return catalog.HealthWarning
	default:
		return t.state.Health
	}
}

// clip makes output safe to keep and to show: valid UTF-8 without control
// characters but newline and tab, at most MaxOutput bytes.
func clip(s string) string {
	s = strings.ToValidUTF8(s, "\uFFFD")
	s = strings.Map(func(r rune) rune {
		if r == '\n' || r == '\t' || r >= 0x20 && r != 0x7f && (r < 0x80 || r > 0x9f) {
			return r
		}
		return -1
	}, s)
	if len(s) <= MaxOutput {
		return s
	}
	cut := MaxOutput
	for !utf8.RuneStart(s[cut]) {
		cut--
	}
	return s[:cut]
}
