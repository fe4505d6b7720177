package http2

import (
	"context"
	"io"
	"net"
	"sync"
	"time"

	"github.com/meshd/meshd/proxy/hpack"
	"github.com/meshd/meshd/proxy/l7"
)

const (
	// drainPing is the PING behind the first GOAWAY of a drain: its answer says that
	// the client has seen that.
	drainPing = 0x6d657368647e7e21
	// drainWait is how long it may take. What the client sent before it saw the first
	// GOAWAY is refused after that, so it covers a host that stalls for seconds.
	drainWait = 5 * time.Second
)

// ServerConfig is what the connections of one listener share.
type ServerConfig struct {
	// ServerConfig is as for HTTP/1. HeadTimeout is for a header block, and for
	// the preface with the first SETTINGS. The sink is called on any goroutine.
	l7.ServerConfig

	// Bounds are what a client may make us hold and do; Limits of the embedded
	// ServerConfig bound a request's head.
	Bounds Limits
	// Counters, if not nil, count what limits refused.
	Counters *Counters
}

// Server makes connections for one listener. It is safe for concurrent use.
type Server struct {
	cfg     ServerConfig
	streams sync.Pool
}

// NewServer returns a Server. It panics without a Handler: nobody would decide.
func NewServer(cfg ServerConfig) *Server { //nolint:gocritic // made once per listener
	if cfg.Handler == nil {
		panic("http2: NewServer without a Handler")
	}
	cfg.ServerConfig = cfg.ServerConfig.WithDefaults()
	cfg.Bounds = cfg.Bounds.WithDefaults()
	if cfg.Counters == nil {
		cfg.Counters = &Counters{}
	}
	return &Server{cfg: cfg}
}

// Conn is one client's connection over HTTP/2. It begins with the preface:
// that the client speaks HTTP/2 was found out before.
type Conn struct {
	conn

	srv  *Server
	info l7.ConnInfo
	xfcc []byte

	idleSince int64 // the reader's: since when there is no stream
	// spareArena, the reader's, is what a head that was too large was decoded into.
	spareArena []byte
	drained    int64 // when Drain's first GOAWAY was sent, 0 for never
	final      bool  // and the second one
}

// NewConn returns a connection to Serve. It does no I/O.
func (s *Server) NewConn(nc net.Conn, info l7.ConnInfo) *Conn {
	c := &Conn{srv: s, info: info}
	if info.ForwardedClientCert != "" {
		c.xfcc = []byte(info.ForwardedClientCert)
	}
	cfg := &s.cfg
	c.link.init(nc)
	c.idle, c.headTimeout, c.lost, c.wrong = cfg.StreamIdle, cfg.HeadTimeout, l7.ClientGone, l7.BadRequest
	const pseudo = 6                                                                                   // fields that HTTP/1 has in its request line
	c.lists = hpack.Limits{ListSize: uint32(cfg.Limits.HeadBytes), Fields: cfg.Limits.Fields + pseudo} //nolint:gosec // a small number
	c.init(c, cfg.Bounds, cfg.Counters)
	c.idleSince = c.began
	return c
}

// Serve serves requests until the connection ends, Drain or Abort were called,
// or ctx is done, which aborts. It blocks, and closes the connection; when it
// returns all exchanges are over. It returns nil after an orderly end.
func (c *Conn) Serve(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { c.Abort(l7.Draining) })
	defer stop()
	err := c.run()
	c.mu.Lock()
	aborted := c.aborted
	c.mu.Unlock()
	if aborted != l7.None {
		return &l7.Error{Reason: aborted, Err: err}
	}
	if err != nil {
		return &l7.Error{Reason: l7.ClientGone, Err: err}
	}
	return nil
}

// Drain ends the connection in good order: GOAWAY tells the client to use
// another one, requests that are on their way are served still, and when the last
// exchange is over the connection is closed. It may be called from any goroutine.
func (c *Conn) Drain() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.drained != 0 || c.ending {
		return
	}
	c.drained = l7.Instant()
	c.control = appendGoAway(c.control, lastStream, NoError, "")
	c.ping(drainPing)
	c.link.hurry()
}

// Abort resets the connection, and the upstreams that work for it. It may be
// called from any goroutine, and does not block.
func (c *Conn) Abort(r l7.Reason) {
	c.Review(func(*l7.Exchange) l7.Reason { return r })
	c.stop(r)
}

// Review shows each exchange that is under way to f, which returns [l7.None], or
// why it is to be cancelled. f must not block nor keep ex; what the handler put
// into its Record it may read. It may be called from any goroutine.
func (c *Conn) Review(f func(ex *l7.Exchange) l7.Reason) {
	type running struct {
		x  *served
		id uint32
	}
	c.mu.Lock()
	all := make([]running, 0, len(c.streams))
	for id, s := range c.streams {
		if x, ok := s.owner.(*served); ok {
			all = append(all, running{x, id})
		}
	}
	c.mu.Unlock()
	for _, r := range all {
		r.x.review(c, r.id, f)
	}
}

// settings implements role: what matters is in c.peer.
func (*Conn) settings() {}

// pong implements role.
func (c *Conn) pong(data uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if data == drainPing && c.drained != 0 {
		c.lastWord()
	}
}

// lastWord is the second GOAWAY: later requests are not served. The lock must be
// held.
func (c *Conn) lastWord() {
	if !c.final {
		c.final, c.hasty = true, true
		c.control = appendGoAway(c.control, c.highest, NoError, "")
		c.ring()
		c.link.hurry()
	}
}

// goAway implements role: the client opens no more streams, which it shows.
func (*Conn) goAway(uint32, ErrCode, []byte) {}

// tick implements role.
func (c *Conn) tick(now int64) (int64, error) {
	cfg := &c.srv.cfg
	var late []overdue
	c.mu.Lock()
	if c.drained != 0 && now-c.drained >= int64(drainWait) {
		c.lastWord()
	}
	none, final, draining := len(c.streams) == 0, c.final, c.drained != 0
	if !none {
		c.idleSince = now
		late = c.overdue(now)
	}
	c.mu.Unlock()
	for _, o := range late {
		o.end(c)
	}
	switch idle := int64(cfg.IdleTimeout); {
	case !none:
		return 0, nil
	case final:
		return 0, io.EOF
	case draining:
		return c.drained + int64(drainWait), nil
	case idle <= 0:
		return 0, nil
	case now-c.idleSince >= idle:
		c.mu.Lock()
		c.control = appendGoAway(c.control, c.highest, NoError, "")
		c.mu.Unlock()
		return 0, io.EOF
	default:
		return c.idleSince + idle, nil
	}
}

// overdue is an exchange whose time is over.
type overdue struct {
	x      *served
	id     uint32
	reason l7.Reason
}

// overdue returns the exchanges whose client is silent for too long, or takes
// nothing. Those that wait for their upstream are the forwarding end's.
func (c *Conn) overdue(now int64) (late []overdue) {
	cfg := &c.srv.cfg
	for id, s := range c.streams {
		x, ok := s.owner.(*served)
		if !ok || s.dead || s.failed != nil {
			continue
		}
		switch {
		case s.slow(now, cfg.BodyGrace):
			late = append(late, overdue{x, id, l7.RequestTimeout})
		case cfg.StreamIdle <= 0 || x.ex.Silent() < cfg.StreamIdle:
		case s.starved:
			late = append(late, overdue{x, id, l7.ClientGone})
		case !s.ended:
			late = append(late, overdue{x, id, l7.RequestTimeout})
		}
	}
	return late
}

// slow reports that a body of declared length keeps us waiting.
func (s *stream) slow(now int64, grace time.Duration) bool {
	const minRate = 1 << 10
	if grace <= 0 || s.expect <= 0 || s.ended {
		return false
	}
	waited := s.waited
	if s.hungry != 0 {
		waited += now - s.hungry
	}
	over := time.Duration(waited) - grace
	return over > 0 && s.got < int64(over.Seconds()*minRate)
}

// end ends it. A request that does not come is answered, while that is possible.
func (o *overdue) end(c *Conn) {
	if o.reason == l7.ClientGone {
		c.count.Stalled.Add(1)
		code := Cancelled
		c.kill(&o.x.stream, o.id, &l7.Error{Reason: o.reason, Err: ErrStalled}, &code)
		return
	}
	c.count.Idle.Add(1)
	c.conn.mu.Lock()
	s := c.streams[o.id]
	var w l7.Waker
	if s != nil && s.failed == nil && !s.ended {
		s.failed = &l7.Error{Reason: o.reason}
		w = s.drop(&c.conn)
	}
	c.conn.mu.Unlock()
	o.x.review(c, o.id, func(*l7.Exchange) l7.Reason { return o.reason })
	if w != nil {
		w.Wake()
	}
}

func (s *Server) get() *served {
	x, ok := s.streams.Get().(*served)
	if !ok {
		x = &served{srv: s}
		x.work = x.serve
	}
	return x
}
