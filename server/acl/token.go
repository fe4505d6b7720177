package acl

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/meshd/meshd/catalog"
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
	// accessorBytes is how much tells two tokens apart in public.
	accessorBytes = 8
	// MaxJoinTTL bounds the life of a join token.
	MaxJoinTTL = 24 * time.Hour
)

// ErrToken is wrapped by errors about tokens that can't be made.
var ErrToken = errors.New("invalid token")

// tokenPrefix makes a token recognizable in a log or to a secret scanner.
const tokenPrefix = "mesht_"

// Limits of tokens.
const (
	maxPolicies = 32
	// MaxGrace bounds how long the old secret of a rotated token goes on.
	MaxGrace = 7 * 24 * time.Hour
)

// Token is the stored record of an API token, kept under Hash of its secret.
type Token struct {
	// Accessor names the token in public.
	Accessor    string `json:"accessor"`
	Description string `json:"description,omitempty"`
	// Policies and Roles say what the token may do.
	Policies []string   `json:"policies,omitempty"`
	Roles    []string   `json:"roles,omitempty"`
	Created  time.Time  `json:"created"`
	Expires  *time.Time `json:"expires,omitempty"`
	// CreatedBy is the caller that made it, as Identity.String says it; "" for the
	// first one.
	CreatedBy string `json:"created_by,omitempty"`
	// Rotated is when it last got another secret.
	Rotated *time.Time `json:"rotated,omitempty"`
	// Superseded says that this is an old secret of a rotated token, good until
	// Expires.
	Superseded bool `json:"superseded,omitempty"`
	// Role was what came before policies: "admin" stands for the policy.
	Role string `json:"role,omitempty"`
}

// Expired reports whether the token has ended.
func (t Token) Expired(now time.Time) bool { return t.Expires != nil && !now.Before(*t.Expires) }

// Label names the token for people: "9f3a66f01b77c2d4 (ci deploys)".
func (t Token) Label() string {
	if t.Description == "" {
		return t.Accessor
	}
	return t.Accessor + " (" + t.Description + ")"
}

// AllPolicies returns the names of the token's own policies, not those of roles.
func (t Token) AllPolicies() []string {
	if t.Role == PolicyAdmin {
		return append(slices.Clone(t.Policies), PolicyAdmin)
	}
	return t.Policies
}

// Identity returns whom the token makes of its bearer at a time, with the rights
// that a book gives it: nobody, after it has expired.
func (t Token) Identity(now time.Time, book *Book) Identity {
	if t.Expired(now) {
		return Identity{}
	}
	who := Identity{Subject: Bearer, Name: t.Accessor, Rights: book.Rights(t.AllPolicies(), t.Roles), Title: t.Description}
	if t.Expires != nil {
		who.Expires = *t.Expires
	}
	return who
}

// Validate reports what is wrong with what a token says; see catalog.FieldErrors.
// Whether its policies and roles exist is for others to know.
func (t Token) Validate() error {
	var p catalog.Problems
	p.Under("description", catalog.CheckDescription(t.Description))
	if len(t.Policies)+len(t.Roles) == 0 {
		p.Add("policies", "missing: a token without policies or roles may do nothing")
	}
	for _, list := range []struct {
		field string
		names []string
	}{{"policies", t.Policies}, {"roles", t.Roles}} {
		if len(list.names) > maxPolicies {
			p.Add(list.field, "%d names, at most %d are allowed", len(list.names), maxPolicies)
		}
		for i, name := range list.names {
			at := fmt.Sprintf("%s[%d]", list.field, i)
			if err := catalog.CheckLabel(name); err != nil {
				p.Add(at, "%v", err)
			} else if slices.Contains(list.names[:i], name) {
				p.Add(at, "%q is listed twice: remove one", name)
			}
		}
	}
	return p.Err()
}

// PolicyAdmin is the built-in policy that allows everything: that of the first
// token.
const PolicyAdmin = catalog.PolicyAdmin

// NewToken returns a record with one policy, and the secret to show once and
// never store.
func NewToken(policy, description string, now time.Time) (token Token, secret string) {
	return newToken(policy, description, now), NewSecret()
}

// NewSecret returns a secret for a token.
func NewSecret() string {
	return tokenPrefix + base64.RawURLEncoding.EncodeToString(randomBytes(SecretBytes))
}

// AdoptToken returns a record with one policy for a secret that an operator chose.
// Errors wrap ErrToken and do not quote the secret.
func AdoptToken(secret, policy, description string, now time.Time) (Token, error) {
	if len(secret) < MinSecret {
		return Token{}, fmt.Errorf("%w: %d characters are too easy to guess, want at least %d random ones", ErrToken, len(secret), MinSecret)
	}
	for _, r := range secret {
		if r <= ' ' || r > '~' {
			return Token{}, fmt.Errorf("%w: it has characters that an HTTP header can't carry, want printable ASCII without spaces", ErrToken)
		}
	}
	return newToken(policy, description, now), nil
}

func newToken(policy, description string, now time.Time) Token {
	t := Token{Accessor: newAccessor(), Description: description, Created: now.UTC()}
	if policy != "" {
		t.Policies = []string{policy}
	}
	return t
}

func newAccessor() string { return hex.EncodeToString(randomBytes(accessorBytes)) }

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
		Accessor: newAccessor(),
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
