package record

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/tls"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"hash"

	"golang.org/x/crypto/chacha20poly1305"
)

// suite is what a cipher suite of TLS 1.3 stands for (RFC 8446 appendix B.4).
type suite struct {
	key  int // length in bytes
	hash func() hash.Hash
	aead func(key []byte) (cipher.AEAD, error)
}

func suiteOf(id uint16) (*suite, error) {
	switch id {
	case tls.TLS_AES_128_GCM_SHA256:
		return &suite{16, sha256.New, newGCM}, nil
	case tls.TLS_AES_256_GCM_SHA384:
		return &suite{32, sha512.New384, newGCM}, nil
	case tls.TLS_CHACHA20_POLY1305_SHA256:
		return &suite{chacha20poly1305.KeySize, sha256.New, chacha20poly1305.New}, nil
	default:
		return nil, fmt.Errorf("%w: cipher suite %s", ErrUnsupported, tls.CipherSuiteName(id))
	}
}

func newGCM(key []byte) (cipher.AEAD, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}

// nonceSize is that of all suites (RFC 8446 section 5.3).
const nonceSize = 12

// protection is one direction's: what protects a record, and what the next key comes from.
type protection struct {
	suite  *suite
	secret []byte
	aead   cipher.AEAD
	iv     [nonceSize]byte
	nonce  [nonceSize]byte // of the record at hand; here, as an argument of an interface's method it would be allocated
	seq    uint64          // of the next record
}

// start derives key and IV of a traffic secret (RFC 8446 section 7.3), which p owns from now on.
func (p *protection) start(s *suite, secret []byte) error {
	key, err := expandLabel(s, secret, "key", s.key)
	if err != nil {
		return err
	}
	iv, err := expandLabel(s, secret, "iv", nonceSize)
	if err != nil {
		return err
	}
	aead, err := s.aead(key)
	clear(key)
	if err != nil {
		return fmt.Errorf("make a cipher: %w", err)
	}
	*p = protection{suite: s, secret: secret, aead: aead}
	copy(p.iv[:], iv)
	return nil
}

// update goes on to the next generation of keys (RFC 8446 section 7.2).
func (p *protection) update() error {
	next, err := expandLabel(p.suite, p.secret, "traffic upd", len(p.secret))
	if err != nil {
		return err
	}
	clear(p.secret)
	return p.start(p.suite, next)
}

// next returns the nonce of the next record, and counts it.
func (p *protection) next() []byte {
	p.nonce = p.iv
	tail := p.nonce[nonceSize-8:]
	binary.BigEndian.PutUint64(tail, binary.BigEndian.Uint64(tail)^p.seq)
	p.seq++
	return p.nonce[:]
}

// seal makes the n bytes behind the room for a header in b, and the room for type and tag behind them, a record. It returns its size.
func (p *protection) seal(b []byte, n int, typ byte) int {
	header := append(b[:0], typeData, 3, 3)
	header = binary.BigEndian.AppendUint16(header, uint16(n+ours-headerSize)) //nolint:gosec // at most maxPlain and a few
	b[headerSize+n] = typ
	p.aead.Seal(b[headerSize:headerSize], p.next(), b[headerSize:headerSize+n+1], header)
	return n + ours
}

// expandLabel is HKDF-Expand-Label with an empty context (RFC 8446 section 7.1).
func expandLabel(s *suite, secret []byte, label string, length int) ([]byte, error) {
	const prefix = "tls13 "
	info := make([]byte, 0, 4+len(prefix)+len(label))
	info = binary.BigEndian.AppendUint16(info, uint16(length)) //nolint:gosec // lengths of keys
	info = append(info, byte(len(prefix)+len(label)))          //nolint:gosec // labels of RFC 8446
	info = append(info, prefix...)
	info = append(info, label...)
	info = append(info, 0)
	out, err := hkdf.Expand(s.hash, secret, string(info), length)
	if err != nil {
		return nil, fmt.Errorf("derive %q: %w", label, err)
	}
	return out, nil
}

// secrets receives the traffic secrets of one handshake from crypto/tls, which hands them out in the form of a key log and in no other.
// They go nowhere else.
type secrets struct{ client, server []byte }

// Write implements io.Writer: one line of a key log, "LABEL random secret".
func (s *secrets) Write(line []byte) (int, error) {
	label, rest, _ := bytes.Cut(line, []byte(" "))
	_, value, _ := bytes.Cut(rest, []byte(" "))
	var to *[]byte
	switch string(label) {
	case "CLIENT_TRAFFIC_SECRET_0":
		to = &s.client
	case "SERVER_TRAFFIC_SECRET_0":
		to = &s.server
	default:
		return len(line), nil
	}
	secret, err := hex.AppendDecode(nil, bytes.TrimSpace(value))
	if err != nil {
		return 0, fmt.Errorf("read a traffic secret: %w", err)
	}
	*to = secret
	return len(line), nil
}
