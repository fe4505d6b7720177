package client

import (
	"context"
	"net/http"
	"net/url"
	"time"

	"github.com/meshd/meshd/catalog"
)

// Token is what is known of an API token: all but its secret.
type Token struct {
	// Accessor names the token in public.
	Accessor    string `json:"accessor"`
	Description string `json:"description,omitempty"`
	// Policies and Roles say what it may do.
	Policies []string   `json:"policies,omitempty"`
	Roles    []string   `json:"roles,omitempty"`
	Created  time.Time  `json:"created"`
	Expires  *time.Time `json:"expires,omitempty"`
	// CreatedBy is who made it, such as "token:9f3a66f01b77c2d4"; absent for the
	// first one.
	CreatedBy string `json:"created_by,omitempty"`
	// Rotated is when it got its secret, if that is not its first one.
	Rotated *time.Time `json:"rotated,omitempty"`
	// OldSecretUntil is how long the secret before is good, if it still is.
	OldSecretUntil *time.Time `json:"old_secret_until,omitempty"`
	// Expired says that it has ended. Such tokens are forgotten after a week.
	Expired bool `json:"expired,omitempty"`
}

// Tokens lists tokens in the order of their accessors.
type Tokens struct {
	Position catalog.Position `json:"position"`
	Tokens   []Token          `json:"tokens"`
}

// TokenRequest asks for a token.
type TokenRequest struct {
	Description string   `json:"description,omitempty"`
	Policies    []string `json:"policies,omitempty"`
	Roles       []string `json:"roles,omitempty"`
	// TTL is how long it is good; zero: for as long as the caller's own, or for ever.
	TTL catalog.Duration `json:"ttl,omitzero"`
}

// RotateRequest asks for another secret of a token.
type RotateRequest struct {
	// Grace is how long the old secret goes on; at most a week.
	Grace catalog.Duration `json:"grace,omitzero"`
}

// NewToken is the answer: the secret is shown this once.
type NewToken struct {
	Token  Token  `json:"token"`
	Secret string `json:"secret"`
}

// Whoami is what the servers take a caller for.
type Whoami struct {
	// Subject is "token" or "local".
	Subject string `json:"subject"`
	// Server is the one that answers, TrustDomain its mesh.
	Server      string `json:"server"`
	TrustDomain string `json:"trust_domain"`
	// Token is the caller's, if he has one.
	Token *Token `json:"token,omitempty"`
	// Rules are all that he may do.
	Rules []catalog.PolicyRule `json:"rules"`
}

// CanRequest asks whether something may be done.
type CanRequest struct {
	// Verb is "read", "write" or "tap", Kind one of catalog.PolicyKinds.
	Verb string `json:"verb"`
	Kind string `json:"kind"`
	// Namespace and Name are as in a rule; empty means all.
	Namespace string `json:"namespace,omitempty"`
	Name      string `json:"name,omitempty"`
	// Accessor is the token that is asked about; empty: the caller's own.
	Accessor string `json:"accessor,omitempty"`
}

// Can is the answer.
type Can struct {
	Allowed bool `json:"allowed"`
	// Text says so in words, and what would be needed.
	Text string `json:"text"`
	// Policy and Rule are what allows it.
	Policy string              `json:"policy,omitempty"`
	Rule   *catalog.PolicyRule `json:"rule,omitempty"`
}

// Tokens lists the tokens that the caller may see.
func (c *Client) Tokens(ctx context.Context) (Tokens, error) {
	var t Tokens
	return t, c.do(ctx, http.MethodGet, "/v1/tokens", nil, &t)
}

// Token returns one token.
func (c *Client) Token(ctx context.Context, accessor string) (Token, error) {
	var t Token
	return t, c.do(ctx, http.MethodGet, "/v1/tokens/"+url.PathEscape(accessor), nil, &t)
}

// CreateToken makes a token that may do no more than the caller.
func (c *Client) CreateToken(ctx context.Context, req TokenRequest) (NewToken, error) {
	var t NewToken
	return t, c.do(ctx, http.MethodPost, "/v1/tokens", req, &t)
}

// RotateToken gives a token another secret.
func (c *Client) RotateToken(ctx context.Context, accessor string, req RotateRequest) (NewToken, error) {
	var t NewToken
	return t, c.do(ctx, http.MethodPost, "/v1/tokens/"+url.PathEscape(accessor)+"/rotate", req, &t)
}

// DeleteToken ends a token at once. The last one that may do everything takes
// force.
func (c *Client) DeleteToken(ctx context.Context, accessor string, force bool) (Token, error) {
	path := "/v1/tokens/" + url.PathEscape(accessor)
	if force {
		path += "?force=true"
	}
	var t Token
	return t, c.do(ctx, http.MethodDelete, path, nil, &t)
}

// Whoami tells what the servers take the caller for.
func (c *Client) Whoami(ctx context.Context) (Whoami, error) {
	var w Whoami
	return w, c.do(ctx, http.MethodGet, "/v1/whoami", nil, &w)
}

// Can asks whether the caller, or another token, may do something.
func (c *Client) Can(ctx context.Context, req CanRequest) (Can, error) {
	var can Can
	return can, c.do(ctx, http.MethodPost, "/v1/can-i", req, &can)
}
