package api

import (
	"context"
	"errors"
	"fmt"
	"net/http"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/acl"
	"github.com/meshd/meshd/server/client"
	"github.com/meshd/meshd/server/state"
	"github.com/meshd/meshd/server/store"
)

// statusOf is the one mapping of codes to HTTP statuses.
func statusOf(c client.Code) int {
	switch c {
	case client.CodeInvalid:
		return http.StatusBadRequest
	case client.CodeUnauthorized:
		return http.StatusUnauthorized
	case client.CodePermission:
		return http.StatusForbidden
	case client.CodeNotFound:
		return http.StatusNotFound
	case client.CodeMethod:
		return http.StatusMethodNotAllowed
	case client.CodeConflict:
		return http.StatusConflict
	case client.CodeTooLarge:
		return http.StatusRequestEntityTooLarge
	case client.CodeUnavailable, client.CodeUnreachable:
		return http.StatusServiceUnavailable
	case client.CodeUnknown:
		return http.StatusGatewayTimeout
	case client.CodeDiskFull:
		return http.StatusInsufficientStorage
	case client.CodeInternal:
		return http.StatusInternalServerError
	default:
		return http.StatusInternalServerError
	}
}

// A rule maps errors that wrap is to a code and a next step.
type rule struct {
	is   error
	code client.Code
	next string
}

// rules are tried in order. An unknown outcome wraps its cause, so it is first.
var rules = []rule{
	{store.ErrUnknownOutcome, client.CodeUnknown, "repeat the command: that is safe"},
	{acl.ErrUnauthenticated, client.CodeUnauthorized, "set MESH_TOKEN or MESH_TOKEN_FILE"},
	{acl.ErrDenied, client.CodePermission, ""},
	{state.ErrRevision, client.CodeConflict, "read it again and repeat the change"},
	{store.ErrConflict, client.CodeConflict, "read it again and repeat the change"},
	{state.ErrContention, client.CodeUnavailable, "repeat it: others write at the same time"},
	{state.ErrFeatureLevel, client.CodeConflict, ""},
	{store.ErrTooLarge, client.CodeTooLarge, "split the change: one transaction holds about 60 resources, 256 KiB; a set, applied with --set NAME, any number"},
	{store.ErrDiskFull, client.CodeDiskFull, "make room on that server's disk: writes are taken again by themselves, and reads go on"},
	{store.ErrNoLeader, client.CodeUnavailable, "wait for the servers to elect a leader"},
	{store.ErrClosed, client.CodeUnavailable, "the server is shutting down; try another one"},
	{acl.ErrToken, client.CodeInvalid, ""},
	{store.ErrCorrupt, client.CodeInvalid, "nothing was changed; use another snapshot"},
	{context.DeadlineExceeded, client.CodeUnavailable, "the servers are slow or have no leader; try again"},
	{context.Canceled, client.CodeUnavailable, "the request was given up"},
}

// toError is the one mapping of errors to what the API says. What it does not
// know is internal, and its text stays in the server's log.
func toError(err error) *client.Error {
	if e, ok := errors.AsType[*client.Error](err); ok {
		return e
	}
	for _, r := range rules {
		if errors.Is(err, r.is) {
			return &client.Error{Code: r.code, Message: err.Error(), Next: r.next}
		}
	}
	return &client.Error{Code: client.CodeInternal, Message: "internal error", Next: "the server's log has it under the request id"}
}

func badField(field, format string, args ...any) *client.Error {
	return &client.Error{
		Code: client.CodeInvalid, Message: "invalid request",
		Fields: []client.Field{{Field: field, Problem: fmt.Sprintf(format, args...)}},
	}
}

// invalid reports all problems of what was sent as the resource named what.
func invalid(what string, err error) *client.Error {
	e := &client.Error{Code: client.CodeInvalid, Message: "invalid " + what}
	for _, f := range catalog.FieldErrors(err) {
		e.Fields = append(e.Fields, client.Field{Field: f.Field, Problem: f.Problem})
	}
	return e
}

func notFound(kind client.Kind, name string, have []string) *client.Error {
	e := &client.Error{Code: client.CodeNotFound, Message: fmt.Sprintf("%s %s does not exist", kind, name)}
	if near := catalog.Closest(name, have); near != "" {
		e.Next = "did you mean " + near + "?"
	}
	return e
}
