package http2

import (
	"context"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/meshd/meshd/proxy/http1"
	"github.com/meshd/meshd/proxy/l7"
)

// PoolConfig is the connections to one endpoint. Zero values take the
// defaults; a negative duration is off.
type PoolConfig struct {
	// Dial opens a connection that speaks HTTP/2 from its first byte, with TLS
	// and the check of the peer's identity done. ctx carries ConnectTimeout.
	// Required.
	Dial func(ctx context.Context) (net.Conn, error)
	// ConnectTimeout bounds Dial, and how long an exchange waits for a stream
	// when all connections are full; 1 s.
	ConnectTimeout time.Duration
	// IdleTimeout is how long a connection without streams is kept; 60 s.
	IdleTimeout time.Duration
	// StreamIdle is how long an exchange may be silent, both ways; 5 min.
	StreamIdle time.Duration
	// PingAfter is how long a connection with streams may be silent before it is
	// asked whether it lives, and how long one without may have been unused
	// before that question goes with its next request; 15 s.
	PingAfter time.Duration
	// PingTimeout is how long the answer may take; 5 s.
	PingTimeout time.Duration
	// MaxConns bounds the connections. Another one is opened when the streams
	// that the peer allows are used up; 16.
	MaxConns int
	// MaxWaiting bounds the exchanges that wait for a connection or a stream;
	// 1024. Further ones fail with Overload.
	MaxWaiting int
	// Limits bound a response's head.
	Limits http1.Limits
	// HTTP2 bounds what else the upstream may do. Streams is how many exchanges we
	// give to one connection, if the upstream allows as many; 256. Window is made large
	// enough that streams whose clients do not read cannot stop the others.
	HTTP2 Limits
	// Counters, if not nil, count what limits refused.
	Counters *Counters
}

// Pool is an [l7.Upstream] over HTTP/2: a few connections to one endpoint,
// with many exchanges on each. It is safe for concurrent use.
//
// What is sent again is what l7.Pool sends again, and what the peer says it
// did not process: streams refused, or above the last one that its GOAWAY names,
// as long as what was pulled of their body is short enough to be kept.
type Pool struct {
	cfg      PoolConfig
	forwards sync.Pool

	mu      sync.Mutex
	conns   []*upstreamConn // that take exchanges; the first one with room is taken
	dialing bool
	waiting []*forward  // for a connection or a stream, the oldest first
	timer   *time.Timer // ends the patience of who waits; nil before it is needed
	closed  bool
}

// NewPool returns a Pool without connections. It panics without Dial.
func NewPool(cfg PoolConfig) *Pool { //nolint:gocritic // made once per endpoint
	if cfg.Dial == nil {
		panic("http2: NewPool without Dial")
	}
	def := func(d *time.Duration, fallback time.Duration) {
		if *d == 0 {
			*d = fallback
		}
		*d = max(*d, 0)
	}
	def(&cfg.ConnectTimeout, time.Second)
	def(&cfg.IdleTimeout, time.Minute)
	def(&cfg.StreamIdle, 5*time.Minute)
	def(&cfg.PingAfter, 15*time.Second)
	def(&cfg.PingTimeout, 5*time.Second)
	if cfg.MaxConns == 0 {
		cfg.MaxConns = 16
	}
	if cfg.Counters == nil {
		cfg.Counters = &Counters{}
	}
	if cfg.MaxWaiting == 0 {
		cfg.MaxWaiting = 1024
	}
	if cfg.HTTP2.Streams == 0 {
		cfg.HTTP2.Streams = 256
	}
	cfg.Limits, cfg.HTTP2 = cfg.Limits.WithDefaults(), cfg.HTTP2.WithDefaults()
	cfg.HTTP2.Window = max(cfg.HTTP2.Window, cfg.HTTP2.Streams*cfg.HTTP2.StreamWindow)
	return &Pool{cfg: cfg}
}

// Forward promises the endpoint's response; see [l7.Response]. Nothing happens
// before its first Head.
func (p *Pool) Forward(ex *l7.Exchange) l7.Response {
	f, ok := p.forwards.Get().(*forward)
	if !ok {
		f = newForward(p)
	}
	f.start(ex)
	return f
}

// Idle returns how many connections are open that carry no exchange.
func (p *Pool) Idle() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := 0
	for _, uc := range p.conns {
		if uc.active == 0 {
			n++
		}
	}
	return n
}

// CloseIdle closes the connections without exchanges, and the others when they
// have none any more. The pool still forwards, on connections that end so, too.
func (p *Pool) CloseIdle() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	for _, uc := range p.conns {
		if uc.active == 0 {
			uc.link.hurry()
		}
	}
}

// assign gives f a stream, now or later. The first connection with room is
// taken: so the last ones become idle, and many streams share a write.
func (p *Pool) assign(f *forward) {
	p.mu.Lock()
	if len(p.waiting) >= p.cfg.MaxWaiting {
		p.mu.Unlock()
		f.fail(errWaiting)
		return
	}
	if len(p.waiting) == 0 {
		if uc := p.room(); uc != nil {
			over := !p.give(f, uc)
			p.mu.Unlock()
			if over {
				f.fail(errClosed)
			}
			return
		}
	}
	f.queuedAt = l7.Instant()
	p.waiting = append(p.waiting, f)
	over := p.handLocked()
	p.mu.Unlock()
	finish(over)
}

// room returns a connection that may have another exchange, or nil.
func (p *Pool) room() *upstreamConn {
	for _, uc := range p.conns {
		if !uc.full() {
			return uc
		}
	}
	return nil
}

// give puts f on uc. It reports false if f is over.
func (p *Pool) give(f *forward, uc *upstreamConn) bool {
	if !f.attach(uc) {
		return false
	}
	if uc.active == 0 && p.cfg.PingAfter > 0 {
		if now := l7.Instant(); now-uc.idleSince > int64(p.cfg.PingAfter) {
			uc.ask(now)
		}
	}
	uc.active++
	return true
}

// hand gives streams to who waits for one.
func (p *Pool) hand() {
	p.mu.Lock()
	over := p.handLocked()
	p.mu.Unlock()
	finish(over)
}

// handLocked is hand with the lock held. It returns those who wait no more, as
// they are over, for finish.
func (p *Pool) handLocked() (over []*forward) {
	for len(p.waiting) > 0 {
		uc := p.room()
		if uc == nil {
			break
		}
		f := p.waiting[0]
		p.waiting[0] = nil
		p.waiting = p.waiting[1:]
		if !p.give(f, uc) {
			over = append(over, f)
		}
	}
	p.more()
	return over
}

func finish(over []*forward) {
	for _, f := range over {
		f.fail(errClosed)
	}
}

// more sees to it that something happens for who waits: a connection is opened,
// or patience has an end. The lock is held.
func (p *Pool) more() {
	switch {
	case len(p.waiting) == 0 || p.dialing:
	case len(p.conns) < p.cfg.MaxConns:
		p.dialing = true
		go p.dial()
	case p.cfg.ConnectTimeout <= 0:
	case p.timer == nil:
		p.timer = time.AfterFunc(p.cfg.ConnectTimeout, p.hurry)
	default:
		p.timer.Reset(time.Duration(max(0, p.waiting[0].queuedAt+int64(p.cfg.ConnectTimeout)-l7.Instant())))
	}
}

// hurry fails who has waited for too long. It is the timer's.
func (p *Pool) hurry() {
	p.mu.Lock()
	now, n := l7.Instant(), 0
	if len(p.conns) >= p.cfg.MaxConns && !p.dialing {
		for n < len(p.waiting) && now-p.waiting[n].queuedAt >= int64(p.cfg.ConnectTimeout) {
			n++
		}
	}
	late := append([]*forward(nil), p.waiting[:n]...)
	clear(p.waiting[:n])
	p.waiting = p.waiting[n:]
	p.more()
	p.mu.Unlock()
	for _, f := range late {
		f.fail(errPatience)
	}
}

// dial opens a connection and serves it. One is opened at a time; if that
// fails, all who wait are told.
func (p *Pool) dial() {
	ctx, cancel := context.Background(), context.CancelFunc(func() {})
	if p.cfg.ConnectTimeout > 0 {
		ctx, cancel = context.WithTimeout(ctx, p.cfg.ConnectTimeout)
	}
	nc, err := p.cfg.Dial(ctx)
	cancel()
	if err != nil {
		p.mu.Lock()
		p.dialing = false
		failed := p.waiting
		p.waiting = nil
		p.mu.Unlock()
		e := &l7.Error{Reason: l7.ConnectFailed, Err: unexpected(err)}
		for _, f := range failed {
			f.fail(e)
		}
		return
	}
	uc := newUpstreamConn(p, nc)
	p.mu.Lock()
	p.dialing = false
	p.conns = append(p.conns, uc)
	over := p.handLocked()
	p.mu.Unlock()
	finish(over)
	uc.serve()
}

// forget takes f off the queue, if it still waits there for the exchange that turn says.
func (p *Pool) forget(f *forward, turn uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.turn != turn {
		return
	}
	if i := slices.Index(p.waiting, f); i >= 0 {
		p.waiting = slices.Delete(p.waiting, i, i+1)
		f.busy = false
	}
}

// release is told that an exchange has left its connection.
func (p *Pool) release(uc *upstreamConn) {
	p.mu.Lock()
	uc.active--
	if uc.active == 0 {
		uc.idleSince = l7.Instant()
		if uc.going || p.closed {
			uc.link.hurry()
		}
	}
	over := p.handLocked()
	p.mu.Unlock()
	finish(over)
}

// remove sees to it that uc gets no more exchanges.
func (p *Pool) remove(uc *upstreamConn) {
	p.mu.Lock()
	p.removeLocked(uc)
	if uc.active == 0 {
		uc.link.hurry()
	}
	over := p.handLocked()
	p.mu.Unlock()
	finish(over)
}

func (p *Pool) removeLocked(uc *upstreamConn) {
	uc.going = true
	if i := slices.Index(p.conns, uc); i >= 0 {
		p.conns = slices.Delete(p.conns, i, i+1)
	}
}
