package ca

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
)

// Bounds of a join token.
const (
	maxTokenServers = 16
	maxTokenAddress = 261 // the longest DNS name, a colon, a port, and brackets
	minTokenSecret  = 16
	maxTokenSecret  = 64
	maxTokenLength  = 8 << 10
)

// tokenPrefix starts every join token: the version, and what makes a token recognizable in a log or a secret scanner.
const tokenPrefix = "mesh1."

const (
	tokenLengthBytes   = 2
	tokenChecksumBytes = 4
)

var (
	// ErrJoinToken is wrapped by every error about text that is no join token, or about fields that make none. It says nothing
	// about whether a server knows the token.
	ErrJoinToken = errors.New("not a usable join token")
	// ErrJoinTokenTruncated is wrapped, beside ErrJoinToken, when the end of a token is missing, as after a bad copy and paste.
	ErrJoinTokenTruncated = errors.New("its end is missing")
)

// JoinToken is what a host needs for its first contact with the servers: where they are, how to recognize them, and a secret
// that admits it. Printing one shows everything but the secret; Encode is the only way to the whole.
type JoinToken struct {
	Servers []string // host:port, at least one
	Roots   Hash     // Bundle.Hash of the servers' trust domain, for PinnedConfig
	Secret  Secret   // 16 to 64 bytes
}

// Encode returns the token as one word of letters, digits, '-', '_' and '.', for a command line or a file. It contains the
// secret: show it once, to whom it is for. Errors wrap ErrJoinToken.
func (t JoinToken) Encode() (string, error) {
	if err := t.validate(); err != nil {
		return "", err
	}
	secret := t.Secret.Reveal()
	payload := make([]byte, tokenLengthBytes, 256)
	payload = append(payload, t.Roots[:]...)
	payload = append(payload, byte(len(secret))) //nolint:gosec // validate bounds it
	payload = append(payload, secret...)
	payload = append(payload, byte(len(t.Servers))) //nolint:gosec // validate bounds it
	for _, server := range t.Servers {
		payload = binary.BigEndian.AppendUint16(payload, uint16(len(server))) //nolint:gosec // validate bounds it
		payload = append(payload, server...)
	}
	binary.BigEndian.PutUint16(payload, uint16(len(payload)+tokenChecksumBytes)) //nolint:gosec // validate bounds every part
	payload = append(payload, tokenChecksum(payload)...)
	return tokenPrefix + base64.RawURLEncoding.EncodeToString(payload), nil
}

// ParseJoinToken reads what Encode wrote; white space around it is ignored. The token's length and a checksum inside it tell a
// damaged copy from a token that a server will not take. Errors wrap ErrJoinToken and never quote the token.
func ParseJoinToken(s string) (JoinToken, error) {
	s = strings.TrimSpace(s)
	if len(s) > maxTokenLength {
		return JoinToken{}, fmt.Errorf("%w: %d characters, at most %d are read", ErrJoinToken, len(s), maxTokenLength)
	}
	encoded, ok := strings.CutPrefix(s, tokenPrefix)
	if !ok {
		if s != "" && strings.HasPrefix(tokenPrefix, s) {
			return JoinToken{}, fmt.Errorf("%w: %w", ErrJoinToken, ErrJoinTokenTruncated)
		}
		return JoinToken{}, fmt.Errorf("%w: it does not start with %q", ErrJoinToken, tokenPrefix)
	}
	payload, err := decodeToken(encoded)
	if err != nil {
		return JoinToken{}, err
	}
	token, err := parsePayload(payload)
	if err != nil {
		return JoinToken{}, err
	}
	return token, token.validate()
}

// decodeToken undoes base64 and checks length and checksum. It returns the bytes between the two.
func decodeToken(encoded string) ([]byte, error) {
	if i := strings.IndexFunc(encoded, func(r rune) bool { return !isTokenRune(r) }); i >= 0 {
		return nil, fmt.Errorf("%w: character %d can't be part of one; was it broken over two lines?", ErrJoinToken, len(tokenPrefix)+i+1)
	}
	// Up to three characters at the end may be the rest of a cut group, so the length is looked at before decoding errors.
	whole := len(encoded) / 4 * 4
	head, err := base64.RawURLEncoding.DecodeString(encoded[:whole])
	if err != nil {
		return nil, fmt.Errorf("%w: it can't be decoded", ErrJoinToken)
	}
	if len(head) < tokenLengthBytes {
		return nil, fmt.Errorf("%w: %w: only %d characters", ErrJoinToken, ErrJoinTokenTruncated, len(tokenPrefix)+len(encoded))
	}
	size := int(binary.BigEndian.Uint16(head))
	switch want := base64.RawURLEncoding.EncodedLen(size); {
	case len(encoded) < want:
		return nil, fmt.Errorf("%w: %w: %d characters of %d", ErrJoinToken, ErrJoinTokenTruncated, len(tokenPrefix)+len(encoded), len(tokenPrefix)+want)
	case len(encoded) > want:
		return nil, fmt.Errorf("%w: %d characters too many", ErrJoinToken, len(encoded)-want)
	}
	payload, err := base64.RawURLEncoding.Strict().DecodeString(encoded)
	if err != nil || len(payload) < tokenLengthBytes+tokenChecksumBytes {
		return nil, fmt.Errorf("%w: it can't be decoded", ErrJoinToken)
	}
	body, sum := payload[:len(payload)-tokenChecksumBytes], payload[len(payload)-tokenChecksumBytes:]
	if !bytes.Equal(sum, tokenChecksum(body)) {
		return nil, fmt.Errorf("%w: its checksum is wrong, a character was changed", ErrJoinToken)
	}
	return body[tokenLengthBytes:], nil
}

func isTokenRune(r rune) bool {
	return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '-' || r == '_'
}

func parsePayload(p []byte) (JoinToken, error) {
	var t JoinToken
	malformed := fmt.Errorf("%w: its parts do not fit together", ErrJoinToken)
	take := func(n int) []byte {
		if n > len(p) {
			return nil
		}
		out := p[:n:n]
		p = p[n:]
		return out
	}
	if copy(t.Roots[:], take(len(t.Roots))) != len(t.Roots) {
		return JoinToken{}, malformed
	}
	size := take(1)
	if size == nil {
		return JoinToken{}, malformed
	}
	t.Secret = NewSecret(take(int(size[0])))
	count := take(1)
	if count == nil {
		return JoinToken{}, malformed
	}
	for range count[0] {
		length := take(2)
		if length == nil {
			return JoinToken{}, malformed
		}
		t.Servers = append(t.Servers, string(take(int(binary.BigEndian.Uint16(length)))))
	}
	if len(p) != 0 {
		return JoinToken{}, malformed
	}
	return t, nil
}

func (t JoinToken) validate() error {
	if t.Roots.IsZero() {
		return fmt.Errorf("%w: it pins no root", ErrJoinToken)
	}
	if n := len(t.Secret.Reveal()); n < minTokenSecret || n > maxTokenSecret {
		return fmt.Errorf("%w: a secret of %d bytes, want %d to %d", ErrJoinToken, n, minTokenSecret, maxTokenSecret)
	}
	if n := len(t.Servers); n < 1 || n > maxTokenServers {
		return fmt.Errorf("%w: %d server addresses, want 1 to %d", ErrJoinToken, n, maxTokenServers)
	}
	for _, server := range t.Servers {
		if err := checkAddress(server); err != nil {
			return err
		}
	}
	return nil
}

func checkAddress(address string) error {
	host, port, err := net.SplitHostPort(address)
	number, portErr := strconv.ParseUint(port, 10, 16)
	if err != nil || portErr != nil || number == 0 || host == "" || len(address) > maxTokenAddress {
		return fmt.Errorf("%w: server address %q is no host:port", ErrJoinToken, address)
	}
	for _, r := range host {
		if r <= ' ' || r > '~' {
			return fmt.Errorf("%w: server address %q is no host:port", ErrJoinToken, address)
		}
	}
	return nil
}

// tokenChecksum finds accidents, not forgeries: the secret protects the token.
func tokenChecksum(body []byte) []byte {
	sum := sha256.Sum256(append([]byte(tokenPrefix), body...))
	return sum[:tokenChecksumBytes]
}
