package intentions

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
)

// A Request is what Policy.Decide decides: one connection, or one HTTP request.
type Request struct {
	// Source is the caller's verified identity.
	Source spiffe.ID
	// Destination is the service that is called, which must be the policy's.
	Destination catalog.Name
	// Port is the name of the port that is called.
	Port string
	// Now is compared with the expiry of intentions.
	Now time.Time
	// HTTP is nil for a connection.
	HTTP *HTTPRequest
}

// An HTTPRequest is the part of a request's head that rules look at.
type HTTPRequest struct {
	Method string
	// Path is the result of NormalizePath or NormalizeTarget, without query.
	Path string
	// Headers may be nil: then no header is present.
	Headers HeaderLookup
}

// A HeaderLookup gives access to the header fields of a request.
type HeaderLookup interface {
	// HeaderValue returns value i, counted from 0, of the named header, and
	// false when it has no such value. The name is in lower case and is to be
	// compared without regard to case; every field line is one value, in the
	// order of the message. The value is only read, and only until
	// Policy.Decide returns. It should not allocate.
	HeaderValue(name string, i int) (value []byte, ok bool)
}

// A Reason is why a decision came out as it did. The values are stable: they
// appear in logs, metrics and error headers.
type Reason string

// The reasons.
const (
	// ReasonNone is that of the zero Decision, which denies.
	ReasonNone Reason = ""
	// ReasonAction: the intention's own action decided.
	ReasonAction Reason = "action"
	// ReasonRule: a rule of the intention decided.
	ReasonRule Reason = "rule"
	// ReasonNoRule: no rule of the intention matched; denied.
	ReasonNoRule Reason = "no-rule-matched"
	// ReasonNoIntention: no intention covers the pair; denied.
	ReasonNoIntention Reason = "no-intention"
	// ReasonExpired: the only intentions that cover the pair have expired;
	// denied. The key names the most specific one.
	ReasonExpired Reason = "expired"
	// ReasonPort: the intention does not cover the port; denied.
	ReasonPort Reason = "port-not-covered"
	// ReasonNotHTTP: the intention has HTTP rules and the traffic is not HTTP;
	// denied.
	ReasonNotHTTP Reason = "not-http"
	// ReasonNoPolicy: there is no policy; denied.
	ReasonNoPolicy Reason = "no-policy"
	// ReasonSource: the source is not the identity of a service; denied.
	ReasonSource Reason = "source-not-a-service"
	// ReasonDestination: the policy is another destination's; denied.
	ReasonDestination Reason = "wrong-destination"
	// ReasonPath: the path of the request is not normalized; denied.
	ReasonPath Reason = "path-not-normalized"
)

// A Decision is the answer to a Request. The zero value denies.
type Decision struct {
	Allowed bool
	// Key is that of the intention that decided; zero where none did.
	Key Key
	// Rule is the index of the rule that decided, -1 where none did. It means
	// something only where Reason is ReasonRule.
	Rule   int
	Reason Reason
}

// A Policy is the compiled intentions of one destination. It is immutable and
// safe for concurrent use. A nil Policy and the zero Policy deny everything.
type Policy struct {
	trustDomain string
	destination catalog.Name
	// Each chain holds all that covers such a source, most specific first. A
	// source is looked up in exact, then in namespaces, then in domains.
	exact      map[sourceKey][]*entry
	namespaces map[namespaceKey][]*entry
	domains    map[string][]*entry
}

// The keys hold an empty trust domain for the mesh's own.
type (
	sourceKey    struct{ trustDomain, namespace, name string }
	namespaceKey struct{ trustDomain, namespace string }
)

// An entry is one compiled intention.
type entry struct {
	key     Key
	rank    int
	action  Action
	rules   []rule
	ports   []string
	expires time.Time // zero: never
	spec    Intention
}

// Compile makes the policy of one destination in the mesh of the trust domain
// from all intentions; those of other destinations are ignored. An intention
// that covers the destination and is not valid is an error, which wraps
// ErrInvalid, and there is no policy: the caller keeps the last good one or
// denies.
func Compile(trustDomain string, destination catalog.Name, all []Intention) (*Policy, error) {
	if _, err := spiffe.ParseTrustDomain(trustDomain); err != nil {
		return nil, fmt.Errorf("%w: policy of %s: %w", ErrInvalid, destination, err)
	}
	if _, err := catalog.ParseName(destination.String()); err != nil {
		return nil, fmt.Errorf("%w: policy of %s: %w", ErrInvalid, destination, err)
	}
	var entries []*entry
	shared := regexes{}
	for _, i := range all {
		key, err := i.Key()
		if err != nil {
			return nil, err
		}
		if !key.CoversDestination(destination) {
			continue
		}
		e, err := compileEntry(key.In(trustDomain), i, shared)
		if err != nil {
			return nil, err
		}
		entries = append(entries, e)
	}
	p := &Policy{trustDomain: trustDomain, destination: destination}
	p.index(entries)
	return p, nil
}

func compileEntry(key Key, i Intention, shared regexes) (*entry, error) {
	if err := i.Validate(); err != nil {
		return nil, fmt.Errorf("%w %s: %w", ErrInvalid, key, err)
	}
	e := &entry{key: key, rank: key.Specificity(), action: i.Action, ports: i.Ports, spec: i}
	if i.Expires != nil {
		e.expires = *i.Expires
	}
	for n, r := range i.Rules {
		c, err := compileRule(r, shared)
		if err != nil {
			return nil, fmt.Errorf("%w %s: rules[%d]: %w", ErrInvalid, key, n, err)
		}
		e.rules = append(e.rules, c)
	}
	return e, nil
}

// index builds the chains.
func (p *Policy) index(entries []*entry) {
	p.exact = map[sourceKey][]*entry{}
	p.namespaces = map[namespaceKey][]*entry{}
	p.domains = map[string][]*entry{}
	// The most specific first. Entries of one rank that cover one source have
	// one key, and their order does not matter, but keep it.
	slices.SortStableFunc(entries, func(a, b *entry) int { return cmp.Compare(b.rank, a.rank) })
	for _, e := range entries {
		td, ns := e.key.SourceTrustDomain, namespaceKey{e.key.SourceTrustDomain, e.key.SourceNamespace}
		switch specificity(e.key.SourceNamespace, e.key.Source) {
		case 0:
			p.domains[td] = append(p.domains[td], e)
		case 1:
			p.namespaces[ns] = append(p.namespaces[ns], e)
		default:
			k := sourceKey{td, ns.namespace, e.key.Source}
			p.exact[k] = append(p.exact[k], e)
		}
	}
	byRank := func(a, b *entry) int { return cmp.Compare(b.rank, a.rank) }
	for k, chain := range p.namespaces {
		chain = append(chain, p.domains[k.trustDomain]...)
		slices.SortStableFunc(chain, byRank)
		p.namespaces[k] = chain
	}
	for k, chain := range p.exact {
		wider, ok := p.namespaces[namespaceKey{k.trustDomain, k.namespace}]
		if !ok {
			wider = p.domains[k.trustDomain]
		}
		chain = append(chain, wider...)
		slices.SortStableFunc(chain, byRank)
		p.exact[k] = chain
	}
}

// chain returns the entries that cover the source, most specific first.
func (p *Policy) chain(source spiffe.ID) []*entry {
	td := source.TrustDomain
	if td == p.trustDomain {
		td = ""
	}
	if c, ok := p.exact[sourceKey{td, source.Namespace, source.Name}]; ok {
		return c
	}
	if c, ok := p.namespaces[namespaceKey{td, source.Namespace}]; ok {
		return c
	}
	return p.domains[td]
}

// isService reports whether the ID may be a source. What it says of the trust
// domain matters: an empty one would look like the mesh's own.
func isService(id *spiffe.ID) bool {
	return id.Kind == spiffe.KindService && id.TrustDomain != "" && id.Namespace != "" && id.Name != ""
}

// Decide answers the request. It is pure, blocks on nothing, and allocates
// nothing, except where a deny rule with a path meets a path with parameters or
// percent-encodings.
func (p *Policy) Decide(r Request) Decision {
	_, d := p.pick(&r)
	return d
}

// pick returns the decision and the entry that made it, nil where none did.
func (p *Policy) pick(r *Request) (*entry, Decision) {
	switch {
	case p == nil || p.destination.IsZero():
		return nil, Decision{Rule: -1, Reason: ReasonNoPolicy}
	case r.Destination != p.destination:
		return nil, Decision{Rule: -1, Reason: ReasonDestination}
	case !isService(&r.Source):
		return nil, Decision{Rule: -1, Reason: ReasonSource}
	case r.HTTP != nil && (r.HTTP.Path == "" || r.HTTP.Path[0] != '/'):
		return nil, Decision{Rule: -1, Reason: ReasonPath}
	}
	none := Decision{Rule: -1, Reason: ReasonNoIntention}
	var decider *entry
	var decision Decision
	for _, e := range p.chain(r.Source) {
		if decider != nil && e.rank < decider.rank {
			break
		}
		if e.expired(r.Now) {
			if none.Reason == ReasonNoIntention {
				none = Decision{Rule: -1, Reason: ReasonExpired, Key: e.key}
			}
			continue
		}
		// On a tie the first deny wins.
		if d := e.decide(r); decider == nil || decision.Allowed && !d.Allowed {
			decider, decision = e, d
		}
	}
	if decider == nil {
		return nil, none
	}
	return decider, decision
}

func (e *entry) expired(now time.Time) bool { return !e.expires.IsZero() && !now.Before(e.expires) }

// decide is the word of one entry that covers the request's source and
// destination.
func (e *entry) decide(r *Request) Decision {
	if len(e.ports) > 0 && !slices.Contains(e.ports, r.Port) {
		return Decision{Key: e.key, Rule: -1, Reason: ReasonPort}
	}
	if len(e.rules) == 0 {
		return Decision{Allowed: e.action == Allow, Key: e.key, Rule: -1, Reason: ReasonAction}
	}
	if r.HTTP == nil {
		return Decision{Key: e.key, Rule: -1, Reason: ReasonNotHTTP}
	}
	var loose loosePath
	for i := range e.rules {
		if e.rules[i].mismatch(r.HTTP, &loose) == condNone {
			return Decision{Allowed: e.rules[i].action == Allow, Key: e.key, Rule: i, Reason: ReasonRule}
		}
	}
	return Decision{Key: e.key, Rule: -1, Reason: ReasonNoRule}
}

// MayAllow reports whether some request of the source, on some port, now or
// when intentions have expired, could be allowed. Where it is false the
// caller's own proxy can say "denied"; where it is true only Decide knows.
func (p *Policy) MayAllow(source spiffe.ID) bool {
	if p == nil || !isService(&source) {
		return false
	}
	chain := p.chain(source)
	for len(chain) > 0 {
		n := 1
		for n < len(chain) && chain[n].rank == chain[0].rank {
			n++
		}
		rank := chain[:n] // more than one is a tie, in which a deny wins
		chain = chain[n:]
		if slices.ContainsFunc(rank, func(e *entry) bool { return e.expires.IsZero() && !e.mayAllow() }) {
			return false
		}
		if slices.ContainsFunc(rank, (*entry).mayAllow) {
			return true
		}
		// All of them deny, and all of them expire: then the next rank decides.
	}
	return false
}

func (e *entry) mayAllow() bool {
	if len(e.rules) == 0 {
		return e.action == Allow
	}
	return slices.ContainsFunc(e.rules, func(r rule) bool { return r.action == Allow })
}
