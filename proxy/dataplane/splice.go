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
}

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
		case errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF):
			return p.dst.CloseWrite()
		default:
			return err
		}
	}
}

// splice carries a TCP session between client and server until both directions ended, each in its own time. If one breaks, both
// sides are reset: neither may take what it has for the whole.
func (p *Plane) splice(l *link, client, server stream) {
	up := &pump{link: l, src: client, dst: server, bytes: l.edge.bytesSent}
	down := &pump{link: l, src: server, dst: client, bytes: l.edge.bytesReceived}
	l.mu.Lock()
	l.spliced = true
	l.mu.Unlock()
	l.touch(time.Now())
	p.sessionOpened(l)
	var broken atomic.Bool
	finish := func(p *pump) {
		if err := p.run(); err != nil {
			broken.Store(true)
			reset(client)
			reset(server)
		}
	}
	done := make(chan struct{})
	p.tasks.Go(func() {
		defer close(done)
		finish(up)
	})
	finish(down)
	<-done
	_ = client.Close() // both directions ended: nothing is left to be told
	_ = server.Close()
	p.sessionEnded(l, up.moved, down.moved, l.outcome(broken.Load()))
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
