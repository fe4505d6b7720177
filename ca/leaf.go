package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"time"

	"github.com/meshd/meshd/ca/spiffe"
)

// ErrLeaf is wrapped by every error about a chain or key that makes no Leaf.
var ErrLeaf = errors.New("invalid leaf certificate")

// maxChain bounds how many certificates are read of any chain: a leaf, two intermediates, cross-signed and present roots fit.
const maxChain = 10

// Chain is a certificate chain: the leaf first, each certificate signed by the next. The certificates are not to be changed.
type Chain []*x509.Certificate

// ParseChain reads a chain from DER. It verifies no signature. Errors wrap ErrLeaf.
func ParseChain(ders [][]byte) (Chain, error) {
	if len(ders) == 0 || len(ders) > maxChain {
		return nil, fmt.Errorf("%w: a chain of %d certificates, want 1 to %d", ErrLeaf, len(ders), maxChain)
	}
	chain := make(Chain, len(ders))
	for i, der := range ders {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("%w: certificate %d of the chain: %w", ErrLeaf, i+1, err)
		}
		chain[i] = cert
	}
	return chain, nil
}

// DER returns the certificates' encodings, for ParseChain. The bytes are not to be changed.
func (c Chain) DER() [][]byte {
	ders := make([][]byte, len(c))
	for i, cert := range c {
		ders[i] = cert.Raw
	}
	return ders
}

// PEM returns the chain as a PEM file.
func (c Chain) PEM() []byte { return encodePEM(c) }

// Leaf is one identity that this process can prove: a chain and the private key of its first certificate. It is immutable and
// safe for concurrent use. Printing one in any way shows its identity and expiry, never its key.
type Leaf struct {
	id    spiffe.ID
	chain Chain
	key   *leafKey
}

// leafKey stands behind a pointer of Leaf, so that printing a Leaf by value does not reach the key either.
type leafKey struct {
	private *ecdsa.PrivateKey
	tls     *tls.Certificate
}

// NewLeaf joins a chain and the P-256 key of its first certificate. It verifies no signature and no time: VerifyPeer does, on
// the other side. Errors wrap ErrLeaf.
func NewLeaf(chain Chain, key crypto.Signer) (*Leaf, error) {
	if len(chain) == 0 || len(chain) > maxChain {
		return nil, fmt.Errorf("%w: a chain of %d certificates, want 1 to %d", ErrLeaf, len(chain), maxChain)
	}
	private, ok := key.(*ecdsa.PrivateKey)
	if !ok || private == nil {
		return nil, fmt.Errorf("%w: private key of type %T, want ECDSA on P-256", ErrLeaf, key)
	}
	if _, err := CheckPublicKey(&private.PublicKey); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrLeaf, err)
	}
	if !private.PublicKey.Equal(chain[0].PublicKey) {
		return nil, fmt.Errorf("%w: the private key belongs to another certificate", ErrLeaf)
	}
	id, err := spiffe.FromCert(chain[0])
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrLeaf, err)
	}
	chain = slices.Clone(chain)
	certificate := &tls.Certificate{Certificate: chain.DER(), PrivateKey: private, Leaf: chain[0]}
	return &Leaf{id: id, chain: chain, key: &leafKey{private: private, tls: certificate}}, nil
}

// ID returns whom the leaf names.
func (l *Leaf) ID() spiffe.ID { return l.id }

// Chain returns the certificates, leaf first. It is not to be changed.
func (l *Leaf) Chain() Chain { return l.chain }

// PublicKey returns the leaf's public key.
func (l *Leaf) PublicKey() *ecdsa.PublicKey { return &l.key.private.PublicKey }

// NotBefore returns the time from which the leaf is valid.
func (l *Leaf) NotBefore() time.Time { return l.chain[0].NotBefore }

// NotAfter returns the time after which the leaf must not be used.
func (l *Leaf) NotAfter() time.Time { return l.chain[0].NotAfter }

// TLS returns the leaf for ServerConfig and ClientConfig. It is shared: not to be changed.
func (l *Leaf) TLS() *tls.Certificate { return l.key.tls }

// TLSWithRoots is TLS with the roots of the leaf's trust domain at the end of the chain. A server's API port presents it, so
// that a host that knows nothing but a join token can check the token's hash within the handshake (PinnedConfig).
func (l *Leaf) TLSWithRoots(b Bundle) *tls.Certificate {
	chain := slices.Concat(l.chain, b.domains[l.id.TrustDomain].roots)
	return &tls.Certificate{Certificate: chain.DER(), PrivateKey: l.key.private, Leaf: l.chain[0]}
}

// RenewAt returns when to ask for the next leaf: at half of the leaf's life, a tenth of that earlier or later, so that leaves
// issued together are not renewed together. random lies in [0, 1). A leaf of 24 h is renewed with at least 10.8 h left. The
// time may lie in the past: then renew at once.
func (l *Leaf) RenewAt(random float64) time.Time {
	issued := l.NotBefore().Add(Backdate)
	life := l.NotAfter().Sub(issued)
	if life <= 0 {
		return l.NotBefore()
	}
	return issued.Add(time.Duration(float64(life) * (0.45 + 0.1*min(max(random, 0), 1))))
}

// KeyDER returns the private key as PKCS #8 in DER: how it crosses a process boundary.
func (l *Leaf) KeyDER() (Secret, error) {
	der, err := x509.MarshalPKCS8PrivateKey(l.key.private)
	if err != nil {
		return Secret{}, fmt.Errorf("encode private key of %s: %w", l.id, err)
	}
	return NewSecret(der), nil
}

// ParseLeaf joins a chain and key in DER, as Chain.DER and KeyDER wrote them. Errors wrap ErrLeaf.
func ParseLeaf(chain [][]byte, key Secret) (*Leaf, error) {
	parsed, err := ParseChain(chain)
	if err != nil {
		return nil, err
	}
	private, err := parseKey(key.Reveal())
	if err != nil {
		return nil, err
	}
	return NewLeaf(parsed, private)
}

const pemPrivateKey = "PRIVATE KEY"

// PEM returns the chain and then the private key as one PEM file, which belongs on disk with mode 0600.
func (l *Leaf) PEM() (Secret, error) {
	key, err := l.KeyDER()
	if err != nil {
		return Secret{}, err
	}
	return NewSecret(append(l.chain.PEM(), pem.EncodeToMemory(&pem.Block{Type: pemPrivateKey, Bytes: key.Reveal()})...)), nil
}

// ParseLeafPEM reads what PEM wrote. Errors wrap ErrLeaf.
func ParseLeafPEM(data Secret) (*Leaf, error) {
	var chain [][]byte
	var key []byte
	rest := data.Reveal()
	for {
		var block *pem.Block
		block, rest = pem.Decode(rest)
		switch {
		case block == nil && key == nil:
			return nil, fmt.Errorf("%w: no %q block in the PEM file, it may be cut off", ErrLeaf, pemPrivateKey)
		case block == nil:
			return ParseLeaf(chain, NewSecret(key))
		case block.Type == pemCertificate && len(chain) < maxChain:
			chain = append(chain, block.Bytes)
		case block.Type == pemPrivateKey && key == nil:
			key = block.Bytes
		default:
			return nil, fmt.Errorf("%w: unexpected PEM block %q", ErrLeaf, block.Type)
		}
	}
}

func parseKey(der []byte) (*ecdsa.PrivateKey, error) {
	key, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		// The parser's message can't quote the key: it speaks of structure only.
		return nil, fmt.Errorf("%w: parse private key: %w", ErrLeaf, err)
	}
	private, ok := key.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("%w: private key of type %T, want ECDSA on P-256", ErrLeaf, key)
	}
	return private, nil
}

// String returns the identity and the expiry.
func (l *Leaf) String() string {
	if l == nil || len(l.chain) == 0 {
		return "no leaf"
	}
	return l.id.String() + " until " + l.NotAfter().UTC().Format(time.RFC3339)
}

// Format writes String's form for every verb.
func (l *Leaf) Format(w fmt.State, _ rune) { _, _ = io.WriteString(w, l.String()) }

// LogValue returns String's form.
func (l *Leaf) LogValue() slog.Value { return slog.StringValue(l.String()) }

// MarshalJSON refuses: a leaf has no JSON form that keeps its key out and reads back. Use Chain.DER and KeyDER.
func (l *Leaf) MarshalJSON() ([]byte, error) {
	return nil, fmt.Errorf("%w: a leaf holds a private key and has no JSON form", ErrLeaf)
}
