package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
)

// MaxCSRLength is the longest certificate request that PublicKeyFromCSR reads, in bytes of DER. One made by NewCSR has 200.
const MaxCSRLength = 4 << 10

// GenerateKey returns a new P-256 key, the only kind that leaves have.
func GenerateKey() (*ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("generate a P-256 key: %w", err)
	}
	return key, nil
}

// CheckPublicKey returns pub as a P-256 key, or an error that wraps ErrRequest if it is any other, or no point of the curve.
func CheckPublicKey(pub crypto.PublicKey) (*ecdsa.PublicKey, error) {
	key, ok := pub.(*ecdsa.PublicKey)
	if !ok || key == nil {
		return nil, fmt.Errorf("%w: public key of type %T, want ECDSA on P-256", ErrRequest, pub)
	}
	if key.Curve != elliptic.P256() {
		return nil, fmt.Errorf("%w: ECDSA key on another curve, want P-256", ErrRequest)
	}
	if _, err := key.ECDH(); err != nil {
		return nil, fmt.Errorf("%w: public key: %w", ErrRequest, err)
	}
	return key, nil
}

// PublicKeyHash returns the SHA-256 of pub in its PKIX encoding: what a server stores to know a key again.
func PublicKeyHash(pub crypto.PublicKey) (Hash, error) {
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return Hash{}, fmt.Errorf("%w: encode public key: %w", ErrRequest, err)
	}
	return sha256.Sum256(der), nil
}

// NewCSR returns a PKCS #10 request, DER, that proves possession of key and asks for no names: the server decides those.
func NewCSR(key crypto.Signer) ([]byte, error) {
	if _, err := CheckPublicKey(key.Public()); err != nil {
		return nil, err
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, fmt.Errorf("create certificate request: %w", err)
	}
	return der, nil
}

// PublicKeyFromCSR returns the P-256 key of a PKCS #10 request in DER, whose signature it verifies (proof of possession).
// It returns nothing else, so that no name, extension or subject of the request can reach a certificate. Errors wrap ErrRequest.
func PublicKeyFromCSR(der []byte) (*ecdsa.PublicKey, error) {
	if len(der) > MaxCSRLength {
		return nil, fmt.Errorf("%w: CSR of %d bytes, at most %d are read", ErrRequest, len(der), MaxCSRLength)
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, fmt.Errorf("%w: parse CSR: %w", ErrRequest, err)
	}
	key, err := CheckPublicKey(csr.PublicKey)
	if err != nil {
		return nil, err
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, fmt.Errorf("%w: the CSR is not signed by its own key: %w", ErrRequest, err)
	}
	return key, nil
}
