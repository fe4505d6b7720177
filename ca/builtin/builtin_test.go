package builtin_test

import (
	"bytes"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"errors"
	"math/big"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/ca/builtin"
	"github.com/meshd/meshd/ca/catest"
	"github.com/meshd/meshd/ca/spiffe"
)

func TestAuthority(t *testing.T) {
	catest.Run(t, func(t *testing.T, o catest.Options) ca.Authority {
		t.Helper()
		created := time.Now()
		if o.IssuerLife != 0 {
			created = created.Add(o.IssuerLife - builtin.IntermediateTTL)
		}
		key := ca.GenerateClusterKey()
		return open(t, create(t, key, created), key)
	})
}

func create(tb testing.TB, key ca.ClusterKey, now time.Time) builtin.State {
	tb.Helper()
	state, err := builtin.Create(key, catest.TrustDomain, now)
	if err != nil {
		tb.Fatal(err)
	}
	return state
}

func open(tb testing.TB, state builtin.State, key ca.ClusterKey) *builtin.Authority {
	tb.Helper()
	authority, err := builtin.Open(state, key, builtin.Config{})
	if err != nil {
		tb.Fatal(err)
	}
	return authority
}

func certificates(t *testing.T, state builtin.State) (root, intermediate *x509.Certificate) {
	t.Helper()
	chain, err := ca.ParseChain([][]byte{state.Root.Certificate, state.Intermediate.Certificate})
	if err != nil {
		t.Fatal(err)
	}
	return chain[0], chain[1]
}

func TestCreate(t *testing.T) {
	now := time.Now().Truncate(time.Second)
	root, intermediate := certificates(t, create(t, ca.GenerateClusterKey(), now))
	type facts struct {
		NotBefore, NotAfter time.Time
		URI                 string
		KeyUsage            x509.KeyUsage
		MaxPathLen          int
		URIDomains          []string
		Critical            bool
	}
	of := func(c *x509.Certificate) facts {
		return facts{
			c.NotBefore.Local(), c.NotAfter.Local(), c.URIs[0].String(), c.KeyUsage, c.MaxPathLen, c.PermittedURIDomains,
			c.PermittedDNSDomainsCritical,
		}
	}
	usage := x509.KeyUsageCertSign | x509.KeyUsageCRLSign
	start := now.Add(-ca.Backdate).Local()
	if diff := cmp.Diff(facts{start, now.Add(builtin.RootTTL).Local(), "spiffe://mesh.example.com", usage, -1, nil, false}, of(root)); diff != "" {
		t.Errorf("root (-want +got):\n%s", diff)
	}
	want := facts{start, now.Add(builtin.IntermediateTTL).Local(), "spiffe://mesh.example.com", usage, 0, []string{"mesh.example.com"}, true}
	if diff := cmp.Diff(want, of(intermediate)); diff != "" {
		t.Errorf("intermediate (-want +got):\n%s", diff)
	}
	if root.Subject.String() == intermediate.Subject.String() || !strings.HasPrefix(root.Subject.CommonName, "meshd root CA ") {
		t.Errorf("subjects %q and %q", root.Subject, intermediate.Subject)
	}
	for _, td := range []string{"", "Mesh", "10.0.0.1", "a/b"} {
		if _, err := builtin.Create(ca.GenerateClusterKey(), td, now); !errors.Is(err, spiffe.ErrInvalid) {
			t.Errorf("trust domain %q: error %v, want spiffe.ErrInvalid", td, err)
		}
	}
	if _, err := builtin.Create(ca.ClusterKey{}, catest.TrustDomain, now); !errors.Is(err, ca.ErrClusterKey) {
		t.Errorf("no cluster key: error %v, want ca.ErrClusterKey", err)
	}
}

// The stored form is a contract with every later version.
func TestStateJSON(t *testing.T) {
	key := ca.GenerateClusterKey()
	state := create(t, key, time.Now())
	data, err := json.Marshal(state)
	if err != nil {
		t.Fatal(err)
	}
	var fields map[string]any
	if err := json.Unmarshal(data, &fields); err != nil {
		t.Fatal(err)
	}
	issuer := map[string]any{"certificate": "", "wrapped_key": ""}
	for _, name := range []string{"root", "intermediate"} {
		for field := range fields[name].(map[string]any) { //nolint:errcheck // a wrong type fails the test by panicking
			fields[name].(map[string]any)[field] = "" //nolint:errcheck // as above
		}
	}
	want := map[string]any{"version": 1.0, "trust_domain": catest.TrustDomain, "root": issuer, "intermediate": issuer}
	if diff := cmp.Diff(want, fields); diff != "" {
		t.Errorf("stored form (-want +got):\n%s", diff)
	}
	var read builtin.State
	if err := json.Unmarshal(data, &read); err != nil {
		t.Fatal(err)
	}
	before, err := open(t, state, key).Roots(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	after, err := open(t, read, key).Roots(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if !before.Equal(after) {
		t.Error("the roots changed on the way through JSON")
	}
	// No private key in the clear: a P-256 key in PKCS #8 starts with this algorithm identifier.
	if bytes.Contains(state.Root.WrappedKey, []byte{0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01}) {
		t.Error("the root's key is not wrapped")
	}
}

func TestOpenRefuses(t *testing.T) {
	key := ca.GenerateClusterKey()
	good, other := create(t, key, time.Now()), create(t, key, time.Now())
	foreign, err := builtin.Create(key, "other.example.com", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*builtin.State){
		"empty":                                func(s *builtin.State) { *s = builtin.State{} },
		"newer version":                        func(s *builtin.State) { s.Version = 2 },
		"other trust domain":                   func(s *builtin.State) { s.TrustDomain = "other.example.com" },
		"intermediate of another root":         func(s *builtin.State) { s.Intermediate = other.Intermediate },
		"intermediate of another trust domain": func(s *builtin.State) { s.Intermediate = foreign.Intermediate },
		"key of another intermediate":          func(s *builtin.State) { s.Intermediate.WrappedKey = other.Intermediate.WrappedKey },
		"root's key for the intermediate":      func(s *builtin.State) { s.Intermediate.WrappedKey = s.Root.WrappedKey },
		"leaf-less garbage":                    func(s *builtin.State) { s.Root.Certificate = []byte("garbage") },
		"cut key":                              func(s *builtin.State) { s.Intermediate.WrappedKey = s.Intermediate.WrappedKey[:20] },
		"no key":                               func(s *builtin.State) { s.Intermediate.WrappedKey = nil },
	} {
		state := good
		change(&state)
		if _, err := builtin.Open(state, key, builtin.Config{}); !errors.Is(err, builtin.ErrState) {
			t.Errorf("%s: error %v, want builtin.ErrState", name, err)
		}
	}
	if _, err := builtin.Open(good, ca.GenerateClusterKey(), builtin.Config{}); !errors.Is(err, ca.ErrUnwrap) {
		t.Errorf("another cluster key: error %v, want ca.ErrUnwrap", err)
	}
	for _, config := range []builtin.Config{{LeafTTL: time.Minute}, {NodeTTL: 721 * time.Hour}, {LeafTTL: -1}} {
		if _, err := builtin.Open(good, key, config); err == nil {
			t.Errorf("config %+v was accepted", config)
		}
	}
}

func TestConfiguredLifetimes(t *testing.T) {
	key := ca.GenerateClusterKey()
	authority, err := builtin.Open(create(t, key, time.Now()), key, builtin.Config{LeafTTL: 2 * time.Hour, NodeTTL: 48 * time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	leafKey, err := ca.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	for id, want := range map[spiffe.ID]time.Duration{
		spiffe.Service(catest.TrustDomain, "default", "web"): 2 * time.Hour,
		spiffe.Server(catest.TrustDomain, "s1"):              2 * time.Hour,
		spiffe.Node(catest.TrustDomain, "vm-a"):              48 * time.Hour,
	} {
		chain, err := authority.Sign(t.Context(), ca.SignRequest{PublicKey: leafKey.Public(), ID: id})
		if err != nil {
			t.Fatal(err)
		}
		if got := chain[0].NotAfter.Sub(chain[0].NotBefore) - ca.Backdate; (got - want).Abs() > time.Second {
			t.Errorf("%s lives %s, want %s", id, got, want)
		}
	}
}

func TestRenew(t *testing.T) {
	key := ca.GenerateClusterKey()
	start := time.Now().Add(-builtin.IntermediateTTL / 2)
	state := create(t, key, start)

	same, renewed, err := builtin.Renew(state, key, start.Add(builtin.IntermediateTTL/2-time.Hour))
	if err != nil || renewed {
		t.Fatalf("before half of its life: renewed %v, error %v", renewed, err)
	}
	if diff := cmp.Diff(state, same); diff != "" {
		t.Errorf("state changed (-before +after):\n%s", diff)
	}

	next, renewed, err := builtin.Renew(state, key, time.Now())
	if err != nil || !renewed {
		t.Fatalf("after half of its life: renewed %v, error %v", renewed, err)
	}
	if diff := cmp.Diff(state.Root, next.Root); diff != "" {
		t.Errorf("the root changed (-before +after):\n%s", diff)
	}
	if _, until := open(t, next, key).Expires(); time.Until(until) < builtin.IntermediateTTL-time.Minute {
		t.Errorf("the new intermediate ends at %s", until)
	}
	leafKey, err := ca.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	id := spiffe.Service(catest.TrustDomain, "default", "web")
	bundle, err := open(t, state, key).Roots(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for name, s := range map[string]builtin.State{"old": state, "new": next} {
		chain, err := open(t, s, key).Sign(t.Context(), ca.SignRequest{PublicKey: leafKey.Public(), ID: id})
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := ca.VerifyPeer(bundle, chain.DER(), time.Now(), x509.ExtKeyUsageClientAuth, ca.AcceptAny); err != nil {
			t.Errorf("leaf of the %s intermediate: %v", name, err)
		}
	}

	// An intermediate never outlives the root, and a root that has ended signs none.
	late, renewed, err := builtin.Renew(state, key, start.Add(builtin.RootTTL-time.Hour))
	if err != nil || !renewed {
		t.Fatalf("an hour before the root's end: renewed %v, error %v", renewed, err)
	}
	if root, intermediate := certificates(t, late); intermediate.NotAfter.After(root.NotAfter) {
		t.Errorf("the intermediate ends at %s, after its root at %s", intermediate.NotAfter, root.NotAfter)
	}
	if _, _, err := builtin.Renew(state, key, start.Add(builtin.RootTTL+time.Hour)); !errors.Is(err, ca.ErrIssuer) {
		t.Errorf("after the root's end: error %v, want ca.ErrIssuer", err)
	}
	if _, _, err := builtin.Renew(state, ca.GenerateClusterKey(), time.Now()); !errors.Is(err, ca.ErrUnwrap) {
		t.Errorf("another cluster key: error %v, want ca.ErrUnwrap", err)
	}
}

// The intermediate's key is what a thief would get first. A verifier that checks the chain alone, and no trust domain, must not
// take an identity of another trust domain from it.
func TestNameConstraint(t *testing.T) {
	key := ca.GenerateClusterKey()
	state := create(t, key, time.Now())
	root, intermediate := certificates(t, state)
	stolen, err := key.Unwrap("CA intermediate key of "+catest.TrustDomain, state.Intermediate.WrappedKey)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := x509.ParsePKCS8PrivateKey(stolen.Reveal())
	if err != nil {
		t.Fatal(err)
	}
	leafKey, err := ca.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	roots, intermediates := x509.NewCertPool(), x509.NewCertPool()
	roots.AddCert(root)
	intermediates.AddCert(intermediate)
	for trustDomain, ok := range map[string]bool{catest.TrustDomain: true, "other.example.com": false, "example.com": false} {
		der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
			SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), URIs: []*url.URL{spiffe.Service(trustDomain, "default", "web").URL()},
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		}, intermediate, leafKey.Public(), signer)
		if err != nil {
			t.Fatal(err)
		}
		leaf, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		_, err = leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: intermediates})
		invalid, constrained := errors.AsType[x509.CertificateInvalidError](err)
		if ok && err != nil || !ok && (!constrained || invalid.Reason != x509.CANotAuthorizedForThisName) {
			t.Errorf("%s: error %v, want accepted %v", trustDomain, err, ok)
		}
	}
}

func BenchmarkSign(b *testing.B) {
	key := ca.GenerateClusterKey()
	authority := open(b, create(b, key, time.Now()), key)
	leafKey, err := ca.GenerateKey()
	if err != nil {
		b.Fatal(err)
	}
	req := ca.SignRequest{PublicKey: leafKey.Public(), ID: spiffe.Service(catest.TrustDomain, "default", "web")}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := authority.Sign(b.Context(), req); err != nil {
			b.Fatal(err)
		}
	}
}
