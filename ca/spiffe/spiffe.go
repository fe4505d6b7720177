// Package spiffe names the workloads, nodes and servers of the mesh.
//
// An identity is a SPIFFE ID (https://spiffe.io, "SPIFFE Identity and Verifiable Identity Document") of one of three shapes:
//
//	spiffe://<trust domain>/ns/<namespace>/svc/<service>
//	spiffe://<trust domain>/node/<name>
//	spiffe://<trust domain>/server/<id>
//
// The grammar is a strict subset of the standard's, so that an identity has exactly one spelling and two identities are
// equal when, and only when, their bytes are. Anything else (a port, a query, a fragment, user information, percent-encoding,
// empty or dot segments, upper case) is refused, never repaired.
package spiffe

import (
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"strings"
)

// Limits of the grammar. The first two are the standard's (SPIFFE-ID, section 2.3), the third is that of a DNS label
// (RFC 1123, section 2.1, and RFC 1035, section 2.3.4).
const (
	MaxLength            = 2048
	MaxTrustDomainLength = 255
	MaxLabelLength       = 63
)

const scheme = "spiffe://"

var (
	// ErrInvalid is wrapped by every error about text or fields that are no identity of this grammar.
	ErrInvalid = errors.New("invalid SPIFFE ID")
	// ErrCertificate is wrapped by every error about a certificate that proves no identity.
	ErrCertificate = errors.New("certificate carries no usable identity")
)

// Kind tells what an identity names. The zero Kind is invalid.
type Kind uint8

// The kinds of identity.
const (
	KindService Kind = iota + 1
	KindNode
	KindServer
)

// String returns "service", "node", "server", or "invalid".
func (k Kind) String() string {
	switch k {
	case KindService:
		return "service"
	case KindNode:
		return "node"
	case KindServer:
		return "server"
	default:
		return "invalid"
	}
}

// ID is one identity. It is comparable: two IDs made by Parse, or that pass Valid, are the same identity when they are ==.
// The zero ID names nobody.
type ID struct {
	TrustDomain string
	Kind        Kind
	Namespace   string // only for KindService
	Name        string
}

// Service returns the identity of a service. Its fields are not checked: call Valid on what comes from outside.
func Service(trustDomain, namespace, name string) ID {
	return ID{TrustDomain: trustDomain, Kind: KindService, Namespace: namespace, Name: name}
}

// Node returns the identity of a host. Its fields are not checked: call Valid on what comes from outside.
func Node(trustDomain, name string) ID {
	return ID{TrustDomain: trustDomain, Kind: KindNode, Name: name}
}

// Server returns the identity of a control plane member. Its fields are not checked: call Valid on what comes from outside.
func Server(trustDomain, id string) ID {
	return ID{TrustDomain: trustDomain, Kind: KindServer, Name: id}
}

// Parse reads an identity. It accepts exactly what String writes for a valid ID; errors wrap ErrInvalid.
func Parse(s string) (ID, error) {
	if len(s) > MaxLength {
		return ID{}, fmt.Errorf("%w: %d bytes long, at most %d are allowed", ErrInvalid, len(s), MaxLength)
	}
	rest, ok := strings.CutPrefix(s, scheme)
	if !ok {
		return ID{}, fmt.Errorf("%w: %q does not start with %q", ErrInvalid, s, scheme)
	}
	trustDomain, path, ok := strings.Cut(rest, "/")
	if !ok {
		return ID{}, fmt.Errorf("%w: %q has no path", ErrInvalid, s)
	}
	id := ID{TrustDomain: trustDomain}
	first, path, _ := strings.Cut(path, "/")
	switch first {
	case "ns":
		id.Kind = KindService
		namespace, svc, _ := strings.Cut(path, "/")
		name, ok := strings.CutPrefix(svc, "svc/")
		if !ok {
			return ID{}, fmt.Errorf("%w: the path of %q is not /ns/<namespace>/svc/<service>", ErrInvalid, s)
		}
		id.Namespace, id.Name = namespace, name
	case "node":
		id.Kind, id.Name = KindNode, path
	case "server":
		id.Kind, id.Name = KindServer, path
	default:
		return ID{}, fmt.Errorf("%w: the path of %q is none of /ns/<namespace>/svc/<service>, /node/<name>, /server/<id>", ErrInvalid, s)
	}
	if err := id.Valid(); err != nil {
		return ID{}, err
	}
	return id, nil
}

// ParseTrustDomain checks the name of a trust domain and returns it unchanged: dot-separated RFC 1123 labels in lower case,
// at most 255 bytes. An IPv4 address is refused, because certificates can't be constrained to it (RFC 5280, section
// 4.2.1.10, asks for a fully qualified name). Errors wrap ErrInvalid.
func ParseTrustDomain(s string) (string, error) {
	if s == "" || len(s) > MaxTrustDomainLength {
		return "", fmt.Errorf("%w: a trust domain has 1 to %d bytes, this one has %d", ErrInvalid, MaxTrustDomainLength, len(s))
	}
	for label := range strings.SplitSeq(s, ".") {
		if !isLabel(label) {
			return "", fmt.Errorf("%w: trust domain %q: %q is no lower-case DNS label", ErrInvalid, s, label)
		}
	}
	if _, err := netip.ParseAddr(s); err == nil {
		return "", fmt.Errorf("%w: trust domain %q is an IP address, want a name such as mesh.example.com", ErrInvalid, s)
	}
	return s, nil
}

// Valid tells why id is no identity of the grammar, or returns nil. Errors wrap ErrInvalid.
func (id ID) Valid() error {
	if _, err := ParseTrustDomain(id.TrustDomain); err != nil {
		return err
	}
	switch id.Kind {
	case KindService:
		if !isLabel(id.Namespace) {
			return fmt.Errorf("%w: namespace %q is no lower-case DNS label of at most %d characters", ErrInvalid, id.Namespace, MaxLabelLength)
		}
	case KindNode, KindServer:
		if id.Namespace != "" {
			return fmt.Errorf("%w: a %s has no namespace, this one has %q", ErrInvalid, id.Kind, id.Namespace)
		}
	default:
		return fmt.Errorf("%w: unknown kind %d", ErrInvalid, id.Kind)
	}
	if !isLabel(id.Name) {
		return fmt.Errorf("%w: %s name %q is no lower-case DNS label of at most %d characters", ErrInvalid, id.Kind, id.Name, MaxLabelLength)
	}
	return nil
}

// IsZero reports whether id is the zero ID, which names nobody.
func (id ID) IsZero() bool { return id == ID{} }

// String returns the one spelling of id, and "" for the zero ID and for one of an unknown kind.
func (id ID) String() string {
	switch id.Kind {
	case KindService:
		return scheme + id.TrustDomain + "/ns/" + id.Namespace + "/svc/" + id.Name
	case KindNode:
		return scheme + id.TrustDomain + "/node/" + id.Name
	case KindServer:
		return scheme + id.TrustDomain + "/server/" + id.Name
	default:
		return ""
	}
}

// URL returns id as a new URL, for certificate templates. For an ID that is not Valid the result means nothing.
func (id ID) URL() *url.URL {
	_, path, _ := strings.Cut(strings.TrimPrefix(id.String(), scheme), "/")
	return &url.URL{Scheme: "spiffe", Host: id.TrustDomain, Path: "/" + path}
}

// MarshalText writes String's form. The zero ID becomes the empty text; any other that is not Valid is an error.
func (id ID) MarshalText() ([]byte, error) {
	if id.IsZero() {
		return []byte{}, nil
	}
	if err := id.Valid(); err != nil {
		return nil, err
	}
	return []byte(id.String()), nil
}

// UnmarshalText reads what MarshalText wrote: empty text gives the zero ID, anything else goes through Parse.
func (id *ID) UnmarshalText(text []byte) error {
	if len(text) == 0 {
		*id = ID{}
		return nil
	}
	parsed, err := Parse(string(text))
	if err != nil {
		return err
	}
	*id = parsed
	return nil
}

// FromCert returns the identity that a parsed leaf certificate carries: its only URI subject alternative name. It refuses
// a certificate that could sign others (SPIFFE X509-SVID, section 5.2). It verifies no signature, no time and no key usage:
// that is package ca's work. Other kinds of names beside the URI are allowed. Errors wrap ErrCertificate, and ErrInvalid
// too when the name is outside the grammar.
func FromCert(c *x509.Certificate) (ID, error) {
	if c == nil {
		return ID{}, fmt.Errorf("%w: there is none", ErrCertificate)
	}
	if c.IsCA || c.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0 {
		return ID{}, fmt.Errorf("%w: it may sign other certificates, a leaf may not", ErrCertificate)
	}
	uris, err := rawURIs(c)
	if err != nil {
		return ID{}, err
	}
	if len(uris) != 1 {
		return ID{}, fmt.Errorf("%w: want exactly one URI name, found %d", ErrCertificate, len(uris))
	}
	id, err := Parse(uris[0])
	if err != nil {
		return ID{}, fmt.Errorf("%w: %w", ErrCertificate, err)
	}
	return id, nil
}

// rawURIs returns the URI names as the issuer signed them. The parsed Certificate.URIs won't do: package url lower-cases the
// scheme and drops an empty fragment, so that two names with different bytes would compare equal.
func rawURIs(c *x509.Certificate) ([]string, error) {
	const uriTag = 6 // GeneralName.uniformResourceIdentifier (RFC 5280, section 4.2.1.6)
	oidSubjectAltName := asn1.ObjectIdentifier{2, 5, 29, 17}
	var uris []string
	for _, ext := range c.Extensions {
		if !ext.Id.Equal(oidSubjectAltName) {
			continue
		}
		var names []asn1.RawValue
		rest, err := asn1.Unmarshal(ext.Value, &names)
		if err != nil || len(rest) != 0 {
			return nil, fmt.Errorf("%w: its subject alternative names can't be read", ErrCertificate)
		}
		for _, name := range names {
			if name.Class == asn1.ClassContextSpecific && name.Tag == uriTag {
				uris = append(uris, string(name.Bytes))
			}
		}
	}
	return uris, nil
}

// isLabel reports whether s is a lower-case DNS label: letters, digits, hyphens, neither end a hyphen.
func isLabel(s string) bool {
	if s == "" || len(s) > MaxLabelLength || s[0] == '-' || s[len(s)-1] == '-' {
		return false
	}
	for i := range len(s) {
		c := s[i]
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return false
		}
	}
	return true
}
