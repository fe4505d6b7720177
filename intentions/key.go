package intentions

import (
	"fmt"
	"strings"

	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
)

// A Key identifies an intention: there is at most one per key. It is
// comparable.
//
// A wildcard over a namespace has the name "*"; one over everything has "*" in
// both.
type Key struct {
	DestinationNamespace string
	Destination          string
	// SourceTrustDomain is empty for the mesh's own trust domain.
	SourceTrustDomain string
	SourceNamespace   string
	Source            string
}

// wildcard is the namespace or name that covers all.
const wildcard = "*"

// Key returns the identity of the intention; the error, which wraps ErrInvalid,
// says which side cannot be understood. A source that spells out the mesh's own
// trust domain keeps it: see Key.In.
func (i Intention) Key() (Key, error) { return ParseKey(i.Source, i.Destination) }

// ParseKey reads the two sides of an intention; see Intention for their
// grammar. Errors wrap ErrInvalid.
func ParseKey(source, destination string) (Key, error) {
	td, ns, name, err := parseSource(source)
	if err != nil {
		return Key{}, fmt.Errorf("%w: source: %w", ErrInvalid, err)
	}
	d, err := parseName(destination)
	if err != nil {
		return Key{}, fmt.Errorf("%w: destination: %w", ErrInvalid, destinationHint(destination, err))
	}
	return Key{
		DestinationNamespace: d.Namespace, Destination: d.Name,
		SourceTrustDomain: td, SourceNamespace: ns, Source: name,
	}, nil
}

// In returns the key as the mesh of the trust domain knows it: a source that
// spells out that trust domain becomes a local one. Stores use keys of this
// form, so that two spellings are one intention.
func (k Key) In(trustDomain string) Key {
	if k.SourceTrustDomain == trustDomain {
		k.SourceTrustDomain = ""
	}
	return k
}

// SourceString returns the source in the grammar of Intention.Source, without
// the default namespace.
func (k Key) SourceString() string {
	if k.SourceTrustDomain == "" {
		return side(k.SourceNamespace, k.Source)
	}
	if k.SourceNamespace == wildcard {
		return "spiffe://" + k.SourceTrustDomain + "/*"
	}
	return "spiffe://" + k.SourceTrustDomain + "/ns/" + k.SourceNamespace + "/svc/" + k.Source
}

// DestinationString returns the destination in the grammar of
// Intention.Destination, without the default namespace.
func (k Key) DestinationString() string { return side(k.DestinationNamespace, k.Destination) }

// String returns "source → destination" for people.
func (k Key) String() string { return k.SourceString() + " → " + k.DestinationString() }

// IsZero reports whether k is the zero Key, which no intention has.
func (k Key) IsZero() bool { return k == Key{} }

func side(namespace, name string) string {
	if namespace == wildcard {
		return wildcard
	}
	return catalog.Name{Namespace: namespace, Name: name}.Short()
}

// CoversSource reports whether the key covers the source in the mesh of the
// trust domain.
func (k Key) CoversSource(trustDomain string, source spiffe.ID) bool {
	if source.Kind != spiffe.KindService || source.Valid() != nil {
		return false
	}
	local := k.SourceTrustDomain == "" && source.TrustDomain == trustDomain
	if !local && k.SourceTrustDomain != source.TrustDomain {
		return false
	}
	return covers(k.SourceNamespace, k.Source, source.Namespace, source.Name)
}

// CoversDestination reports whether the key covers the destination.
func (k Key) CoversDestination(d catalog.Name) bool {
	return covers(k.DestinationNamespace, k.Destination, d.Namespace, d.Name)
}

func covers(patternNamespace, patternName, namespace, name string) bool {
	if patternNamespace == wildcard {
		return true
	}
	return patternNamespace == namespace && (patternName == wildcard || patternName == name)
}

// specificity orders the patterns of one side: exact, namespace, everything.
func specificity(namespace, name string) int {
	switch {
	case namespace == wildcard:
		return 0
	case name == wildcard:
		return 1
	default:
		return 2
	}
}

// Specificity ranks intentions that cover one request: the highest decides.
func (k Key) Specificity() int {
	return 3*specificity(k.DestinationNamespace, k.Destination) + specificity(k.SourceNamespace, k.Source)
}

// parseName reads "api", "ns/api", "ns/*" or "*".
func parseName(s string) (catalog.Name, error) {
	if s == "" {
		return catalog.Name{}, fmt.Errorf("missing: write \"service\", \"ns/service\", \"ns/*\" or \"*\"")
	}
	if err := catalog.CheckPattern(s); err != nil {
		return catalog.Name{}, err
	}
	if s == wildcard {
		return catalog.Name{Namespace: wildcard, Name: wildcard}, nil
	}
	if ns, name, ok := strings.Cut(s, "/"); ok {
		return catalog.Name{Namespace: ns, Name: name}, nil
	}
	return catalog.Name{Namespace: catalog.DefaultNamespace, Name: s}, nil
}

// parseSource reads a source; the trust domain is empty where none is written.
func parseSource(s string) (trustDomain, namespace, name string, err error) {
	rest, foreign := strings.CutPrefix(s, "spiffe://")
	if !foreign {
		n, err := parseName(s)
		return "", n.Namespace, n.Name, err
	}
	if td, ok := strings.CutSuffix(rest, "/*"); ok && !strings.Contains(td, "/") {
		if _, err := spiffe.ParseTrustDomain(td); err != nil {
			return "", "", "", fmt.Errorf("%q: %w", s, err)
		}
		return td, wildcard, wildcard, nil
	}
	if text, ok := strings.CutSuffix(s, "/svc/*"); ok {
		id, err := spiffe.Parse(text + "/svc/x")
		if err != nil {
			return "", "", "", fmt.Errorf("%q: %w", s, err)
		}
		return id.TrustDomain, id.Namespace, wildcard, nil
	}
	id, err := spiffe.Parse(s)
	if err != nil {
		return "", "", "", fmt.Errorf("%w; write \"spiffe://TRUST-DOMAIN/ns/NAMESPACE/svc/SERVICE\"", err)
	}
	if id.Kind != spiffe.KindService {
		return "", "", "", fmt.Errorf("%q is a %s: only services call services", s, id.Kind)
	}
	return id.TrustDomain, id.Namespace, id.Name, nil
}

// destinationHint explains why a destination has no trust domain.
func destinationHint(s string, err error) error {
	if strings.HasPrefix(s, "spiffe://") {
		return fmt.Errorf("%q: a destination is a service of this mesh: write \"service\" or \"ns/service\"", s)
	}
	return err
}
