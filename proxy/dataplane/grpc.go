package dataplane

import (
	"context"
	"errors"
	"strconv"
	"time"

	"github.com/meshd/meshd/proxy/http1"
	"github.com/meshd/meshd/proxy/l7"
)

// What gRPC over HTTP/2 says about the fields that a proxy looks at (its PROTOCOL-HTTP2 document): a request has the content type
// application/grpc, and perhaps a time-out of at most 8 digits and a unit; a response has its status in the trailers, or in
// the head if that is all there is.
const (
	fieldTimeout = "grpc-timeout"
	fieldStatus  = "grpc-status"
	maxTimeout   = 9
)

const (
	noStatus    = -1
	unavailable = 14
	numStatuses = 17
)

// statusNames are those of the status codes.
//
//nolint:gochecknoglobals // a constant table
var statusNames = [numStatuses]string{
	"OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS", "PERMISSION_DENIED",
	"RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS",
	"UNAUTHENTICATED",
}

// statusName is how metrics and logs call a status.
func statusName(status int) string {
	if status < 0 || status >= numStatuses {
		return "none"
	}
	return statusNames[status]
}

var (
	errTooLate     = errors.New("the caller's time is over")
	errUnavailable = errors.New("it says that it is unavailable")
)

// isGRPC reports whether a request is gRPC's.
func isGRPC(r *l7.Head) bool { return l7.IsGRPC(r.Fields) }

// limit takes over the caller's time-out.
func (a *attempt) limit() {
	value, ok := a.ex.Request.Fields.Value(fieldTimeout, 0)
	if !ok {
		return
	}
	if d, ok := parseTimeout(value); ok {
		a.ex.Deadline = a.ex.Record.Start.Add(d)
	}
}

// inTime makes the request's time-out what is left of it, and reports false if nothing is.
func (a *attempt) inTime() bool {
	if !a.grpc || a.ex.Deadline.IsZero() {
		return true
	}
	left := time.Until(a.ex.Deadline)
	if left <= 0 {
		return false
	}
	fields := a.ex.Request.Fields
	for i := range fields {
		if equalFold(fields[i].Name, fieldTimeout) {
			fields[i].Value = appendTimeout(a.timeout[:0], left)
			break
		}
	}
	return true
}

// units of time-outs, the finest first.
//
//nolint:gochecknoglobals // a constant table
var units = [...]struct {
	letter byte
	length time.Duration
}{{'n', 1}, {'u', time.Microsecond}, {'m', time.Millisecond}, {'S', time.Second}, {'M', time.Minute}, {'H', time.Hour}}

// parseTimeout reads a time-out. What would be longer than a time.Duration can be is as good as none.
func parseTimeout(b []byte) (time.Duration, bool) {
	if len(b) < 2 || len(b) > maxTimeout {
		return 0, false
	}
	n := int64(0)
	for _, c := range b[:len(b)-1] {
		if c < '0' || c > '9' {
			return 0, false
		}
		n = n*10 + int64(c-'0')
	}
	for _, u := range units {
		if u.letter == b[len(b)-1] {
			d := n * int64(u.length)
			return time.Duration(d), d/int64(u.length) == n
		}
	}
	return 0, false
}

// appendTimeout writes a time-out as exactly as 8 digits allow, and never longer than it is.
func appendTimeout(b []byte, d time.Duration) []byte {
	for _, u := range units {
		if n := d / u.length; n < 1e8 {
			return append(strconv.AppendInt(b, int64(n), 10), u.letter)
		}
	}
	return append(b, "99999999H"...)
}

// note takes note of the status, and of what it says about the endpoint.
func (a *attempt) note(fields http1.Fields) {
	value, ok := fields.Value(fieldStatus, 0)
	if !ok || a.status != noStatus {
		return
	}
	a.status = parseStatus(value)
	if a.route == nil || a.state == nil {
		return
	}
	if _, ours := fields.Value(l7.FieldError, 0); ours {
		return // the word of its proxy, which turnedAway looks at
	}
	e := a.route.endpoints[a.tried[a.n-1]]
	if a.status == unavailable {
		a.link.plane.failed(context.Background(), e, errUnavailable)
	} else {
		a.link.plane.succeeded(context.Background(), e)
	}
}

// parseStatus reads a status; what is none is UNKNOWN, as clients have it.
func parseStatus(b []byte) int {
	const unknown = 2
	n := 0
	for _, c := range b {
		if c < '0' || c > '9' || n >= numStatuses {
			return unknown
		}
		n = n*10 + int(c-'0')
	}
	if len(b) == 0 || n >= numStatuses {
		return unknown
	}
	return n
}

// settle completes what is known of an exchange that is over: one that this proxy broke off has the status of the reason.
func (a *attempt) settle(r *l7.Record) {
	if a.grpc && r.Reason != l7.None && a.status == noStatus {
		a.status = r.Reason.GRPC()
	}
}

// class is that of mesh_requests_total. For gRPC, whose HTTP status is always 200, it is that of the status's counterpart in HTTP.
func (a *attempt) class(status int) int {
	switch {
	case !a.grpc || a.status == noStatus:
	case a.status == 0:
		return 2
	case serverFault(a.status):
		return 5
	default:
		return 4
	}
	if class := status / 100; class >= 0 && class < len(classes) {
		return class
	}
	return 0
}

// serverFault reports whether a status of gRPC is what HTTP has 5xx for: UNKNOWN, DEADLINE_EXCEEDED, UNIMPLEMENTED, INTERNAL,
// UNAVAILABLE and DATA_LOSS.
func serverFault(status int) bool {
	switch status {
	case 2, 4, 12, 13, 14, 15:
		return true
	default:
		return false
	}
}
