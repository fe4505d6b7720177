// Package agenttest is what the agent's packages are tested against: a
// certificate authority that signs any lifetime, and a stand-in for a server.
// The stand-in speaks real gRPC over real mutual TLS; behind it is a map, not
// the store, and it can be told to refuse, to fall silent and to lag. Only
// tests import it.
package agenttest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"math/big"
	"net/url"
	"sync/atomic"
	"time"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/ca/spiffe"
)

// TrustDomain is the trust domain of every test.
const TrustDomain = "mesh.example.com"

// Authority signs leaves directly under its root. It is safe for concurrent
// use.
type Authority struct {
	root   *x509.Certificate
	key    *ecdsa.PrivateKey
	serial atomic.Int64
}

// NewAuthority makes a root for TrustDomain.
func NewAuthority() (*Authority, error) {
	key, err := ca.GenerateKey()
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test root"},
		URIs:      []*url.URL{{Scheme: "spiffe", Host: TrustDomain}},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * 365 * time.Hour),
		KeyUsage: x509.KeyUsageCertSign, BasicConstraintsValid: true, IsCA: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("make the test root: %w", err)
	}
	root, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("make the test root: %w", err)
	}
	return &Authority{root: root, key: key}, nil
}

// Bundle trusts the authority.
func (a *Authority) Bundle() (ca.Bundle, error) { return ca.NewBundle(TrustDomain, a.root) }

// Sign returns a leaf for any identity, valid between the two times.
func (a *Authority) Sign(pub crypto.PublicKey, id spiffe.ID, notBefore, notAfter time.Time) (ca.Chain, error) {
	template := &x509.Certificate{
		SerialNumber: big.NewInt(a.serial.Add(1) + 1), URIs: []*url.URL{id.URL()},
		NotBefore: notBefore, NotAfter: notAfter, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.root, pub, a.key)
	if err != nil {
		return nil, fmt.Errorf("sign %s: %w", id, err)
	}
	return ca.ParseChain([][]byte{der})
}

// Leaf makes a key and a leaf that lives for ttl from now.
func (a *Authority) Leaf(id spiffe.ID, ttl time.Duration) (*ca.Leaf, error) {
	key, err := ca.GenerateKey()
	if err != nil {
		return nil, err
	}
	now := time.Now()
	chain, err := a.Sign(key.Public(), id, now.Add(-ca.Backdate), now.Add(ttl))
	if err != nil {
		return nil, err
	}
	return ca.NewLeaf(chain, key)
}
