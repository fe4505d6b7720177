package http1

import "errors"

// ErrShort means that the bytes so far are a proper beginning: call again
// with more of them. It is never wrapped.
var ErrShort = errors.New("http/1.1: more bytes are needed")

// Error is a refusal. Nothing after a refused head or chunk on the same
// connection can be trusted, so the connection must be closed.
type Error struct {
	// Status is the response status for a refused request: 400, 405, 414,
	// 417, 431, 501 or 505. For a refused response it is 502.
	Status int
	// Reason says what is wrong, in one line, without any byte of the peer.
	Reason string
	// Limit is what refused, if it was a limit.
	Limit Limit
}

// Error says what was refused.
func (e *Error) Error() string { return "http/1.1 refused: " + e.Reason }

func refuse(status int, reason string) *Error { return &Error{Status: status, Reason: reason} }

func limited(status int, by Limit, reason string) *Error {
	return &Error{Status: status, Reason: reason, Limit: by}
}

// The refusals. They are values, so that refusing a flood allocates nothing.
var (
	errBareLF        = refuse(400, "a line ends in LF without CR")
	errCR            = refuse(400, "CR without LF")
	errLeadingLine   = refuse(400, "empty line before the request line")
	errFold          = refuse(400, "folded field line (obs-fold)")
	errRequestLine   = refuse(400, "request line is not METHOD SP TARGET SP VERSION")
	errMethod        = refuse(400, "method is not a token")
	errConnect       = refuse(405, "CONNECT is not served here")
	errPreface       = refuse(505, "HTTP/2 preface on an HTTP/1.1 port")
	errVersion       = refuse(505, "only HTTP/1.1 and HTTP/1.0 are served")
	errVersionSyntax = refuse(400, "version is not HTTP/1.1 or HTTP/1.0")
	errTarget        = refuse(400, "target has a byte outside visible ASCII")
	errFragment      = refuse(400, "target has a fragment (#)")
	errEscape        = refuse(400, "target has a percent sign without two hex digits")
	errTargetForm    = refuse(400, "target is neither a path nor an http or https URL")
	errAsterisk      = refuse(400, "target * belongs to OPTIONS only")
	errUserinfo      = refuse(400, "target has user information")
	errTargetHost    = refuse(400, "the target's host differs from Host")
	errTargetLong    = limited(414, LimitLineBytes, "request line is longer than the limit")
	errLineLong      = limited(431, LimitLineBytes, "field line is longer than the limit")
	errHeadLong      = limited(431, LimitHeadBytes, "head is longer than the limit")
	errFields        = limited(431, LimitFields, "more field lines than the limit")
	errNoColon       = refuse(400, "field line without a colon")
	errName          = refuse(400, "field name is not a token")
	errNameSpace     = refuse(400, "white space between field name and colon")
	errUnderscore    = limited(400, LimitUnderscore, "field name has an underscore")
	errValue         = refuse(400, "field value has a control byte")
	errNoHost        = refuse(400, "no Host field")
	errHosts         = refuse(400, "more than one Host field")
	errHost          = refuse(400, "Host is not a host name with an optional port")
	errLengths       = refuse(400, "more than one Content-Length field")
	errLength        = refuse(400, "Content-Length is not a plain decimal number")
	errLengthAndTE   = refuse(400, "Content-Length together with Transfer-Encoding")
	errTE10          = refuse(400, "Transfer-Encoding in HTTP/1.0")
	errTEs           = refuse(400, "more than one Transfer-Encoding field")
	errTE            = refuse(501, "a transfer coding other than chunked")
	errExpects       = refuse(400, "more than one Expect field")
	errExpect        = refuse(417, "an expectation other than 100-continue")
	errTrailerName   = refuse(400, "Trailer announces a field that may not be a trailer")
	errUpgrade       = refuse(501, "an upgrade other than websocket")
	errUpgradeBody   = refuse(400, "an upgrade request with a body")
	errUpgradeMethod = refuse(400, "a websocket upgrade that is not a GET of HTTP/1.1")
	errChunkSize     = refuse(400, "chunk size is not a plain hex number")
	errChunkLarge    = refuse(400, "chunk size is out of range")
	errChunkExt      = refuse(400, "chunk extensions are malformed or too long")
	errChunkEnd      = refuse(400, "chunk data is not followed by CRLF")
	errStatusLine    = refuse(502, "status line is not VERSION SP 3DIGIT SP REASON")
	errStatusVersion = refuse(502, "the response's version is not HTTP/1.1 or HTTP/1.0")
)
