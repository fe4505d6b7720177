package api

import (
	"context"
	"errors"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/meshd/meshd/server/acl"
	"github.com/meshd/meshd/server/client"
	"github.com/meshd/meshd/server/state"
)

// AuditLog is what was accounted for.
type AuditLog interface {
	// Read returns the records that q selects, the oldest first.
	Read(ctx context.Context, q client.AuditQuery) (client.AuditLog, error)
	// Follow emits the same, and then what comes, until ctx ends or emit fails.
	Follow(ctx context.Context, q client.AuditQuery, emit func(client.AuditLog) error) error
}

// accounted returns the handler of a route. A write begins only if there is a place
// for its record.
func (a *API) accounted(r route) func(*call) (any, error) {
	if r.verb != acl.Write || a.cfg.Reserve == nil {
		return r.handle
	}
	return func(c *call) (any, error) {
		account, err := a.cfg.Reserve()
		if err != nil {
			code := client.CodeUnavailable
			if errors.Is(err, syscall.ENOSPC) {
				code = client.CodeDiskFull
			}
			return nil, &client.Error{
				Code: code, Message: "nothing was changed, as it could not be accounted for: " + err.Error(),
				Next: "look at this server's disk; it goes on by itself",
			}
		}
		c.account = account
		return r.handle(c)
	}
}

// account hands a record over.
func (a *API) account(c *call, rec AuditRecord) {
	rec.Namespace, rec.Name = a.conceal(rec.Namespace), a.conceal(rec.Name)
	if c.account == nil {
		a.cfg.Audit(rec)
		return
	}
	account := c.account
	c.account = nil
	account(rec)
}

// concealed stands for a secret that somebody typed where a name belongs.
const concealed = "(a secret)"

func (a *API) conceal(name string) string {
	for _, sign := range []string{"mesht_", "mesh1.", "meshkey1."} {
		if strings.Contains(name, sign) {
			return concealed
		}
	}
	if len(name) >= acl.MinSecret {
		if _, known := state.Tokens.Get(a.cfg.State.Snapshot(), acl.Hash([]byte(name))); known {
			return concealed
		}
	}
	return name
}

// auditLog answers with records, or follows them.
func (a *API) auditLog(c *call) (any, error) {
	if a.cfg.AuditLog == nil {
		return nil, &client.Error{Code: client.CodeUnavailable, Message: "this server keeps no audit log"}
	}
	v := c.URL.Query()
	q := client.AuditQuery{
		Server: v.Get("server"), Who: v.Get("who"), Kind: v.Get("kind"), Outcome: v.Get("outcome"), RequestID: v.Get("request_id"),
	}
	var err error
	if text := v.Get("since"); text != "" {
		if q.Since, err = time.Parse(time.RFC3339Nano, text); err != nil {
			return nil, badField("since", "%q is no time such as 2026-11-22T02:47:12Z", text)
		}
	}
	if text := v.Get("after"); text != "" {
		if q.After, err = strconv.ParseUint(text, 10, 64); err != nil {
			return nil, badField("after", "%q is no number of a record", text)
		}
	}
	if text := v.Get("limit"); text != "" {
		if q.Limit, err = strconv.Atoi(text); err != nil || q.Limit < 1 || q.Limit > client.MaxAudit {
			return nil, badField("limit", "%q is no number from 1 to %d", text, client.MaxAudit)
		}
	}
	if v.Get("follow") == "true" {
		return stream(a, c, func(ctx context.Context, emit func(client.AuditLog) error) error {
			return a.cfg.AuditLog.Follow(ctx, q, emit)
		}, func(piece client.AuditLog) client.AuditLog { return piece })
	}
	return a.cfg.AuditLog.Read(c.Context(), q)
}
