package dataplane

import (
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/meshd/meshd/proxy/sock"
)

// pumpBuffer is what a direction of a TCP session borrows while bytes are there: four records, and the type of the last.
const pumpBuffer = 64<<10 + 1

var pumpBuffers = sync.Pool{New: func() any { return new([pumpBuffer]byte) }} //nolint:gochecknoglobals // memory, not state

// stream is either side of a TCP session, plain or over TLS.
type stream interface {
	net.Conn
	ReadLent(l sock.Lender) (int, error)
	CloseWrite() error
}

// pump carries one direction of a TCP session. While there is nothing to carry it holds no buffer.
type pump struct {
	link     *link
	src, dst stream
	bytes    prometheus.Counter
	moved    int64 // bytes that were read
	buf      *[pumpBuffer]byte
	// first, if not nil, is told what the first read gave, and says whether anybody wants it.
	first func(n int, err error) bool
}

// errUnwanted is that nobody wants what a direction carries.
var errUnwanted = errors.New("the direction is not wanted")

// ended reports the orderly end of a direction.
func ended(err error) bool { return errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) }

// Lend implements sock.Lender.
func (p *pump) Lend() []byte {
	p.buf, _ = pumpBuffers.Get().(*[pumpBuffer]byte)
	return p.buf[:]
}

// Return implements sock.Lender.
func (p *pump) Return() {
	pumpBuffers.Put(p.buf)
	p.buf = nil
}

// run copies until src ends, passes the end on, and returns nil; or returns why it could not.
func (p *pump) run() error {
	for {
		n, err := p.src.ReadLent(p)
		if first := p.first; first != nil {
			p.first = nil
			if !first(n, err) {
				if n > 0 {
					p.Return()
				}
				return errUnwanted
			}
		}
		if n > 0 {
			p.link.touch(time.Now())
			p.bytes.Add(float64(n))
			p.moved += int64(n)
			_, failed := p.dst.Write(p.buf[:n])
			p.Return()
			if failed != nil {
				return failed
			}
		}
		switch {
		case err == nil:
		case ended(err):
			return p.dst.CloseWrite()
		default:
			return err
		}
	}
}

// session carries a TCP connection between client and server until both directions ended, each in its own time. If one breaks,
// both sides are reset: neither may take what it has for the whole.
type session struct {
	plane          *Plane
	link           *link
	client, server stream
	up, down       pump
	broken         atomic.Bool
}

func (p *Plane) newSession(l *link, client stream) *session {
	return &session{plane: p, link: l, client: client}
}

// open gives it its far side.
func (s *session) open(server stream) {
	s.server = server
	s.up = pump{link: s.link, src: s.client, dst: server, bytes: s.link.edge.bytesSent}
	s.down = pump{link: s.link, src: server, dst: s.client, bytes: s.link.edge.bytesReceived}
}

// begin takes note that bytes are carried from now on.
func (s *session) begin() {
	l := s.link
	l.mu.Lock()
	l.spliced = true
	l.mu.Unlock()
	l.touch(time.Now())
	s.plane.sessionOpened(l)
}

// finish carries one direction to its end.
func (s *session) finish(p *pump) {
	if err := p.run(); err != nil && !errors.Is(err, errUnwanted) {
		s.broken.Store(true)
		reset(s.client)
		reset(s.server)
	}
}

// end waits for the other direction, and closes.
func (s *session) end(other <-chan struct{}) {
	<-other
	_ = s.client.Close() // both directions ended: nothing is left to be told
	_ = s.server.Close()
	s.plane.sessionEnded(s.link, s.up.moved, s.down.moved, s.link.outcome(s.broken.Load()))
}

// splice carries a TCP session to its end.
func (p *Plane) splice(l *link, client, server stream) {
	s := p.newSession(l, client)
	s.open(server)
	s.begin()
	done := make(chan struct{})
	p.tasks.Go(func() {
		defer close(done)
		s.finish(&s.up)
	})
	s.finish(&s.down)
	s.end(done)
}

// outcome tells why a TCP session ended, or "" if both its sides ended it.
func (l *link) outcome(broken bool) Reason {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ended == "" && broken {
		return ReasonReset
	}
	return l.ended
}
