package l7

import (
	"errors"
	"io"
	"sync/atomic"
	"unsafe"

	"github.com/meshd/meshd/intentions"
	"github.com/meshd/meshd/proxy/http1"
)

// job is what a connection holds while it serves requests.
type job struct {
	conn   *Conn
	parser http1.Request
	src    source
	body   requestBody
	ex     Exchange
	writer bodyWriter
	look   func() error
	began  int64 // when the first byte of the head was seen
	sent   int   // status that was sent, 0 for none
	close  bool  // the response said that the connection closes
}

// begin prepares for a head.
func (j *job) begin() {
	j.began = instant()
	j.parser.Reset()
	j.sent, j.close = 0, false
}

// forget drops every reference, not the memory.
func (j *job) forget() {
	j.ex.Clear()
	j.conn, j.src.link, j.writer.link = nil, nil, nil
	fields := j.parser.Fields[:cap(j.parser.Fields)]
	clear(fields)
	j.parser = http1.Request{Fields: fields[:0]}
}

// prepare makes an exchange of the parsed head.
func (j *job) prepare() *Error {
	c, p, ex := j.conn, &j.parser, &j.ex
	cfg := &c.srv.cfg
	framing, length := http1.Sized, p.Length
	if p.Chunked {
		framing, length = http1.Chunked, -1
	}
	ex.Begin(&c.info, c, &Head{
		Method: p.Method, Path: p.Path, RawQuery: p.RawQuery, HasQuery: p.HasQuery, Fields: p.EndToEnd(), Length: length,
	}, j.began)

	j.src.link, j.src.limits, j.src.idle = &c.link, &cfg.Limits, cfg.StreamIdle
	j.src.progress, j.src.look = &ex.progress, j.look
	j.src.lost, j.src.slow, j.src.deadline = ClientGone, RequestTimeout, 0
	j.src.grace = cfg.BodyGrace
	j.src.start(framing, length)
	j.writer = bodyWriter{link: &c.link, idle: cfg.StreamIdle, progress: &ex.progress}

	ex.ExpectContinue = p.ExpectContinue
	if !j.src.eof.Load() {
		j.body.reset()
		ex.Body = &j.body
	}
	if p.WebSocket {
		ex.Upgrade = "websocket"
		j.body.reset()
		ex.Body = &j.body
	}
	refused := ex.Normalize(p.Host, c.xfcc)
	p.Fields = ex.Request.Fields
	return refused
}

//nolint:gochecknoglobals // constants
var (
	httpScheme  = []byte("http")
	httpsScheme = []byte("https")
)

// normalize brings path and authority to the one form that policy sees and
// that is forwarded.
func (h *Head) normalize(host []byte, fallback string) *Error {
	if len(h.Path) != 1 || h.Path[0] != '*' {
		path := view(h.Path)
		normal, err := intentions.NormalizePath(path)
		if err != nil {
			return &Error{Reason: BadRequest, Detail: "the path is ambiguous", Err: err}
		}
		if normal != path {
			h.Path = []byte(normal)
		}
	}
	if len(host) == 0 {
		if fallback == "" {
			return &Error{Reason: BadRequest, Detail: "the request names no host"}
		}
		host = []byte(fallback)
	}
	normal, err := intentions.NormalizeHost(view(host))
	if err != nil {
		return &Error{Reason: BadRequest, Detail: "the host is not valid", Err: err}
	}
	port := portOf(host)
	if view(host[:len(host)-len(port)]) == normal {
		h.Authority = host
		return nil
	}
	h.Authority = append([]byte(normal), port...)
	return nil
}

// portOf returns the colon and the port at the end of a valid host, if any.
func portOf(host []byte) []byte {
	for i := len(host) - 1; i >= 0 && host[i] != ']'; i-- {
		if host[i] == ':' {
			return host[i:]
		}
	}
	return nil
}

// view is b as a string that must not outlive it.
func view(b []byte) string {
	return unsafe.String(unsafe.SliceData(b), len(b)) //nolint:gosec // a view for the length of a call; b does not change meanwhile
}

// exchange serves the parsed request. It reports whether another may follow;
// an error means that the connection must be reset.
func (j *job) exchange() (again bool, failed *Error) {
	ex := &j.ex
	var resp Response
	if err := j.prepare(); err != nil {
		j.close = true // nothing behind what was refused is looked at
		resp = ex.Fail(err)
	} else {
		resp = j.conn.srv.cfg.Handler.Handle(ex)
	}
	if !j.conn.begin(resp) {
		failed = &Error{Reason: ClientGone}
	} else {
		failed = j.respond(&resp)
	}
	j.conn.end()
	if failed != nil {
		resp.Cancel(failed.Reason)
	}
	resp.Close()
	j.record(failed)
	// What the handler appended may have moved the list.
	j.parser.Fields = ex.Request.Fields[:0]
	if failed != nil {
		return false, failed
	}
	return !j.close && j.finishBody(), nil
}

// begin makes the response known to Abort.
func (c *Conn) begin(resp Response) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.response = resp
	return c.aborted == None
}

func (c *Conn) end() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.response = nil
}

// respond pulls the response and writes it. A failure before the head becomes
// a response of our own, in *resp.
func (j *job) respond(resp *Response) *Error {
	for {
		head, err := (*resp).Head(nil)
		if err != nil {
			if err := j.replace(resp, asError(err)); err != nil {
				return err
			}
			continue
		}
		if head.Status >= 200 || head.Status == 101 {
			return j.final(head, *resp)
		}
		if j.parser.Minor == 0 {
			continue // RFC 9110 section 15.2: HTTP/1.0 knows no 1xx
		}
		out := http1.AppendStatusLine(j.writer.begin(), head.Status, head.Reason)
		out = http1.AppendFields(out, head.Fields)
		if err := j.writer.flush(append(out, http1.LineEnd...)); err != nil {
			return &Error{Reason: ClientGone, Err: err}
		}
	}
}

// replace puts an error's own response in the place of one that failed.
func (j *job) replace(resp *Response, err *Error) *Error {
	if err.StatusCode() == 0 {
		return err
	}
	reply := j.ex.Fail(err)
	j.conn.end()
	(*resp).Cancel(err.Reason)
	(*resp).Close()
	*resp = reply
	if !j.conn.begin(reply) {
		return &Error{Reason: ClientGone}
	}
	return nil
}

// final writes the final head and the body.
func (j *job) final(head *ResponseHead, resp Response) *Error {
	w := &j.writer
	out := http1.AppendStatusLine(w.begin(), head.Status, head.Reason)
	out = http1.AppendFields(out, head.Fields)
	if head.Status == 101 {
		return j.tunnel(append(append(out, http1.LineWebSocket...), http1.LineEnd...), resp)
	}
	// The head tells our own replies, whatever a handler wrapped around them.
	if head == &j.ex.reply.head && !j.src.eof.Load() && !j.buffered() {
		j.close = true // whether its body comes, nobody knows
	}
	j.close = j.close || !j.parser.KeepAlive || j.conn.leaving()
	_, announced := head.Fields.Known(http1.Trailer)
	switch {
	case announced && !head.NoBody && !resp.Blocking() && j.parser.Minor > 0:
		// Over HTTP/2 trailers may follow a body of declared length.
		w.chunked = true
		out = append(out, http1.LineChunked...)
	case head.Length >= 0 && (!head.NoBody || !http1.NoBodyStatus(head.Status) || head.Status == 304):
		out = http1.AppendLength(out, head.Length)
	case head.NoBody:
	case j.parser.Minor > 0:
		w.chunked = true
		out = append(out, http1.LineChunked...)
	default:
		j.close = true
	}
	switch {
	case j.close:
		out = append(out, http1.LineClose...)
	case j.parser.Minor == 0:
		out = append(out, http1.LineKeepAlive...)
	}
	out = append(out, http1.LineEnd...)
	j.sent = head.Status
	if head.NoBody {
		if err := w.flush(out); err != nil {
			return &Error{Reason: ClientGone, Err: err}
		}
		return nil
	}
	pulled, err := w.pipe(out, resp)
	switch {
	case pulled != nil:
		return pulled
	case err != nil:
		return &Error{Reason: ClientGone, Err: err}
	case head.Length >= 0 && w.bytes != head.Length:
		return &Error{Reason: Internal, Detail: "the body's length is not the declared one"}
	}
	return nil
}

// tunnel carries bytes both ways after a switch: the client's are pulled by
// the forwarding side.
func (j *job) tunnel(head []byte, resp Response) *Error {
	j.close, j.sent = true, 101
	pulled, err := j.writer.pipe(head, resp)
	switch {
	case pulled != nil:
		return pulled
	case err != nil:
		return &Error{Reason: ClientGone, Err: err}
	}
	return nil
}

// leaving reports that the next response must say close.
func (c *Conn) leaving() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.draining || c.retiring
}

// buffered reports that the whole rest of the request's body was read already.
func (j *job) buffered() bool {
	b := j.src.buf
	return j.src.framing == http1.Sized && int64(b.w-b.r) >= j.src.left
}

// record tells the sink.
func (j *job) record(failed *Error) {
	j.ex.Tell(&j.conn.srv.cfg, &Outcome{Status: j.sent, RequestBytes: j.src.bytes, ResponseBytes: j.writer.bytes, Failed: failed})
}

// refuse answers a head that the codec refused.
func (j *job) refuse(err error) error {
	refused := &Error{Reason: BadRequest, Err: err}
	if e, ok := errors.AsType[*http1.Error](err); ok {
		refused.Status, refused.Detail = e.Status, e.Reason
	}
	return j.answer(refused)
}

// answer answers where there is no valid request, and ends the connection.
func (j *job) answer(err *Error) error {
	c := j.conn
	j.ex.Begin(&c.info, nil, &Head{}, j.began)
	j.writer = bodyWriter{link: &c.link, idle: c.srv.cfg.StreamIdle, progress: &j.ex.progress}
	j.parser = http1.Request{Fields: j.parser.Fields[:0], Minor: 1}
	j.src.eof.Store(true)
	resp := j.ex.Fail(err)
	failed := j.final(&j.ex.reply.head, resp)
	j.record(failed)
	if failed != nil {
		return failed
	}
	j.linger()
	return io.EOF
}

// finishBody reads what is left of the request's body if that is little and
// soon there, so that the connection can be used again.
func (j *job) finishBody() bool {
	if j.body.cancelled.Load() != 0 {
		j.conn.link.resume()
	}
	if j.ex.Upgrade != "" || j.src.eof.Load() {
		return true
	}
	if j.src.err != nil || j.src.framing == http1.Sized && j.src.left > drainBytes {
		return false
	}
	j.src.deadline = instant() + int64(drainTime)
	for from := j.src.bytes; j.src.bytes-from <= drainBytes; {
		_, err := j.src.next(largeSize, nil)
		if ended(err) {
			return true
		}
		if err != nil {
			return false
		}
	}
	return false
}

// linger closes so that the client can read the response: a close with unread
// bytes would be a reset, and that destroys what is still on its way.
func (j *job) linger() {
	l := &j.conn.link
	if l.interrupted.Load() {
		l.resume()
	}
	if l.closeWrite() != nil {
		return
	}
	by := instant() + int64(drainTime)
	b := j.src.buf
	for total := 0; total < 16*drainBytes; {
		n, err := l.read(b.b, by, nil)
		if err != nil {
			return
		}
		total += n
	}
}

// requestBody is the body of a request on an HTTP/1 connection.
type requestBody struct {
	job       *job
	cancelled atomic.Uint32 // the Reason, if any
}

func (b *requestBody) reset() { b.cancelled.Store(0) }

// Next reads on.
func (b *requestBody) Next(limit int, w Waker) ([]byte, error) {
	s := &b.job.src
	if b.job.ex.Upgrade != "" && s.framing != http1.UntilClose {
		s.raw() // pulled after the switch, by contract
	}
	view, err := s.next(limit, w)
	if err != nil && errors.Is(err, errInterrupted) {
		s.err = &Error{Reason: Reason(b.cancelled.Load()), Err: err} //nolint:gosec // stored from a Reason
		return nil, s.err
	}
	return view, err
}

// Trailers returns the trailer fields.
func (b *requestBody) Trailers() http1.Fields { return b.job.src.trailers() }

// Cancel stops the reading.
func (b *requestBody) Cancel(r Reason) {
	if b.job.src.eof.Load() || r == None {
		return
	}
	if b.cancelled.CompareAndSwap(0, uint32(r)) {
		b.job.conn.link.interrupt()
	}
}

// Blocking is true: bytes come only while somebody pulls.
func (*requestBody) Blocking() bool { return true }
