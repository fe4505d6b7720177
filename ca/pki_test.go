package ca_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net/url"
	"testing"
	"time"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/ca/spiffe"
)

const (
	home    = "mesh.example.com"
	foreign = "other.example.com"
)

var (
	web    = spiffe.Service(home, "default", "web")
	api    = spiffe.Service(home, "default", "api")
	vm     = spiffe.Node(home, "vm-a")
	server = spiffe.Server(home, "s1")
)

// authority is a small CA that, unlike a real one, signs whatever a test wants to see refused.
type authority struct {
	root, intermediate *x509.Certificate
	rootKey, key       *ecdsa.PrivateKey
	bundle             ca.Bundle
}

func newAuthority(tb testing.TB, trustDomain string) *authority {
	tb.Helper()
	return buildAuthority(tb, trustDomain, time.Now(), newKey(tb), newKey(tb))
}

// fixedAuthority has the same keys and certificates in every process that calls it with the same seed: a fuzzer's corpus stays
// meaningful, and its workers agree.
func fixedAuthority(tb testing.TB, trustDomain string, seed byte) *authority {
	tb.Helper()
	return buildAuthority(tb, trustDomain, fixedTime, fixedKey(tb, seed), fixedKey(tb, seed+1))
}

// fixedTime is when the certificates of a fixedAuthority are in force.
var fixedTime = time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC)

func fixedKey(tb testing.TB, seed byte) *ecdsa.PrivateKey {
	tb.Helper()
	key, err := ecdsa.ParseRawPrivateKey(elliptic.P256(), bytes.Repeat([]byte{seed}, 32))
	if err != nil {
		tb.Fatal(err)
	}
	return key
}

// fixedLeaf is a leaf's chain and key that are the same in every process.
func (a *authority) fixedLeaf(tb testing.TB, id spiffe.ID, seed byte) *ca.Leaf {
	tb.Helper()
	template := leafTemplate(id)
	template.NotBefore, template.NotAfter = fixedTime.Add(-ca.Backdate), fixedTime.Add(24*time.Hour)
	key := fixedKey(tb, seed)
	leaf, err := ca.NewLeaf(a.chain(tb, template, key.Public()), key)
	if err != nil {
		tb.Fatal(err)
	}
	return leaf
}

func buildAuthority(tb testing.TB, trustDomain string, now time.Time, rootKey, key *ecdsa.PrivateKey) *authority {
	tb.Helper()
	a := &authority{rootKey: rootKey, key: key}
	template := func(name string) *x509.Certificate {
		return &x509.Certificate{
			Subject: pkix.Name{CommonName: name}, URIs: []*url.URL{{Scheme: "spiffe", Host: trustDomain}},
			NotBefore: now.Add(-time.Hour), NotAfter: now.Add(48 * time.Hour),
			KeyUsage: x509.KeyUsageCertSign, BasicConstraintsValid: true, IsCA: true,
		}
	}
	root := template("root of " + trustDomain)
	a.root = issue(tb, root, root, a.rootKey.Public(), a.rootKey)
	a.intermediate = issue(tb, template("intermediate of "+trustDomain), a.root, a.key.Public(), a.rootKey)
	bundle, err := ca.NewBundle(trustDomain, a.root)
	if err != nil {
		tb.Fatal(err)
	}
	a.bundle = bundle
	return a
}

// issue signs deterministically (RFC 6979): without a random source, and with a serial number made from the public key.
func issue(tb testing.TB, template, parent *x509.Certificate, public crypto.PublicKey, signer crypto.Signer) *x509.Certificate {
	tb.Helper()
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		tb.Fatal(err)
	}
	sum := sha256.Sum256(der)
	template.SerialNumber = new(big.Int).SetBytes(sum[:8])
	der, err = x509.CreateCertificate(nil, template, parent, public, signer)
	if err != nil {
		tb.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		tb.Fatal(err)
	}
	return cert
}

// leafTemplate is what a correct leaf says. Tests break it in one place.
func leafTemplate(ids ...spiffe.ID) *x509.Certificate {
	template := &x509.Certificate{
		NotBefore: time.Now().Add(-ca.Backdate), NotAfter: time.Now().Add(24 * time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
	}
	for _, id := range ids {
		template.URIs = append(template.URIs, id.URL())
	}
	return template
}

func (a *authority) chain(tb testing.TB, template *x509.Certificate, public crypto.PublicKey) ca.Chain {
	tb.Helper()
	return ca.Chain{issue(tb, template, a.intermediate, public, a.key), a.intermediate}
}

func (a *authority) leaf(tb testing.TB, id spiffe.ID) *ca.Leaf {
	tb.Helper()
	key := newKey(tb)
	leaf, err := ca.NewLeaf(a.chain(tb, leafTemplate(id), key.Public()), key)
	if err != nil {
		tb.Fatal(err)
	}
	return leaf
}

func newKey(tb testing.TB) *ecdsa.PrivateKey {
	tb.Helper()
	key, err := ca.GenerateKey()
	if err != nil {
		tb.Fatal(err)
	}
	return key
}
