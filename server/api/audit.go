package api

import (
	"errors"
	"net"
	"net/http"
	"time"

	"github.com/meshd/meshd/server/acl"
	"github.com/meshd/meshd/server/client"
)

// An Outcome says what became of a request that is audited.
type Outcome string

// The outcomes.
const (
	// OutcomeAllowed: the caller might, and it was done.
	OutcomeAllowed Outcome = "allowed"
	// OutcomeDenied: the caller might not, or is nobody whom the servers know.
	OutcomeDenied Outcome = "denied"
	// OutcomeFailed: the caller might, and it was not done, or nobody knows; see
	// AuditRecord.Code.
	OutcomeFailed Outcome = "failed"
)

// maxAuditChanges bounds the changes that one record names.
const maxAuditChanges = 100

// AuditRecord is one request of those that have to be accounted for: each write,
// each denial, and each read of what is secret. It holds no secret itself.
type AuditRecord struct {
	Time time.Time `json:"time"`
	// RequestID is what the caller was told, and what the server's log has.
	RequestID string `json:"request_id"`
	// Who is the caller: "token:9f3a66f01b77c2d4" (its accessor),
	// "local:admin-socket" or "anonymous", as one whose token is unknown is, too.
	// Title is what people call it; it proves nothing.
	Who   string `json:"who"`
	Title string `json:"title,omitempty"`
	// Remote is the address that the request came from; empty on the admin socket.
	Remote string `json:"remote,omitempty"`
	// What was asked for; of a denial, what was denied.
	Verb      acl.Verb     `json:"verb"`
	Resource  acl.Resource `json:"resource"`
	Namespace string       `json:"namespace,omitempty"`
	Name      string       `json:"name,omitempty"`
	// Method and Route are the line of the route table: "PUT", "/v1/nodes/{name}".
	Method string `json:"method"`
	Route  string `json:"route"`
	// Outcome, the HTTP status, and the code of the error, if it was one.
	Outcome Outcome     `json:"outcome"`
	Status  int         `json:"status"`
	Code    client.Code `json:"code,omitempty"`
	// Revision is that of the commit; 0 if there was none.
	Revision uint64 `json:"revision,omitempty"`
	// Changes are the resources that were changed; of many the first 100, and
	// Omitted counts the others. A dry run changes none.
	Changes []AuditChange `json:"changes,omitempty"`
	Omitted int           `json:"omitted,omitempty"`
}

// AuditChange is one resource that a request changed.
type AuditChange struct {
	Kind   client.Kind `json:"kind"`
	Name   string      `json:"name"`
	Change string      `json:"change"`
}

// secret tells the resources of which even a read is accounted for.
func secret(r acl.Resource) bool {
	switch r {
	case acl.Tokens, acl.JoinTokens, acl.Snapshot, acl.Audit:
		return true
	default:
		return false
	}
}

// audit hands the record of a request over, if it is one to account for. It is
// called before the answer, unless that is a stream.
func (a *API) audit(c *call, r route, out any, err error, status int) {
	rec := AuditRecord{
		Time: a.cfg.Now().UTC(), RequestID: c.id, Who: c.who.String(), Title: c.who.Title, Remote: remote(c.Request),
		Verb: c.what.Verb, Resource: c.what.Resource, Namespace: c.what.Namespace, Name: c.what.Name,
		Method: r.method, Route: r.pattern, Outcome: OutcomeAllowed, Status: status, Revision: c.revision,
	}
	if err == nil {
		err = c.cut
	}
	if err != nil {
		rec.Outcome, rec.Code = OutcomeFailed, toError(err).Code
	}
	if rec.Code == client.CodeUnauthorized || rec.Code == client.CodePermission {
		rec.Outcome = OutcomeDenied
	}
	if denied, ok := errors.AsType[*acl.DeniedError](err); ok {
		what := denied.Request
		rec.Verb, rec.Resource, rec.Namespace, rec.Name = what.Verb, what.Resource, what.Namespace, what.Name
	}
	if rec.Outcome != OutcomeDenied && r.verb != acl.Write && !secret(r.resource) {
		return
	}
	if result, ok := out.(client.Result); ok && err == nil && !result.DryRun {
		rec.Revision = result.Position.Revision
		rec.changed(result.Changes)
	}
	a.account(c, rec)
}

func (r *AuditRecord) changed(changes []client.Change) {
	for _, c := range changes {
		switch {
		case c.Change == client.ChangeUnchanged:
		case len(r.Changes) == maxAuditChanges:
			r.Omitted++
		default:
			r.Changes = append(r.Changes, AuditChange{Kind: c.Kind, Name: c.Name, Change: c.Change})
		}
	}
}

// remote is the host that a request came from.
func remote(req *http.Request) string {
	host, _, err := net.SplitHostPort(req.RemoteAddr)
	if err != nil {
		return "" // a unix socket
	}
	return host
}
