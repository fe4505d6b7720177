package l7

// Reason says why an exchange, or one direction of it, did not end by itself.
// Its text is what the mesh-error header, metrics and records carry, so an
// existing one never changes its meaning. The zero value is no reason: a
// normal end.
type Reason uint8

// The reasons. The status in each comment is what a client gets when no
// response head was sent yet; afterwards every reason aborts the response.
const (
	None              Reason = iota
	BadRequest               // 400 (or the more exact 405, 414, 431, 501, 505): the head or the body's framing was refused
	Denied                   // 403: policy
	NoRoute                  // 404: no service is meant by this host
	RequestTimeout           // 408: the client was too slow with its head or body
	UpgradeRefused           // 501: an upgrade other than websocket
	UpstreamReset            // 502: the upstream closed or reset before its response was complete
	UpstreamProtocol         // 502: the upstream's response is not valid HTTP
	NoHealthyInstance        // 503: nothing to forward to
	ConnectFailed            // 503: no connection to the chosen instance
	Overload                 // 503: a limit on connections or requests
	Draining                 // 503: this proxy is going away
	Timeout                  // 504: the deadline passed, or the upstream was silent for too long
	Internal                 // 500: a broken invariant of our own
	ClientGone               // no response possible: the client closed, reset or stalled
	EarlyResponse            // the response was complete before the request's body was: the rest is not wanted
	Superseded               // this try lost: a retry or another try took its place
	PolicyChanged            // the connection was cut because policy denies it now
	NoLeaf                   // 503: this proxy has no certificate of the calling service
	numReasons
)

type reasonInfo struct {
	text   string
	status int
	grpc   int
	advice string
}

//nolint:gochecknoglobals // a constant table
var reasons = [numReasons]reasonInfo{
	None:              {"", 0, 0, ""},
	BadRequest:        {"bad-request", 400, 13, "the request is not valid HTTP/1.1 as this mesh accepts it; correct the client"},
	Denied:            {"denied", 403, 7, "no intention allows this request; run: meshctl explain"},
	NoRoute:           {"no-route", 404, 12, "no service is known by this host name; check the URL and the declared upstreams"},
	RequestTimeout:    {"request-timeout", 408, 4, "the request did not arrive in time; send it faster or raise the limit"},
	UpgradeRefused:    {"upgrade-refused", 501, 12, "only websocket may be upgraded to; send the request without Upgrade"},
	UpstreamReset:     {"upstream-reset", 502, 14, "the service closed the connection before its response was complete; look at its log"},
	UpstreamProtocol:  {"upstream-protocol", 502, 13, "the service's response is not valid HTTP/1.1; look at its log"},
	NoHealthyInstance: {"no-healthy-instance", 503, 14, "no instance of the service can take the request; run: meshctl instances"},
	ConnectFailed:     {"connect-failed", 503, 14, "no connection to the chosen instance; check that it runs and that its port is right"},
	Overload:          {"overload", 503, 14, "a limit on connections or requests is reached; retry later"},
	Draining:          {"draining", 503, 14, "this proxy is shutting down; retry on a new connection"},
	Timeout:           {"timeout", 504, 4, "the service did not answer in time; look at its latency or raise the timeout"},
	Internal:          {"internal", 500, 13, "a fault of mesh-proxy itself; its log has the error id"},
	ClientGone:        {"client-gone", 0, 1, ""},
	EarlyResponse:     {"early-response", 0, 1, ""},
	Superseded:        {"superseded", 0, 1, ""},
	PolicyChanged:     {"policy-changed", 0, 7, ""},
	NoLeaf:            {"no-leaf", 503, 14, "this host has no certificate of the calling service, which takes a second or two after its first registration; run: meshctl check"},
}

// String returns the reason's text, for example no-healthy-instance; empty for
// [None].
func (r Reason) String() string {
	if r >= numReasons {
		return "unknown"
	}
	return reasons[r].text
}

// Status returns the response status that the reason maps to while no head
// was sent, or 0 where no response is possible.
func (r Reason) Status() int {
	if r >= numReasons {
		return 0
	}
	return reasons[r].status
}

// GRPC returns the status of gRPC that the reason maps to, 0 (OK) for [None]. It is what clients of gRPC know for the like: what a
// retry may help is UNAVAILABLE.
func (r Reason) GRPC() int {
	if r >= numReasons {
		return 2 // UNKNOWN
	}
	return reasons[r].grpc
}

// Advice returns one line for the person who reads the response: what is wrong
// and what to do about it.
func (r Reason) Advice() string {
	if r >= numReasons {
		return ""
	}
	return reasons[r].advice
}

// Error is why an exchange failed. Bodies and responses of this package return
// no other type but io.EOF and [ErrPending].
type Error struct {
	// Reason decides what the other side sees.
	Reason Reason
	// Status, if not 0, is a more exact status than the reason's.
	Status int
	// Detail, if not empty, follows the advice in the response's body. It
	// must not carry secrets or other clients' data.
	Detail string
	// Err is the cause, for logs; never sent.
	Err error
}

// Error describes the failure with its cause.
func (e *Error) Error() string {
	text := "http exchange: " + e.Reason.String()
	if e.Detail != "" {
		text += ": " + e.Detail
	}
	if e.Err != nil {
		text += ": " + e.Err.Error()
	}
	return text
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// StatusCode returns the status of the response that reports e, or 0 where no
// response is possible.
func (e *Error) StatusCode() int {
	if e.Status != 0 {
		return e.Status
	}
	return e.Reason.Status()
}
