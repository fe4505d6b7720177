package client

import (
	"errors"
	"fmt"
	"strings"
)

// A Code says what kind of failure an Error is; it is part of the API.
type Code string

// The codes, each with the HTTP status that carries it.
const (
	CodeInvalid      Code = "invalid"            // 400
	CodeUnauthorized Code = "unauthorized"       // 401
	CodePermission   Code = "permission"         // 403
	CodeNotFound     Code = "not_found"          // 404
	CodeMethod       Code = "method_not_allowed" // 405
	CodeConflict     Code = "conflict"           // 409
	CodeTooLarge     Code = "too_large"          // 413
	CodeInternal     Code = "internal"           // 500
	CodeUnavailable  Code = "unavailable"        // 503: no leader, shutting down
	CodeUnknown      Code = "outcome_unknown"    // 504: the write may have happened; repeating it is safe
	CodeDiskFull     Code = "disk_full"          // 507: nothing was written
	// CodeUnreachable is the client's own: no server answered.
	CodeUnreachable Code = "unreachable"
)

// A Field is one problem of one field of what was sent.
type Field struct {
	Field   string `json:"field,omitempty"`
	Problem string `json:"problem"`
}

// Error is a failure as the API reports it.
type Error struct {
	Code    Code    `json:"code"`
	Message string  `json:"message"`
	Fields  []Field `json:"fields,omitempty"`
	// Next is what to do about it.
	Next string `json:"next,omitempty"`
	// RequestID finds the request in the server's log.
	RequestID string `json:"request_id,omitempty"`

	cause error
}

// Error returns the message, each field's problem and the next step.
func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString(e.Message)
	for _, f := range e.Fields {
		if f.Field == "" {
			fmt.Fprintf(&b, "\n  %s", f.Problem)
		} else {
			fmt.Fprintf(&b, "\n  %s: %s", f.Field, f.Problem)
		}
	}
	if e.Next != "" {
		b.WriteString("\n  → " + e.Next)
	}
	return b.String()
}

// Unwrap returns the cause of a CodeUnreachable.
func (e *Error) Unwrap() error { return e.cause }

// CodeOf returns the code of the Error in err's tree, or "" if there is none.
func CodeOf(err error) Code {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Code
	}
	return ""
}
