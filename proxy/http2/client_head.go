package http2

import (
	"crypto/sha1" //nolint:gosec // RFC 6455 section 4.2.2 asks for it; nothing is kept secret by it
	"encoding/base64"
	"slices"

	"github.com/meshd/meshd/proxy/hpack"
	"github.com/meshd/meshd/proxy/http1"
	"github.com/meshd/meshd/proxy/l7"
)

// maxInterim bounds the interim heads of one response.
const maxInterim = 16

// The answers of an upstream that are refused. They are values, so that a flood
// of them allocates nothing.
//
//nolint:gochecknoglobals // constants
var (
	errResponseList    = upstreamError("the head is larger than the limit")
	errResponseName    = upstreamError("a field name is not a token in lower case")
	errResponseValue   = upstreamError("a field value has a control byte or white space at an end")
	errResponsePseudo  = upstreamError("a pseudo-header field other than one :status in front")
	errResponseStatus  = upstreamError(":status is not three digits, or 101")
	errResponseHop     = upstreamError("a field that belongs to a connection of HTTP/1.1")
	errResponseLengths = upstreamError("content-length is not one plain decimal number")
	errResponseInterim = upstreamError("interim responses without end, or one that ends the stream")
	errResponseOrder   = upstreamError("a frame of the response where none may be")
	errResponseBody    = upstreamError("the body's length is not the declared one, or there must be none")
	errResponseSwitch  = upstreamError("a switch of protocols that nobody asked for")
)

func upstreamError(detail string) *l7.Error {
	return &l7.Error{Reason: l7.UpstreamProtocol, Status: 502, Detail: detail}
}

// responseHead is a head, or the trailers, of a response, with the memory that
// its views point into.
type responseHead struct {
	l7.ResponseHead

	arena  []byte
	accept [28]byte // sec-websocket-accept
}

// clear drops references, and memory that a large head took.
func (h *responseHead) clear() {
	if cap(h.arena) > keepArena {
		h.arena = nil
	}
	clear(h.Fields[:cap(h.Fields)])
}

// read decodes one header block (RFC 9113 sections 8.2 and 8.3.2). The second
// error is the connection's; the first concerns the response alone.
func (h *responseHead) read(d *hpack.Decoder, block []byte, limits hpack.Limits, trailers bool) (refused *l7.Error, err error) {
	h.ResponseHead = l7.ResponseHead{Fields: h.Fields[:0], Length: -1}
	d.Begin(block, h.arena[:0], limits)
	var f hpack.Field
	for refused == nil && d.Next(&f) {
		if trailers {
			refused = h.trailer(&f)
		} else {
			refused = h.field(&f)
		}
	}
	h.arena, err = d.End()
	switch {
	case err == nil:
	case refused == nil && isListTooLarge(err):
		return errResponseList, nil
	case !isListTooLarge(err):
		return nil, err
	}
	if refused == nil && !trailers && h.Status == 0 {
		refused = errResponsePseudo
	}
	return refused, nil
}

func (h *responseHead) field(f *hpack.Field) *l7.Error {
	switch {
	case f.Pseudo == hpack.Status && h.Status == 0 && len(h.Fields) == 0 && h.Length < 0:
		return h.status(f.Value)
	case f.Pseudo != hpack.NotPseudo || h.Status == 0:
		return errResponsePseudo
	}
	if refused := flawed(f); refused != nil {
		return refused
	}
	switch f.ID {
	case http1.Connection, http1.ProxyConnection, http1.KeepAlive, http1.TransferEncoding, http1.Upgrade:
		return errResponseHop
	case http1.ContentLength:
		n, ok := http1.ParseLength(f.Value)
		if !ok || h.Length >= 0 {
			return errResponseLengths
		}
		h.Length = n
		return nil
	default:
	}
	if !http1.HopByHop(f.ID) {
		h.Fields = append(h.Fields, f.Field)
	}
	return nil
}

func (h *responseHead) status(v []byte) *l7.Error {
	if len(v) != 3 || v[0] < '1' || v[0] > '9' || v[1] < '0' || v[1] > '9' || v[2] < '0' || v[2] > '9' {
		return errResponseStatus
	}
	h.Status = int(v[0]-'0')*100 + int(v[1]-'0')*10 + int(v[2]-'0')
	if h.Status == 101 { // RFC 9113 section 8.6
		return errResponseStatus
	}
	return nil
}

// trailer takes a field of the trailers. What may not come there is dropped, as
// it is for HTTP/1.1.
func (h *responseHead) trailer(f *hpack.Field) *l7.Error {
	if f.Pseudo != hpack.NotPseudo {
		return errResponsePseudo
	}
	if refused := flawed(f); refused != nil {
		return refused
	}
	if !http1.ForbiddenTrailer(f.ID) {
		h.Fields = append(h.Fields, f.Field)
	}
	return nil
}

// flawed lets underscores pass: what an application says is its own affair.
func flawed(f *hpack.Field) *l7.Error {
	switch f.Flaw {
	case hpack.BadName:
		return errResponseName
	case hpack.BadValue:
		return errResponseValue
	default:
		return nil
	}
}

// final checks a final head against its request, and completes it. end says
// that the stream ended with it.
func (h *responseHead) final(ex *l7.Exchange, end bool) *l7.Error {
	if ex.Upgrade != "" && h.Status < 300 {
		return h.switched(ex, end)
	}
	switch none := string(ex.Request.Method) == "HEAD" || http1.NoBodyStatus(h.Status); {
	case none:
		h.NoBody = true
		if h.Status == 204 {
			h.Length = -1
		}
	case end && h.Length > 0:
		return errResponseBody
	case end:
		h.Length = 0
	}
	return nil
}

// switched makes the answer that HTTP/1.1 has of one that accepts an extended
// CONNECT (RFC 8441 section 5), which knows neither key nor accept.
func (h *responseHead) switched(ex *l7.Exchange, end bool) *l7.Error {
	if h.Status != 200 || end {
		return errResponseSwitch
	}
	h.Status, h.Length = 101, -1
	if key, ok := ex.Request.Fields.Get("Sec-WebSocket-Key"); ok {
		h.arena = append(append(slices.Clip(h.arena), key...), websocketGUID...)
		sum := sha1.Sum(h.arena[len(h.arena)-len(key)-len(websocketGUID):]) //nolint:gosec // as above
		base64.StdEncoding.Encode(h.accept[:], sum[:])
		h.Fields.Set(nameAccept, h.accept[:])
	}
	return nil
}

const websocketGUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"

//nolint:gochecknoglobals // constants
var (
	nameAccept     = []byte("sec-websocket-accept")
	methodConnect  = []byte("CONNECT")
	valueContinue  = []byte("100-continue")
	valueTrailers  = []byte("trailers")
	valueWebsocket = []byte("websocket")
)

// appendRequest appends the header block of a request. path is memory to join
// path and query in.
func appendRequest(e *hpack.Encoder, dst []byte, ex *l7.Exchange, path *[]byte) []byte {
	h := &ex.Request
	dst = e.Begin(dst)
	if ex.Upgrade != "" {
		dst = e.Pseudo(dst, hpack.Method, methodConnect)
		dst = e.Pseudo(dst, hpack.Protocol, valueWebsocket)
	} else {
		dst = e.Pseudo(dst, hpack.Method, h.Method)
	}
	dst = e.Pseudo(dst, hpack.Scheme, h.Scheme)
	dst = e.Pseudo(dst, hpack.Authority, h.Authority)
	target := h.Path
	if h.HasQuery {
		*path = append(append(append((*path)[:0], h.Path...), '?'), h.RawQuery...)
		target = *path
	}
	dst = e.Pseudo(dst, hpack.Path, target)
	te := false
	for i := range h.Fields {
		f := &h.Fields[i]
		switch f.ID {
		case http1.TE:
			te = true
			continue
		case http1.ContentType:
			te = te || isGRPC(f.Value)
		case http1.Other:
			if ex.Upgrade != "" && isKey(f.Name) {
				continue
			}
		default:
		}
		dst = e.Field(dst, f)
	}
	if te {
		dst = e.Literal(dst, "te", valueTrailers)
	}
	switch {
	case ex.Upgrade != "":
	case ex.Body != nil && h.Length >= 0:
		dst = e.Length(dst, h.Length)
	case ex.Body == nil && http1.ExpectsBody(h.Method):
		dst = e.Length(dst, 0)
	}
	if ex.ExpectContinue {
		dst = e.Literal(dst, "expect", valueContinue)
	}
	return dst
}

// isGRPC reports a content type of gRPC, whose servers want to hear that
// trailers pass.
func isGRPC(v []byte) bool {
	const grpc = "application/grpc"
	return len(v) >= len(grpc) && string(v[:len(grpc)]) == grpc
}

func isKey(name []byte) bool {
	const key = "sec-websocket-key"
	if len(name) != len(key) {
		return false
	}
	for i, c := range name {
		if c|0x20 != key[i]|0x20 {
			return false
		}
	}
	return true
}
