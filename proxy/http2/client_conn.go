package http2

import (
	"errors"
	"io"
	"net"
	"sync/atomic"
	"time"

	"github.com/meshd/meshd/proxy/hpack"
	"github.com/meshd/meshd/proxy/l7"
)

// greetTimeout is how long a new connection may take with its first SETTINGS,
// and any with a header block.
const greetTimeout = 10 * time.Second

// likelyStreams is what a peer is taken to allow before it has said so: RFC 9113
// section 6.5.2 asks it for no less. Those above would be refused.
const likelyStreams = 100

var errNoPong = errors.New("the upstream does not answer PING any more")

// upstreamConn is a connection of a pool: the forwarding end's role.
type upstreamConn struct {
	conn

	pool   *Pool
	served atomic.Bool // a head came on it: it had worked once

	// Under the pool's lock.
	active    int   // exchanges that it has
	most      int   // that it may have
	idleSince int64 // since when it has none
	settled   bool  // the peer's SETTINGS came
	connects  bool  // it takes extended CONNECT
	going     bool  // no more exchanges
	parked    []*forward
	heads     []watched // scratch memory of tick

	nextID uint32 // the writer's

	// The reader's.
	heard   int64 // when something came
	heardOf int64 // sum of what had come on the open streams then
	pinged  atomic.Int64
}

type watched struct {
	f   *forward
	id  uint32
	got int64
}

func newUpstreamConn(p *Pool, nc net.Conn) *upstreamConn {
	now := l7.Instant()
	uc := &upstreamConn{pool: p, nextID: 1, most: min(p.cfg.HTTP2.Streams, likelyStreams), idleSince: now, heard: now}
	c := &uc.conn
	c.link.init(nc)
	c.client, c.lost, c.wrong = true, l7.UpstreamReset, l7.UpstreamProtocol
	c.idle, c.headTimeout = p.cfg.StreamIdle, greetTimeout
	c.lists = hpack.Limits{ListSize: uint32(p.cfg.Limits.HeadBytes), Fields: p.cfg.Limits.Fields + 1} //nolint:gosec // a limit
	c.init(uc, p.cfg.HTTP2, p.cfg.Counters)
	return uc
}

// full reports that the connection takes no further exchange. The pool's lock is
// held.
func (uc *upstreamConn) full() bool {
	c := &uc.conn
	c.mu.Lock()
	defer c.mu.Unlock()
	return uc.active >= uc.most || c.ending
}

// serve runs the connection to its end.
func (uc *upstreamConn) serve() {
	err := uc.run()
	uc.pool.remove(uc)
	// Those that were given to it last, and found nobody any more.
	c := &uc.conn
	c.mu.Lock()
	s := c.first
	c.first, c.last = nil, nil
	c.mu.Unlock()
	var late []*stream
	for ; s != nil; s = s.next {
		late = append(late, s)
	}
	e := errUnprocessed
	if err != nil {
		e = &l7.Error{Reason: l7.UpstreamReset, Err: err}
	}
	for _, s := range late {
		c.mu.Lock()
		s.isReady = false
		gone := s.detached
		c.mu.Unlock()
		uc.drop(s, gone, e)
	}
	uc.pool.mu.Lock()
	parked := uc.parked
	uc.parked = nil
	uc.pool.mu.Unlock()
	for _, f := range parked {
		f.mu.Lock()
		here := f.uc == uc && f.sid == 0 && !f.done
		f.mu.Unlock()
		if here {
			uc.drop(&f.stream, false, e)
		}
	}
}

func (uc *upstreamConn) drop(s *stream, gone bool, e *l7.Error) {
	f, ok := s.owner.(*forward)
	switch {
	case !ok:
	case gone:
		f.recycle()
	default:
		f.ended(e, false)
		f.over()
	}
}

// number returns the number of f's stream. It is the writer's.
func (uc *upstreamConn) number(f *forward) (uint32, error) {
	p := uc.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case uc.going || uc.nextID > lastStream:
		uc.going = true
		return 0, errUnprocessed
	case f.ex.Upgrade == "":
	case !uc.settled:
		uc.parked = append(uc.parked, f)
		return 0, l7.ErrPending
	case !uc.connects:
		return 0, errNoConnect
	}
	return uc.nextID, nil
}

// ended returns what the connection's end means to a request that did not get on it.
func (uc *upstreamConn) ended() *l7.Error {
	c := &uc.conn
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.failure == nil || uc.served.Load() {
		return errUnprocessed
	}
	return &l7.Error{Reason: c.lost, Err: c.failure}
}

// head implements role.
func (uc *upstreamConn) head(id uint32, _ *stream, block []byte, end bool) error {
	c := &uc.conn
	uc.alive()
	c.mu.Lock()
	var f *forward
	if s := c.streams[id]; s != nil {
		f, _ = s.owner.(*forward)
	}
	known := f != nil || id%2 == 1 && c.used(id)
	c.mu.Unlock()
	switch {
	case !known:
		return violation(ProtocolError, errIdle)
	case f == nil:
		return c.skipHead(block)
	}
	return f.take(uc, id, block, end)
}

// take takes a header block of the response. It is the reader's.
func (f *forward) take(uc *upstreamConn, id uint32, block []byte, end bool) error {
	f.pull.Lock()
	f.mu.Lock()
	if f.uc != uc || f.sid != id || f.ex == nil {
		f.mu.Unlock()
		f.pull.Unlock()
		return uc.skipHead(block)
	}
	uc.served.Store(true)
	f.ex.Moved()
	refused, err := f.takeHead(uc, id, block, end)
	w := f.awakeLocked()
	tunnel := f.tunnel
	f.mu.Unlock()
	f.pull.Unlock()
	switch {
	case err != nil:
		err = violation(CompressionError, err)
	case refused == nil && end && !uc.conn.end(id, nil):
		refused = errResponseBody
	}
	if refused != nil {
		uc.refuse(f, id, refused)
	}
	if tunnel {
		f.stream.Wake()
	}
	if w != nil {
		w.Wake()
	}
	return err
}

// takeHead decodes a header block and makes of it what it is: an interim head,
// the final one, or trailers.
func (f *forward) takeHead(uc *upstreamConn, id uint32, block []byte, end bool) (refused *l7.Error, err error) {
	c := &uc.conn
	h := &f.head
	if f.final {
		h = &f.trail
	}
	if refused, err = h.read(c.dec, block, c.lists, f.final); err != nil || refused != nil {
		if refused == errResponseList {
			c.count.HeadTooLarge.Add(1)
		}
		return refused, err
	}
	switch {
	case f.final && !end:
		return errResponseOrder, nil
	case f.final:
		return c.headed(id, &f.stream, -1, true), nil
	case h.Status < 200:
		if f.interims++; end || f.interims > maxInterim {
			return errResponseInterim, nil
		}
		f.interim = append(f.interim, &responseHead{ResponseHead: h.ResponseHead, arena: h.arena})
		*h = responseHead{}
		return c.headed(id, &f.stream, 0, false), nil
	}
	if refused := h.final(f.ex, end); refused != nil {
		return refused, nil
	}
	expect := h.Length
	if h.NoBody {
		expect = 0
	}
	if refused := c.headed(id, &f.stream, expect, false); refused != nil {
		return refused, nil
	}
	f.final, f.tunnel = true, h.Status == 101
	return nil, nil
}

// headed takes note of a head of s in its state.
func (c *conn) headed(id uint32, s *stream, expect int64, trailers bool) *l7.Error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.streams[id] != s:
		return nil
	case s.ended:
		return errResponseOrder
	case !trailers:
		s.expect = expect
	}
	return nil
}

// refuse resets a stream because of what came on it.
func (uc *upstreamConn) refuse(f *forward, id uint32, e *l7.Error) {
	uc.conn.count.Malformed.Add(1)
	code := ProtocolError
	uc.conn.kill(&f.stream, id, e, &code)
}

// settings implements role.
func (uc *upstreamConn) settings() {
	uc.alive()
	c, p := &uc.conn, uc.pool
	c.mu.Lock()
	most, connects := c.peer.maxStreams, c.peer.connect
	c.mu.Unlock()
	p.mu.Lock()
	uc.settled, uc.connects = true, connects
	uc.most = int(min(most, uint32(p.cfg.HTTP2.Streams))) //nolint:gosec // a limit
	parked := uc.parked
	uc.parked = nil
	p.mu.Unlock()
	for _, f := range parked {
		f.stream.Wake()
	}
	p.hand()
}

// pong implements role.
func (uc *upstreamConn) pong(uint64) { uc.alive() }

// goAway implements role.
func (uc *upstreamConn) goAway(last uint32, _ ErrCode, _ []byte) {
	uc.alive()
	uc.pool.remove(uc)
	c := &uc.conn
	c.mu.Lock()
	var above []uint32
	for id := range c.streams {
		if id > last {
			above = append(above, id)
		}
	}
	c.mu.Unlock()
	for _, id := range above {
		c.mu.Lock()
		s := c.streams[id]
		c.mu.Unlock()
		if s != nil {
			c.kill(s, id, errUnprocessed, nil)
		}
	}
}

func (uc *upstreamConn) alive() {
	uc.heard = l7.Instant()
	uc.pinged.Store(0)
}

// tick implements role.
func (uc *upstreamConn) tick(now int64) (int64, error) {
	p := uc.pool
	p.mu.Lock()
	if uc.active == 0 {
		due := uc.idleSince + int64(p.cfg.IdleTimeout)
		if !uc.going && !p.closed && (p.cfg.IdleTimeout <= 0 || now < due) {
			p.mu.Unlock()
			if p.cfg.IdleTimeout <= 0 {
				due = 0
			}
			return due, nil
		}
		p.removeLocked(uc)
		p.mu.Unlock()
		uc.farewell()
		return 0, io.EOF
	}
	p.mu.Unlock()
	c := &uc.conn
	all, sum := uc.heads[:0], int64(0)
	c.mu.Lock()
	for id, s := range c.streams {
		if f, ok := s.owner.(*forward); ok {
			all = append(all, watched{f, id, s.got})
			sum += s.got
		}
	}
	c.mu.Unlock()
	if sum > uc.heardOf {
		uc.alive()
	}
	uc.heardOf = sum
	for i := range all {
		all[i].f.watch(uc, all[i].id, all[i].got)
	}
	clear(all)
	uc.heads = all
	return 0, uc.check(now)
}

// check asks a silent peer whether it is there.
func (uc *upstreamConn) check(now int64) error {
	cfg := &uc.pool.cfg
	asked := uc.pinged.Load()
	switch {
	case cfg.PingAfter <= 0:
	case asked != 0 && now-asked > int64(cfg.PingTimeout):
		return errNoPong
	case asked == 0 && now-uc.heard > int64(cfg.PingAfter):
		uc.ask(now)
	}
	return nil
}

// ask sends a PING.
func (uc *upstreamConn) ask(now int64) {
	uc.pinged.Store(now)
	c := &uc.conn
	c.mu.Lock()
	c.ping(uint64(now)) //nolint:gosec // any number will do
	c.mu.Unlock()
}

// farewell says that the connection ends in good order.
func (uc *upstreamConn) farewell() {
	c := &uc.conn
	c.mu.Lock()
	defer c.mu.Unlock()
	c.control = appendGoAway(c.control, 0, NoError, "")
	c.ring()
}
