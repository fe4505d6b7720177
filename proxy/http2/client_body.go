package http2

import (
	"io"
	"sync"

	"github.com/meshd/meshd/proxy/http1"
	"github.com/meshd/meshd/proxy/l7"
)

const (
	// pumpLimit is how much a pump asks for at once.
	pumpLimit = 64 << 10
	// keepLimit is up to where a request's body is kept, to be sent again on
	// another connection if the peer says that it did not process it.
	keepLimit = 8 << 10
)

// forwardBody is what is sent of an exchange's body. What it returns is memory
// of its own, as the exchange may be over while its connection's writer still
// has it.
type forwardBody struct {
	src    l7.Body // nil if there is none
	pump   *pump   // if src blocks and had too little
	kept   []byte  // from the beginning, while it is short
	copied *chunk  // a part of what is too long to be kept
	whole  bool    // src has ended
	asked  bool    // src was pulled: before that, another upstream may have all of it
	long   bool    // kept is not all that was pulled
	at     int     // what of kept was returned on this attempt
}

func (b *forwardBody) begin(src l7.Body) {
	*b = forwardBody{src: src, kept: b.kept[:0]}
}

// repeatable reports that all that was pulled can be sent again.
func (b *forwardBody) repeatable() bool { return !b.long }

// next is l7.Body's Next.
func (b *forwardBody) next(limit int, w l7.Waker) ([]byte, error) {
	if b.at < len(b.kept) {
		view := b.kept[b.at:min(len(b.kept), b.at+limit)]
		if b.at += len(view); b.at == len(b.kept) && b.whole {
			return view, io.EOF
		}
		return view, nil
	}
	if b.whole {
		return nil, io.EOF
	}
	view, err := b.pull(min(limit, largeChunk), w)
	if b.whole = err == io.EOF; !b.whole && err != nil { //nolint:errorlint // as it is, by contract
		return nil, err
	}
	if !b.long && len(b.kept)+len(view) <= keepLimit {
		b.kept = append(b.kept, view...)
		b.at = len(b.kept)
		return b.kept[len(b.kept)-len(view):], err
	}
	b.long = true
	if b.copied == nil {
		b.copied = getChunk(largeChunk)
	}
	return b.copied.b[:copy(b.copied.b, view)], err
}

func (b *forwardBody) pull(limit int, w l7.Waker) ([]byte, error) {
	b.asked = true
	if !b.src.Blocking() {
		return b.src.Next(limit, w)
	}
	if b.pump == nil {
		b.pump = newPump(b.src)
	}
	return b.pump.next(limit, w)
}

// trailers returns a copy of the trailers, which are rare.
func (b *forwardBody) trailers() http1.Fields {
	var out http1.Fields
	if b.src == nil {
		return nil
	}
	for _, f := range b.src.Trailers() {
		f.Name, f.Value = append([]byte(nil), f.Name...), append([]byte(nil), f.Value...)
		out = append(out, f)
	}
	return out
}

// stop tells the source that no more is wanted, unless it has ended or nobody began to pull it, and waits until nobody pulls it.
func (b *forwardBody) stop(r l7.Reason) {
	switch {
	case b.pump != nil:
		b.pump.close(r)
		b.pump = nil
	case b.src != nil && !b.whole && b.asked:
		b.src.Cancel(r)
	}
	b.src = nil
}

// release gives memory back, when nobody sends any more.
func (b *forwardBody) release() {
	if b.copied != nil {
		b.copied.release()
		b.copied = nil
	}
}

// pump makes an active source of one that blocks, by bringing the goroutine
// that it lacks. It starts one only when bytes are wanted that are not there
// yet: most bodies came with their head. It is used again after close.
type pump struct {
	body l7.Body
	run  func() // p.loop, made once

	mu      sync.Mutex
	view    []byte // pulled, not yet returned
	err     error  // comes behind view
	idle    bool   // the goroutine waits for ask
	running bool
	waker   l7.Waker
	stopped bool
	ask     chan struct{} // one token: pull on
	ended   chan struct{} // one token: the goroutine has ended
}

//nolint:gochecknoglobals // a pool is shared by design: a pump belongs to no connection
var pumps = sync.Pool{New: func() any {
	p := &pump{ask: make(chan struct{}, 1), ended: make(chan struct{}, 1)}
	p.run = p.loop
	return p
}}

func newPump(body l7.Body) *pump {
	p, ok := pumps.Get().(*pump)
	if !ok {
		panic("http2: the pool of pumps holds something else")
	}
	p.body = body
	return p
}

// noWait is the Waker of who wants only what is there already.
type noWait struct{}

// Wake does nothing.
func (noWait) Wake() {}

// next returns bytes that are there, or wakes w once there are. What it returned
// before is used up.
func (p *pump) next(limit int, w l7.Waker) ([]byte, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.view) == 0 && p.err == nil {
		if p.running {
			p.waker = w
			if p.idle {
				p.idle = false
				p.ask <- struct{}{}
			}
			return nil, l7.ErrPending
		}
		p.view, p.err = p.body.Next(pumpLimit, noWait{})
		if p.err == l7.ErrPending { //nolint:errorlint // as it is, by contract
			p.err, p.running, p.waker = nil, true, w
			go p.run()
			return nil, l7.ErrPending
		}
	}
	n := min(limit, len(p.view))
	view := p.view[:n]
	if p.view = p.view[n:]; len(p.view) > 0 {
		return view, nil
	}
	return view, p.err
}

// loop pulls until the body's end.
func (p *pump) loop() {
	for again := true; again; {
		view, err := p.body.Next(pumpLimit, nil)
		p.mu.Lock()
		p.view, p.err = view, err
		again = err == nil && !p.stopped
		p.idle = again
		w := p.waker
		p.waker = nil
		p.mu.Unlock()
		if w != nil {
			w.Wake()
		}
		if again {
			<-p.ask
		}
	}
	p.ended <- struct{}{}
}

// close ends the goroutine, which the body's Cancel unblocks. Nobody calls next
// any more.
func (p *pump) close(r l7.Reason) {
	p.mu.Lock()
	running, whole := p.running, p.err == io.EOF //nolint:errorlint // as it is, by contract
	p.stopped, p.waker = true, nil
	if p.idle {
		p.idle = false
		p.ask <- struct{}{}
	}
	p.mu.Unlock()
	if !whole {
		p.body.Cancel(r)
	}
	if running {
		<-p.ended
	}
	*p = pump{run: p.run, ask: p.ask, ended: p.ended}
	pumps.Put(p)
}
