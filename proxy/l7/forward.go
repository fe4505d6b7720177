package l7

import (
	"context"
	"errors"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/meshd/meshd/proxy/http1"
	"github.com/meshd/meshd/proxy/sock"
)

// finalWrite bounds how long the end of an exchange waits for the request's
// last bytes to leave, when the response is whole already.
const finalWrite = 100 * time.Millisecond

// forward is one exchange over an HTTP/1 connection of a pool: the [Response].
// It is used again after Close.
type forward struct {
	pool   *Pool
	ex     *Exchange
	up     *upstreamConn
	reused bool  // up came from the pool
	begun  bool  // the request was sent
	unsent bool  // nothing of it left
	early  error // of reading the answer, in the call that sent the request
	whole  bool  // the request was sent to its end, by the one that sent its head
	failed *Error

	parser http1.Response
	src    source
	head   ResponseHead
	final  bool
	keep   bool // the server lets the connection be used again
	writer bodyWriter
	look   func() error

	// The pump sends the rest of a request's body from a goroutine of its own.
	pump    func()
	pumping bool
	pumped  chan struct{} // one token when it ended
	lastOut atomic.Bool   // it has the body's last byte in hand
	pumpOK  atomic.Bool   // and sent it

	mu        sync.Mutex
	cancelled Reason
	cancel    context.CancelFunc // of the dial that runs
	current   *link              // what Cancel aborts
}

func newForward(p *Pool) *forward {
	f := &forward{pool: p, pumped: make(chan struct{}, 1)}
	f.look = f.lookUp
	f.pump = f.runPump
	return f
}

func (f *forward) start(ex *Exchange) {
	f.ex = ex
	f.reused, f.begun, f.unsent, f.whole, f.failed, f.early = false, false, false, false, nil, nil
	f.final, f.keep, f.pumping = false, false, false
	f.lastOut.Store(false)
	f.pumpOK.Store(false)
	f.parser.Reset()
	cfg := &f.pool.cfg
	s := &f.src
	s.limits, s.idle, s.progress, s.look = &cfg.Limits, cfg.StreamIdle, &ex.progress, f.look
	s.lost, s.slow = UpstreamReset, Timeout
	f.mu.Lock()
	f.cancelled = None
	f.mu.Unlock()
}

// Blocking is true: the connection is read only while somebody pulls.
func (*forward) Blocking() bool { return true }

// Head connects and sends the request in its first call, then reads a head.
func (f *forward) Head(w Waker) (*ResponseHead, error) {
	if w != nil {
		return nil, ErrPending
	}
	if f.failed != nil {
		return nil, f.failed
	}
	if !f.begun {
		f.begun = true
		f.src.deadline = 0
		if !f.ex.Deadline.IsZero() {
			f.src.deadline = int64(f.ex.Deadline.Sub(epoch))
		}
		if err := f.connect(true); err != nil {
			return nil, f.fail(err)
		}
	}
	for {
		err := f.readHead()
		if err == nil {
			return &f.head, nil
		}
		if !f.mayRepeat(err) {
			return nil, f.fail(err)
		}
		f.up.link.close()
		f.ex.Record.Retried = true
		if err := f.connect(false); err != nil {
			return nil, f.fail(err)
		}
	}
}

// connect gets a connection and sends the request on it. A kept one that turns
// out to be dead before a byte left is replaced by a fresh one.
func (f *forward) connect(kept bool) error {
	for kept {
		u := f.pool.pop()
		if u == nil {
			break
		}
		sent, err := f.reuse(u)
		if sent || err != nil {
			return err
		}
	}
	u, err := f.dial()
	if err != nil {
		return &Error{Reason: ConnectFailed, Err: unexpected(err)}
	}
	if err := f.use(u, false); err != nil {
		return err
	}
	f.send()
	return nil
}

// reuse sends the request on a connection that was kept, if that is open and
// silent, and reports whether it did; if not, the connection is closed.
func (f *forward) reuse(u *upstreamConn) (sent bool, err error) {
	simple := f.ex.Body == nil && f.ex.Upgrade == "" && u.link.asks != nil
	if !simple && !u.link.quiet() {
		u.link.close()
		return false, nil
	}
	if f.use(u, true) != nil {
		return false, errInterrupted
	}
	if simple {
		f.unsent = true // until Ask
		f.src.asked = instant()
		n, err := u.link.ask((*question)(f), f.src.deadline, f.look)
		switch {
		case n > 0:
			f.src.buf.w = n
			f.ex.progress.Store(instant())
			return true, nil
		case errors.Is(err, sock.ErrBusy):
			u.link.close()
			return false, nil
		case !f.unsent:
			f.early = err
			return true, nil
		}
	} else if f.send(); !f.unsent || f.pumping {
		return true, nil
	}
	u.link.close()
	f.ex.Record.Retried = true
	return false, nil
}

// question is a request without a body, sent while waiting for its answer
// begins already.
type question forward

// Ask implements sock.Asker.
func (q *question) Ask() bool {
	f := (*forward)(q)
	f.send()
	return !f.unsent
}

// Lend implements sock.Lender.
func (q *question) Lend() []byte {
	q.src.buf = getBuffer()
	return q.src.buf.b
}

// Return implements sock.Lender.
func (q *question) Return() {
	q.src.buf.release()
	q.src.buf = nil
}

func (f *forward) dial() (*upstreamConn, error) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	if f.src.deadline != 0 {
		limited, stop := context.WithDeadline(ctx, f.ex.Deadline)
		defer stop()
		ctx = limited
	}
	f.mu.Lock()
	f.cancel = cancel
	cancelled := f.cancelled
	f.mu.Unlock()
	if cancelled != None {
		return nil, errInterrupted
	}
	u, err := f.pool.dial(ctx)
	f.mu.Lock()
	f.cancel = nil
	f.mu.Unlock()
	return u, err
}

// use makes u the connection of this exchange, unless it was cancelled.
func (f *forward) use(u *upstreamConn, reused bool) error {
	f.up, f.reused = u, reused
	f.src.link = &u.link
	f.writer = bodyWriter{link: &u.link, idle: f.pool.cfg.StreamIdle, progress: &f.ex.progress}
	f.mu.Lock()
	f.current = &u.link
	cancelled := f.cancelled
	f.mu.Unlock()
	if cancelled != None {
		u.link.abort()
		return errInterrupted
	}
	return nil
}

// send writes the head and what is there of the body, in one write, and
// starts the pump if more is to come. A failed write is not the end: the
// response may be there, and says more than the write.
func (f *forward) send() {
	ex, w := f.ex, &f.writer
	head := f.appendHead(w.begin())
	body := ex.Body
	if ex.Upgrade != "" {
		body = nil
	}
	if body == nil {
		err := w.flush(head)
		f.whole = err == nil
		f.unsent = err != nil && w.wire == 0
		return
	}
	f.unsent = false
	view, err := body.Next(bufferSize, noWait{})
	switch {
	case ended(err):
		f.whole = w.send(head, view, true, body.Trailers()) == nil
		return
	case errors.Is(err, ErrPending):
		err = w.flush(head)
	case err != nil:
		w.drop()
		f.Cancel(asError(err).Reason)
		return
	default:
		err = w.send(head, view, false, nil)
	}
	if err == nil {
		f.pumping = true
		go f.pump()
	}
}

func (f *forward) appendHead(out []byte) []byte {
	ex := f.ex
	h := &ex.Request
	out = http1.AppendRequestLine(out, h.Method, h.Path, h.RawQuery, h.HasQuery)
	out = http1.AppendField(out, "Host", h.Authority)
	out = appendFields(out, h.Fields)
	switch {
	case ex.Upgrade == "websocket":
		out = append(out, http1.LineWebSocket...)
	case ex.Body == nil:
		if http1.ExpectsBody(h.Method) {
			out = http1.AppendLength(out, 0)
		}
	case h.Length >= 0:
		out = http1.AppendLength(out, h.Length)
	default:
		f.writer.chunked = true
		out = append(out, http1.LineChunked...)
	}
	if ex.ExpectContinue {
		out = append(out, http1.LineExpect...)
	}
	return append(out, http1.LineEnd...)
}

// appendFields leaves out TE, which a request over HTTP/2 keeps as an end-to-end field.
func appendFields(out []byte, fields http1.Fields) []byte {
	for i := range fields {
		if fields[i].ID == http1.TE {
			return http1.AppendFields(http1.AppendFields(out, fields[:i]), fields[i+1:])
		}
	}
	return http1.AppendFields(out, fields)
}

// mayRepeat reports the one safe case of sending again: a kept connection died
// before a byte of the response, and the request has no body and changes
// nothing by coming twice.
func (f *forward) mayRepeat(err error) bool {
	var refused *http1.Error
	return f.reused && f.ex.Body == nil && f.src.buf.w == 0 && http1.Repeatable(f.ex.Request.Method) &&
		f.cancelReason() == None && !errors.As(err, &refused) && !errors.Is(err, os.ErrDeadlineExceeded)
}

// readHead reads one head into f.head.
func (f *forward) readHead() error {
	s := &f.src
	if s.buf == nil {
		s.buf = getBuffer()
	}
	if err := f.early; err != nil {
		f.early = nil
		return err
	}
	b := s.buf
	if b.r > 0 { // behind an interim head, which is void now
		b.w = copy(b.b, b.b[b.r:b.w])
		b.r = 0
	}
	f.parser.Reset()
	for {
		n, err := f.parser.Parse(b.b[b.r:b.w], s.limits)
		if err == nil {
			b.r += n
			return f.interpret()
		}
		if !errors.Is(err, http1.ErrShort) {
			return err
		}
		if b.w == len(b.b) && !b.grow(s.limits.HeadBytes) {
			return &http1.Error{Status: 502, Reason: "head is longer than the limit", Limit: http1.LimitHeadBytes}
		}
		n, err = s.fill(b.b[b.w:])
		if err != nil {
			return err
		}
		b.w += n
	}
}

// interpret turns the parsed head into the response's.
func (f *forward) interpret() error {
	p := &f.parser
	framing := p.BodyFor(f.ex.Request.Method)
	f.head = ResponseHead{Status: p.Status, Reason: p.Reason, Length: p.Length, NoBody: framing == http1.NoBody}
	f.head.Fields = p.EndToEnd()
	switch {
	case p.Status == 101:
		if f.ex.Upgrade == "" || !p.WebSocket {
			return &http1.Error{Status: 502, Reason: "a switch of protocols that nobody asked for"}
		}
		f.head.NoBody = false
		f.final = true
		f.src.base = f.src.buf.r
		f.src.raw()
		f.writer.chunked = false
		f.pumping = true
		go f.pump()
	case framing == http1.UntilClose && !f.up.link.plain:
		// No proxy of the mesh frames a body so, and some implementations of
		// TLS take the end of TCP for the end of the stream.
		return &http1.Error{Status: 502, Reason: "a body without length or chunks over TLS"}
	case p.Status >= 200:
		f.final = true
		f.keep = p.KeepAlive && framing != http1.UntilClose
		f.src.start(framing, p.Length)
	}
	return nil
}

// Next reads on.
func (f *forward) Next(limit int, w Waker) ([]byte, error) {
	if f.failed != nil {
		return nil, f.failed
	}
	view, err := f.src.next(limit, w)
	if err == nil || ended(err) || errors.Is(err, ErrPending) {
		return view, err
	}
	return nil, f.fail(err)
}

// Trailers returns the trailer fields.
func (f *forward) Trailers() http1.Fields { return f.src.trailers() }

// fail names what happened: a cancel is the cause of the errors that follow it.
func (f *forward) fail(err error) *Error {
	if reason := f.cancelReason(); reason != None {
		f.failed = &Error{Reason: reason, Err: err}
		return f.failed
	}
	var e *Error
	if !errors.As(err, &e) {
		e = f.src.fail(err)
	}
	if e.Reason == ConnectFailed && f.src.deadline != 0 && instant() >= f.src.deadline {
		e = &Error{Reason: Timeout, Err: err}
	}
	f.failed = e
	return e
}

func (f *forward) cancelReason() Reason {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.cancelled
}

// Cancel aborts the exchange.
func (f *forward) Cancel(r Reason) {
	if r == None {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.cancelled == None {
		f.cancelled = r
	}
	if f.cancel != nil {
		f.cancel()
	}
	if f.current != nil {
		f.current.abort()
	}
}

// lookUp is asked by a wait for the upstream about once a second.
func (f *forward) lookUp() error {
	if err := f.src.silent(); err != nil {
		return err
	}
	reading := f.pumping && (!f.lastOut.Load() || f.ex.Upgrade != "") // that finds out itself
	if !reading && f.ex.Client != nil && f.ex.Client.Gone() {
		return errGone
	}
	return nil
}

// runPump sends the rest of the request's body.
func (f *forward) runPump() {
	defer func() { f.pumped <- struct{}{} }()
	body, w := f.ex.Body, &f.writer
	tunnel := f.ex.Upgrade != ""
	for {
		view, err := body.Next(largeSize, nil)
		last := ended(err)
		if err != nil && !last {
			f.Cancel(asError(err).Reason)
			return
		}
		var trailers http1.Fields
		if last {
			f.lastOut.Store(true)
			trailers = body.Trailers()
		}
		if err := w.send(w.begin(), view, last, trailers); err != nil {
			body.Cancel(UpstreamReset)
			return
		}
		if last {
			f.pumpOK.Store(!tunnel)
			if tunnel {
				_ = w.link.closeWrite() // if it fails, reading fails as well
			}
			return
		}
	}
}

// stopPump returns when the pump has ended. It has the request's last bytes in
// hand if the response is whole because all was read; then it may finish.
func (f *forward) stopPump(whole bool) {
	if !f.pumping {
		return
	}
	f.pumping = false
	if whole && f.lastOut.Load() {
		select {
		case <-f.pumped:
		default:
			cut := time.AfterFunc(finalWrite, f.up.link.abort)
			<-f.pumped
			cut.Stop()
		}
		return
	}
	f.ex.Body.Cancel(EarlyResponse)
	f.up.link.abort()
	<-f.pumped
}

// Close gives the connection back to the pool, or aborts it.
func (f *forward) Close() {
	complete := f.final && f.failed == nil && f.src.eof.Load()
	f.stopPump(complete)
	u := f.up
	f.mu.Lock()
	f.current = nil
	cancelled := f.cancelled
	f.mu.Unlock()
	clean := f.src.buf == nil || f.src.buf.r == f.src.buf.w
	switch {
	case u == nil:
	case cancelled == None && complete && f.keep && clean && (f.whole || f.pumpOK.Load()):
		f.pool.keep(u)
	case cancelled == None && complete && f.ex.Upgrade == "":
		u.link.close()
	default:
		u.link.abort()
	}
	f.src.release()
	f.src.link, f.src.progress = nil, nil
	f.up, f.ex, f.writer = nil, nil, bodyWriter{}
	clear(f.parser.Fields[:cap(f.parser.Fields)])
	f.pool.forwards.Put(f)
}
