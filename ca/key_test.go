package ca_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"strings"
	"testing"

	"github.com/meshd/meshd/ca"
)

func csr(tb testing.TB, template *x509.CertificateRequest, key crypto.Signer) []byte {
	tb.Helper()
	der, err := x509.CreateCertificateRequest(nil, template, key) // deterministic, for the fuzzer
	if err != nil {
		tb.Fatal(err)
	}
	return der
}

func TestCSR(t *testing.T) {
	key := newKey(t)
	der, err := ca.NewCSR(key)
	if err != nil {
		t.Fatal(err)
	}
	got, err := ca.PublicKeyFromCSR(der)
	if err != nil || !key.PublicKey.Equal(got) {
		t.Errorf("another key came back, error %v", err)
	}
	hash, err := ca.PublicKeyHash(got)
	again, err2 := ca.PublicKeyHash(key.Public())
	other, err3 := ca.PublicKeyHash(newKey(t).Public())
	if errors.Join(err, err2, err3) != nil || hash != again || hash == other || hash.IsZero() {
		t.Errorf("hashes %s, %s, %s; errors %v %v %v", hash, again, other, err, err2, err3)
	}
	if _, err := ca.PublicKeyHash("x"); !errors.Is(err, ca.ErrRequest) {
		t.Errorf("hash of a string: %v", err)
	}
}

func TestCSRRefuses(t *testing.T) {
	key := newKey(t)
	good, err := ca.NewCSR(key)
	if err != nil {
		t.Fatal(err)
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	_, edKey, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	badSignature := bytes.Clone(good)
	badSignature[len(badSignature)-1] ^= 1
	otherKey := bytes.Replace(good, point(t, key), point(t, newKey(t)), 1)
	long := csr(t, &x509.CertificateRequest{Subject: pkix.Name{CommonName: strings.Repeat("a", ca.MaxCSRLength)}}, key)
	for name, der := range map[string][]byte{
		"nothing": nil, "garbage": []byte("garbage"), "cut": good[:len(good)-5], "trailing byte": append(bytes.Clone(good), 0), "bad signature": badSignature,
		"someone else's key": otherKey, "too long": long, "P-384": csr(t, &x509.CertificateRequest{}, p384),
		"RSA": csr(t, &x509.CertificateRequest{}, rsaKey), "Ed25519": csr(t, &x509.CertificateRequest{}, edKey),
	} {
		if got, err := ca.PublicKeyFromCSR(der); !errors.Is(err, ca.ErrRequest) || got != nil {
			t.Errorf("%s: key %v, error %v; want ErrRequest", name, got != nil, err)
		}
	}
	if _, err := ca.NewCSR(edKey); !errors.Is(err, ca.ErrRequest) {
		t.Errorf("a request for an Ed25519 key: %v", err)
	}
}

func point(t *testing.T, key *ecdsa.PrivateKey) []byte {
	t.Helper()
	b, err := key.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func FuzzPublicKeyFromCSR(f *testing.F) {
	key := fixedKey(f, 1)
	good := csr(f, &x509.CertificateRequest{}, key)
	f.Add(good, uint16(0), byte(0))
	f.Add(csr(f, &x509.CertificateRequest{Subject: pkix.Name{CommonName: "x"}, DNSNames: []string{"a"}}, key), uint16(9), byte(1))
	f.Add([]byte{0x30, 0x80}, uint16(40), byte(0xff))
	f.Fuzz(func(t *testing.T, der []byte, at uint16, flip byte) {
		for _, data := range [][]byte{der, flipped(good, at, flip)} {
			got, err := ca.PublicKeyFromCSR(data)
			if err != nil {
				if !errors.Is(err, ca.ErrRequest) || got != nil {
					t.Fatalf("key %v, error %v", got, err)
				}
				continue
			}
			if _, err := ca.CheckPublicKey(got); err != nil {
				t.Fatal(err)
			}
		}
	})
}
