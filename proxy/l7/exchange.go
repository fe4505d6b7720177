package l7

import (
	"errors"
	"sync/atomic"
	"time"

	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/intentions"
	"github.com/meshd/meshd/proxy/http1"
)

// Head is a request's head, the same for every version of HTTP. All slices are
// views that stay valid until the exchange is over; whoever keeps one longer
// copies it. Between the ends, a head may be changed only by the handler,
// before it returns.
type Head struct {
	Method    []byte
	Scheme    []byte // http or https, as the client sees it; never from the wire of an untrusted peer
	Authority []byte // normalized: lower case, no trailing dot; port kept
	Path      []byte // normalized; exactly what policy is shown and what is forwarded
	RawQuery  []byte // without the question mark; HasQuery tells "/a?" from "/a"
	HasQuery  bool
	// Fields has no hop-by-hop field, no framing, no host: those belong to a
	// connection, and each end writes its own.
	Fields http1.Fields
	// Length is the body's declared length, -1 if unknown.
	Length int64
}

// HeaderValue returns the value of the i-th field line named name, so that a
// head is an intentions.HeaderLookup. host is the authority.
func (h *Head) HeaderValue(name string, i int) ([]byte, bool) {
	if name == "host" {
		return h.Authority, i == 0
	}
	return h.Fields.Value(name, i)
}

// ResponseHead is the head of a response, final or interim (1xx). Its views
// stay valid until the next call of Head, those of the final one until
// [Response.Close].
type ResponseHead struct {
	Status int
	// Reason is the reason phrase of HTTP/1, which other versions drop.
	Reason []byte
	// Fields has no hop-by-hop field and no framing.
	Fields http1.Fields
	// Length is the body's declared length, -1 if unknown. In the answer to
	// HEAD, and in a 304, it is what a body would have had: 0 bytes follow.
	Length int64
	// NoBody says that no byte and no trailer follows, whatever Length says.
	NoBody bool
}

// ErrPending means "nothing yet": the Waker given in that call will be woken
// once, unless the source is Blocking.
var ErrPending = errors.New("http exchange: nothing to read yet")

// Waker is told that a source which returned [ErrPending] is worth asking
// again. Wake is called from the producer's goroutine, at most once per
// pending call, perhaps before that call returned and perhaps for nothing. It
// must not block and must not call the source.
type Waker interface{ Wake() }

// Body is one direction's bytes, then its trailers. One goroutine at a time
// pulls.
type Body interface {
	// Next returns the next bytes, at least one and at most max, as a view
	// that is valid until the next call of Next or Close. Asking again is what
	// grants credit for the bytes returned before. io.EOF means that the body
	// is complete, and may come with the last bytes; it is never wrapped. Any
	// other error but ErrPending is an *Error, and final.
	//
	// With a nil Waker it blocks until there is something. Otherwise it never
	// blocks: it returns ErrPending, and wakes w later unless Blocking.
	Next(limit int, w Waker) ([]byte, error)
	// Trailers returns the trailer fields; valid after io.EOF.
	Trailers() http1.Fields
	// Cancel tells the producer that no more is wanted, and why. A call of
	// Next that blocks returns at once. It may be called from any goroutine,
	// any number of times, and does not block; after io.EOF it does nothing. A
	// response is not cancelled once its Close was called: whoever cancels from
	// another goroutine than the one that closes shares a lock with it.
	Cancel(Reason)
	// Blocking reports a source without a goroutine of its own (HTTP/1): its
	// bytes come only while somebody blocks in Next, so that a consumer that
	// may not block brings a goroutine. It is constant for a source.
	Blocking() bool
}

// Response is the answer that a [Handler] promises. The consumer calls Head
// until it has the final one, Next until io.EOF, and then Close.
type Response interface {
	Body
	// Head returns the next head: any number of interim ones (1xx but 101),
	// then the final one. Waker and errors are as in Next. The work that can
	// block (connecting, sending the request) happens in here.
	Head(w Waker) (*ResponseHead, error)
	// Close ends the exchange for the forwarding side and must be called
	// exactly once, last, by the consumer. Before io.EOF it aborts what runs.
	// When it returns nobody on the forwarding side touches the exchange, its
	// head or its body any more. It never waits for the network.
	Close()
}

// Handler decides what becomes of a request. Handle must not block: it looks
// at the head, decides, and promises a response: [Upstream.Forward] or
// [Exchange.Fail]. It runs on the goroutine that reads the client's
// connection and must not keep ex.
type Handler interface {
	Handle(ex *Exchange) Response
}

// Upstream carries exchanges to one endpoint. Forward does not block; see
// [Response.Head].
type Upstream interface {
	Forward(ex *Exchange) Response
}

// Exchange is one request and its answer. The serving end makes and owns it;
// it is valid until the response's Close returned.
type Exchange struct {
	// Request is the request's head.
	Request Head
	// Body is the request's body, nil if there is none. With Upgrade it is the
	// client's bytes after the switch, and must not be pulled before the
	// response head 101 (HTTP/2: 200) was seen.
	Body Body
	// Upgrade is "websocket" or empty.
	Upgrade string
	// ExpectContinue says that the client waits for a 100 before its body.
	ExpectContinue bool
	// Deadline, if not zero, ends the exchange with [Timeout]. The handler may
	// set it.
	Deadline time.Time
	// Conn is the client's connection as the owner of the listener described
	// it: identity, and what he attached.
	Conn *ConnInfo
	// Client, if not nil, reports without blocking whether the client is still
	// there. A forwarding end that waits long for its upstream asks it about
	// once a second.
	Client interface{ Gone() bool }
	// Record is what will be told about the exchange. The handler fills what
	// only it knows.
	Record Record

	reply    reply
	policy   intentions.HTTPRequest
	progress atomic.Int64 // when bytes last moved, either way
}

// Fail promises a response of this proxy's own that reports err: status,
// mesh-error and mesh-error-id fields and one line of text. err must not be
// nil; it is recorded.
func (ex *Exchange) Fail(err *Error) Response { return ex.reply.fail(ex, err) }

// ForPolicy returns the request as rules look at it. It is a view, and valid as
// long as the exchange.
func (ex *Exchange) ForPolicy() *intentions.HTTPRequest {
	ex.policy = intentions.HTTPRequest{
		Method:  view(ex.Request.Method),
		Path:    view(ex.Request.Path),
		Headers: &ex.Request,
	}
	return &ex.policy
}

// ConnInfo describes a client's connection to the exchanges that come from it.
type ConnInfo struct {
	// Source is the client's identity: the peer's on the mesh port, the local
	// service's behind an upstream listener. The zero ID is nobody.
	Source spiffe.ID
	// ForwardedClientCert, if not empty, is sent on as
	// x-forwarded-client-cert; see [ForwardedClientCert]. What clients send
	// under that name never passes.
	ForwardedClientCert string
	// Scheme is http or https; empty is http.
	Scheme string
	// Authority stands in for the host that a request of HTTP/1.0 may lack;
	// empty refuses such a request.
	Authority string
	// User is the owner's; this package never looks at it.
	User any
}

// Record tells about one finished exchange. Views are valid only during the
// call of the sink.
type Record struct {
	Source      spiffe.ID
	Destination catalog.Name // set by the handler
	Endpoint    string       // set by the handler: the instance that was picked
	Rule        int          // set by the handler: index of the deciding rule, -1 if none

	Method    []byte
	Authority []byte
	Path      []byte

	Status        int    // sent to the client; 0 if none was
	Reason        Reason // None if it went well
	ErrorID       string // mesh-error-id, if a response of our own was sent
	Err           error  // the cause, for logs
	RequestBytes  int64  // of body
	ResponseBytes int64  // of body
	Start         time.Time
	Duration      time.Duration // first byte of the request's head to last byte of the response
	Retried       bool          // sent again on a fresh connection after a pooled one was found dead

	// User is the handler's, for example the endpoint's state that must know
	// when the exchange is over.
	User any
}
