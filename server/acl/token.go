package acl

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"time"
)

// Sizes and lifetimes of tokens.
const (
	// SecretBytes is the entropy of a secret: 256 bits.
	SecretBytes = 32
	// MinSecret is the length that a token chosen by an operator has at least:
	// that of 128 random bits in hexadecimal.
	MinSecret = 32
	// DefaultJoinTTL is how long a join token may be used unless it says otherwise.
	DefaultJoinTTL = 10 * time.Minute
	// MaxJoinTTL bounds the life of a join token.
	MaxJoinTTL = 24 * time.Hour
)

// ErrToken is wrapped by errors about tokens that can't be made.
var ErrToken = errors.New("invalid token")

// tokenPrefix makes a token recognizable in a log or to a secret scanner.
const tokenPrefix = "mesht_"

// Token is the stored record of an API token, kept under Hash of its secret.
type Token struct {
	// Accessor names the token in public.
	Accessor    string     `json:"accessor"`
	Description string     `json:"description,omitempty"`
	Role        Role       `json:"role"`
	Created     time.Time  `json:"created"`
	Expires     *time.Time `json:"expires,omitempty"`
}

// Identity returns whom the token makes of its bearer at a time: nobody, after
// it has expired.
func (t Token) Identity(now time.Time) Identity {
	if t.Expires != nil && !now.Before(*t.Expires) {
		return Identity{}
	}
	return Identity{Subject: Bearer, Name: t.Accessor, Role: t.Role, Title: t.Description}
}

// NewToken returns a record, and the secret to show once and never store.
func NewToken(role Role, description string, now time.Time) (token Token, secret string) {
	secret = tokenPrefix + base64.RawURLEncoding.EncodeToString(randomBytes(SecretBytes))
	return newToken(role, description, now), secret
}

// AdoptToken returns a record for a secret that an operator chose. Errors wrap
// ErrToken and do not quote the secret.
func AdoptToken(secret string, role Role, description string, now time.Time) (Token, error) {
	if len(secret) < MinSecret {
		return Token{}, fmt.Errorf("%w: %d characters are too easy to guess, want at least %d random ones", ErrToken, len(secret), MinSecret)
	}
	for _, r := range secret {
		if r <= ' ' || r > '~' {
			return Token{}, fmt.Errorf("%w: it has characters that an HTTP header can't carry, want printable ASCII without spaces", ErrToken)
		}
	}
	return newToken(role, description, now), nil
}

func newToken(role Role, description string, now time.Time) Token {
	return Token{Accessor: hex.EncodeToString(randomBytes(8)), Description: description, Role: role, Created: now.UTC()}
}

// Hash returns what is stored in place of a secret: its SHA-256 in hexadecimal.
// Secrets have so much entropy that a slow hash would add nothing.
func Hash(secret []byte) string {
	sum := sha256.Sum256(secret)
	return hex.EncodeToString(sum[:])
}

// JoinToken is the stored record of a one-time token for one new node, kept under
// Hash of its secret.
type JoinToken struct {
	// Accessor names the token in public.
	Accessor string `json:"accessor"`
	// Node is the only name that the token admits.
	Node string `json:"node"`
	// Services are the patterns that the node's record gets, unless there is one.
	Services []string `json:"services,omitempty"`
	// Replace admits a rebuilt host under a name that is in use.
	Replace bool      `json:"replace,omitempty"`
	Created time.Time `json:"created"`
	Expires time.Time `json:"expires"`
	// Used is when the token was consumed, and UsedBy the SHA-256 of the public
	// key (ca.Hash) that was certified for it. That key alone may repeat the join
	// until the token expires.
	Used   *time.Time `json:"used,omitempty"`
	UsedBy string     `json:"used_by,omitempty"`
}

// NewJoinToken returns a record that expires after ttl (0: DefaultJoinTTL), and
// its secret. Node and services are the caller's to validate. Errors wrap ErrToken.
func NewJoinToken(node string, services []string, ttl time.Duration, replace bool, now time.Time) (token JoinToken, secret []byte, err error) {
	if ttl == 0 {
		ttl = DefaultJoinTTL
	}
	if ttl < 0 || ttl > MaxJoinTTL {
		return JoinToken{}, nil, fmt.Errorf("%w: a join token lives for up to %v, not %v", ErrToken, MaxJoinTTL, ttl)
	}
	return JoinToken{
		Accessor: hex.EncodeToString(randomBytes(8)),
		Node:     node,
		Services: services,
		Replace:  replace,
		Created:  now.UTC(),
		Expires:  now.Add(ttl).UTC(),
	}, randomBytes(SecretBytes), nil
}

func randomBytes(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails: crypto/rand.Read ends the process instead
	return b
}
