package http2

import (
	"errors"
	"io"
	"sync"
	"time"

	"github.com/meshd/meshd/proxy/http1"
	"github.com/meshd/meshd/proxy/l7"
)

// maxAttempts bounds how often a request is sent.
const maxAttempts = 3

// forward is one exchange over a stream of a pool: the [l7.Response], and its
// stream's owner. It is used again after Close, as soon as no connection has it
// any more.
//
// Of its locks, pull belongs to what is sent, and keeps the exchange from ending
// while a connection's writer looks at it; mu belongs to the rest. Who needs both takes
// pull first. The pool's lock comes between them, a connection's is the last. None
// is held while anything blocks.
type forward struct {
	stream

	pool  *Pool
	timer *time.Timer
	rang  chan struct{} // one token: who blocks in Head or Next is to look

	pull   sync.Mutex
	ex     *l7.Exchange // nil once Close was called
	body   forwardBody
	path   []byte
	tunnel bool // the switch was seen: the body may be asked

	queuedAt int64 // under the pool's lock

	mu        sync.Mutex
	turn      uint64        // counts the exchanges that used f
	uc        *upstreamConn // that the stream is on
	sid       uint32        // its number, 0 before it is open
	begun     bool
	busy      bool // the pool or a connection has it
	closed    bool // Close was called
	released  bool // and is done with it
	done      bool // nothing more will be sent on this stream
	leaving   bool // detach was called
	again     bool // to be sent again
	attempts  int
	deadline  int64
	interim   []*responseHead
	interims  int
	head      responseHead
	final     bool // head is there
	given     bool // and was returned
	trail     responseHead
	failed    *l7.Error
	cancelled bool // failed comes before what was received
	waker     l7.Waker
	blocked   bool // somebody waits for rang
	look      bool // and is to look whether the client is there
	got0      int64
}

func newForward(p *Pool) *forward {
	return &forward{pool: p, rang: make(chan struct{}, 1)}
}

func (f *forward) start(ex *l7.Exchange) {
	f.pull.Lock()
	f.ex, f.tunnel = ex, false
	f.body.begin(ex.Body)
	f.pull.Unlock()
	f.mu.Lock()
	f.turn++
	f.uc, f.sid, f.attempts, f.deadline, f.interims, f.got0 = nil, 0, 0, 0, 0, 0
	f.begun, f.busy, f.closed, f.released, f.done, f.leaving, f.again = false, false, false, false, false, false, false
	f.final, f.given, f.cancelled, f.blocked, f.look = false, false, false, false, false
	f.failed, f.waker = nil, nil
	f.trail.Fields = f.trail.Fields[:0]
	f.mu.Unlock()
}

// Blocking is false: a connection has a reader of its own.
func (*forward) Blocking() bool { return false }

// sleeper wakes who blocks.
type sleeper forward

// Wake implements l7.Waker.
func (s *sleeper) Wake() {
	select {
	case s.rang <- struct{}{}:
	default:
	}
}

// sleep waits for the sleeper to be woken, and looks after the client.
func (f *forward) sleep() {
	f.mu.Lock()
	f.blocked = true
	f.mu.Unlock()
	<-f.rang
	f.mu.Lock()
	look := f.look
	f.blocked, f.look = false, false
	f.mu.Unlock()
	if client := f.ex.Client; look && client != nil && client.Gone() {
		f.abort(errClientGone)
	}
}

// Head returns the next head. Its first call looks for a connection.
func (f *forward) Head(w l7.Waker) (*l7.ResponseHead, error) {
	f.mu.Lock()
	if !f.begun {
		f.begun = true
		if f.failed == nil {
			f.busy = true
			f.arm()
			f.mu.Unlock()
			f.pool.assign(f)
			f.mu.Lock()
		}
	}
	for {
		switch {
		case f.cancelled:
		case len(f.interim) > 0:
			h := f.interim[0]
			f.interim = f.interim[1:]
			f.mu.Unlock()
			return &h.ResponseHead, nil
		case f.final && !f.given:
			f.given = true
			f.mu.Unlock()
			return &f.head.ResponseHead, nil
		case f.failed == nil && w != nil:
			f.waker = w
			f.mu.Unlock()
			return nil, l7.ErrPending
		case f.failed == nil:
			f.waker = (*sleeper)(f)
			f.mu.Unlock()
			f.sleep()
			f.mu.Lock()
			continue
		}
		err := f.failed
		f.mu.Unlock()
		return nil, err
	}
}

// Next returns the next bytes of the body.
func (f *forward) Next(limit int, w l7.Waker) ([]byte, error) {
	from := w
	if w == nil {
		from = (*sleeper)(f)
	}
	for {
		f.mu.Lock()
		failed := f.failed
		if !f.cancelled && f.uc != nil {
			failed = nil // what came before it comes first
		}
		f.mu.Unlock()
		if failed != nil {
			return nil, failed
		}
		view, err := f.stream.Next(limit, from)
		switch err {
		case nil, io.EOF: //nolint:errorlint // as it is, by contract
			if len(view) > 0 {
				f.ex.Moved()
			}
			return view, err
		case l7.ErrPending:
			if w != nil {
				return nil, err
			}
			f.sleep()
		default:
			return nil, lost(l7.AsError(err))
		}
	}
}

// Trailers returns the trailer fields.
func (f *forward) Trailers() http1.Fields {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.trail.Fields
}

// wholeLocked reports that the response was returned to its end.
func (f *forward) wholeLocked() bool {
	if f.uc == nil || !f.given {
		return false
	}
	c := &f.uc.conn
	c.mu.Lock()
	defer c.mu.Unlock()
	return f.stream.whole || f.head.NoBody && f.stream.ended
}

func (f *forward) awakeLocked() l7.Waker {
	w := f.waker
	f.waker = nil
	return w
}

// fail ends an exchange that has no stream.
func (f *forward) fail(e *l7.Error) {
	if e == errWaiting || e == errPatience {
		f.pool.cfg.Counters.Waiting.Add(1)
	}
	f.mu.Lock()
	if f.failed == nil {
		f.failed = e
	}
	f.busy = false
	over := f.released
	w := f.awakeLocked()
	f.mu.Unlock()
	if w != nil {
		w.Wake()
	}
	if over {
		f.put()
	}
}

// arm starts the deadline.
func (f *forward) arm() {
	if f.ex.Deadline.IsZero() {
		return
	}
	left := time.Until(f.ex.Deadline)
	f.deadline = l7.Instant() + int64(left)
	if f.timer == nil {
		f.timer = time.AfterFunc(left, f.expire)
	} else {
		f.timer.Reset(left)
	}
}

// watch is asked about once a second while the stream is open. got is what came so far.
func (f *forward) watch(uc *upstreamConn, id uint32, got int64) {
	f.pull.Lock()
	f.mu.Lock()
	if f.uc != uc || f.sid != id || f.closed {
		f.mu.Unlock()
		f.pull.Unlock()
		return
	}
	if got != f.got0 {
		f.got0 = got
		f.ex.Moved()
	}
	idle := f.pool.cfg.StreamIdle
	silent := idle > 0 && f.ex.Silent() > idle
	if f.blocked {
		f.look = true
		(*sleeper)(f).Wake()
	}
	turn := f.turn
	f.mu.Unlock()
	f.pull.Unlock()
	if silent {
		uc.conn.count.Idle.Add(1)
		f.abortTurn(turn, errSilent)
	}
}

// attach puts f on a connection. The pool's lock is held. It reports false if
// the exchange is over already.
func (f *forward) attach(uc *upstreamConn) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed || f.failed != nil {
		return false
	}
	f.uc, f.sid, f.done, f.leaving, f.again = uc, 0, false, false, false
	f.stream.begin(&uc.conn, f)
	f.stream.expect = 0 // nothing may come before the head
	f.stream.waker = (*early)(f)
	f.stream.Wake()
	return true
}

// early is the Waker of a stream's body before its head is there: what wakes it
// is an end without a head.
type early forward

// Wake implements l7.Waker.
func (e *early) Wake() {
	f := (*forward)(e)
	f.mu.Lock()
	uc, id := f.uc, f.sid
	wrong := uc != nil && id != 0 && !f.final && f.failed == nil && !f.again && !f.closed
	f.mu.Unlock()
	if !wrong {
		return
	}
	c := &uc.conn
	c.mu.Lock()
	wrong = c.streams[id] == &f.stream && f.stream.ended
	if wrong {
		f.stream.ended = false // not as it should
	}
	c.mu.Unlock()
	if wrong {
		uc.refuse(f, id, errResponseOrder)
	}
}

// sendHead implements owner.
func (f *forward) sendHead() (bool, error) {
	f.pull.Lock()
	defer f.pull.Unlock()
	if f.ex == nil {
		return false, errClosed
	}
	uc := f.uc // no other is given while the writer has the stream
	id, err := uc.number(f)
	if err != nil {
		return false, err
	}
	f.mu.Lock()
	failed := f.failed
	if failed == nil {
		f.sid = id
	}
	f.mu.Unlock()
	if failed != nil {
		return false, failed
	}
	c := &uc.conn
	if !c.open(&f.stream, id) {
		return false, uc.ended()
	}
	uc.nextID += 2
	f.body.at = 0
	end := f.ex.Body == nil
	mark := c.beginHead()
	c.writing = appendRequest(c.enc, c.writing, f.ex, &f.path)
	c.endHead(mark, id, end)
	f.ex.Moved()
	return end, nil
}

// next implements owner.
func (f *forward) next(limit int) ([]byte, error) {
	f.pull.Lock()
	defer f.pull.Unlock()
	switch {
	case f.ex == nil:
		return nil, errClosed
	case f.ex.Upgrade != "" && !f.tunnel:
		return nil, l7.ErrPending
	}
	view, err := f.body.next(limit, &f.stream)
	if len(view) > 0 {
		f.ex.Moved()
	}
	return view, err
}

// trailers implements owner.
func (f *forward) trailers() http1.Fields {
	f.pull.Lock()
	defer f.pull.Unlock()
	if f.ex == nil || f.ex.Upgrade != "" {
		return nil
	}
	return f.body.trailers()
}

// broken implements owner: the request's body failed, or there was no stream.
func (f *forward) broken(err error) ErrCode {
	f.ended(l7.AsError(err), false)
	return Cancelled
}

// over implements owner.
func (f *forward) over() {
	f.mu.Lock()
	f.done = true
	uc := f.uc
	f.mu.Unlock()
	f.leave(uc)
}

// killed implements owner.
func (f *forward) killed(err *l7.Error) {
	f.mu.Lock()
	uc := f.uc
	f.mu.Unlock()
	c := &uc.conn
	c.mu.Lock()
	whole := f.stream.ended
	c.mu.Unlock()
	f.ended(err, whole)
	f.leave(uc)
}

// ended decides what the end of the stream means: nothing for a response that
// is whole, another attempt, or the exchange's failure.
func (f *forward) ended(err *l7.Error, whole bool) {
	f.pull.Lock()
	f.mu.Lock()
	switch {
	case whole || f.failed != nil:
	case f.repeats(err):
		f.again = true
		f.attempts++
		f.ex.Record.Retried = true
	default:
		f.failed = lost(err)
	}
	w := f.awakeLocked()
	f.mu.Unlock()
	f.pull.Unlock()
	if w != nil {
		w.Wake()
	}
}

// repeats reports that the request may be sent again: the peer says that it did
// not process it, or a connection that had served before died before a byte of the
// response to a request that changes nothing by coming twice.
func (f *forward) repeats(err *l7.Error) bool {
	if f.ex == nil || f.closed || f.final || f.interims > 0 || f.attempts+1 >= maxAttempts || !f.body.repeatable() {
		return false
	}
	if reset, ok := errors.AsType[*ResetError](err.Err); ok {
		return reset.Code == RefusedStream
	}
	_, ours := errors.AsType[*ConnError](err.Err)
	if ours && !f.uc.served.Load() {
		return false // who is there does not speak HTTP/2
	}
	if err == errUnprocessed || f.sid == 0 && err.Reason == l7.UpstreamReset {
		return true
	}
	return err.Reason == l7.UpstreamReset && !ours && f.attempts == 0 && f.ex.Body == nil &&
		f.uc.served.Load() && http1.Repeatable(f.ex.Request.Method)
}

// recycle implements owner: no connection has the stream any more.
func (f *forward) recycle() {
	f.mu.Lock()
	uc, again := f.uc, f.again && !f.closed && f.failed == nil
	f.uc, f.sid, f.again = nil, 0, false
	f.busy = again
	put := f.released && !again
	f.mu.Unlock()
	f.pool.release(uc)
	switch {
	case again:
		f.pool.assign(f)
	case put:
		f.put()
	}
}

// lost gives an error of a connection the reason that fits: what the peer did
// against the protocol is not a mere reset.
func lost(e *l7.Error) *l7.Error {
	if _, ours := errors.AsType[*ConnError](e.Err); ours && e.Reason == l7.UpstreamReset {
		return &l7.Error{Reason: l7.UpstreamProtocol, Err: e.Err}
	}
	return e
}

// Failures that tell nothing more than this.
//
//nolint:gochecknoglobals // constants
var (
	errClientGone  = &l7.Error{Reason: l7.ClientGone}
	errClosed      = &l7.Error{Reason: l7.EarlyResponse}
	errDeadline    = &l7.Error{Reason: l7.Timeout}
	errSilent      = &l7.Error{Reason: l7.Timeout, Detail: "no byte in either direction for too long"}
	errWaiting     = &l7.Error{Reason: l7.Overload, Detail: "too many requests wait for a stream to the chosen instance"}
	errPatience    = &l7.Error{Reason: l7.Overload, Detail: "no stream to the chosen instance became free in time"}
	errNoConnect   = &l7.Error{Reason: l7.UpgradeRefused, Detail: "the instance does not take WebSockets over HTTP/2"}
	errUnprocessed = &l7.Error{Reason: l7.UpstreamReset, Err: errors.New("the upstream's GOAWAY says that it did not process the request")}
)
