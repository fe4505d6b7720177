package api

import (
	"context"
	"net/http"
	"strings"
	"time"

	"github.com/meshd/meshd/server/acl"
	"github.com/meshd/meshd/server/client"
	"github.com/meshd/meshd/server/state"
)

func (a *API) answer(c *call, r route, local bool) (any, error) {
	if r.object != nil {
		c.what = r.object(c.Request)
	}
	c.what.Verb, c.what.Resource = r.verb, r.resource
	c.allowed = func() error {
		var err error
		if c.who, err = a.authenticate(c.Request, local); err != nil {
			return err
		}
		return acl.Authorize(c.who, c.what)
	}
	if err := c.allowed(); err != nil {
		return nil, err
	}
	return r.handle(c)
}

// some is the object of routes that show what the caller may see, and are closed
// to those who may see nothing.
func some(req *http.Request) acl.Request {
	return acl.Request{Some: true, Namespace: req.URL.Query().Get("namespace")}
}

// may reports whether the caller may do something with the object of what.
func (c *call) may(verb acl.Verb, resource acl.Resource, what acl.Request) bool {
	what.Verb, what.Resource = verb, resource
	return acl.May(c.who, what)
}

// authorize is may with a reason.
func (c *call) authorize(verb acl.Verb, resource acl.Resource, what acl.Request) error {
	what.Verb, what.Resource = verb, resource
	return acl.Authorize(c.who, what)
}

// authenticate finds out who calls. A token that is wrong is an error, not an
// anonymous caller, so that a typo is not mistaken for a missing permission.
func (a *API) authenticate(req *http.Request, local bool) (acl.Identity, error) {
	if local {
		return acl.Identity{Subject: acl.Local, Name: "admin-socket", Title: "local admin"}, nil
	}
	header := req.Header.Get("Authorization")
	if header == "" {
		return acl.Identity{}, nil
	}
	secret, ok := strings.CutPrefix(header, "Bearer ")
	if !ok {
		return acl.Identity{}, &client.Error{Code: client.CodeUnauthorized, Message: "the Authorization header is not of the form Bearer TOKEN"}
	}
	select {
	case <-a.cfg.State.Ready():
	default: // a good token must not be called unknown
		return acl.Identity{}, errNotLoaded()
	}
	hash := acl.Hash([]byte(secret))
	s := a.cfg.State.Snapshot()
	rec, ok := state.Tokens.Get(s, hash)
	if !ok {
		if s = a.newer(req.Context(), s); s != nil {
			rec, ok = state.Tokens.Get(s, hash)
		}
	}
	if ok && rec.Err == nil {
		if who := rec.Value.Identity(a.cfg.Now(), s.Access()); who.Subject == acl.Bearer {
			return who, nil
		}
	}
	return acl.Identity{}, &client.Error{
		Code: client.CodeUnauthorized, Message: "the token is unknown or expired", Next: "check MESH_TOKEN or MESH_TOKEN_FILE",
	}
}

func errNotLoaded() error {
	return &client.Error{Code: client.CodeUnavailable, Message: "the state is not loaded yet", Next: "try again in a moment, or another server"}
}

const (
	// lookupPause is how often an unknown token is looked for in a newer state at
	// most: strangers must not keep the servers busy.
	lookupPause = 50 * time.Millisecond
	lookupWait  = time.Second
)

// newer returns a state that has what was acknowledged elsewhere in the cluster, as
// a token that was made a moment ago; nil if there is none to be had.
func (a *API) newer(ctx context.Context, than *state.Snapshot) *state.Snapshot {
	now, last := time.Now().UnixNano(), a.lookup.Load()
	if 0 <= now-last && now-last < int64(lookupPause) || !a.lookup.CompareAndSwap(last, now) {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, lookupWait)
	defer cancel()
	s, err := a.cfg.State.Fresh(ctx)
	if err != nil || s == than {
		return nil
	}
	return s
}
