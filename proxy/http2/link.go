package http2

import (
	"errors"
	"net"
	"os"
	"runtime"
	"sync/atomic"
	"time"

	"github.com/meshd/meshd/proxy/l7"
	"github.com/meshd/meshd/proxy/sock"
)

// tick is how often a connection with streams looks whether one of them is
// overdue.
const tick = int64(time.Second)

// errTick is a read that looked up. It can go on.
var errTick = errors.New("nothing came until the next look")

// link is a connection's socket. One goroutine reads, one writes; hurry and
// abort may come from any.
type link struct {
	nc     net.Conn
	tcp    net.Conn // nc, or what is under its TLS
	lends  lendReader
	yields bool

	readArmed  int64 // when the read deadline fires; 0 is never. The reader's.
	writeArmed int64 // the writer's
	hurried    atomic.Bool
	leaving    atomic.Bool // the write deadline is the last one
	closed     atomic.Bool
}

type lendReader interface {
	ReadLent(l sock.Lender) (int, error)
}

func (l *link) init(nc net.Conn) {
	if s, ok := nc.(sock.Stream); ok {
		if _, ok := nc.(*sock.Conn); !ok {
			nc = sock.New(s)
		}
	}
	l.nc, l.tcp, l.yields = nc, nc, runtime.GOMAXPROCS(0) == 1
	if under, ok := nc.(interface{ NetConn() net.Conn }); ok {
		l.tcp = under.NetConn()
	}
	l.lends, _ = nc.(lendReader)
}

// read blocks until there are bytes, which go to what from lends, or until by,
// which is errTick. by is 0 for no limit. An earlier return than by is possible.
func (l *link) read(by int64, from sock.Lender) (int, error) {
	if err := l.arm(by); err != nil {
		return 0, err
	}
	if l.yields {
		runtime.Gosched() // on one CPU there is mostly something to read then
	}
	var n int
	var err error
	if l.lends != nil {
		n, err = l.lends.ReadLent(from)
	} else if n, err = l.nc.Read(from.Lend()); n == 0 {
		from.Return()
	}
	switch {
	case n > 0:
		return n, nil
	case err == nil:
		return 0, errTick
	case errors.Is(err, os.ErrDeadlineExceeded):
		l.readArmed = -1
		l.hurried.Store(false)
		return 0, errTick
	}
	return 0, err
}

// arm sees to it that the read deadline fires no later than by, and not much
// earlier: one that is armed already serves if it fires at most a tick before.
func (l *link) arm(by int64) error {
	switch {
	case by == l.readArmed:
		return nil
	case by != 0 && l.readArmed > 0 && l.readArmed <= by && l.readArmed > by-tick:
		if l.readArmed > l7.Instant() {
			return nil
		}
	}
	l.readArmed = by
	var at time.Time
	if by != 0 {
		at = l7.At(by)
	}
	if err := l.nc.SetReadDeadline(at); err != nil {
		return err
	}
	if l.hurried.Load() { // what it set may have been overwritten
		l.readArmed = -1
		return l.nc.SetReadDeadline(time.Unix(1, 0))
	}
	return nil
}

// hurry makes the read that blocks, or the next one, return errTick.
func (l *link) hurry() {
	l.hurried.Store(true)
	_ = l.nc.SetReadDeadline(time.Unix(1, 0)) // if it fails the connection is closed, and reads end as well
}

// write writes all of p. A peer that takes nothing for idle (to 1.5 idle) ends
// it. A write deadline must never fire early: TLS cannot go on after it.
func (l *link) write(p []byte, idle time.Duration) error {
	if idle > 0 && !l.leaving.Load() {
		if now := l7.Instant(); l.writeArmed <= now+int64(idle) {
			l.writeArmed = now + int64(idle) + int64(idle)/2
			if err := l.nc.SetWriteDeadline(l7.At(l.writeArmed)); err != nil {
				return err
			}
			if l.leaving.Load() { // what lastWrites set may have been overwritten
				l.lastWrites()
			}
		}
	}
	_, err := l.nc.Write(p)
	return err
}

// abort resets the connection.
func (l *link) abort() {
	if l.closed.Swap(true) {
		return
	}
	if lingerer, ok := l.tcp.(interface{ SetLinger(sec int) error }); ok {
		_ = lingerer.SetLinger(0) // without it the close is an orderly one
	}
	_ = l.tcp.Close() // closing what is under TLS sends nothing and waits for nobody
}

// lastWrites bounds those that run and that are to come: the connection ends.
func (l *link) lastWrites() {
	l.leaving.Store(true)
	_ = l.nc.SetWriteDeadline(time.Now().Add(time.Second)) // if it fails writes do as well
}

// close ends the connection so that the peer can read what was written last:
// with unread bytes a close would be a reset. It waits a second at most.
func (l *link) close() {
	if l.closed.Load() {
		return
	}
	if half, ok := l.nc.(interface{ CloseWrite() error }); ok && half.CloseWrite() == nil {
		l.drain()
	}
	if !l.closed.Swap(true) {
		_ = l.nc.Close() // nothing is left to be told about it
	}
}

// drain takes what the peer still sends, in turns with pauses: one that floods costs a read per turn, and is held up by TCP.
func (l *link) drain() {
	const (
		most = 1 << 20
		turn = 10 * time.Millisecond
	)
	if l.nc.SetReadDeadline(time.Now().Add(time.Second)) != nil {
		return
	}
	b := getBuffer(true)
	defer b.release()
	for total := 0; total < most; {
		n, err := l.nc.Read(b.b)
		if err != nil {
			return
		}
		total += n
		pause := time.NewTimer(turn)
		<-pause.C
	}
}
