package ca

import (
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/meshd/meshd/ca/spiffe"
)

// Why a peer was refused. Each error of VerifyPeer, and so of a handshake, wraps exactly one of these; a peer whose
// certificate carries no identity is refused with spiffe.ErrCertificate.
var (
	ErrNoCertificate      = errors.New("peer presented no certificate")
	ErrPeerChain          = errors.New("peer's certificates can't be read")
	ErrUnknownTrustDomain = errors.New("no roots are known for the peer's trust domain")
	ErrNotYetValid        = errors.New("peer's certificate is not valid yet")
	ErrExpired            = errors.New("certificate has expired")
	ErrUsage              = errors.New("peer's certificate is not meant for this use")
	ErrUntrusted          = errors.New("peer's certificate does not chain to a root of its trust domain")
	ErrUnexpectedPeer     = errors.New("peer is not who was expected")
)

// maxChainBytes bounds what is parsed of a peer's chain. Ours has about 1 KiB.
const maxChainBytes = 64 << 10

// VerifyPeer decides whether rawCerts, as presented in a handshake (leaf first), prove an identity at the time now, for a peer
// that acts in the role of usage: ExtKeyUsageClientAuth for one that connected to us, ExtKeyUsageServerAuth for one that we
// connected to. It returns the identity and the verified chain up to and including the root.
//
// The leaf must carry exactly one URI name within the grammar of package spiffe, must not be able to sign, must be meant for
// digital signatures and, explicitly, for usage. Only the roots that b holds for the identity's own trust domain count. accept
// is called last, with a proven identity, and has the last word; nil accepts nobody. The possession of the private key is for
// the TLS handshake to prove. VerifyPeer is pure and safe for concurrent use.
func VerifyPeer(b Bundle, rawCerts [][]byte, now time.Time, usage x509.ExtKeyUsage, accept func(spiffe.ID) error) (spiffe.ID, Chain, error) {
	if len(rawCerts) == 0 {
		return spiffe.ID{}, nil, ErrNoCertificate
	}
	size := 0
	for _, raw := range rawCerts {
		size += len(raw)
	}
	if size > maxChainBytes {
		return spiffe.ID{}, nil, fmt.Errorf("%w: %d bytes, at most %d are read", ErrPeerChain, size, maxChainBytes)
	}
	chain, err := ParseChain(rawCerts)
	if err != nil {
		return spiffe.ID{}, nil, fmt.Errorf("%w: %w", ErrPeerChain, err)
	}
	return verifyChain(b, chain, now, usage, accept)
}

func verifyChain(b Bundle, presented Chain, now time.Time, usage x509.ExtKeyUsage, accept func(spiffe.ID) error) (spiffe.ID, Chain, error) {
	if len(presented) == 0 {
		return spiffe.ID{}, nil, ErrNoCertificate
	}
	if len(presented) > maxChain {
		return spiffe.ID{}, nil, fmt.Errorf("%w: %d certificates, at most %d are read", ErrPeerChain, len(presented), maxChain)
	}
	leaf := presented[0]
	id, err := spiffe.FromCert(leaf)
	if err != nil {
		return spiffe.ID{}, nil, err
	}
	roots, ok := b.domains[id.TrustDomain]
	if !ok {
		return spiffe.ID{}, nil, fmt.Errorf("%w: %s", ErrUnknownTrustDomain, id)
	}
	if err := checkTimes(leaf, id, now); err != nil {
		return spiffe.ID{}, nil, err
	}
	// Package x509 takes a leaf without any extended key usage as good for all: here it is good for none.
	if leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0 || !slices.Contains(leaf.ExtKeyUsage, usage) {
		return spiffe.ID{}, nil, fmt.Errorf("%w: %s", ErrUsage, id)
	}
	intermediates := x509.NewCertPool()
	for _, cert := range presented[1:] {
		intermediates.AddCert(cert)
	}
	chains, err := leaf.Verify(x509.VerifyOptions{
		Roots:         roots.pool,
		Intermediates: intermediates,
		CurrentTime:   now,
		KeyUsages:     []x509.ExtKeyUsage{usage},
	})
	if err != nil {
		if invalid, ok := errors.AsType[x509.CertificateInvalidError](err); ok && invalid.Reason == x509.Expired {
			if err := checkTimes(invalid.Cert, id, now); err != nil {
				return spiffe.ID{}, nil, err
			}
		}
		return spiffe.ID{}, nil, fmt.Errorf("%w: %s: %w", ErrUntrusted, id, err)
	}
	if accept == nil {
		return spiffe.ID{}, nil, fmt.Errorf("%w: %s, nobody is", ErrUnexpectedPeer, id)
	}
	if err := accept(id); err != nil {
		return spiffe.ID{}, nil, err
	}
	return id, chains[0], nil
}

// checkTimes refuses a certificate outside of its validity. The message carries the difference, since a peer's wrong clock
// looks the same as an old certificate.
func checkTimes(cert *x509.Certificate, id spiffe.ID, now time.Time) error {
	if early := cert.NotBefore.Sub(now); early > 0 {
		return fmt.Errorf("%w: %s starts in %s, or a clock is wrong", ErrNotYetValid, id, early.Round(time.Second))
	}
	if late := now.Sub(cert.NotAfter); late > 0 {
		return fmt.Errorf("%w: %s ended %s ago, or a clock is wrong", ErrExpired, id, late.Round(time.Second))
	}
	return nil
}
