package rig

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net/url"
	"time"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/ca/spiffe"
)

// Authority is a CA that, unlike a real one, signs whatever a test wants to
// see refused.
type Authority struct {
	TrustDomain string
	Bundle      ca.Bundle

	root *x509.Certificate
	key  *ecdsa.PrivateKey
}

// NewAuthority makes a root for a trust domain.
func NewAuthority(trustDomain string) (*Authority, error) {
	a := &Authority{TrustDomain: trustDomain}
	var err error
	if a.key, err = ca.GenerateKey(); err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		Subject: pkix.Name{CommonName: "root of " + trustDomain}, URIs: []*url.URL{{Scheme: "spiffe", Host: trustDomain}},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		KeyUsage: x509.KeyUsageCertSign, BasicConstraintsValid: true, IsCA: true,
	}
	a.root = template // its own issuer
	if a.root, err = a.sign(template, a.key.Public()); err != nil {
		return nil, err
	}
	a.Bundle, err = ca.NewBundle(trustDomain, a.root)
	return a, err
}

func (a *Authority) sign(template *x509.Certificate, public crypto.PublicKey) (*x509.Certificate, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return nil, fmt.Errorf("choose a serial number: %w", err)
	}
	template.SerialNumber = serial
	der, err := x509.CreateCertificate(rand.Reader, template, a.root, public, a.key)
	if err != nil {
		return nil, fmt.Errorf("sign a certificate: %w", err)
	}
	return x509.ParseCertificate(der)
}

// Template is what a correct leaf of the identities says. Tests break it in
// one place.
func Template(ids ...spiffe.ID) *x509.Certificate {
	template := &x509.Certificate{
		NotBefore: time.Now().Add(-ca.Backdate), NotAfter: time.Now().Add(12 * time.Hour),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
	}
	for _, id := range ids {
		template.URIs = append(template.URIs, id.URL())
	}
	return template
}

// Sign returns a certificate as the template says, and its new key.
func (a *Authority) Sign(template *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey, error) {
	key, err := ca.GenerateKey()
	if err != nil {
		return nil, nil, err
	}
	cert, err := a.sign(template, key.Public())
	return cert, key, err
}

// Leaf returns a correct leaf.
func (a *Authority) Leaf(id spiffe.ID) (*ca.Leaf, error) {
	cert, key, err := a.Sign(Template(id))
	if err != nil {
		return nil, err
	}
	return ca.NewLeaf(ca.Chain{cert}, key)
}

// RootPEM returns the root as a PEM file.
func (a *Authority) RootPEM() []byte { return a.Bundle.PEM(a.TrustDomain) }

// PEM returns certificate and key in one PEM file, certificate first.
func PEM(cert *x509.Certificate, key *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("write a key: %w", err)
	}
	out := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})
	return append(out, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})...), nil
}
