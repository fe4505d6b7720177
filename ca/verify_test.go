package ca_test

import (
	"crypto/x509"
	"errors"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/ca/spiffe"
)

func TestVerifyPeer(t *testing.T) {
	ours, theirs := newAuthority(t, home), newAuthority(t, foreign)
	both := ours.bundle.Merge(theirs.bundle)
	chain := ours.chain(t, leafTemplate(web), newKey(t).Public())
	clientOnly := leafTemplate(web)
	clientOnly.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	client := ours.chain(t, clientOnly, newKey(t).Public())
	const asClient, asServer = x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth
	for _, row := range []struct {
		name   string
		bundle ca.Bundle
		chain  ca.Chain
		at     time.Time
		usage  x509.ExtKeyUsage
		want   error
	}{
		{"as a client", both, chain, time.Now(), asClient, nil},
		{"as a server", both, chain, time.Now(), asServer, nil},
		{"root in the chain", both, append(chain[:2:2], ours.root), time.Now(), asClient, nil},
		{"unrelated certificate in the chain", both, append(chain[:2:2], theirs.intermediate), time.Now(), asClient, nil},
		{"client's certificate as a client", both, client, time.Now(), asClient, nil},
		{"client's certificate as a server", both, client, time.Now(), asServer, ca.ErrUsage},
		{"nobody is trusted", ca.Bundle{}, chain, time.Now(), asClient, ca.ErrUnknownTrustDomain},
		{"only another trust domain is", theirs.bundle, chain, time.Now(), asClient, ca.ErrUnknownTrustDomain},
		{"at its first second", both, chain, chain[0].NotBefore, asClient, nil},
		{"at its last second", both, chain, chain[0].NotAfter, asClient, nil},
		{"before", both, chain, chain[0].NotBefore.Add(-1), asClient, ca.ErrNotYetValid},
		{"after", both, chain, chain[0].NotAfter.Add(1), asClient, ca.ErrExpired},
		{"nothing presented", both, nil, time.Now(), asClient, ca.ErrNoCertificate},
		{"eleven certificates", both, append(chain[:1:1], ca.Chain{
			ours.root, ours.root, ours.root, ours.root, ours.root, ours.root, ours.root, ours.root, ours.root, ours.root,
		}...), time.Now(), asClient, ca.ErrPeerChain},
	} {
		id, verified, err := ca.VerifyPeer(row.bundle, row.chain.DER(), row.at, row.usage, ca.AcceptAny)
		if !errors.Is(err, row.want) || row.want == nil && err != nil {
			t.Errorf("%s: error %v, want %v", row.name, err, row.want)
			continue
		}
		if row.want != nil {
			if !id.IsZero() || verified != nil {
				t.Errorf("%s: refused, yet returned %q and a chain of %d", row.name, id, len(verified))
			}
			continue
		}
		want := ca.Chain{row.chain[0], ours.intermediate, ours.root}.DER()
		if diff := cmp.Diff(want, verified.DER()); id != web || diff != "" {
			t.Errorf("%s: identity %q, chain (-want +got):\n%s", row.name, id, diff)
		}
	}
}

// An intermediate that ended before its leaf is refused for its age, not as a stranger.
func TestVerifyPeerExpiredIntermediate(t *testing.T) {
	ours := newAuthority(t, home)
	chain := ours.chain(t, leafTemplate(web), newKey(t).Public())
	short := *ours.intermediate
	short.NotAfter = time.Now().Add(time.Hour)
	chain[1] = issue(t, &short, ours.root, ours.key.Public(), ours.rootKey)
	for at, want := range map[time.Time]error{
		time.Now():                    nil,
		time.Now().Add(2 * time.Hour): ca.ErrExpired,
	} {
		if _, _, err := ca.VerifyPeer(ours.bundle, chain.DER(), at, x509.ExtKeyUsageClientAuth, ca.AcceptAny); !errors.Is(err, want) || want == nil && err != nil {
			t.Errorf("at %s: error %v, want %v", at, err, want)
		}
	}
}

func TestVerifyPeerAcceptIsLast(t *testing.T) {
	ours, theirs := newAuthority(t, home), newAuthority(t, foreign)
	var asked []spiffe.ID
	accept := func(id spiffe.ID) error {
		asked = append(asked, id)
		return nil
	}
	minted := theirs.chain(t, leafTemplate(web), newKey(t).Public())
	if _, _, err := ca.VerifyPeer(ours.bundle, minted.DER(), time.Now(), x509.ExtKeyUsageClientAuth, accept); !errors.Is(err, ca.ErrUntrusted) {
		t.Errorf("error %v, want ErrUntrusted", err)
	}
	chain := ours.chain(t, leafTemplate(api), newKey(t).Public())
	if _, _, err := ca.VerifyPeer(ours.bundle, chain.DER(), time.Now(), x509.ExtKeyUsageClientAuth, accept); err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff([]spiffe.ID{api}, asked); diff != "" {
		t.Errorf("accept was asked for (-want +got):\n%s", diff)
	}
}

func TestAccept(t *testing.T) {
	for _, row := range []struct {
		name   string
		accept func(spiffe.ID) error
		id     spiffe.ID
		ok     bool
	}{
		{"any", ca.AcceptAny, web, true},
		{"same", ca.Expect(web), web, true},
		{"other name", ca.Expect(web), api, false},
		{"other trust domain", ca.Expect(web), spiffe.Service(foreign, "default", "web"), false},
		{"other namespace", ca.Expect(web), spiffe.Service(home, "batch", "web"), false},
		{"other kind", ca.Expect(spiffe.Node(home, "s1")), server, false},
		{"zero against zero", ca.Expect(spiffe.ID{}), spiffe.ID{}, false},
		{"kind", ca.ExpectKind(home, spiffe.KindServer), server, true},
		{"kind of another trust domain", ca.ExpectKind(home, spiffe.KindServer), spiffe.Server(foreign, "s1"), false},
		{"another kind", ca.ExpectKind(home, spiffe.KindServer), vm, false},
	} {
		if err := row.accept(row.id); (err == nil) != row.ok || err != nil && !errors.Is(err, ca.ErrUnexpectedPeer) {
			t.Errorf("%s: error %v, want accepted %v", row.name, err, row.ok)
		}
	}
}

// FuzzVerifyPeer changes the bytes of a good chain, and feeds it anything at all: what comes out is refused, or is the identity
// that was signed.
func FuzzVerifyPeer(f *testing.F) {
	ours, theirs := fixedAuthority(f, home, 1), fixedAuthority(f, foreign, 3)
	good, minted := ours.fixedLeaf(f, web, 5).Chain().DER(), theirs.fixedLeaf(f, web, 6).Chain().DER()
	bundle := ours.bundle.Merge(theirs.bundle)
	f.Add(good[0], good[1], uint16(0), byte(0))
	f.Add(good[0], good[1], uint16(300), byte(1))
	f.Add(minted[0], minted[1], uint16(0), byte(0))
	f.Add([]byte{}, []byte{0x30}, uint16(0), byte(0))
	f.Fuzz(func(t *testing.T, leaf, intermediate []byte, at uint16, flip byte) {
		for _, raw := range [][][]byte{{leaf, intermediate}, {flipped(good[0], at, flip), good[1]}, {good[0], flipped(good[1], at, flip)}} {
			id, chain, err := ca.VerifyPeer(bundle, raw, fixedTime, x509.ExtKeyUsageClientAuth, ca.AcceptAny)
			if err != nil {
				if !id.IsZero() || chain != nil {
					t.Fatalf("refused, yet returned %q", id)
				}
				continue
			}
			if id != web || len(chain) != 3 || string(chain[0].RawTBSCertificate) != string(mustParse(t, good[0]).RawTBSCertificate) {
				t.Fatalf("accepted %q with a leaf that nobody signed", id)
			}
		}
	})
}

func flipped(data []byte, at uint16, flip byte) []byte {
	out := append([]byte(nil), data...)
	out[int(at)%len(out)] ^= flip
	return out
}

func mustParse(t *testing.T, der []byte) *x509.Certificate {
	t.Helper()
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func BenchmarkVerifyPeer(b *testing.B) {
	ours := newAuthority(b, home)
	raw := ours.chain(b, leafTemplate(web), newKey(b).Public()).DER()
	now := time.Now()
	b.ReportAllocs()
	for b.Loop() {
		if _, _, err := ca.VerifyPeer(ours.bundle, raw, now, x509.ExtKeyUsageClientAuth, ca.AcceptAny); err != nil {
			b.Fatal(err)
		}
	}
}
