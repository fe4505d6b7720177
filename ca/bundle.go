package ca

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/meshd/meshd/ca/spiffe"
)

// Bounds of a bundle that comes from outside: far above any rotation, and low enough that a hostile one costs little.
const (
	maxDomains        = 1024
	maxRootsPerDomain = 64
)

// ErrBundle is wrapped by every error about roots that can't be used or read.
var ErrBundle = errors.New("invalid trust bundle")

// Hash is a SHA-256 digest: of the roots of one trust domain, or of a public key.
type Hash [sha256.Size]byte

// hashPrefix names the algorithm in a hash's text form, so that a later one can be told from it.
const hashPrefix = "sha256:"

// ParseHash reads what String writes. Errors wrap ErrBundle.
func ParseHash(s string) (Hash, error) {
	var h Hash
	digits, ok := strings.CutPrefix(s, hashPrefix)
	if !ok || len(digits) != hex.EncodedLen(len(h)) {
		return Hash{}, fmt.Errorf("%w: %q is no hash, want %q and %d hexadecimal digits", ErrBundle, s, hashPrefix, hex.EncodedLen(len(h)))
	}
	if _, err := hex.Decode(h[:], []byte(digits)); err != nil {
		return Hash{}, fmt.Errorf("%w: %q is no hash: %w", ErrBundle, s, err)
	}
	return h, nil
}

// String returns "sha256:" and 64 hexadecimal digits.
func (h Hash) String() string { return hashPrefix + hex.EncodeToString(h[:]) }

// IsZero reports whether h is the hash of nothing known.
func (h Hash) IsZero() bool { return h == Hash{} }

// MarshalText writes String's form.
func (h Hash) MarshalText() ([]byte, error) { return []byte(h.String()), nil }

// UnmarshalText reads String's form.
func (h *Hash) UnmarshalText(text []byte) error {
	parsed, err := ParseHash(string(text))
	if err != nil {
		return err
	}
	*h = parsed
	return nil
}

// Bundle is the set of roots that is trusted, per trust domain. It is an immutable value, cheap to copy and safe for
// concurrent use. The zero Bundle trusts nobody.
//
// Its JSON is an object of trust domains, each a list of base64 DER certificates; equal bundles have equal JSON.
type Bundle struct {
	domains map[string]domain
}

// domain is what one trust domain's peers are verified against. The pool and hash are made once, not per handshake.
type domain struct {
	roots []*x509.Certificate // sorted by DER, no two equal
	pool  *x509.CertPool
	hash  Hash
}

// NewBundle returns the bundle that trusts roots for trustDomain, and nothing else. Each root must be a CA certificate; their
// order and repetitions do not matter. It does not look at expiry: VerifyPeer does. Errors wrap ErrBundle.
func NewBundle(trustDomain string, roots ...*x509.Certificate) (Bundle, error) {
	if _, err := spiffe.ParseTrustDomain(trustDomain); err != nil {
		return Bundle{}, fmt.Errorf("%w: %w", ErrBundle, err)
	}
	if len(roots) == 0 || len(roots) > maxRootsPerDomain {
		return Bundle{}, fmt.Errorf("%w: %d roots for %s, want 1 to %d", ErrBundle, len(roots), trustDomain, maxRootsPerDomain)
	}
	for _, root := range roots {
		if root == nil || len(root.Raw) == 0 || !root.BasicConstraintsValid || !root.IsCA {
			return Bundle{}, fmt.Errorf("%w: a root of %s is no CA certificate", ErrBundle, trustDomain)
		}
	}
	return Bundle{domains: map[string]domain{trustDomain: newDomain(trustDomain, roots)}}, nil
}

func newDomain(trustDomain string, roots []*x509.Certificate) domain {
	roots = slices.Clone(roots)
	slices.SortFunc(roots, func(a, b *x509.Certificate) int { return bytes.Compare(a.Raw, b.Raw) })
	roots = slices.CompactFunc(roots, (*x509.Certificate).Equal)
	d := domain{roots: roots, pool: x509.NewCertPool()}
	sum := sha256.New()
	sum.Write([]byte("meshd bundle v1\n" + trustDomain + "\n"))
	for _, root := range roots {
		d.pool.AddCert(root)
		one := sha256.Sum256(root.Raw)
		sum.Write(one[:])
	}
	sum.Sum(d.hash[:0])
	return d
}

// ParseRootsPEM reads the CA certificates of a PEM file, such as MESH_CACERT names, and files each under the trust domain in
// its own URI name (spiffe://<trust domain>), as the roots that meshd makes carry it. Errors wrap ErrBundle.
func ParseRootsPEM(data []byte) (Bundle, error) {
	certs, err := parsePEM(data)
	if err != nil {
		return Bundle{}, fmt.Errorf("%w: %w", ErrBundle, err)
	}
	byDomain := map[string][]*x509.Certificate{}
	for _, cert := range certs {
		if len(cert.URIs) != 1 || cert.URIs[0].String() != "spiffe://"+cert.URIs[0].Host {
			return Bundle{}, fmt.Errorf("%w: certificate %q does not name its trust domain", ErrBundle, cert.Subject.CommonName)
		}
		byDomain[cert.URIs[0].Host] = append(byDomain[cert.URIs[0].Host], cert)
	}
	return bundleOf(byDomain)
}

func bundleOf(byDomain map[string][]*x509.Certificate) (Bundle, error) {
	if len(byDomain) > maxDomains {
		return Bundle{}, fmt.Errorf("%w: %d trust domains, at most %d are read", ErrBundle, len(byDomain), maxDomains)
	}
	all := Bundle{domains: make(map[string]domain, len(byDomain))}
	for td, roots := range byDomain {
		one, err := NewBundle(td, roots...)
		if err != nil {
			return Bundle{}, err
		}
		all.domains[td] = one.domains[td]
	}
	return all, nil
}

// TrustDomains returns the trust domains that have roots, sorted.
func (b Bundle) TrustDomains() []string { return slices.Sorted(maps.Keys(b.domains)) }

// Roots returns the roots of one trust domain, nil if it has none. The caller must not change the certificates.
func (b Bundle) Roots(trustDomain string) []*x509.Certificate {
	return slices.Clone(b.domains[trustDomain].roots)
}

// IsZero reports whether the bundle trusts nobody.
func (b Bundle) IsZero() bool { return len(b.domains) == 0 }

// Hash returns the digest of one trust domain's name and roots, the same for every order of the roots, and the zero Hash if it
// has none. A join token pins it.
func (b Bundle) Hash(trustDomain string) Hash { return b.domains[trustDomain].hash }

// Merge returns the bundle that trusts what either trusts.
func (b Bundle) Merge(other Bundle) Bundle {
	merged := Bundle{domains: maps.Clone(b.domains)}
	if merged.domains == nil {
		merged.domains = make(map[string]domain, len(other.domains))
	}
	for td, theirs := range other.domains {
		if ours, ok := merged.domains[td]; ok && ours.hash != theirs.hash {
			theirs = newDomain(td, slices.Concat(ours.roots, theirs.roots))
		}
		merged.domains[td] = theirs
	}
	return merged
}

// Equal reports whether both trust the same roots for the same trust domains.
func (b Bundle) Equal(other Bundle) bool {
	return maps.EqualFunc(b.domains, other.domains, func(x, y domain) bool { return x.hash == y.hash })
}

// PEM returns the roots of one trust domain as a PEM file, for tools that take one.
func (b Bundle) PEM(trustDomain string) []byte { return encodePEM(b.domains[trustDomain].roots) }

// MarshalJSON writes the form that the type's comment describes.
func (b Bundle) MarshalJSON() ([]byte, error) {
	out := make(map[string][][]byte, len(b.domains))
	for td, d := range b.domains {
		for _, root := range d.roots {
			out[td] = append(out[td], root.Raw)
		}
	}
	return json.Marshal(out)
}

// UnmarshalJSON reads what MarshalJSON wrote. It checks every name and certificate; errors wrap ErrBundle.
func (b *Bundle) UnmarshalJSON(data []byte) error {
	var in map[string][][]byte
	if err := json.Unmarshal(data, &in); err != nil {
		return fmt.Errorf("%w: %w", ErrBundle, err)
	}
	byDomain := make(map[string][]*x509.Certificate, len(in))
	for td, ders := range in {
		if len(ders) == 0 || len(ders) > maxRootsPerDomain {
			return fmt.Errorf("%w: %d roots for %q, want 1 to %d", ErrBundle, len(ders), td, maxRootsPerDomain)
		}
		for _, der := range ders {
			cert, err := x509.ParseCertificate(der)
			if err != nil {
				return fmt.Errorf("%w: a root of %q: %w", ErrBundle, td, err)
			}
			byDomain[td] = append(byDomain[td], cert)
		}
	}
	parsed, err := bundleOf(byDomain)
	if err != nil {
		return err
	}
	*b = parsed
	return nil
}

const pemCertificate = "CERTIFICATE"

func encodePEM(certs []*x509.Certificate) []byte {
	var out []byte
	for _, cert := range certs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: pemCertificate, Bytes: cert.Raw})...)
	}
	return out
}

func parsePEM(data []byte) ([]*x509.Certificate, error) {
	var certs []*x509.Certificate
	for len(bytes.TrimSpace(data)) > 0 {
		block, rest := pem.Decode(data)
		if block == nil {
			return nil, errors.New("not a PEM file, or it is cut off")
		}
		if block.Type != pemCertificate {
			return nil, fmt.Errorf("PEM block %q, want %q", block.Type, pemCertificate)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("parse certificate %d: %w", len(certs)+1, err)
		}
		certs, data = append(certs, cert), rest
	}
	if len(certs) == 0 {
		return nil, errors.New("no certificate in it")
	}
	return certs, nil
}
