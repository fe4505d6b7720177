package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"net/http"
	"net/url"
	"strconv"
	"time"
)

// AuditEvent says what a record of the audit log is about.
type AuditEvent string

// The events.
const (
	// AuditRequest is a request to the API.
	AuditRequest AuditEvent = "request"
	// AuditOpened and AuditClosed frame a run of the server. A run that was killed
	// has no end.
	AuditOpened AuditEvent = "opened"
	AuditClosed AuditEvent = "closed"
	// AuditRecovered tells that a crash had left an unfinished record, which was
	// taken away.
	AuditRecovered AuditEvent = "recovered"
	// AuditRemoved tells that old files were removed: all records up to Count.
	AuditRemoved AuditEvent = "removed"
	// AuditSuppressed tells that Count denials came too fast to be recorded, or
	// certificates were signed while the log took no record.
	AuditSuppressed AuditEvent = "suppressed"
)

// AuditRecord is one line of the audit log of one server: what happened, and how
// it is chained to the line before. It holds no secret.
type AuditRecord struct {
	// Seq counts the records of the server, from 1, without gaps.
	Seq    uint64     `json:"seq"`
	Time   time.Time  `json:"time"`
	Server string     `json:"server"`
	Event  AuditEvent `json:"event"`
	// Detail and Count belong to events that are no requests.
	Detail string `json:"detail,omitempty"`
	Count  uint64 `json:"count,omitempty"`

	// RequestID is what the caller was told, and what the server's log has.
	RequestID string `json:"request_id,omitempty"`
	// Who is the caller: "token:9f3a66f01b77c2d4", "local:admin-socket",
	// "node:vm-a" or "anonymous". Title is what people call it, and proves nothing.
	Who    string `json:"who,omitempty"`
	Title  string `json:"title,omitempty"`
	Remote string `json:"remote,omitempty"`
	// What was asked for.
	Verb      string `json:"verb,omitempty"`
	Resource  string `json:"resource,omitempty"`
	Namespace string `json:"namespace,omitempty"`
	Name      string `json:"name,omitempty"`
	Method    string `json:"method,omitempty"`
	Route     string `json:"route,omitempty"`
	// Outcome is allowed, denied or failed.
	Outcome string `json:"outcome,omitempty"`
	Status  int    `json:"status,omitempty"`
	Code    Code   `json:"code,omitempty"`
	// Revision is that of the commit; 0 if there was none.
	Revision uint64        `json:"revision,omitempty"`
	Changes  []AuditChange `json:"changes,omitempty"`
	Omitted  int           `json:"omitted,omitempty"` // changes beyond those named

	// Prev is the SHA-256 of the line before, without its line feed; 64 zeros in the
	// first line.
	Prev string `json:"prev"`
	// MAC is HMAC-SHA256, under a subkey of the cluster key, of this line without
	// this field.
	MAC string `json:"mac,omitempty"`
}

// AuditChange is one resource that a request changed.
type AuditChange struct {
	Kind   Kind   `json:"kind"`
	Name   string `json:"name"`
	Change string `json:"change"`
}

// AuditQuery selects records. The zero query selects the newest.
type AuditQuery struct {
	// Server asks only that server's log. Empty: all that can be reached.
	Server string
	// Who matches AuditRecord.Who or Title; Kind the resource, or the kind of a
	// change; Outcome and RequestID their fields. Empty ones match everything.
	Who, Kind, Outcome, RequestID string
	Since                         time.Time
	// After asks for records with a higher Seq, the lowest of them first. It is for
	// one Server.
	After uint64
	// Limit is how many at most; 100 when 0.
	Limit int
}

// MaxAudit bounds AuditQuery.Limit.
const MaxAudit = 10_000

// Values returns the query as parameters of a URL.
func (q AuditQuery) Values() url.Values {
	v := url.Values{}
	set := func(name, value string) {
		if value != "" {
			v.Set(name, value)
		}
	}
	set("server", q.Server)
	set("who", q.Who)
	set("kind", q.Kind)
	set("outcome", q.Outcome)
	set("request_id", q.RequestID)
	if !q.Since.IsZero() {
		v.Set("since", q.Since.UTC().Format(time.RFC3339Nano))
	}
	if q.After > 0 {
		v.Set("after", strconv.FormatUint(q.After, 10))
	}
	if q.Limit > 0 {
		v.Set("limit", strconv.Itoa(q.Limit))
	}
	return v
}

// AuditLog is what GET /v1/audit answers: records, the oldest first.
type AuditLog struct {
	Records []AuditRecord `json:"records"`
	// Silent names the servers whose log is missing, each with the reason.
	Silent []string `json:"silent,omitempty"`
}

// Audit returns records of the audit log, the oldest first.
func (c *Client) Audit(ctx context.Context, q AuditQuery) (AuditLog, error) {
	var out AuditLog
	return out, c.do(ctx, http.MethodGet, "/v1/audit?"+q.Values().Encode(), nil, &out)
}

// FollowAudit yields the records that Audit returns, and then those that come, until
// ctx ends, the caller stops, or the connection breaks, which is the last error.
func (c *Client) FollowAudit(ctx context.Context, q AuditQuery) iter.Seq2[AuditLog, error] {
	return func(yield func(AuditLog, error) bool) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		alarm := time.AfterFunc(watchSilence, cancel)
		defer alarm.Stop()
		v := q.Values()
		v.Set("follow", "true")
		resp, err := c.send(ctx, http.MethodGet, "/v1/audit?"+v.Encode(), "", nil)
		if err != nil {
			yield(AuditLog{}, err)
			return
		}
		defer resp.Body.Close() //nolint:errcheck // whoever stops reading needs no more
		for a, err := range readStream(resp.Body, func() { alarm.Reset(watchSilence) }, decodeAudit) {
			if err != nil && CodeOf(err) == "" && !errors.Is(err, errEvent) {
				err = &Error{Code: CodeUnreachable, cause: err, Message: "the connection broke: " + rootText(err), Next: "begin again"}
			}
			if !yield(a, err) || err != nil {
				return
			}
		}
	}
}

func decodeAudit(name, data string) (a AuditLog, known bool, err error) {
	switch name {
	case EventAnswer:
		err = json.Unmarshal([]byte(data), &a)
	case EventError:
		var refusal Error
		if err = json.Unmarshal([]byte(data), &refusal); err == nil {
			return a, true, &refusal
		}
	default:
		return a, false, nil
	}
	if err != nil {
		err = fmt.Errorf("%w %q: %w", errEvent, name, err)
	}
	return a, true, err
}
