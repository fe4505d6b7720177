package l7

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/proxy/http1"
)

// Bounds on what is read of a request after its answer, so that the client
// gets to read the answer.
const (
	drainBytes = 64 << 10
	drainTime  = time.Second
)

// Server makes connections for one listener. It is safe for concurrent use.
type Server struct {
	cfg ServerConfig
	// jobs hold what a connection needs only while it serves a request.
	jobs sync.Pool
}

// NewServer returns a Server. It panics without a Handler: nobody would decide.
func NewServer(cfg ServerConfig) *Server {
	if cfg.Handler == nil {
		panic("l7: NewServer without a Handler")
	}
	cfg = cfg.WithDefaults()
	return &Server{cfg: cfg}
}

func orDefault(d, fallback time.Duration) time.Duration {
	if d == 0 {
		return fallback
	}
	return max(d, 0)
}

// Conn is one client's connection over HTTP/1.
type Conn struct {
	link link
	srv  *Server
	info ConnInfo
	xfcc []byte
	job  *job // nil while idle

	mu       sync.Mutex
	idle     bool
	retiring bool // the next response is the last
	draining bool // and no request is waited for
	aborted  Reason
	response Response // of the exchange that runs
}

// NewConn returns a connection to Serve. It does no I/O.
func (s *Server) NewConn(nc net.Conn, info ConnInfo) *Conn {
	c := &Conn{srv: s, info: info}
	c.link.init(nc)
	if info.ForwardedClientCert != "" {
		c.xfcc = []byte(info.ForwardedClientCert)
	}
	return c
}

// lender gives a connection its job when the first bytes of a request are there.
type lender Conn

// Lend implements sock.Lender.
func (l *lender) Lend() []byte {
	l.job = l.srv.getJob((*Conn)(l))
	return l.job.src.buf.b
}

// Return implements sock.Lender.
func (l *lender) Return() { (*Conn)(l).putJob() }

// Serve serves requests, one after the other, until the connection ends, Drain
// or Abort were called, or ctx is done, which aborts. It blocks, and closes the
// connection. It returns nil after an orderly end, and otherwise an *Error.
func (c *Conn) Serve(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { c.Abort(Draining) })
	defer stop()
	defer c.link.close()
	defer c.putJob()
	for {
		err := c.await()
		if err == nil {
			err = c.readHead()
		}
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return c.failure(err)
		}
		again, failed := c.job.exchange()
		if failed != nil {
			c.link.abort()
			return c.failure(failed)
		}
		if !again {
			c.job.linger()
			return nil
		}
	}
}

// failure names the abort, if there was one, as the cause of what it caused.
func (c *Conn) failure(err error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.aborted != None {
		return &Error{Reason: c.aborted, Err: err}
	}
	return asError(err)
}

// Drain ends the connection in good order: at once if it waits for a request,
// else after the response, which says so. It may be called from any goroutine.
func (c *Conn) Drain() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.draining = true
	if c.idle {
		c.link.interrupt()
	}
}

// Abort resets the connection, and the upstream that works for it. It may be
// called from any goroutine, and does not block.
func (c *Conn) Abort(r Reason) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.aborted == None {
		c.aborted = r
	}
	if c.response != nil {
		c.response.Cancel(r)
	}
	c.link.abort()
}

// await returns once there are unread bytes in the job's buffer. While it
// waits the connection has no job. io.EOF is an orderly end.
func (c *Conn) await() error {
	if c.job != nil {
		b := c.job.src.buf
		if b.r < b.w {
			b.w = copy(b.b, b.b[b.r:b.w])
			b.r = 0
			c.job.begin()
			return nil
		}
		c.putJob()
	}
	if !c.setIdle(true) {
		return io.EOF
	}
	var by int64
	if c.srv.cfg.IdleTimeout > 0 {
		by = instant() + int64(c.srv.cfg.IdleTimeout)
	}
	n, err := c.link.await(by, (*lender)(c))
	c.setIdle(false)
	if err != nil {
		if errors.Is(err, errInterrupted) || errors.Is(err, os.ErrDeadlineExceeded) {
			return io.EOF
		}
		return err
	}
	c.job.src.buf.w = n
	if c.link.interrupted.Load() {
		c.link.resume() // drained in this moment; the request is served still
	}
	c.job.begin()
	return nil
}

// Retire ends the connection after a response that says so: the one that runs, or
// that to the next request, for which it waits as long as before. A request that
// was on its way is so not lost, as it would be with Drain. It may be called from
// any goroutine.
func (c *Conn) Retire() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.retiring = true
}

// setIdle reports false if the connection is not to wait for another request.
func (c *Conn) setIdle(idle bool) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.idle = idle && !c.draining
	return !c.draining
}

// readHead parses a head, reading more as needed. A head that is refused is
// answered here. io.EOF is the end of the connection.
func (c *Conn) readHead() error {
	j, cfg := c.job, &c.srv.cfg
	b := j.src.buf
	var by int64
	for {
		n, err := j.parser.Parse(b.b[b.r:b.w], &cfg.Limits)
		if err == nil {
			b.r += n
			return nil
		}
		if !errors.Is(err, http1.ErrShort) {
			return j.refuse(err)
		}
		if b.w == len(b.b) && !b.grow(cfg.Limits.HeadBytes) {
			return j.refuse(&http1.Error{Status: 431, Reason: "head is longer than the limit", Limit: http1.LimitHeadBytes})
		}
		if by == 0 && cfg.HeadTimeout > 0 {
			by = instant() + int64(cfg.HeadTimeout)
		}
		n, err = c.link.read(b.b[b.w:], by, nil)
		b.w += n
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			return j.answer(&Error{Reason: RequestTimeout, Err: err})
		case err != nil:
			return &Error{Reason: ClientGone, Err: unexpected(err)}
		}
	}
}

// Gone reports without blocking whether the client closed or reset. While a
// request's body is read, that reading finds out instead.
func (c *Conn) Gone() bool {
	if c.job == nil || !c.job.src.eof.Load() {
		return false
	}
	return c.link.gone()
}

// ForwardedClientCert returns the x-forwarded-client-cert value that tells an
// application who called it, in Envoy's grammar: By is the called service, URI
// the caller.
func ForwardedClientCert(own, peer spiffe.ID) string {
	return "By=" + own.String() + ";URI=" + peer.String()
}

func (s *Server) getJob(c *Conn) *job {
	j, ok := s.jobs.Get().(*job)
	if !ok {
		j = &job{}
		j.body.job = j
		j.look = j.src.silent
	}
	j.conn = c
	j.src.buf = getBuffer()
	return j
}

// putJob makes the connection idle: it keeps nothing of its last request.
func (c *Conn) putJob() {
	j := c.job
	if j == nil {
		return
	}
	c.job = nil
	j.src.release()
	j.forget()
	c.srv.jobs.Put(j)
}
