// Package client is the Go SDK of the HTTP API: what meshctl and every other
// program outside the servers speak it with. It also holds the shapes of the
// API's bodies, which the server's side imports, so that the two cannot drift.
package client

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
)

// Config says where the API is and who calls it.
type Config struct {
	// Address is "https://HOST:7400", "HOST:7400", "HOST", or
	// "unix:///PATH" of a server's admin socket, which needs no token. Several
	// servers are separated by commas: one that can't be reached, or that has no
	// leader, is passed over.
	Address string
	// Token is sent as a bearer token. Empty: none.
	Token ca.Secret
	// Roots are those that the server's certificate must chain to. They are
	// needed for every address but a unix socket.
	Roots ca.Bundle
	// Timeout bounds each call that is not a wait; 10 s when zero.
	Timeout time.Duration
}

const (
	defaultTimeout = 10 * time.Second
	defaultPort    = "7400"
	maxResponse    = 64 << 20
)

// Client calls the API. It is safe for concurrent use.
type Client struct {
	http    *http.Client
	base    string
	targets *targets // nil for a unix socket
	token   ca.Secret
	timeout time.Duration
}

// New returns a client. It connects when it is first used.
func New(cfg Config) (*Client, error) {
	timeout := cmp.Or(cfg.Timeout, defaultTimeout)
	if path, ok := strings.CutPrefix(cfg.Address, "unix://"); ok {
		var d net.Dialer
		transport := newTransport(timeout)
		transport.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) { return d.DialContext(ctx, "unix", path) }
		return &Client{http: newHTTP(transport), base: "http://meshd", token: cfg.Token, timeout: timeout}, nil
	}
	t, err := parseTargets(cfg.Address)
	if err != nil {
		return nil, err
	}
	if cfg.Roots.IsZero() {
		return nil, fmt.Errorf("address %s: no CA certificate to verify the server by: set MESH_CACERT to the roots (meshctl ca roots prints them)", cfg.Address)
	}
	c := overTLS(t, timeout, serverTLS(cfg.Roots))
	c.token = cfg.Token
	return c, nil
}

func newTransport(timeout time.Duration) *http.Transport {
	return &http.Transport{TLSHandshakeTimeout: timeout, MaxIdleConnsPerHost: 4, IdleConnTimeout: time.Minute}
}

func newHTTP(transport *http.Transport) *http.Client {
	return &http.Client{Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

func baseURL(address string) (string, error) {
	host := strings.TrimPrefix(address, "https://")
	if host == "" || strings.Contains(host, "://") || strings.ContainsAny(host, "/?#@") {
		return "", fmt.Errorf("address %q: write https://HOST:7400 or unix:///PATH", address)
	}
	if _, _, err := net.SplitHostPort(host); err != nil {
		host = net.JoinHostPort(strings.Trim(host, "[]"), defaultPort)
	}
	return "https://" + host, nil
}

// serverTLS accepts any server of a trust domain whose roots are known: a
// server is recognised by its identity, not by the name that it was dialled by.
func serverTLS(roots ca.Bundle) *tls.Config {
	return &tls.Config{
		MinVersion:         tls.VersionTLS13,
		InsecureSkipVerify: true, //nolint:gosec // VerifyConnection checks chain and identity; only the host name is not used
		VerifyConnection: func(cs tls.ConnectionState) error {
			_, _, err := ca.VerifyPeer(roots, raw(cs.PeerCertificates), time.Now(), x509.ExtKeyUsageServerAuth, func(id spiffe.ID) error {
				if id.Kind != spiffe.KindServer {
					return fmt.Errorf("%s is no server", id)
				}
				return nil
			})
			if err != nil {
				return fmt.Errorf("the server's certificate: %w", err)
			}
			return nil
		},
	}
}

func raw(certs []*x509.Certificate) [][]byte {
	out := make([][]byte, len(certs))
	for i, c := range certs {
		out[i] = c.Raw
	}
	return out
}

// Status describes the server that answers.
func (c *Client) Status(ctx context.Context) (Status, error) {
	var s Status
	return s, c.do(ctx, http.MethodGet, "/v1/status", nil, &s)
}

// Roots returns the trust bundle. It needs no token; over an unverified
// connection it proves nothing.
func (c *Client) Roots(ctx context.Context) (ca.Bundle, error) {
	var b ca.Bundle
	return b, c.do(ctx, http.MethodGet, "/v1/ca/roots", nil, &b)
}

// pageSize is how many resources List asks for at once.
const pageSize = 500

// List returns the selected resources of a kind, linearizably. Long lists come
// in pages, of which each is as new as its own call: Position is that of the
// first one. What exists all the while is there once.
func (c *Client) List(ctx context.Context, kind Kind, sel Selection) (List, error) {
	var all List
	q := sel.query()
	q.Set("limit", strconv.Itoa(pageSize))
	for first := true; first || all.Continue != ""; first = false {
		var page List
		if err := c.do(ctx, http.MethodGet, "/v1/"+kind.Collection()+"?"+q.Encode(), nil, &page); err != nil {
			return all, err
		}
		if first {
			all.Position = page.Position
		}
		all.Items, all.Continue = append(all.Items, page.Items...), page.Continue
		q.Set("continue", page.Continue)
	}
	return all, nil
}

func (s Selection) query() url.Values {
	q := url.Values{}
	if s.Namespace != "" {
		q.Set("namespace", s.Namespace)
	}
	if s.Prefix != "" {
		q.Set("prefix", s.Prefix)
	}
	for _, l := range s.Labels {
		q.Add("label", l)
	}
	return q
}

// Get returns one resource. A missing one is an *Error with CodeNotFound.
func (c *Client) Get(ctx context.Context, ref Ref) (Item, error) {
	var i Item
	return i, c.do(ctx, http.MethodGet, ref.Path(), nil, &i)
}

// AnyRevision makes a Delete unconditional.
const AnyRevision = ^uint64(0)

// setTimeout bounds the apply of a set, for which the servers may have to stage
// the whole state.
const setTimeout = 2 * time.Minute

// Apply writes all resources or none. A set may take up to two minutes.
func (c *Client) Apply(ctx context.Context, req ApplyRequest) (Result, error) {
	var r Result
	if req.Set != "" {
		ctx, cancel := context.WithTimeout(ctx, max(c.timeout, setTimeout))
		defer cancel()
		return r, c.call(ctx, http.MethodPost, "/v1/apply", req, &r)
	}
	return r, c.do(ctx, http.MethodPost, "/v1/apply", req, &r)
}

// Put writes one resource if its revision is still the given one: 0 demands
// that it does not exist, AnyRevision demands nothing.
func (c *Client) Put(ctx context.Context, ref Ref, spec json.RawMessage, revision uint64) (Result, error) {
	var r Result
	return r, c.do(ctx, http.MethodPut, withRevision(ref.Path(), revision), spec, &r)
}

// Delete removes one resource if its revision is still the given one;
// AnyRevision demands nothing.
func (c *Client) Delete(ctx context.Context, ref Ref, revision uint64) (Result, error) {
	var r Result
	return r, c.do(ctx, http.MethodDelete, withRevision(ref.Path(), revision), nil, &r)
}

// DeleteSet forgets a set. With prune it deletes all that belongs to it, too.
func (c *Client) DeleteSet(ctx context.Context, name string, prune bool) (Result, error) {
	path := Ref{Kind: KindSet, Parts: []string{name}}.Path()
	if prune {
		path += "?prune=true"
	}
	ctx, cancel := context.WithTimeout(ctx, max(c.timeout, setTimeout))
	defer cancel()
	var r Result
	return r, c.call(ctx, http.MethodDelete, path, nil, &r)
}

// History returns what became of the selected intentions, the newest first. The
// servers forget what is very old.
func (c *Client) History(ctx context.Context, sel HistorySelection) (History, error) {
	var all History
	q := url.Values{}
	if sel.Namespace != "" {
		q.Set("namespace", sel.Namespace)
	}
	if sel.Source != "" {
		q.Set("source", sel.Source)
	}
	if sel.Destination != "" {
		q.Set("destination", sel.Destination)
	}
	if !sel.Since.IsZero() {
		q.Set("since", sel.Since.UTC().Format(time.RFC3339))
	}
	for first := true; first || all.Continue != ""; first = false {
		left := pageSize
		if sel.Limit > 0 {
			left = min(left, sel.Limit-len(all.Transactions))
		}
		if left == 0 {
			break
		}
		q.Set("limit", strconv.Itoa(left))
		var page History
		if err := c.do(ctx, http.MethodGet, "/v1/intentions/history?"+q.Encode(), nil, &page); err != nil {
			return all, err
		}
		if first {
			all.Position = page.Position
		}
		all.Transactions, all.Continue = append(all.Transactions, page.Transactions...), page.Continue
		q.Set("continue", page.Continue)
	}
	return all, nil
}

// Undo restores what was before a change of intentions, all of it or none. It may
// take up to two minutes.
func (c *Client) Undo(ctx context.Context, req UndoRequest) (Result, error) {
	ctx, cancel := context.WithTimeout(ctx, max(c.timeout, setTimeout))
	defer cancel()
	var r Result
	return r, c.call(ctx, http.MethodPost, "/v1/intentions/undo", req, &r)
}

// Drain lets a node, or an instance, take no new work until Undrain, whatever its
// agent says.
func (c *Client) Drain(ctx context.Context, ref Ref, req DrainRequest) (Result, error) {
	var r Result
	return r, c.do(ctx, http.MethodPut, ref.Path()+"/drain", req, &r)
}

// Undrain takes back what Drain said.
func (c *Client) Undrain(ctx context.Context, ref Ref) (Result, error) {
	var r Result
	return r, c.do(ctx, http.MethodDelete, ref.Path()+"/drain", nil, &r)
}

// Leave takes the instances of a node that is out of touch out of the catalog.
func (c *Client) Leave(ctx context.Context, node string) (Result, error) {
	var r Result
	return r, c.do(ctx, http.MethodPost, Ref{Kind: KindNode, Parts: []string{node}}.Path()+"/leave", nil, &r)
}

// ReleaseNodes lets nodes be declared out of touch that are held back because more
// than half of all fell silent at once.
func (c *Client) ReleaseNodes(ctx context.Context) (Released, error) {
	var r Released
	return r, c.do(ctx, http.MethodPost, "/v1/held-nodes/release", nil, &r)
}

// Check decides one request as a proxy would.
func (c *Client) Check(ctx context.Context, req AccessRequest) (Access, error) {
	var a Access
	return a, c.do(ctx, http.MethodPost, "/v1/intentions/check", req, &a)
}

// Explain decides one request and says what else stands in its way.
func (c *Client) Explain(ctx context.Context, req AccessRequest) (Explanation, error) {
	var e Explanation
	return e, c.do(ctx, http.MethodPost, "/v1/explain", req, &e)
}

// JoinToken makes a one-time token that admits one node.
func (c *Client) JoinToken(ctx context.Context, req JoinTokenRequest) (JoinToken, error) {
	var t JoinToken
	return t, c.do(ctx, http.MethodPost, "/v1/join-tokens", req, &t)
}

// WaitRollout returns when the proxies that serve or call the services have
// applied the position, when one refused it, or after about wait; Done tells.
// The wait is cut to 60 s by the server: call again to go on.
func (c *Client) WaitRollout(ctx context.Context, pos catalog.Position, services []catalog.Name, wait time.Duration) (Rollout, error) {
	return c.waitRollout(ctx, pos, "service", services, wait)
}

// WaitCallers is WaitRollout for the proxies of the services that call one of the
// given ones.
func (c *Client) WaitCallers(ctx context.Context, pos catalog.Position, called []catalog.Name, wait time.Duration) (Rollout, error) {
	return c.waitRollout(ctx, pos, "callers_of", called, wait)
}

func (c *Client) waitRollout(ctx context.Context, pos catalog.Position, parameter string, services []catalog.Name, wait time.Duration) (Rollout, error) {
	q := url.Values{"generation": {pos.Generation}, "revision": {strconv.FormatUint(pos.Revision, 10)}, "wait": {wait.String()}}
	for _, s := range services {
		q.Add(parameter, s.String())
	}
	ctx, cancel := context.WithTimeout(ctx, wait+c.timeout)
	defer cancel()
	var r Rollout
	return r, c.call(ctx, http.MethodGet, "/v1/rollout?"+q.Encode(), nil, &r)
}

func withRevision(path string, revision uint64) string {
	if revision == AnyRevision {
		return path
	}
	sep := "?"
	if strings.Contains(path, "?") {
		sep = "&"
	}
	return path + sep + "revision=" + strconv.FormatUint(revision, 10)
}

func (c *Client) do(ctx context.Context, method, path string, body, out any) error {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	return c.call(ctx, method, path, body, out)
}

func (c *Client) call(ctx context.Context, method, path string, body, out any) error {
	var data []byte
	contentType := ""
	if body != nil {
		var err error
		if data, err = json.Marshal(body); err != nil {
			return fmt.Errorf("%s %s: encode the body: %w", method, path, err)
		}
		contentType = "application/json"
	}
	for left := c.targets.count(); ; left-- {
		var reader io.Reader
		if body != nil {
			reader = bytes.NewReader(data)
		}
		resp, err := c.send(ctx, method, path, contentType, reader)
		if err == nil {
			return c.read(resp, method, path, out)
		}
		// Unavailable says that nothing was done, so another server may be asked.
		if CodeOf(err) != CodeUnavailable || left <= 1 || !c.targets.turn() {
			return err
		}
		c.http.CloseIdleConnections()
	}
}

// send returns a response of class 2xx, whose body the caller closes.
func (c *Client) send(ctx context.Context, method, path, contentType string, body io.Reader) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, c.base+path, body)
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", method, path, err)
	}
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	if !c.token.IsZero() {
		req.Header.Set("Authorization", "Bearer "+string(c.token.Reveal()))
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, c.transportError(method, err)
	}
	if resp.StatusCode/100 == 2 {
		return resp, nil
	}
	defer resp.Body.Close() //nolint:errcheck // what can be read of it is read
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxResponse))
	if err != nil {
		return nil, c.transportError(method, err)
	}
	return nil, responseError(resp, data)
}

func (c *Client) read(resp *http.Response, method, path string, out any) error {
	defer resp.Body.Close() //nolint:errcheck // read to its end below
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxResponse))
	if err != nil {
		return c.transportError(method, err)
	}
	if err := json.Unmarshal(data, out); err != nil {
		return fmt.Errorf("%s %s: the answer is not what this version understands: %w", method, path, err)
	}
	return nil
}

// transportError tells a call that certainly did nothing from a write whose
// outcome nobody knows.
func (c *Client) transportError(method string, err error) error {
	op, dialing := errors.AsType[*net.OpError](err)
	dialing = dialing && op.Op == "dial"
	if method != http.MethodGet && !dialing {
		return &Error{
			Code: CodeUnknown, cause: err, Message: "no answer from the server, the change may have happened: " + rootText(err),
			Next: "repeat the command: that is safe",
		}
	}
	return &Error{
		Code: CodeUnreachable, cause: err, Message: "the server cannot be reached: " + rootText(err),
		Next: "check that it runs, and MESH_ADDR and MESH_CACERT",
	}
}

func rootText(err error) string {
	if u, ok := errors.AsType[*url.Error](err); ok {
		return u.Err.Error()
	}
	return err.Error()
}

func responseError(resp *http.Response, data []byte) error {
	var body struct {
		Error *Error `json:"error"`
	}
	if json.Unmarshal(data, &body) == nil && body.Error != nil && body.Error.Code != "" {
		return body.Error
	}
	return &Error{Code: CodeInternal, Message: fmt.Sprintf("HTTP status %s without the body of a meshd server; is this its address?", resp.Status)}
}
