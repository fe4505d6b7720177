package ca_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
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

func newAuthority(t testing.TB, trustDomain string) *authority {
	t.Helper()
	a := &authority{rootKey: newKey(t), key: newKey(t)}
	from, to := time.Now().Add(-time.Hour), time.Now().Add(48*time.Hour)
	template := func(name string) *x509.Certificate {
		return &x509.Certificate{
			Subject: pkix.Name{CommonName: name}, URIs: []*url.URL{{Scheme: "spiffe", Host: trustDomain}}, NotBefore: from, NotAfter: to,
			KeyUsage: x509.KeyUsageCertSign, BasicConstraintsValid: true, IsCA: true,
		}
	}
	root := template("root of " + trustDomain)
	a.root = issue(t, root, root, a.rootKey.Public(), a.rootKey)
	a.intermediate = issue(t, template("intermediate of "+trustDomain), a.root, a.key.Public(), a.rootKey)
	bundle, err := ca.NewBundle(trustDomain, a.root)
	if err != nil {
		t.Fatal(err)
	}
	a.bundle = bundle
	return a
}

func issue(t testing.TB, template, parent *x509.Certificate, public crypto.PublicKey, signer crypto.Signer) *x509.Certificate {
	t.Helper()
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		t.Fatal(err)
	}
	template.SerialNumber = serial
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
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

func (a *authority) chain(t testing.TB, template *x509.Certificate, public crypto.PublicKey) ca.Chain {
	t.Helper()
	return ca.Chain{issue(t, template, a.intermediate, public, a.key), a.intermediate}
}

func (a *authority) leaf(t testing.TB, id spiffe.ID) *ca.Leaf {
	t.Helper()
	key := newKey(t)
	leaf, err := ca.NewLeaf(a.chain(t, leafTemplate(id), key.Public()), key)
	if err != nil {
		t.Fatal(err)
	}
	return leaf
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ca.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	return key
}
