package http2

import (
	"errors"
	"strconv"
)

// ErrCode is an error code of RFC 9113 section 7.
type ErrCode uint32

// The error codes.
const (
	NoError            ErrCode = 0x0
	ProtocolError      ErrCode = 0x1
	InternalError      ErrCode = 0x2
	FlowControlError   ErrCode = 0x3
	SettingsTimeout    ErrCode = 0x4
	StreamClosed       ErrCode = 0x5
	FrameSizeError     ErrCode = 0x6
	RefusedStream      ErrCode = 0x7
	Cancelled          ErrCode = 0x8
	CompressionError   ErrCode = 0x9
	ConnectError       ErrCode = 0xa
	EnhanceYourCalm    ErrCode = 0xb
	InadequateSecurity ErrCode = 0xc
	HTTP11Required     ErrCode = 0xd
)

//nolint:gochecknoglobals // a constant table
var codeNames = [...]string{
	"NO_ERROR", "PROTOCOL_ERROR", "INTERNAL_ERROR", "FLOW_CONTROL_ERROR", "SETTINGS_TIMEOUT", "STREAM_CLOSED", "FRAME_SIZE_ERROR",
	"REFUSED_STREAM", "CANCEL", "COMPRESSION_ERROR", "CONNECT_ERROR", "ENHANCE_YOUR_CALM", "INADEQUATE_SECURITY", "HTTP_1_1_REQUIRED",
}

// String returns the code's name in RFC 9113.
func (c ErrCode) String() string {
	if int(c) < len(codeNames) {
		return codeNames[c]
	}
	return "error code " + strconv.FormatUint(uint64(c), 10)
}

// ConnError is why this end ended a connection. The peer was told the code, and
// the text of Err.
type ConnError struct {
	Code ErrCode
	Err  error
}

// Error describes it.
func (e *ConnError) Error() string {
	return "HTTP/2 connection: " + e.Code.String() + ": " + e.Err.Error()
}

// Unwrap returns the cause.
func (e *ConnError) Unwrap() error { return e.Err }

// GoAwayError is the peer's GOAWAY with an error.
type GoAwayError struct {
	Code  ErrCode
	Debug string // what the peer said, shortened
}

// Error describes it.
func (e *GoAwayError) Error() string {
	text := "the peer ended the HTTP/2 connection: " + e.Code.String()
	if e.Debug != "" {
		text += ": " + strconv.Quote(e.Debug)
	}
	return text
}

// ResetError is the peer's RST_STREAM.
type ResetError struct{ Code ErrCode }

// Error describes it.
func (e *ResetError) Error() string { return "the peer reset the stream: " + e.Code.String() }

// The limits that end a connection, with ENHANCE_YOUR_CALM or by time, and
// ErrStalled, which ends an exchange. Each has a counter in [Counters].
var (
	ErrResets        = errors.New("too many streams were reset")
	ErrControl       = errors.New("too many frames that bring nothing")
	ErrContinuations = errors.New("too many CONTINUATION frames")
	ErrAnswers       = errors.New("the peer asks without reading the answers")
	ErrHeadTimeout   = errors.New("a header block or the first SETTINGS took too long")
	ErrStalled       = errors.New("the peer opens no window for what it asked for")
)

// What the peer did against RFC 9113. They are values: refusing allocates little.
var (
	errPreface       = errors.New("the connection does not begin with the preface of HTTP/2")
	errFirstSettings = errors.New("the first frame is not SETTINGS")
	errFrameSize     = errors.New("a frame has a size that it must not have")
	errTooLong       = errors.New("a frame is longer than SETTINGS_MAX_FRAME_SIZE")
	errOnZero        = errors.New("a frame on stream 0 that belongs to a stream")
	errNotOnZero     = errors.New("a frame on a stream that belongs to the connection")
	errPadding       = errors.New("padding is longer than its frame")
	errIdle          = errors.New("a frame on a stream that was never opened")
	errContinuation  = errors.New("a CONTINUATION without HEADERS, or something else before its end")
	errStreamID      = errors.New("a stream's number is not a new one of the peer's")
	errClosedStream  = errors.New("a frame on a stream that is closed")
	errPush          = errors.New("PUSH_PROMISE is not allowed")
	errWindow        = errors.New("a window grew beyond 2^31-1")
	errNoIncrement   = errors.New("a WINDOW_UPDATE of 0")
	errOverrun       = errors.New("more data than the window allows")
	errSetting       = errors.New("a setting has a value that it must not have")
	errSelf          = errors.New("a stream depends on itself")
	errMalformed     = errors.New("what came on the stream is not valid")
)
