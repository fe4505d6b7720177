package l7

import (
	"context"
	"sync"
	"time"
)

// Pool is an [Upstream] over HTTP/1.1: the connections to one endpoint, kept
// between exchanges. Each has its own lock; nothing is shared between
// endpoints. It is safe for concurrent use.
type Pool struct {
	cfg      PoolConfig
	forwards sync.Pool

	mu     sync.Mutex
	idle   []*upstreamConn // the last one was used last
	timer  *time.Timer     // closes what is unused for too long; nil if none is kept
	closed bool
}

// upstreamConn is a connection to the endpoint. Unused, it holds no buffer.
type upstreamConn struct {
	link  link
	since int64 // unused since
}

// NewPool returns a Pool without connections. It panics without Dial.
func NewPool(cfg PoolConfig) *Pool {
	if cfg.Dial == nil {
		panic("l7: NewPool without Dial")
	}
	cfg.ConnectTimeout = orDefault(cfg.ConnectTimeout, time.Second)
	cfg.IdleTimeout = orDefault(cfg.IdleTimeout, time.Minute)
	cfg.StreamIdle = orDefault(cfg.StreamIdle, 5*time.Minute)
	if cfg.MaxIdle == 0 {
		cfg.MaxIdle = 256
	}
	cfg.Limits = cfg.Limits.WithDefaults()
	return &Pool{cfg: cfg}
}

// Forward promises the endpoint's response; see [Response.Head].
func (p *Pool) Forward(ex *Exchange) Response {
	f, ok := p.forwards.Get().(*forward)
	if !ok {
		f = newForward(p)
	}
	f.start(ex)
	return f
}

// Idle returns how many unused connections are kept.
func (p *Pool) Idle() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.idle)
}

// CloseIdle closes the unused connections, and those in use when they become
// unused. The pool still forwards, on connections of one exchange each.
func (p *Pool) CloseIdle() {
	p.mu.Lock()
	idle := p.idle
	p.idle, p.closed = nil, true
	if p.timer != nil {
		p.timer.Stop()
		p.timer = nil
	}
	p.mu.Unlock()
	for _, u := range idle {
		u.link.close()
	}
}

// pop returns the connection that was kept last, or nil. Whether it is still fit for use is for the caller to find out.
func (p *Pool) pop() *upstreamConn {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := len(p.idle)
	if n == 0 {
		return nil
	}
	u := p.idle[n-1]
	p.idle[n-1] = nil
	p.idle = p.idle[:n-1]
	return u
}

// keep takes u for a later exchange, or closes it.
func (p *Pool) keep(u *upstreamConn) {
	u.since = instant()
	p.mu.Lock()
	full := p.closed || len(p.idle) >= p.cfg.MaxIdle
	if !full {
		p.idle = append(p.idle, u)
		if p.timer == nil && p.cfg.IdleTimeout > 0 {
			p.timer = time.AfterFunc(p.cfg.IdleTimeout, p.reap)
		}
	}
	p.mu.Unlock()
	if full {
		u.link.close()
	}
}

// reap closes what was unused for IdleTimeout. It is the timer's.
func (p *Pool) reap() {
	now := instant()
	p.mu.Lock()
	n := 0
	for n < len(p.idle) && now-p.idle[n].since >= int64(p.cfg.IdleTimeout) {
		n++
	}
	old := append([]*upstreamConn(nil), p.idle[:n]...)
	p.idle = append(p.idle[:0], p.idle[n:]...)
	clear(p.idle[len(p.idle) : len(p.idle)+n])
	switch {
	case p.timer == nil:
	case len(p.idle) == 0:
		p.timer = nil
	default:
		p.timer.Reset(time.Duration(p.idle[0].since + int64(p.cfg.IdleTimeout) - now))
	}
	p.mu.Unlock()
	for _, u := range old {
		u.link.close()
	}
}

// dial opens a connection.
func (p *Pool) dial(ctx context.Context) (*upstreamConn, error) {
	if p.cfg.ConnectTimeout > 0 {
		limited, cancel := context.WithTimeout(ctx, p.cfg.ConnectTimeout)
		defer cancel()
		ctx = limited
	}
	nc, err := p.cfg.Dial(ctx)
	if err != nil {
		return nil, err
	}
	u := &upstreamConn{}
	u.link.init(nc)
	return u, nil
}
