package l7_test

import (
	"errors"
	"io"
	"sync"

	"github.com/meshd/meshd/proxy/http1"
	"github.com/meshd/meshd/proxy/l7"
)

// A second transport, in memory, with what HTTP/2 has and HTTP/1 lacks: many
// streams on one connection, one reader and one writer per end, windows, resets.
// No goroutine belongs to a stream. It is here to hold the contract of
// Exchange: both transports carry every message to each other.

const window = 8 << 10

type frameKind int

const (
	frameRequest frameKind = iota
	frameHead
	frameData
	frameEnd
	frameReset
	frameCredit
)

type frame struct {
	kind    frameKind
	id      int
	request *l7.Exchange     // frameRequest: a deep copy of the head
	head    *l7.ResponseHead // frameHead: a deep copy
	data    []byte
	fields  http1.Fields
	reason  l7.Reason
	n       int
}

// queue is an active body: filled by a connection's reader, which never blocks,
// drained by whoever pulls. What it holds is bounded by the window.
type queue struct {
	mu       sync.Mutex
	cond     *sync.Cond
	chunks   [][]byte
	lent     int // bytes returned by the last Next
	heads    []*l7.ResponseHead
	ended    bool
	trailers http1.Fields
	failed   *l7.Error
	waker    l7.Waker
	credit   func(n int)
	cancel   func(l7.Reason)
}

func newQueue(credit func(int), cancel func(l7.Reason)) *queue {
	q := &queue{credit: credit, cancel: cancel}
	q.cond = sync.NewCond(&q.mu)
	return q
}

// put changes the queue and wakes whoever waits for it.
func (q *queue) put(change func()) {
	q.mu.Lock()
	change()
	w := q.waker
	q.waker = nil
	q.cond.Broadcast()
	q.mu.Unlock()
	if w != nil {
		w.Wake()
	}
}

func (q *queue) fail(r l7.Reason) {
	q.put(func() {
		if q.failed == nil && !q.ended {
			q.failed = &l7.Error{Reason: r}
		}
	})
}

// wait returns true when there may be news, and false for ErrPending.
func (q *queue) wait(w l7.Waker) bool {
	if w != nil {
		q.waker = w
		return false
	}
	q.cond.Wait()
	return true
}

func (q *queue) Head(w l7.Waker) (*l7.ResponseHead, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for {
		switch {
		case len(q.heads) > 0:
			h := q.heads[0]
			q.heads = q.heads[1:]
			return h, nil
		case q.failed != nil:
			return nil, q.failed
		case !q.wait(w):
			return nil, l7.ErrPending
		}
	}
}

func (q *queue) Next(limit int, w l7.Waker) ([]byte, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.lent > 0 && q.credit != nil {
		q.credit(q.lent)
	}
	q.lent = 0
	for {
		switch {
		case len(q.chunks) > 0:
			view := q.chunks[0]
			if len(view) > limit {
				view, q.chunks[0] = view[:limit], view[limit:]
			} else {
				q.chunks = q.chunks[1:]
			}
			q.lent = len(view)
			return view, nil
		case q.failed != nil:
			return nil, q.failed
		case q.ended:
			return nil, io.EOF
		case !q.wait(w):
			return nil, l7.ErrPending
		}
	}
}

func (q *queue) Trailers() http1.Fields { return q.trailers }
func (*queue) Blocking() bool           { return false }

func (q *queue) Cancel(r l7.Reason) {
	q.mu.Lock()
	done := q.ended && len(q.chunks) == 0
	q.mu.Unlock()
	if done {
		return
	}
	q.fail(r)
	if q.cancel != nil {
		q.cancel(r)
	}
}

// pumped makes an active response or body of a blocking one, by bringing the
// goroutine that it lacks. size bounds what is ahead of the consumer.
func pumped(head func(l7.Waker) (*l7.ResponseHead, error), body l7.Body) (*queue, *sync.WaitGroup) {
	var wg sync.WaitGroup
	room := sync.NewCond(&sync.Mutex{})
	ahead, stopped := 0, false
	q := newQueue(func(n int) {
		room.L.Lock()
		ahead -= n
		room.L.Unlock()
		room.Signal()
	}, func(r l7.Reason) {
		body.Cancel(r)
		room.L.Lock()
		stopped = true
		room.L.Unlock()
		room.Signal()
	})
	wg.Go(func() {
		for final := head == nil; !final; {
			h, err := head(nil)
			if err != nil {
				q.put(func() { q.failed = failure(err) })
				return
			}
			final = h.Status >= 200
			clone := copyHead(h)
			q.put(func() { q.heads = append(q.heads, clone) })
		}
		for {
			view, err := body.Next(window, nil)
			if len(view) > 0 {
				data := append([]byte(nil), view...)
				q.put(func() { q.chunks = append(q.chunks, data) })
			}
			switch {
			case err == io.EOF: //nolint:errorlint // by contract as it is
				trailers := copyFields(body.Trailers())
				q.put(func() { q.ended, q.trailers = true, trailers })
				return
			case err != nil:
				q.put(func() { q.failed = failure(err) })
				return
			}
			room.L.Lock()
			for ahead += len(view); ahead > window && !stopped; {
				room.Wait()
			}
			room.L.Unlock()
		}
	})
	return q, &wg
}

func failure(err error) *l7.Error {
	var e *l7.Error
	if !errors.As(err, &e) {
		e = &l7.Error{Reason: l7.Internal, Err: err}
	}
	return e
}

func copyFields(f http1.Fields) http1.Fields {
	var out http1.Fields
	for i := range f {
		out.Add(append([]byte(nil), f[i].Name...), append([]byte(nil), f[i].Value...))
	}
	return out
}

func copyHead(h *l7.ResponseHead) *l7.ResponseHead {
	c := *h
	c.Reason = append([]byte(nil), h.Reason...)
	c.Fields = copyFields(h.Fields)
	return &c
}

// framedEnd is one end of a connection. With a handler it serves, without one
// it forwards.
type framedEnd struct {
	in      <-chan frame
	out     chan<- frame
	handler l7.Handler

	mu      sync.Mutex
	nextID  int
	streams map[int]*framedStream
	ready   []*framedStream
	control []frame
	bell    chan struct{}
	closed  chan struct{}
	wg      sync.WaitGroup
}

// framedStream is one exchange on one end: bytes come into its queue, and go
// out as its source gives them.
type framedStream struct {
	*queue
	end  *framedEnd
	id   int
	ex   *l7.Exchange
	resp l7.Response // serving: what is sent
	body l7.Body     // what is sent, resp or the request's body
	pump *sync.WaitGroup

	pull     sync.Mutex // held while the source is asked
	room     int        // that the peer's window has
	queued   bool
	headSent bool
	done     bool
}

// framed connects a forwarding end to a serving one with handler h, and returns
// it as an Upstream. stop ends both.
func framed(h l7.Handler) (up l7.Upstream, stop func()) {
	a, b := make(chan frame, 4), make(chan frame, 4)
	closed := make(chan struct{})
	client := &framedEnd{in: b, out: a, streams: map[int]*framedStream{}, bell: make(chan struct{}, 1), closed: closed}
	server := &framedEnd{in: a, out: b, handler: h, streams: map[int]*framedStream{}, bell: make(chan struct{}, 1), closed: closed}
	for _, e := range []*framedEnd{client, server} {
		e.wg.Go(e.read)
		e.wg.Go(e.write)
	}
	return client, func() {
		close(closed)
		client.wg.Wait()
		server.wg.Wait()
	}
}

func (e *framedEnd) ring() {
	select {
	case e.bell <- struct{}{}:
	default:
	}
}

// post sends a frame that no window holds back, from any goroutine.
func (e *framedEnd) post(f frame) {
	e.mu.Lock()
	e.control = append(e.control, f)
	e.mu.Unlock()
	e.ring()
}

// Wake marks the stream ready for the writer. It is the Waker of its source.
func (s *framedStream) Wake() {
	s.end.mu.Lock()
	if !s.queued {
		s.queued = true
		s.end.ready = append(s.end.ready, s)
	}
	s.end.mu.Unlock()
	s.end.ring()
}

func (e *framedEnd) add(id int, ex *l7.Exchange) *framedStream {
	s := &framedStream{end: e, id: id, ex: ex, room: window}
	s.queue = newQueue(
		func(n int) { e.post(frame{kind: frameCredit, id: id, n: n}) },
		func(r l7.Reason) { e.post(frame{kind: frameReset, id: id, reason: r}) },
	)
	e.mu.Lock()
	e.streams[id] = s
	e.mu.Unlock()
	return s
}

// Forward opens a stream. The request's body is asked by the writer, or by a
// goroutine if it blocks.
func (e *framedEnd) Forward(ex *l7.Exchange) l7.Response {
	e.mu.Lock()
	e.nextID++
	id := e.nextID
	e.mu.Unlock()
	s := e.add(id, ex)
	s.body, s.headSent = ex.Body, true
	request := &l7.Exchange{Request: ex.Request, ExpectContinue: ex.ExpectContinue, Conn: ex.Conn}
	request.Request.Fields = copyFields(ex.Request.Fields)
	request.Request.Method = append([]byte(nil), ex.Request.Method...)
	request.Request.Path = append([]byte(nil), ex.Request.Path...)
	e.post(frame{kind: frameRequest, id: id, request: request, n: bit(s.body != nil)})
	if s.body != nil {
		if s.body.Blocking() {
			s.body, s.pump = pumped(nil, s.body)
		}
		s.Wake()
	}
	return s
}

func bit(b bool) int {
	if b {
		return 1
	}
	return 0
}

// Close is the consumer's last call: the stream leaves the connection.
func (s *framedStream) Close() {
	s.pull.Lock()
	unsent := s.body != nil && !s.done
	s.done = true
	s.pull.Unlock()
	if unsent {
		s.body.Cancel(l7.EarlyResponse)
		s.end.post(frame{kind: frameReset, id: s.id, reason: l7.EarlyResponse})
	}
	if s.pump != nil {
		s.pump.Wait()
	}
	s.end.mu.Lock()
	delete(s.end.streams, s.id)
	s.end.mu.Unlock()
}

func (e *framedEnd) read() {
	for {
		select {
		case <-e.closed:
			return
		case f := <-e.in:
			e.take(f)
		}
	}
}

// take handles a frame, without ever blocking.
func (e *framedEnd) take(f frame) {
	if f.kind == frameRequest {
		s := e.add(f.id, f.request)
		if f.n == 1 {
			f.request.Body = s.queue
		}
		s.resp = e.handler.Handle(f.request)
		s.body = s.resp
		if s.resp.Blocking() {
			q, wg := pumped(s.resp.Head, s.resp)
			s.resp, s.body, s.pump = pumpedResponse{q, s.resp, wg}, q, nil
		}
		s.Wake()
		return
	}
	e.mu.Lock()
	s := e.streams[f.id]
	e.mu.Unlock()
	if s == nil {
		return // its end crossed this frame
	}
	switch f.kind {
	case frameHead:
		s.put(func() { s.heads = append(s.heads, f.head) })
	case frameData:
		s.put(func() { s.chunks = append(s.chunks, f.data) })
	case frameEnd:
		s.put(func() { s.ended, s.trailers = true, f.fields })
	case frameReset:
		s.fail(f.reason)
		s.pull.Lock()
		if s.resp != nil {
			s.resp.Cancel(f.reason)
		}
		s.pull.Unlock()
	case frameCredit:
		s.pull.Lock()
		s.room += f.n
		s.pull.Unlock()
		s.Wake()
	case frameRequest:
	}
}

// pumpedResponse is an active response that still closes the blocking one.
type pumpedResponse struct {
	*queue
	inner l7.Response
	wg    *sync.WaitGroup
}

func (p pumpedResponse) Cancel(r l7.Reason) {
	p.queue.Cancel(r)
	p.inner.Cancel(r)
}

func (p pumpedResponse) Close() {
	p.wg.Wait()
	p.inner.Close()
}

func (e *framedEnd) write() {
	for {
		select {
		case <-e.closed:
			return
		case <-e.bell:
		}
		for {
			e.mu.Lock()
			control := e.control
			e.control = nil
			var s *framedStream
			if len(e.ready) > 0 {
				s, e.ready = e.ready[0], e.ready[1:]
				s.queued = false
			}
			e.mu.Unlock()
			for _, f := range control {
				e.emit(f)
			}
			if s != nil {
				s.advance()
			}
			if s == nil && len(control) == 0 {
				break
			}
		}
	}
}

func (e *framedEnd) emit(f frame) {
	select {
	case e.out <- f:
	case <-e.closed:
	}
}

// advance sends what the stream's source has, as far as the window goes. It is
// the writer's, and blocks on nothing but the wire.
func (s *framedStream) advance() {
	for {
		f, more := s.step()
		if f.id != 0 {
			s.end.emit(f)
		}
		if !more {
			break
		}
	}
	if s.end.handler == nil {
		return
	}
	s.pull.Lock()
	var over l7.Response
	if s.done {
		over, s.resp = s.resp, nil // from here on nobody cancels it
	}
	s.pull.Unlock()
	if over != nil {
		over.Close()
		s.end.mu.Lock()
		delete(s.end.streams, s.id)
		s.end.mu.Unlock()
	}
}

// step asks the source once.
func (s *framedStream) step() (f frame, more bool) {
	s.pull.Lock()
	defer s.pull.Unlock()
	if s.done {
		return frame{}, false
	}
	if !s.headSent {
		h, err := s.resp.Head(s)
		switch {
		case errors.Is(err, l7.ErrPending):
			return frame{}, false
		case err != nil:
			s.done = true
			return frame{kind: frameReset, id: s.id, reason: failure(err).Reason}, false
		}
		s.headSent = h.Status >= 200
		return frame{kind: frameHead, id: s.id, head: copyHead(h)}, true
	}
	if s.room <= 0 {
		return frame{}, false
	}
	view, err := s.body.Next(s.room, s)
	switch {
	case err == io.EOF: //nolint:errorlint // by contract as it is
		if len(view) > 0 {
			s.room -= len(view)
			return frame{kind: frameData, id: s.id, data: append([]byte(nil), view...)}, true
		}
		s.done = true
		return frame{kind: frameEnd, id: s.id, fields: copyFields(s.body.Trailers())}, false
	case errors.Is(err, l7.ErrPending):
		return frame{}, false
	case err != nil:
		s.done = true
		return frame{kind: frameReset, id: s.id, reason: failure(err).Reason}, false
	}
	s.room -= len(view)
	return frame{kind: frameData, id: s.id, data: append([]byte(nil), view...)}, true
}
