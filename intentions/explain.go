package intentions

import (
	"fmt"
	"strings"
)

// An Explanation is a decision with its grounds, for people.
type Explanation struct {
	Decision Decision
	// Intention is the one that decided; zero where none did.
	Intention Intention
	// Rules tells of each rule that was looked at, in order; the last one
	// matched where Decision.Reason is ReasonRule.
	Rules []RuleResult
}

// A RuleResult is how one rule fared.
type RuleResult struct {
	// Index counts from 0.
	Index int
	Rule  Rule
	// Matched is true for the rule that decided.
	Matched bool
	// Why names the first condition that failed; empty for a match.
	Why string
}

// String returns one line, such as
//
//	intention web → api, rule 1 of 1 "allow GET,HEAD /v1/*": POST matches none → deny
func (e Explanation) String() string {
	verdict := " → " + string(Deny)
	if e.Decision.Allowed {
		verdict = " → " + string(Allow)
	}
	head := "intention " + e.Decision.Key.String()
	total := len(e.Intention.Rules)
	switch e.Decision.Reason {
	case ReasonAction:
		return head + verdict
	case ReasonRule:
		if n := len(e.Rules); n > 0 {
			return fmt.Sprintf("%s, rule %d of %d %q%s", head, n, total, e.Rules[n-1].Rule, verdict)
		}
		return head + verdict
	case ReasonNoRule:
		var why []string
		for _, r := range e.Rules {
			why = append(why, fmt.Sprintf("rule %d of %d %q: %s", r.Index+1, total, r.Rule, r.Why))
		}
		return head + ", " + strings.Join(why, "; ") + verdict
	case ReasonPort:
		return fmt.Sprintf("%s covers port %s only%s", head, strings.Join(e.Intention.Ports, ", "), verdict)
	case ReasonNotHTTP:
		return head + " has HTTP rules, and the traffic is not HTTP" + verdict
	case ReasonExpired:
		return head + " has expired, and no other covers the pair" + verdict
	case ReasonNoIntention:
		return "no intention covers the pair" + verdict
	case ReasonNoPolicy, ReasonNone:
		return "there is no policy for the destination" + verdict
	case ReasonSource:
		return "the source is not the identity of a service" + verdict
	case ReasonDestination:
		return "the policy is another destination's" + verdict
	case ReasonPath:
		return "the path is not normalized" + verdict
	default:
		return string(e.Decision.Reason) + verdict
	}
}

// Explain decides the request as Decide does and says why. It is for people, not
// for the data path: it allocates.
func (p *Policy) Explain(r Request) Explanation {
	e, d := p.pick(&r)
	x := Explanation{Decision: d}
	if e == nil {
		return x
	}
	x.Intention = e.spec
	if d.Reason != ReasonRule && d.Reason != ReasonNoRule {
		return x
	}
	var loose loosePath
	for i := range e.rules {
		spec := e.spec.Rules[i]
		failed := e.rules[i].mismatch(r.HTTP, &loose)
		x.Rules = append(x.Rules, RuleResult{
			Index: i, Rule: spec, Matched: failed == condNone, Why: why(spec, failed, r.HTTP),
		})
		if failed == condNone {
			break
		}
	}
	return x
}

// why says in words which condition of the rule the request fails.
func why(spec Rule, failed condition, h *HTTPRequest) string {
	switch failed {
	case condNone:
		return ""
	case condMethod:
		return h.Method + " matches none"
	case condPath:
		return fmt.Sprintf("path %q does not match", h.Path)
	default:
		return "header " + spec.Headers[failed].String() + " does not hold"
	}
}

// String returns one line, such as "denied: intention web → api,
// no-rule-matched". Explanation.String says more.
func (d Decision) String() string {
	verdict := "denied"
	if d.Allowed {
		verdict = "allowed"
	}
	reason := string(d.Reason)
	switch d.Reason {
	case ReasonNone:
		reason = "no decision"
	case ReasonRule:
		reason = fmt.Sprintf("rule %d", d.Rule+1)
	case ReasonAction, ReasonNoRule, ReasonNoIntention, ReasonExpired, ReasonPort, ReasonNotHTTP,
		ReasonNoPolicy, ReasonSource, ReasonDestination, ReasonPath:
	}
	if d.Key.IsZero() {
		return verdict + ": " + reason
	}
	return verdict + ": intention " + d.Key.String() + ", " + reason
}
