package l7

import (
	"io"
	"math/rand/v2"

	"github.com/meshd/meshd/proxy/http1"
)

// The names of the fields that tell about errors of this proxy's own.
const (
	FieldError   = "mesh-error"
	FieldErrorID = "mesh-error-id"
)

// reply is a response of this proxy's own, in the form that the client understands. It lives in its exchange.
type reply struct {
	head   ResponseHead
	fields [5]http1.Field
	id     [6]byte
	code   [2]byte
	text   []byte
	from   int // of text, what Next returns next
	sent   bool
}

//nolint:gochecknoglobals // constants
var (
	nameContentType = []byte("Content-Type")
	nameError       = []byte(FieldError)
	nameErrorID     = []byte(FieldErrorID)
	nameStatus      = []byte("grpc-status")
	nameMessage     = []byte("grpc-message")
	contentGRPC     = []byte("application/grpc")
	plainText       = []byte("text/plain; charset=utf-8")
	nameXFCC        = []byte("x-forwarded-client-cert")
)

func (r *reply) fail(ex *Exchange, err *Error) Response {
	const hex = "0123456789abcdef"
	n := rand.Uint32() //nolint:gosec // a name to find a record by, not a secret
	for i := range r.id {
		r.id[i] = hex[n&15]
		n >>= 4
	}
	status := err.StatusCode()
	if status == 0 {
		status = Internal.Status()
	}
	ex.Record.Reason = err.Reason
	ex.Record.ErrorID = string(r.id[:])
	ex.Record.Err = err

	text := append(r.text[:0], err.Reason.String()...)
	text = append(text, ": "...)
	text = append(text, err.Reason.Advice()...)
	if err.Reason == Denied { // the advice is a command
		text = append(append(text, " id:"...), r.id[:]...)
	}
	if err.Detail != "" {
		text = append(text, " ("...)
		text = append(text, err.Detail...)
		text = append(text, ')')
	}
	if IsGRPC(ex.Request.Fields) {
		r.status(err.Reason, text)
		return r
	}
	r.text = append(text, '\n')
	r.fields = [...]http1.Field{
		{Name: nameContentType, Value: plainText, ID: http1.ContentType},
		{Name: nameError, Value: []byte(err.Reason.String()), ID: http1.MeshHeader},
		{Name: nameErrorID, Value: r.id[:], ID: http1.MeshHeader},
		{},
		{},
	}
	r.head = ResponseHead{
		Status: status,
		Fields: r.fields[:3],
		Length: int64(len(r.text)),
		NoBody: string(ex.Request.Method) == "HEAD",
	}
	r.from, r.sent = 0, r.head.NoBody
	return r
}

// IsGRPC reports whether a request with these fields is gRPC's (grpc-web, which has status and message in the same places, too).
func IsGRPC(fields http1.Fields) bool {
	for i := range fields {
		if f := &fields[i]; f.ID == http1.ContentType {
			return len(f.Value) >= len(contentGRPC) && string(f.Value[:len(contentGRPC)]) == string(contentGRPC)
		}
	}
	return false
}

// status makes it what gRPC calls trailers-only: a head with the status, and nothing behind it.
func (r *reply) status(reason Reason, text []byte) {
	from := len(text)
	for _, c := range text[:from] {
		if c < ' ' || c > '~' || c == '%' {
			const hex = "0123456789ABCDEF"
			text = append(text, '%', hex[c>>4], hex[c&15])
		} else {
			text = append(text, c)
		}
	}
	r.text = text
	code := reason.GRPC()
	r.code = [2]byte{'0' + byte(code/10), '0' + byte(code%10)} //nolint:gosec // two digits
	value := r.code[:]
	if code < 10 {
		value = r.code[1:]
	}
	r.fields = [...]http1.Field{
		{Name: nameContentType, Value: contentGRPC, ID: http1.ContentType},
		{Name: nameStatus, Value: value},
		{Name: nameMessage, Value: text[from:]},
		{Name: nameError, Value: []byte(reason.String()), ID: http1.MeshHeader},
		{Name: nameErrorID, Value: r.id[:], ID: http1.MeshHeader},
	}
	r.head = ResponseHead{Status: 200, Fields: r.fields[:], NoBody: true}
	r.from, r.sent = 0, true
}

// Head returns the only head.
func (r *reply) Head(Waker) (*ResponseHead, error) { return &r.head, nil }

// Next returns the whole text.
func (r *reply) Next(limit int, _ Waker) ([]byte, error) {
	if r.sent {
		return nil, io.EOF
	}
	view := r.text[r.from:min(len(r.text), r.from+limit)]
	if r.from += len(view); r.from < len(r.text) {
		return view, nil
	}
	r.sent = true
	return view, io.EOF
}

// Trailers returns none.
func (*reply) Trailers() http1.Fields { return nil }

// Cancel does nothing: there is nothing to stop.
func (*reply) Cancel(Reason) {}

// Blocking is false: it never is pending.
func (*reply) Blocking() bool { return false }

// Close does nothing.
func (*reply) Close() {}
