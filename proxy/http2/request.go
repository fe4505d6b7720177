package http2

import (
	"github.com/meshd/meshd/proxy/hpack"
	"github.com/meshd/meshd/proxy/http1"
	"github.com/meshd/meshd/proxy/l7"
)

// keepArena is up to which size the memory of a head is kept for the next one.
const keepArena = 4 << 10

// requestHead is a request's head as it comes in a header block.
type requestHead struct {
	arena  []byte
	fields http1.Fields

	pseudo    [hpack.PseudoUnknown][]byte
	has       [hpack.PseudoUnknown]bool
	host      []byte
	hosts     int
	length    int64 // -1 if it has none
	expect    bool
	grpc      bool
	under     bool // a name with an underscore
	cookies   int
	malformed bool
	refused   *l7.Error
	key       [24]byte
}

// The requests that are answered although no handler sees them. They are
// values, so that a flood of them allocates little.
//
//nolint:gochecknoglobals // constants
var (
	errHeadTooLarge = badRequest(431, "the head is larger than the limit")
	errLineTooLong  = badRequest(431, "a field is longer than the limit")
	errUnderscore   = badRequest(400, "a field name has an underscore")
	errConflict     = badRequest(400, "the host field is not the authority")
	errManyHosts    = badRequest(400, "more than one host field")
	errBadHost      = badRequest(400, "the authority is not valid")
	errExpectation  = badRequest(417, "only 100-continue may be expected")
	errConnect      = badRequest(405, "CONNECT is for websockets only")
	errMethod       = badRequest(400, "the method is not a token")
	errProtocol     = &l7.Error{Reason: l7.UpgradeRefused}
)

func badRequest(status int, detail string) *l7.Error {
	return &l7.Error{Reason: l7.BadRequest, Status: status, Detail: detail}
}

func (r *requestHead) clear() {
	if cap(r.arena) > keepArena {
		r.arena = nil
	}
	clear(r.fields[:cap(r.fields)])
	*r = requestHead{arena: r.arena[:0], fields: r.fields[:0]}
}

// read decodes a header block. It returns an error of the connection.
func (r *requestHead) read(d *hpack.Decoder, block []byte, lists hpack.Limits, limits *http1.Limits) error {
	r.length = -1
	d.Begin(block, r.arena[:0], lists)
	var f hpack.Field
	for !r.malformed && d.Next(&f) {
		r.field(&f, limits)
	}
	var err error
	r.arena, err = d.End()
	switch {
	case err == nil:
	case isListTooLarge(err):
		r.tooLarge()
	default:
		return violation(CompressionError, err)
	}
	return nil
}

// tooLarge drops what was read of a head that is refused for its size, but the method. Many may wait for their answer, and
// r.arena is used for the next one.
func (r *requestHead) tooLarge() {
	method := append(make([]byte, 0, 24), r.pseudo[hpack.Method][:min(24, len(r.pseudo[hpack.Method]))]...)
	clear(r.fields)
	clear(r.pseudo[:])
	clear(r.has[:])
	r.refused, r.fields, r.host, r.hosts, r.cookies = errHeadTooLarge, r.fields[:0], nil, 0, 0
	r.pseudo[hpack.Method], r.pseudo[hpack.Path] = method, slash
}

// field takes one field (RFC 9113 sections 8.2 and 8.3).
func (r *requestHead) field(f *hpack.Field, limits *http1.Limits) {
	if len(f.Name)+len(f.Value) > limits.LineBytes {
		r.refused = errLineTooLong
	}
	if f.Pseudo != hpack.NotPseudo {
		switch p := f.Pseudo; {
		case p == hpack.PseudoUnknown, p == hpack.Status, r.has[p], len(r.fields) > 0, r.hosts > 0, r.length >= 0, f.Flaw != hpack.NoFlaw:
			r.malformed = true
		default:
			r.pseudo[p], r.has[p] = f.Value, true
		}
		return
	}
	switch f.Flaw {
	case hpack.BadName, hpack.BadValue:
		r.malformed = true
		return
	case hpack.Underscore:
		r.under = true
	default:
	}
	r.regular(f)
}

func (r *requestHead) regular(f *hpack.Field) {
	switch f.ID {
	case http1.Connection, http1.ProxyConnection, http1.KeepAlive, http1.TransferEncoding, http1.Upgrade:
		r.malformed = true
		return
	case http1.ContentLength:
		n, ok := http1.ParseLength(f.Value)
		r.malformed = !ok || r.length >= 0
		r.length = n
		return
	case http1.Host:
		r.host = f.Value
		r.hosts++
		return
	case http1.TE:
		if string(f.Value) != "trailers" {
			r.malformed = true
			return
		}
	case http1.Expect:
		if !equalFold(f.Value, "100-continue") {
			r.refused = errExpectation
		}
		r.expect = true
		return
	case http1.ContentType:
		r.grpc = isGRPCType(f.Value)
	case http1.Other:
		if string(f.Name) == "cookie" {
			r.cookies++
		}
	default:
		if http1.HopByHop(f.ID) {
			return
		}
	}
	r.fields = append(r.fields, f.Field)
}

// complete checks what is not about a single field, and makes the head of it.
// What comes out refused is to be answered; false is a malformed request.
func (r *requestHead) complete(h *l7.Head, end bool, limits *http1.Limits) (host []byte, ok bool) {
	if r.malformed {
		return nil, false
	}
	connect := string(r.pseudo[hpack.Method]) == "CONNECT"
	extended := connect && r.has[hpack.Protocol]
	switch {
	case r.refused == errHeadTooLarge: // what comes behind is not known
	case !r.has[hpack.Method], r.has[hpack.Protocol] && !connect:
		return nil, false
	case connect && !extended && (r.has[hpack.Scheme] || r.has[hpack.Path] || !r.has[hpack.Authority]):
		return nil, false
	case (!connect || extended) && (len(r.pseudo[hpack.Scheme]) == 0 || len(r.pseudo[hpack.Path]) == 0):
		return nil, false
	case end && r.length > 0:
		return nil, false
	}
	*h = l7.Head{Method: r.pseudo[hpack.Method], Length: r.length}
	if end {
		h.Length = 0
	}
	host = r.target(h, connect, extended)
	if r.cookies > 1 {
		r.joinCookies()
	}
	if extended {
		r.keyed()
	}
	h.Fields = r.fields
	switch {
	case r.refused != nil:
	case r.under && !r.grpc && !limits.AllowUnderscore:
		r.refused = errUnderscore
	case connect && !extended:
		r.refused = errConnect
	case extended && !equalFold(r.pseudo[hpack.Protocol], "websocket"):
		r.refused = errProtocol
	case !http1.IsToken(h.Method):
		r.refused = errMethod
	}
	return host, true
}

// target checks path and authority.
func (r *requestHead) target(h *l7.Head, connect, extended bool) (host []byte) {
	refuse := func(e *l7.Error) {
		if r.refused == nil {
			r.refused = e
		}
	}
	host = r.pseudo[hpack.Authority]
	switch {
	case r.hosts > 1:
		refuse(errManyHosts)
	case r.hosts == 1 && len(host) > 0 && !equalFold(host, string(r.host)):
		refuse(errConflict)
	case len(host) == 0:
		host = r.host
	}
	if len(host) > 0 && !http1.ValidHost(host) {
		refuse(errBadHost)
	}
	path := r.pseudo[hpack.Path]
	switch {
	case connect && !extended:
		h.Path = slash
	case string(path) == "*" && string(h.Method) == "OPTIONS":
		h.Path = path
	default:
		var err error
		h.Path, h.RawQuery, h.HasQuery, err = http1.ParsePath(path)
		if err != nil {
			h.Path, h.RawQuery, h.HasQuery = slash, nil, false
			refuse(&l7.Error{Reason: l7.BadRequest, Status: 400, Detail: "the path is not valid", Err: err})
		}
	}
	if extended {
		h.Method = methodGet // as the handler, and HTTP/1, know it
	}
	return host
}

//nolint:gochecknoglobals // constants
var (
	slash      = []byte("/")
	methodGet  = []byte("GET")
	nameCookie = []byte("cookie")
	nameKey    = []byte("sec-websocket-key")
)

// joinCookies makes one field of several (RFC 9113 section 8.2.3).
func (r *requestHead) joinCookies() {
	at := len(r.arena)
	kept := r.fields[:0]
	first := -1
	sensitive := false
	for i := range r.fields {
		f := r.fields[i]
		if f.ID != http1.Other || string(f.Name) != "cookie" {
			kept = append(kept, f)
			continue
		}
		if first < 0 {
			first = len(kept)
			kept = append(kept, f)
		} else {
			r.arena = append(r.arena, "; "...)
		}
		r.arena = append(r.arena, f.Value...)
		sensitive = sensitive || f.Sensitive
	}
	kept[first] = http1.Field{Name: nameCookie, Value: r.arena[at:len(r.arena):len(r.arena)], Sensitive: sensitive}
	r.fields = kept
}

// keyed adds the key that HTTP/1 asks for and extended CONNECT does not have.
func (r *requestHead) keyed() {
	r.fields.Set(nameKey, websocketKey(&r.key))
}

// isGRPCType reports a content type of gRPC.
func isGRPCType(v []byte) bool {
	const grpc = "application/grpc"
	return len(v) >= len(grpc) && equalFold(v[:len(grpc)], grpc)
}

func isAccept(name []byte) bool { return equalFold(name, "sec-websocket-accept") }

// equalFold compares ASCII without regard to case.
func equalFold(b []byte, s string) bool {
	if len(b) != len(s) {
		return false
	}
	for i, c := range b {
		d := s[i]
		if c == d {
			continue
		}
		if c |= 0x20; c != d|0x20 || c < 'a' || c > 'z' {
			return false
		}
	}
	return true
}

// head implements role: a request, or the trailers of one.
func (c *Conn) head(id uint32, s *stream, block []byte, end bool) error {
	if s != nil {
		return c.trailers(id, s, block, end)
	}
	if id%2 == 0 {
		return violation(ProtocolError, errStreamID)
	}
	c.conn.mu.Lock()
	highest, used, late := c.highest, c.used(id), id <= c.resetUpTo
	crowded, ending := len(c.streams) >= c.limits.Streams, c.final
	c.conn.mu.Unlock()
	switch {
	case id <= highest && !used:
		return violation(ProtocolError, errStreamID)
	case id <= highest && late:
		if err := c.skipHead(block); err != nil {
			return err
		}
		return c.spend()
	case id <= highest:
		return violation(StreamClosed, errClosedStream)
	case ending: // RFC 9113 section 6.8: it was told
		return c.skipHead(block)
	case crowded:
		return c.turnAway(id, block)
	}
	x := c.srv.get()
	if c.spareArena != nil {
		x.head.arena, c.spareArena = c.spareArena, nil
	}
	if err := x.head.read(c.dec, block, c.lists, &c.srv.cfg.Limits); err != nil {
		return err
	}
	tooLarge := x.head.refused == errHeadTooLarge
	if tooLarge { // cheap to send, and dear to take: at least its memory serves for the next one
		x.head.arena, c.spareArena = nil, x.head.arena[:0]
	}
	x.client = c
	x.begin(&c.conn, x)
	x.pinned = true
	var h l7.Head
	host, ok := x.head.complete(&h, end, &c.srv.cfg.Limits)
	if !ok {
		c.conn.mu.Lock()
		c.note(id)
		c.conn.mu.Unlock()
		x.recycle()
		c.count.Malformed.Add(1)
		return c.refuse(id, ProtocolError)
	}
	c.exchange(x, id, &h, host, end)
	if tooLarge {
		return c.countReset()
	}
	return nil
}

// turnAway refuses a stream beyond the limit, whose head nobody reads. A client
// that does not know the limit yet is not blamed.
func (c *Conn) turnAway(id uint32, block []byte) error {
	if err := c.skipHead(block); err != nil {
		return err
	}
	c.conn.mu.Lock()
	c.note(id)
	c.conn.mu.Unlock()
	c.count.Refused.Add(1)
	if !c.acked {
		return c.decline(id, RefusedStream)
	}
	return c.refuse(id, RefusedStream)
}

// exchange begins an exchange.
func (c *Conn) exchange(x *served, id uint32, h *l7.Head, host []byte, end bool) {
	r := &x.head
	x.ex.Begin(&c.info, x, h, l7.Instant())
	refused := r.refused
	if refused == errHeadTooLarge || refused == errLineTooLong {
		c.count.HeadTooLarge.Add(1)
	}
	if refused == errHeadTooLarge {
		x.ex.Request.Path = slash
	} else if err := x.ex.Normalize(host, c.xfcc); refused == nil {
		refused = err
	}
	x.ended = end
	if !end {
		x.expect = r.length
		x.ex.Body = x
		x.ex.ExpectContinue = r.expect
	}
	if string(r.pseudo[hpack.Protocol]) != "" && refused == nil {
		x.ex.Upgrade = "websocket"
		x.ex.Body = x
	}
	c.open(&x.stream, id)
	x.start(refused)
}

// trailers takes what comes behind a request's body.
func (c *Conn) trailers(id uint32, s *stream, block []byte, end bool) error {
	c.conn.mu.Lock()
	ended, reset := s.ended, c.streams[id] == s && s.byPeer
	c.conn.mu.Unlock()
	var fields http1.Fields
	ok := end && !ended
	c.dec.Begin(block, nil, c.lists)
	var f hpack.Field
	for ok && c.dec.Next(&f) {
		switch {
		case f.Pseudo != hpack.NotPseudo, f.Flaw == hpack.BadName, f.Flaw == hpack.BadValue:
			ok = false
		case f.Flaw == hpack.Underscore && !c.srv.cfg.Limits.AllowUnderscore, http1.ForbiddenTrailer(f.ID):
		default:
			fields = append(fields, f.Field)
		}
	}
	switch _, err := c.dec.End(); {
	case err != nil && !isListTooLarge(err):
		return violation(CompressionError, err)
	case err != nil:
		c.count.HeadTooLarge.Add(1)
		return c.malformed(s, id, EnhanceYourCalm)
	case reset:
		return c.refuse(id, StreamClosed)
	case ended:
		return c.malformed(s, id, StreamClosed)
	case !ok || !c.end(id, fields):
		return c.malformed(s, id, ProtocolError)
	}
	return nil
}
