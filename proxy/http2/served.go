package http2

import (
	"crypto/rand"
	"encoding/base64"
	"io"
	"sync"

	"github.com/meshd/meshd/proxy/http1"
	"github.com/meshd/meshd/proxy/l7"
)

// pullLimit is how much is pulled at once of a response that blocks.
const pullLimit = 64 << 10

// served is one exchange on a serving end, with the stream that carries it.
type served struct {
	stream

	srv    *Server
	client *Conn
	ex     l7.Exchange
	head   requestHead // what ex.Request's views point into

	// The response. It is closed by the writer, or by the worker if there is one
	// that still runs.
	status   int
	failed   *l7.Error
	tunnel   bool
	peeked   []byte // bytes of the body that came with the head
	peekErr  error
	hasPeek  bool
	behind   http1.Fields // trailers that a worker gave
	declared int64        // length, -1 if unknown

	first     *l7.ResponseHead // what the reader got when it asked first
	firstErr  error
	hasFirst  bool
	blocking  bool
	work      func()        // x.serve, made once
	taken     chan struct{} // one token: the offer was taken
	reply     bool          // resp is a reply of our own, put in the place of one that failed
	lingering bool          // the worker closes; under conn.mu
	atWork    bool          // the worker runs; under conn.mu
	inUse     bool          // the writer's: an offer was taken, and the worker waits
	offer     offer         // under conn.mu

	mu   sync.Mutex // orders Cancel, Close and review
	resp l7.Response
	at   *Conn // while resp is not nil
	num  uint32
}

// offer is what a worker pulled.
type offer struct {
	head     *l7.ResponseHead
	body     []byte
	err      error
	has      bool
	hasBody  bool // body and err are of Next; else err is of Head
	trailers http1.Fields
}

// Next implements l7.Body, for the request's body.
func (x *served) Next(limit int, w l7.Waker) ([]byte, error) {
	view, err := x.stream.Next(limit, w)
	if len(view) > 0 {
		x.ex.Moved()
	}
	return view, err
}

// start asks the handler, on the reader's goroutine, and asks its response first.
func (x *served) start(refused *l7.Error) {
	c := x.client
	var resp l7.Response
	if refused != nil {
		resp = x.ex.Fail(refused)
	} else {
		resp = c.srv.cfg.Handler.Handle(&x.ex)
	}
	x.mu.Lock()
	x.resp, x.at, x.num = resp, c, x.id
	x.mu.Unlock()
	if resp.Blocking() {
		x.blocking = true
		if x.taken == nil {
			x.taken = make(chan struct{}, 1)
		}
		c.conn.mu.Lock()
		x.pinned, x.atWork = false, true
		c.conn.mu.Unlock()
		go x.work()
		return
	}
	x.first, x.firstErr = resp.Head(&x.stream)
	x.hasFirst = x.firstErr != l7.ErrPending //nolint:errorlint // as it is, by contract
	c.conn.mu.Lock()
	x.pinned = false
	if x.hasFirst || x.woken || x.dead {
		c.enqueue(&x.stream)
	}
	c.conn.mu.Unlock()
}

// serve pulls a response that blocks. It is the worker.
func (x *served) serve() {
	resp, c := x.resp, &x.client.conn
	for {
		head, err := resp.Head(nil)
		o := offer{head: head, err: err, has: true}
		if err == nil && (head.Status >= 200 || head.Status == 101) {
			x.pull(resp, o)
			return
		}
		if !x.give(o, err != nil) {
			return
		}
		if !x.wait(c) {
			return
		}
	}
}

// pull pulls the body, behind the final head.
func (x *served) pull(resp l7.Response, o offer) {
	c := &x.client.conn
	if !o.head.NoBody {
		o.body, o.err = resp.Next(pullLimit, notNow{})
		o.hasBody = o.err != l7.ErrPending //nolint:errorlint // as it is, by contract
		if !o.hasBody {
			o.err = nil
		}
	}
	for {
		last := o.err != nil || o.head != nil && o.head.NoBody
		if o.err == io.EOF { //nolint:errorlint // as it is, by contract
			o.trailers = resp.Trailers()
		}
		if !x.give(o, last) || !x.wait(c) {
			return
		}
		for last {
			if !x.wait(c) {
				return
			}
		}
		o = offer{has: true, hasBody: true}
		o.body, o.err = resp.Next(pullLimit, nil)
	}
}

// give offers what was pulled to the writer. With the last offer the worker ends, unless
// closing the response may have to wait for the end of the request. It reports
// whether the worker goes on.
func (x *served) give(o offer, last bool) bool {
	c := &x.client.conn
	leaves := last && (x.ex.Body == nil || o.err != nil && o.err != io.EOF) //nolint:errorlint // as it is, by contract
	c.mu.Lock()
	if x.lingering { // the writer is done with the stream
		c.mu.Unlock()
		x.finish()
		return false
	}
	x.offer = o
	x.atWork = !leaves
	c.enqueue(&x.stream)
	c.mu.Unlock()
	return !leaves
}

// wait waits until the offer was taken. It reports false if that was the end: the
// response is closed then.
func (x *served) wait(c *conn) bool {
	<-x.taken
	c.mu.Lock()
	over := x.lingering
	c.mu.Unlock()
	if over {
		x.finish()
	}
	return !over
}

// take takes what the worker offers, and lets it go on once it was sent.
func (x *served) take() (offer, bool) {
	c := &x.client.conn
	c.mu.Lock()
	defer c.mu.Unlock()
	o := x.offer
	x.offer = offer{}
	x.inUse = o.has
	return o, o.has
}

// goOn lets the worker pull on, if it waits because an offer is in use.
func (x *served) goOn() {
	if x.inUse {
		x.inUse = false
		x.token()
	}
}

func (x *served) token() {
	select {
	case x.taken <- struct{}{}:
	default: // it has one already
	}
}

// nextHead returns the next head, of a worker or of an active response.
func (x *served) nextHead() (*l7.ResponseHead, error) {
	switch {
	case x.hasFirst:
		x.hasFirst = false
		return x.first, x.firstErr
	case !x.blocking || x.reply:
		return x.resp.Head(&x.stream)
	}
	o, ok := x.take()
	if !ok {
		return nil, l7.ErrPending
	}
	if o.head != nil && o.hasBody {
		x.peeked, x.peekErr, x.hasPeek, x.behind = o.body, o.err, true, o.trailers
		return o.head, nil
	}
	return o.head, o.err
}

// sendHead implements owner.
func (x *served) sendHead() (bool, error) {
	for {
		head, err := x.nextHead()
		switch {
		case err == l7.ErrPending: //nolint:errorlint // as it is, by contract
			return false, err
		case err != nil:
			if err := x.replace(l7.AsError(err)); err != nil {
				return false, err
			}
			continue
		case head.Status >= 200 || head.Status == 101:
			return x.final(head), nil
		}
		c := &x.client.conn
		mark := c.beginHead()
		c.writing = c.enc.Status(c.enc.Begin(c.writing), head.Status)
		x.appendFields(head)
		c.endHead(mark, x.id, false)
		if x.blocking && !x.reply {
			x.goOn()
		}
	}
}

// replace puts an error's own response in the place of one that failed.
func (x *served) replace(err *l7.Error) *l7.Error {
	if err.StatusCode() == 0 || x.reply {
		return err
	}
	reply := x.ex.Fail(err)
	x.mu.Lock()
	old := x.resp
	x.resp = reply
	x.mu.Unlock()
	old.Cancel(err.Reason)
	old.Close() // a worker has ended with its error
	x.reply = true
	return nil
}

// final appends the final head, and reports whether the stream ends with it.
func (x *served) final(head *l7.ResponseHead) bool {
	c := &x.client.conn
	status := head.Status
	if status == 101 {
		x.tunnel, status = true, 200
	}
	x.declared = -1
	end := head.NoBody
	if !end {
		x.declared = head.Length
		if !x.hasPeek && (!x.blocking || x.reply) {
			x.peek()
		}
		end = x.hasPeek && x.peekErr == io.EOF && len(x.peeked) == 0 && len(x.trailers()) == 0 //nolint:errorlint // as it is, by contract
	}
	mark := c.beginHead()
	c.writing = c.enc.Status(c.enc.Begin(c.writing), status)
	x.appendFields(head)
	if !x.tunnel && head.Length >= 0 && (!head.NoBody || !http1.NoBodyStatus(head.Status) || head.Status == 304) {
		c.writing = c.enc.Length(c.writing, head.Length)
	}
	if end && x.declared > 0 {
		end = false // what is missing is found behind the head
	}
	c.endHead(mark, x.id, end)
	x.status = head.Status
	if x.blocking && !x.reply && !x.hasPeek {
		x.goOn()
	}
	return end
}

func (x *served) appendFields(head *l7.ResponseHead) {
	c := &x.client.conn
	for i := range head.Fields {
		f := &head.Fields[i]
		if http1.HopByHop(f.ID) || x.tunnel && isAccept(f.Name) {
			continue
		}
		c.writing = c.enc.Field(c.writing, f)
	}
}

// peek asks for the body's first bytes, so that an end that is known goes with
// the head.
func (x *served) peek() {
	x.peeked, x.peekErr = x.resp.Next(pullLimit, &x.stream)
	x.hasPeek = x.peekErr != l7.ErrPending //nolint:errorlint // as it is, by contract
}

// next implements owner.
func (x *served) next(limit int) ([]byte, error) {
	view, err := x.pullNext(limit)
	switch {
	case err == io.EOF: //nolint:errorlint // as it is, by contract
		if x.declared >= 0 && x.sent+int64(len(view)) != x.declared {
			return nil, &l7.Error{Reason: l7.Internal, Detail: "the body's length is not the declared one"}
		}
	case len(view) > 0:
		x.ex.Moved()
	}
	return view, err
}

func (x *served) pullNext(limit int) ([]byte, error) {
	if x.hasPeek {
		x.hasPeek = false
		view, err := x.peeked, x.peekErr
		x.peeked, x.peekErr = nil, nil
		return view, err
	}
	if !x.blocking || x.reply {
		return x.resp.Next(limit, &x.stream)
	}
	x.goOn() // what was offered before is sent
	o, ok := x.take()
	if !ok {
		return nil, l7.ErrPending
	}
	x.behind = o.trailers
	return o.body, o.err
}

// trailers implements owner.
func (x *served) trailers() http1.Fields {
	if x.blocking && !x.reply {
		return x.behind
	}
	return x.resp.Trailers()
}

// broken implements owner.
func (x *served) broken(err error) ErrCode {
	x.failed = l7.AsError(err)
	if x.failed.Reason == l7.Internal {
		return InternalError
	}
	return Cancelled
}

// killed implements owner.
func (x *served) killed(err *l7.Error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.resp != nil {
		x.resp.Cancel(err.Reason)
	}
}

// review lets f decide whether the exchange goes on, if it still is that of
// stream id of c.
func (x *served) review(c *Conn, id uint32, f func(*l7.Exchange) l7.Reason) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.resp == nil || x.at != c || x.num != id {
		return
	}
	if r := f(&x.ex); r != l7.None {
		x.resp.Cancel(r)
	}
}

// over implements owner: the writer is done.
func (x *served) over() {
	c := &x.client.conn
	c.mu.Lock()
	atWork := x.atWork
	x.lingering = atWork
	killed, got := x.killedBy, x.got
	c.mu.Unlock()
	if atWork {
		x.token()
		return
	}
	x.conclude(killed, got)
}

// finish is conclude for a worker.
func (x *served) finish() {
	c := &x.client.conn
	c.mu.Lock()
	killed, got := x.killedBy, x.got
	c.mu.Unlock()
	x.conclude(killed, got)
}

// conclude closes the response, tells of the exchange, and takes the stream off its
// connection. killed is why it ended early, got how many bytes came.
func (x *served) conclude(killed *l7.Error, got int64) {
	x.mu.Lock()
	resp := x.resp
	x.resp, x.at = nil, nil
	x.mu.Unlock()
	if x.failed == nil {
		x.failed = killed
	}
	if x.failed != nil {
		resp.Cancel(x.failed.Reason)
	}
	resp.Close()
	x.ex.Tell(&x.srv.cfg.ServerConfig, &l7.Outcome{Status: x.status, RequestBytes: got, ResponseBytes: x.sent, Failed: x.failed})
	x.client.conn.detach(&x.stream)
}

// recycle implements owner.
func (x *served) recycle() {
	if grown := x.ex.Request.Fields; cap(grown) > cap(x.head.fields) {
		x.head.fields = grown // what was appended moved the list
	}
	x.ex.Clear()
	x.head.clear()
	x.client, x.failed, x.first, x.firstErr, x.peeked, x.peekErr, x.offer = nil, nil, nil, nil, nil, nil, offer{}
	x.behind, x.hasFirst, x.hasPeek, x.blocking, x.reply, x.tunnel = nil, false, false, false, false, false
	x.lingering, x.inUse, x.atWork, x.status = false, false, false, 0
	select {
	case <-x.taken:
	default:
	}
	x.srv.streams.Put(x)
}

// Gone reports whether the client reset the stream, or is gone itself.
func (x *served) Gone() bool {
	c := x.stream.conn.Load()
	c.mu.Lock()
	defer c.mu.Unlock()
	return x.dead || c.ending
}

// notNow is the Waker of who wants only what is there already.
type notNow struct{}

// Wake does nothing.
func (notNow) Wake() {}

// websocketKey makes the key that HTTP/1 asks for and HTTP/2 does not have.
func websocketKey(dst *[24]byte) []byte {
	var b [16]byte
	_, _ = rand.Read(b[:]) // it never fails
	base64.StdEncoding.Encode(dst[:], b[:])
	return dst[:]
}
