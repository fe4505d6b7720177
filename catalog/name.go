package catalog

import (
	"errors"
	"fmt"
	"strings"
)

// DefaultNamespace is the namespace of every name that is written without one.
const DefaultNamespace = "default"

// ErrName is wrapped by the errors of ParseName and CheckLabel.
var ErrName = errors.New("invalid name")

// A Name identifies a service: its namespace and its name therein. It is
// comparable. The zero value is no service.
type Name struct{ Namespace, Name string }

// ParseName reads "service" (in DefaultNamespace, whatever namespace the text
// stands in) or "namespace/service". Both parts are RFC 1123 labels.
func ParseName(s string) (Name, error) {
	n := Name{Namespace: DefaultNamespace, Name: s}
	if ns, name, ok := strings.Cut(s, "/"); ok {
		n = Name{Namespace: ns, Name: name}
	}
	if err := CheckLabel(n.Namespace); err != nil {
		return Name{}, fmt.Errorf("%q: namespace: %w", s, err)
	}
	if err := CheckLabel(n.Name); err != nil {
		return Name{}, fmt.Errorf("%q: service: %w", s, err)
	}
	return n, nil
}

// String returns "namespace/name", which ParseName reads back.
func (n Name) String() string { return n.Namespace + "/" + n.Name }

// Short returns the name as people write it: without the namespace where that
// is DefaultNamespace. ParseName reads it back. The pattern "default/*" stays
// whole, for "*" alone means every namespace.
func (n Name) Short() string {
	if n.Namespace == DefaultNamespace && n.Name != "*" {
		return n.Name
	}
	return n.String()
}

// IsZero reports whether n is the zero Name.
func (n Name) IsZero() bool { return n == Name{} }

// Compare orders names by namespace, then name, as cmp.Compare does.
func (n Name) Compare(o Name) int {
	if c := strings.Compare(n.Namespace, o.Namespace); c != 0 {
		return c
	}
	return strings.Compare(n.Name, o.Name)
}

// MarshalText implements encoding.TextMarshaler: "namespace/name".
func (n Name) MarshalText() ([]byte, error) { return []byte(n.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler; it reads what ParseName
// reads.
func (n *Name) UnmarshalText(text []byte) error {
	v, err := ParseName(string(text))
	if err != nil {
		return err
	}
	*n = v
	return nil
}

// maxLabel is the longest DNS label (RFC 1035, section 2.3.4).
const maxLabel = 63

// CheckLabel reports why s is not a label as RFC 1123, section 2.1 has it: 1 to
// 63 of a-z, 0-9 and "-", with no "-" at either end. Upper case is refused
// rather than folded, so that two spellings never name one thing. Names of
// namespaces, services, nodes and ports are labels, because they become parts
// of DNS names and of SPIFFE IDs.
func CheckLabel(s string) error {
	switch {
	case s == "":
		return fmt.Errorf("%w: it is empty", ErrName)
	case len(s) > maxLabel:
		return fmt.Errorf("%w: %d characters, at most %d are allowed", ErrName, len(s), maxLabel)
	case s[0] == '-' || s[len(s)-1] == '-':
		return fmt.Errorf("%w %q: it must start and end with a letter or a digit", ErrName, s)
	}
	for i := range len(s) {
		c := s[i]
		if c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-' {
			continue
		}
		return fmt.Errorf("%w %q: use only a-z, 0-9 and \"-\"", ErrName, s)
	}
	return nil
}

// orDefault returns namespace, or DefaultNamespace for an empty one.
func orDefault(namespace string) string {
	if namespace == "" {
		return DefaultNamespace
	}
	return namespace
}

// label records a problem of the required label v at path.
func (p *Problems) label(path, v string) {
	if err := CheckLabel(v); err != nil {
		p.Add(path, "%v", err)
	}
}

// namespace records a problem of the optional namespace v at path.
func (p *Problems) namespace(path, v string) {
	if v != "" {
		p.label(path, v)
	}
}
