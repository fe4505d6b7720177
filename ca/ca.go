// Package ca holds the nouns of the mesh's public key infrastructure: roots per trust domain (Bundle), leaf certificates with
// their keys (Leaf), the contract of what signs them (Authority), and the TLS configurations in which both sides prove who
// they are. It also holds the two secrets that stand outside that infrastructure: the join token, by which a host gets its
// first certificate, and the cluster key, under which the CA's own keys are stored.
//
// Two rules hold everywhere. The roots that a chain is verified against are chosen by the trust domain of the identity in the
// peer's leaf, before the chain is looked at: an authority trusted for one trust domain vouches for no other. And what fails,
// is missing or is unknown is refused: the zero Bundle trusts nobody, a nil accept function accepts nobody.
//
// The package uses the standard library's cryptography only, so that mesh-proxy can link it.
package ca

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/meshd/meshd/ca/spiffe"
)

// Lifetimes. A leaf is valid from Backdate before it is signed, so that a verifier whose clock is slow accepts it at once.
const (
	MinTTL     = time.Hour
	MaxTTL     = 720 * time.Hour
	DefaultTTL = 24 * time.Hour  // of a service's or server's leaf
	NodeTTL    = 720 * time.Hour // of a node's leaf
	Backdate   = 5 * time.Minute
)

// maxNames bounds the additional names of a server's certificate.
const maxNames = 64

var (
	// ErrRequest is wrapped when a SignRequest, a CSR or a public key asks for what no Authority may sign.
	ErrRequest = errors.New("certificate request refused")
	// ErrIssuer is wrapped when an Authority can't sign now, because its own certificate is expired or not yet valid.
	ErrIssuer = errors.New("issuing certificate is not usable")
)

// Authority signs leaf certificates for one trust domain. Implementations are safe for concurrent use, and pass the suite in
// ca/catest. An Authority authenticates nobody: its caller has decided that the holder of the key may have the identity.
type Authority interface {
	// Roots returns what verifiers must trust to accept the leaves that Sign returns, now and during a rotation.
	Roots(ctx context.Context) (Bundle, error)
	// Sign returns a new chain for the request, leaf first, intermediates after it, without the root. The leaf never outlives
	// any certificate of its chain or its root: its life is cut rather than the request refused. Nothing but the request
	// decides what is in the leaf. Errors wrap ErrRequest if repeating the request can't help.
	Sign(ctx context.Context, req SignRequest) (Chain, error)
}

// SignRequest asks for one leaf.
type SignRequest struct {
	// PublicKey is an *ecdsa.PublicKey on P-256, usually from PublicKeyFromCSR.
	PublicKey crypto.PublicKey
	// ID becomes the only URI name. It must lie in the Authority's trust domain.
	ID spiffe.ID
	// TTL counts from now and lies within MinTTL and MaxTTL; zero takes the Authority's default for the kind of ID.
	TTL time.Duration
	// DNSNames and IPs are further names for browsers and curl on the server's API port. Only a server may have them.
	DNSNames []string
	IPs      []net.IP
}

// Validate tells why no Authority of the trust domain may sign the request, or returns nil. Every Authority calls it first.
// Errors wrap ErrRequest.
func (r SignRequest) Validate(trustDomain string) error {
	if _, err := CheckPublicKey(r.PublicKey); err != nil {
		return err
	}
	if err := r.ID.Valid(); err != nil {
		return fmt.Errorf("%w: %w", ErrRequest, err)
	}
	if r.ID.TrustDomain != trustDomain {
		return fmt.Errorf("%w: %s is outside of trust domain %s", ErrRequest, r.ID, trustDomain)
	}
	if r.TTL != 0 && (r.TTL < MinTTL || r.TTL > MaxTTL) {
		return fmt.Errorf("%w: lifetime %s for %s, allowed are %s to %s", ErrRequest, r.TTL, r.ID, MinTTL, MaxTTL)
	}
	return r.validateNames()
}

func (r SignRequest) validateNames() error {
	if len(r.DNSNames) == 0 && len(r.IPs) == 0 {
		return nil
	}
	if r.ID.Kind != spiffe.KindServer {
		return fmt.Errorf("%w: DNS names and IP addresses are for servers, %s is a %s", ErrRequest, r.ID, r.ID.Kind)
	}
	if n := len(r.DNSNames) + len(r.IPs); n > maxNames {
		return fmt.Errorf("%w: %d names for %s, at most %d are allowed", ErrRequest, n, r.ID, maxNames)
	}
	for _, name := range r.DNSNames {
		// The grammar of a trust domain is that of a lower-case host name, and refuses IP addresses too. No wildcards.
		if _, err := spiffe.ParseTrustDomain(name); err != nil {
			return fmt.Errorf("%w: %q is no lower-case DNS name", ErrRequest, name)
		}
	}
	for _, ip := range r.IPs {
		if ip.To16() == nil || ip.IsUnspecified() || ip.IsMulticast() {
			return fmt.Errorf("%w: %q is no address that a server can be reached at", ErrRequest, ip.String())
		}
	}
	return nil
}

// AcceptAny accepts every identity that was verified. It is for listeners whose policy decides later, per request.
func AcceptAny(spiffe.ID) error { return nil }

// Expect returns an accept function for exactly one identity, compared byte by byte. The zero ID accepts nobody.
func Expect(want spiffe.ID) func(spiffe.ID) error {
	return func(got spiffe.ID) error {
		if got != want || want.IsZero() {
			return fmt.Errorf("%w: it is %s, want %q", ErrUnexpectedPeer, got, want)
		}
		return nil
	}
}

// ExpectKind returns an accept function for every identity of one kind in one trust domain: any server, any node.
func ExpectKind(trustDomain string, kind spiffe.Kind) func(spiffe.ID) error {
	return func(got spiffe.ID) error {
		if got.TrustDomain != trustDomain || got.Kind != kind {
			return fmt.Errorf("%w: it is %s, want a %s of %q", ErrUnexpectedPeer, got, kind, trustDomain)
		}
		return nil
	}
}
