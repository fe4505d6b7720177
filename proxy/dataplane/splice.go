package dataplane

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

const (
	// smallBuffer is what each direction of an idle TCP session keeps; largeBuffer is lent to one that moves bulk.
	smallBuffer = 512
	largeBuffer = 32 << 10
)

// largeBuffers lends buffers to the directions that are busy.
var largeBuffers = sync.Pool{New: func() any { return new([largeBuffer]byte) }} //nolint:gochecknoglobals // memory, not state

// pump carries one direction of a TCP session.
type pump struct {
	link     *link
	src, dst net.Conn
	bytes    prometheus.Counter
	// large says that a large buffer is held; woken that the read deadline was moved to the past to get it back.
	large, woken atomic.Bool
	moved        int64 // bytes that were read
	small        [smallBuffer]byte
}

// halfCloser is what both plain and TLS connections can do.
type halfCloser interface{ CloseWrite() error }

var errNoHalfClose = errors.New("the connection can't be half-closed")

// run copies until src ends, passes the end on, and returns nil; or returns why it could not.
func (p *pump) run() error {
	buf := p.small[:]
	var lent *[largeBuffer]byte
	giveBack := func() {
		if lent != nil {
			largeBuffers.Put(lent)
			lent, buf = nil, p.small[:]
			p.large.Store(false)
		}
	}
	defer giveBack()
	for {
		n, err := p.src.Read(buf)
		if n > 0 {
			p.link.touch(time.Now())
			p.bytes.Add(float64(n))
			p.moved += int64(n)
			if _, err := p.dst.Write(buf[:n]); err != nil {
				return err
			}
		}
		switch {
		case err == nil:
		case errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF):
			half, ok := p.dst.(halfCloser)
			if !ok {
				return errNoHalfClose
			}
			return half.CloseWrite()
		case errors.Is(err, os.ErrDeadlineExceeded) && p.woken.Load():
			giveBack()
			p.woken.Store(false)
			if err := p.src.SetReadDeadline(time.Time{}); err != nil {
				return err
			}
			continue
		default:
			return err
		}
		if n == len(buf) && lent == nil {
			lent, _ = largeBuffers.Get().(*[largeBuffer]byte)
			buf = lent[:]
			p.large.Store(true)
		}
	}
}

// shrink makes a pump that waits for bytes give its large buffer back.
func (p *pump) shrink() {
	if p != nil && p.large.Load() && !p.woken.Swap(true) {
		_ = p.src.SetReadDeadline(time.Unix(1, 0)) // the error is that of a closed connection
	}
}

// splice carries a TCP session between client and server until both directions ended, each in its own time. If one breaks, both
// sides are reset: neither may take what it has for the whole.
func (p *Plane) splice(l *link, client, server net.Conn) {
	up := &pump{link: l, src: client, dst: server, bytes: l.edge.bytesSent}
	down := &pump{link: l, src: server, dst: client, bytes: l.edge.bytesReceived}
	l.mu.Lock()
	l.pumps = [2]*pump{up, down}
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
