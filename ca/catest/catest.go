// Package catest is the suite that every ca.Authority passes. An implementation's test calls Run; what Run does not check, no
// caller may rely on.
package catest

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"math/big"
	"net"
	"net/url"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/ca/spiffe"
)

// TrustDomain is the trust domain of every Authority under test.
const TrustDomain = "mesh.example.com"

// Options tell a Factory what the Authority must be like.
type Options struct {
	// IssuerLife is how long the issuing certificate is still valid; zero leaves it to the implementation. A negative one
	// asks for an issuer that has expired.
	IssuerLife time.Duration
}

// Factory returns a new Authority for TrustDomain, with defaults of the package ca for lifetimes. It ends the test on failure,
// and cleans up through t.
type Factory func(t *testing.T, o Options) ca.Authority

// Run runs the suite.
func Run(t *testing.T, open Factory) {
	t.Helper()
	for _, test := range []struct {
		name string
		run  func(suite)
	}{
		{"leaf of each kind verifies and says what it must", suite.leaf},
		{"lifetime", suite.lifetime},
		{"never outlives its issuer", suite.issuerLife},
		{"expired issuer signs nothing", suite.expiredIssuer},
		{"names of a server", suite.serverNames},
		{"nothing of a request but its key", suite.requestContents},
		{"refused requests", suite.refused},
		{"canceled context", suite.canceled},
		{"serial numbers and concurrent use", suite.concurrent},
		{"roots do not change", suite.rootsStay},
	} {
		t.Run(test.name, func(t *testing.T) { test.run(suite{t, open}) })
	}
}

// suite is one part's run; its methods are the parts.
type suite struct {
	*testing.T
	open Factory
}

var (
	service = spiffe.Service(TrustDomain, "default", "web")
	node    = spiffe.Node(TrustDomain, "vm-a")
	server  = spiffe.Server(TrustDomain, "s1")
)

func (t suite) leaf() {
	authority := t.open(t.T, Options{})
	for _, id := range []spiffe.ID{service, node, server} {
		key := newKey(t.T)
		chain := sign(t.T, authority, ca.SignRequest{PublicKey: key.Public(), ID: id})
		verify(t.T, authority, chain, id)
		leaf := chain[0]
		if !key.PublicKey.Equal(leaf.PublicKey) {
			t.Errorf("%s: the leaf has another public key", id)
		}
		if leaf.KeyUsage != x509.KeyUsageDigitalSignature {
			t.Errorf("%s: key usage %v, want digital signature alone", id, leaf.KeyUsage)
		}
		if !leaf.BasicConstraintsValid || leaf.IsCA {
			t.Errorf("%s: basic constraints do not say CA:false", id)
		}
		if len(leaf.Subject.Names) != 0 {
			t.Errorf("%s: subject %q, want none", id, leaf.Subject)
		}
		if len(leaf.DNSNames) != 0 || len(leaf.IPAddresses) != 0 || len(leaf.EmailAddresses) != 0 || len(leaf.URIs) != 1 {
			t.Errorf("%s: other names than one URI: %v %v %v %v", id, leaf.DNSNames, leaf.IPAddresses, leaf.EmailAddresses, leaf.URIs)
		}
		if !sanIsCritical(leaf) {
			t.Errorf("%s: the subject alternative name is not critical", id)
		}
		if len(leaf.SubjectKeyId) == 0 || len(leaf.AuthorityKeyId) == 0 {
			t.Errorf("%s: key identifiers are missing", id)
		}
		for i, cert := range chain[1:] {
			if !cert.IsCA {
				t.Errorf("%s: certificate %d of the chain is no CA", id, i+2)
			}
			if cert.CheckSignatureFrom(cert) == nil {
				t.Errorf("%s: certificate %d of the chain is a root", id, i+2)
			}
		}
	}
}

func (t suite) lifetime() {
	authority := t.open(t.T, Options{})
	for _, row := range []struct {
		id   spiffe.ID
		ttl  time.Duration
		want time.Duration
	}{
		{service, 0, ca.DefaultTTL},
		{server, 0, ca.DefaultTTL},
		{node, 0, ca.NodeTTL},
		{service, ca.MinTTL, ca.MinTTL},
		{service, 36*time.Hour + time.Second, 36*time.Hour + time.Second},
		{node, ca.MaxTTL, ca.MaxTTL},
	} {
		before := time.Now()
		leaf := sign(t.T, authority, ca.SignRequest{PublicKey: newKey(t.T).Public(), ID: row.id, TTL: row.ttl})[0]
		after := time.Now()
		// Certificates count whole seconds.
		if leaf.NotAfter.Before(before.Add(row.want-time.Second)) || leaf.NotAfter.After(after.Add(row.want)) {
			t.Errorf("%s with lifetime %s: ends %s after signing, want %s", row.id, row.ttl, leaf.NotAfter.Sub(before), row.want)
		}
		if leaf.NotBefore.Before(before.Add(-ca.Backdate-time.Second)) || leaf.NotBefore.After(after.Add(-ca.Backdate)) {
			t.Errorf("%s with lifetime %s: starts %s before signing, want %s", row.id, row.ttl, before.Sub(leaf.NotBefore), ca.Backdate)
		}
	}
}

func (t suite) issuerLife() {
	authority := t.open(t.T, Options{IssuerLife: 2 * time.Hour})
	for _, ttl := range []time.Duration{0, ca.MinTTL, ca.MaxTTL} {
		chain := sign(t.T, authority, ca.SignRequest{PublicKey: newKey(t.T).Public(), ID: service, TTL: ttl})
		verify(t.T, authority, chain, service)
		for i, issuer := range chain[1:] {
			if chain[0].NotAfter.After(issuer.NotAfter) {
				t.Errorf("lifetime %s: the leaf ends at %s, after certificate %d of its chain at %s", ttl, chain[0].NotAfter, i+2, issuer.NotAfter)
			}
		}
		left := time.Until(chain[0].NotAfter)
		if limit := 2 * time.Hour; ttl != ca.MinTTL && (left > limit || left < limit-time.Minute) {
			t.Errorf("lifetime %s: %s left, want the issuer's %s", ttl, left, limit)
		}
	}
}

func (t suite) expiredIssuer() {
	authority := t.open(t.T, Options{IssuerLife: -time.Hour})
	chain, err := authority.Sign(t.Context(), ca.SignRequest{PublicKey: newKey(t.T).Public(), ID: service})
	if !errors.Is(err, ca.ErrIssuer) {
		t.Errorf("got chain %v and error %v, want ca.ErrIssuer", chain != nil, err)
	}
}

func (t suite) serverNames() {
	authority := t.open(t.T, Options{})
	ips := []net.IP{net.IPv4(10, 0, 0, 11), net.ParseIP("fd00::1")}
	names := []string{"meshd.example.com", "localhost"}
	chain := sign(t.T, authority, ca.SignRequest{PublicKey: newKey(t.T).Public(), ID: server, DNSNames: names, IPs: ips})
	verify(t.T, authority, chain, server)
	leaf := chain[0]
	if !slices.Equal(leaf.DNSNames, names) || !slices.EqualFunc(leaf.IPAddresses, ips, net.IP.Equal) {
		t.Errorf("names %v %v, want %v %v", leaf.DNSNames, leaf.IPAddresses, names, ips)
	}
	if !sanIsCritical(leaf) {
		t.Error("the subject alternative name is not critical")
	}
}

// requestContents goes the way of a CSR that asks for everything it should not get.
func (t suite) requestContents() {
	key := newKey(t.T)
	basicConstraints, err := asn1.Marshal(struct{ IsCA bool }{true})
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject:         pkix.Name{CommonName: "payments", Organization: []string{"evil"}},
		URIs:            []*url.URL{spiffe.Service(TrustDomain, "default", "payments").URL()},
		DNSNames:        []string{"payments.example.com"},
		EmailAddresses:  []string{"root@example.com"},
		IPAddresses:     []net.IP{net.IPv4(10, 0, 0, 1)},
		ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 19}, Critical: true, Value: basicConstraints}},
	}, key)
	if err != nil {
		t.Fatal(err)
	}
	public, err := ca.PublicKeyFromCSR(der)
	if err != nil {
		t.Fatal(err)
	}
	authority := t.open(t.T, Options{})
	plain := sign(t.T, authority, ca.SignRequest{PublicKey: key.Public(), ID: service})[0]
	leaf := sign(t.T, authority, ca.SignRequest{PublicKey: public, ID: service})[0]
	if leaf.IsCA || len(leaf.Subject.Names) != 0 || len(leaf.DNSNames)+len(leaf.EmailAddresses)+len(leaf.IPAddresses) != 0 || len(leaf.URIs) != 1 {
		t.Error("something of the request reached the leaf")
	}
	ids := func(c *x509.Certificate) (out []string) {
		for _, e := range c.Extensions {
			out = append(out, e.Id.String())
		}
		return out
	}
	if got, want := ids(leaf), ids(plain); !slices.Equal(got, want) {
		t.Errorf("extensions %v, without the request's %v", got, want)
	}
}

func (t suite) refused() {
	authority := t.open(t.T, Options{})
	good := newKey(t.T).Public()
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	ed, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	var noKey *ecdsa.PublicKey
	offCurve := &ecdsa.PublicKey{Curve: elliptic.P256(), X: big.NewInt(1), Y: big.NewInt(1)} //nolint:staticcheck // a point that no constructor makes
	for name, req := range map[string]ca.SignRequest{
		"no key":               {ID: service},
		"nil key":              {ID: service, PublicKey: noKey},
		"P-384":                {ID: service, PublicKey: p384.Public()},
		"RSA":                  {ID: service, PublicKey: rsaKey.Public()},
		"Ed25519":              {ID: service, PublicKey: ed},
		"not on the curve":     {ID: service, PublicKey: offCurve},
		"private key":          {ID: service, PublicKey: crypto.PublicKey(newKey(t.T))},
		"no identity":          {PublicKey: good},
		"other trust domain":   {ID: spiffe.Service("other.example.com", "default", "web"), PublicKey: good},
		"sub domain":           {ID: spiffe.Service("a."+TrustDomain, "default", "web"), PublicKey: good},
		"invalid identity":     {ID: spiffe.Service(TrustDomain, "default", "a/../b"), PublicKey: good},
		"upper case":           {ID: spiffe.Node(TrustDomain, "VM"), PublicKey: good},
		"negative lifetime":    {ID: service, PublicKey: good, TTL: -time.Hour},
		"too short":            {ID: service, PublicKey: good, TTL: ca.MinTTL - 1},
		"too long":             {ID: service, PublicKey: good, TTL: ca.MaxTTL + 1},
		"service with DNS":     {ID: service, PublicKey: good, DNSNames: []string{"a.example.com"}},
		"node with IP":         {ID: node, PublicKey: good, IPs: []net.IP{net.IPv4(10, 0, 0, 1)}},
		"wildcard":             {ID: server, PublicKey: good, DNSNames: []string{"*.example.com"}},
		"address as a DNS":     {ID: server, PublicKey: good, DNSNames: []string{"10.0.0.1"}},
		"URI as a DNS":         {ID: server, PublicKey: good, DNSNames: []string{service.String()}},
		"unspecified address":  {ID: server, PublicKey: good, IPs: []net.IP{net.IPv4zero}},
		"address of no length": {ID: server, PublicKey: good, IPs: []net.IP{{}}},
		"too many names":       {ID: server, PublicKey: good, DNSNames: slices.Repeat([]string{"a.example.com"}, 100)},
	} {
		chain, err := authority.Sign(t.Context(), req)
		if !errors.Is(err, ca.ErrRequest) || chain != nil {
			t.Errorf("%s: got chain %v and error %v, want ca.ErrRequest alone", name, chain != nil, err)
		}
	}
}

func (t suite) canceled() {
	authority := t.open(t.T, Options{})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := authority.Sign(ctx, ca.SignRequest{PublicKey: newKey(t.T).Public(), ID: service}); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v, want context.Canceled", err)
	}
}

func (t suite) concurrent() {
	const workers, each = 8, 125
	authority := t.open(t.T, Options{})
	key := newKey(t.T)
	serials := make([][]*big.Int, workers)
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for range each {
				chain, err := authority.Sign(t.Context(), ca.SignRequest{PublicKey: key.Public(), ID: service})
				if err != nil {
					t.Errorf("sign: %v", err)
					return
				}
				serials[w] = append(serials[w], chain[0].SerialNumber)
			}
		})
	}
	wg.Wait()
	seen := map[string]bool{}
	longest := 0
	for _, serial := range slices.Concat(serials...) {
		if serial.Sign() <= 0 || seen[serial.String()] {
			t.Fatalf("serial number %s is not positive, or was used twice", serial)
		}
		seen[serial.String()] = true
		longest = max(longest, serial.BitLen())
	}
	if len(seen) != workers*each {
		t.Errorf("%d serial numbers, want %d", len(seen), workers*each)
	}
	if longest < 64 || longest > 159 {
		t.Errorf("the longest serial number has %d bits, want 64 (hard to guess) to 159 (20 octets)", longest)
	}
}

func (t suite) rootsStay() {
	authority := t.open(t.T, Options{})
	first, second := roots(t.T, authority), roots(t.T, authority)
	if !first.Equal(second) {
		t.Error("two calls gave different roots")
	}
	if got := first.TrustDomains(); !slices.Equal(got, []string{TrustDomain}) {
		t.Errorf("roots for %v, want only %s", got, TrustDomain)
	}
	if other := roots(t.T, t.open(t.T, Options{})); first.Equal(other) {
		t.Error("two authorities share their roots")
	}
}

// verify checks that the chain proves want, in both roles, to a verifier that knows nothing but the roots.
func verify(t *testing.T, authority ca.Authority, chain ca.Chain, want spiffe.ID) {
	t.Helper()
	bundle := roots(t, authority)
	for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth} {
		got, verified, err := ca.VerifyPeer(bundle, chain.DER(), time.Now(), usage, ca.AcceptAny)
		if err != nil || got != want {
			t.Errorf("usage %d: identity %q, error %v; want %q", usage, got, err, want)
			continue
		}
		for i, issuer := range verified[1:] {
			if chain[0].NotAfter.After(issuer.NotAfter) {
				t.Errorf("%s outlives certificate %d of its chain", want, i+2)
			}
		}
	}
}

func sign(t *testing.T, authority ca.Authority, req ca.SignRequest) ca.Chain {
	t.Helper()
	chain, err := authority.Sign(t.Context(), req)
	if err != nil {
		t.Fatalf("sign %s: %v", req.ID, err)
	}
	if len(chain) == 0 {
		t.Fatalf("sign %s: an empty chain", req.ID)
	}
	return chain
}

func roots(t *testing.T, authority ca.Authority) ca.Bundle {
	t.Helper()
	bundle, err := authority.Roots(t.Context())
	if err != nil {
		t.Fatalf("roots: %v", err)
	}
	return bundle
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ca.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func sanIsCritical(c *x509.Certificate) bool {
	return slices.ContainsFunc(c.Extensions, func(e pkix.Extension) bool {
		return e.Id.Equal(asn1.ObjectIdentifier{2, 5, 29, 17}) && e.Critical
	})
}
