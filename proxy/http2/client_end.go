package http2

import "github.com/meshd/meshd/proxy/l7"

// Cancel aborts the exchange.
func (f *forward) Cancel(r l7.Reason) {
	if r != l7.None {
		f.abort(&l7.Error{Reason: r})
	}
}

// abort ends the exchange from our side. What was received is void, unless it is
// whole and was returned. It is the consumer's.
func (f *forward) abort(e *l7.Error) {
	f.mu.Lock()
	turn := f.turn
	f.mu.Unlock()
	f.abortTurn(turn, e)
}

// abortTurn is abort for who is not the consumer, and may come when f is used for another exchange already: turn says for
// which it is meant.
func (f *forward) abortTurn(turn uint64, e *l7.Error) {
	f.mu.Lock()
	if f.turn != turn || f.closed || f.cancelled || f.wholeLocked() {
		f.mu.Unlock()
		return
	}
	f.cancelled = true
	f.failed = e
	waits := f.busy && f.uc == nil
	uc, wake := f.condemnLocked(e)
	w := f.awakeLocked()
	f.mu.Unlock()
	switch {
	case uc != nil:
		uc.conn.execute(&f.stream, e, wake)
	case waits: // nobody else should be kept off the queue by it
		f.pool.forget(f, turn)
	}
	if w != nil {
		w.Wake()
	}
}

// condemnLocked resets the stream, if f has one that is not over: if uc is not nil, the caller calls uc.conn.execute with w as
// soon as the lock is released. The lock must be held since the look at f.uc: without it the stream could be another
// exchange's by now.
func (f *forward) condemnLocked(e *l7.Error) (uc *upstreamConn, w l7.Waker) {
	if f.uc == nil || f.leaving {
		return nil, nil
	}
	code := Cancelled
	w, ok := f.uc.conn.condemn(&f.stream, f.sid, e, &code)
	if !ok {
		return nil, nil
	}
	return f.uc, w
}

// expire is the timer's. It may come late, when the deadline is another one's.
func (f *forward) expire() {
	f.mu.Lock()
	early, turn := f.deadline == 0 || l7.Instant() < f.deadline, f.turn
	f.mu.Unlock()
	if !early {
		f.abortTurn(turn, errDeadline)
	}
}

// Close ends the exchange for this side.
func (f *forward) Close() {
	f.mu.Lock()
	f.closed = true
	if f.timer != nil {
		f.timer.Stop()
	}
	f.deadline, f.waker = 0, nil
	waits, turn := f.busy && f.uc == nil, f.turn
	reason := l7.EarlyResponse
	if f.failed != nil {
		reason = f.failed.Reason
	}
	f.mu.Unlock()
	f.pull.Lock() // from here on the writer does not look at the exchange
	f.ex = nil
	f.pull.Unlock()
	f.body.stop(reason)
	if waits {
		f.pool.forget(f, turn)
	}

	f.mu.Lock()
	f.released = true // from here on f may be used again, but while the lock is held
	uc := f.uc
	if uc == nil {
		free := !f.busy
		f.mu.Unlock()
		if free { // else who has it sees that it is over
			f.put()
		}
		return
	}
	var unfinished *upstreamConn
	var w l7.Waker
	if !f.done || !f.cameLocked() {
		unfinished, w = f.condemnLocked(errClosed)
	}
	f.mu.Unlock()
	if unfinished != nil {
		uc.conn.execute(&f.stream, errClosed, w)
	}
	f.leave(uc)
}

// leave takes the stream off its connection once both are done with it: the
// writer, and the consumer, or who sends it again.
func (f *forward) leave(uc *upstreamConn) {
	f.mu.Lock()
	now := f.uc == uc && f.done && (f.closed || f.again) && !f.leaving
	f.leaving = f.leaving || now
	f.mu.Unlock()
	if now {
		uc.conn.detach(&f.stream)
	}
}

// put gives f back to the pool.
func (f *forward) put() {
	f.body.release()
	f.head.clear()
	f.trail.clear()
	f.interim = nil
	select {
	case <-f.rang:
	default:
	}
	f.pool.forwards.Put(f)
}

// cameLocked reports that all of the response came.
func (f *forward) cameLocked() bool {
	c := &f.uc.conn
	c.mu.Lock()
	defer c.mu.Unlock()
	return f.stream.ended
}
