package l7

import (
	"errors"
	"net"
	"os"
	"runtime"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/meshd/meshd/proxy/sock"
)

// epoch is what instants are counted from: an int64 of monotonic nanoseconds
// is cheaper to read, to store atomically and to compare than a time.Time.
//
//nolint:gochecknoglobals // a constant once the process runs
var epoch = time.Now()

func instant() int64 { return int64(time.Since(epoch)) }

// tick is how often a wait that may be long looks up: is the client still
// there, is the deadline over.
const tick = int64(time.Second)

var (
	errInterrupted = errors.New("the wait was interrupted")
	errGone        = errors.New("the client is gone")
)

// link is one connection with deadlines that cost a timer operation about once
// a second, not once per read: a deadline that fires early is renewed. One
// goroutine reads, one writes; interrupt and abort may come from any.
type link struct {
	nc  net.Conn
	tcp net.Conn        // nc, or what is under its TLS; nil if unknown
	raw syscall.RawConn // of tcp
	// plain says that bytes of nc are bytes of raw: no TLS between.
	plain   bool
	lends   lendReader // nc, or nil if it can't
	asks    asker      // nc, or nil if it can't
	gathers gatherer   // nc, or nil if it can't
	holds   holder     // nc, or nil if it keeps nothing
	// vain is asked whether a read found something at once; nil if that can't be told.
	vain  *sock.Conn
	turns turns

	readArmed  int64 // when the read deadline fires; 0 is never
	writeArmed int64

	interrupted atomic.Bool
	closed      atomic.Bool

	n    int
	err  error
	peek func(fd uintptr) bool // made once, so that peeking does not allocate
}

// What a connection may be able to do beyond net.Conn; those of packages sock and record are.
type (
	lendReader interface {
		ReadLent(l sock.Lender) (int, error)
	}
	asker interface {
		AskLent(q sock.Asker) (int, error)
	}
	gatherer interface {
		WriteAll(a, b, c []byte) (int64, error)
	}
	holder interface{ Buffered() bool }
)

func (l *link) init(nc net.Conn) {
	if s, ok := nc.(sock.Stream); ok {
		if _, ok := nc.(*sock.Conn); !ok {
			nc = sock.New(s)
		}
	}
	*l = link{nc: nc, tcp: nc, plain: true}
	if under, ok := nc.(interface{ NetConn() net.Conn }); ok {
		l.tcp, l.plain = under.NetConn(), false
	}
	l.lends, _ = nc.(lendReader)
	l.asks, _ = nc.(asker)
	l.gathers, _ = nc.(gatherer)
	l.holds, _ = nc.(holder)
	if l.lends != nil {
		l.vain, _ = l.tcp.(*sock.Conn)
	}
	if sc, ok := l.tcp.(syscall.Conn); ok {
		if raw, err := sc.SyscallConn(); err == nil {
			l.raw = raw
		}
	}
	l.peek = func(fd uintptr) bool {
		l.n, l.err = sock.Peek(fd)
		return true
	}
}

// read blocks until there are bytes, the instant by is past, or interrupt was
// called. by is 0 for no limit. look, if not nil, is asked about once a second
// whether to go on waiting.
func (l *link) read(p []byte, by int64, look func() error) (int, error) {
	for {
		if err := l.armRead(by, look != nil); err != nil {
			return 0, err
		}
		n, err := l.nc.Read(p)
		if n > 0 {
			return n, nil
		}
		if err == nil {
			continue
		}
		if err := l.again(err, by, look); err != nil {
			return 0, err
		}
	}
}

// again decides what an error of a read means: nil is to try again.
func (l *link) again(err error, by int64, look func() error) error {
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		return err
	}
	l.readArmed = -1 // it is past: arm anew
	if l.interrupted.Load() {
		return errInterrupted
	}
	if by != 0 && instant() >= by {
		return os.ErrDeadlineExceeded
	}
	if look != nil {
		return look()
	}
	return nil
}

// armRead sees to it that the read deadline fires no later than by, or, for a
// wait that looks up, than a second or two from now.
func (l *link) armRead(by int64, looks bool) error {
	want := by
	if looks {
		now := instant()
		if by == 0 || by > now+tick {
			want = now + tick
			// What is armed serves as well while it fires neither at once nor late.
			if l.readArmed > now+tick/2 && l.readArmed <= want+tick {
				return l.check()
			}
		}
	}
	if want == 0 && l.readArmed == 0 || l.readArmed > 0 && l.readArmed <= want && l.readArmed > instant() {
		return l.check()
	}
	if want == 0 {
		if err := l.nc.SetReadDeadline(time.Time{}); err != nil {
			return err
		}
	} else if err := l.nc.SetReadDeadline(epoch.Add(time.Duration(want))); err != nil {
		return err
	}
	l.readArmed = want
	return l.check()
}

// check comes after arming, so that an interrupt that came before it, and
// whose deadline was overwritten, is seen.
func (l *link) check() error {
	if l.interrupted.Load() {
		return errInterrupted
	}
	return nil
}

// write writes all of p. A peer that takes nothing for idle (to 1.5 idle) ends
// it. A write deadline must never fire early: TLS cannot go on after it.
func (l *link) write(p []byte, idle time.Duration) (int, error) {
	if err := l.armWrite(idle); err != nil {
		return 0, err
	}
	return l.nc.Write(p)
}

// writeAll writes parts one behind the other, in one call where the connection can. Without gathers it uses vec up.
func (l *link) writeAll(parts *[3][]byte, vec *net.Buffers, idle time.Duration) (int64, error) {
	if err := l.armWrite(idle); err != nil {
		return 0, err
	}
	if l.gathers != nil {
		return l.gathers.WriteAll(parts[0], parts[1], parts[2])
	}
	*vec = parts[:]
	return vec.WriteTo(l.nc)
}

func (l *link) armWrite(idle time.Duration) error {
	if idle <= 0 {
		return nil
	}
	now := instant()
	if l.writeArmed > now+int64(idle) {
		return nil
	}
	l.writeArmed = now + int64(idle) + int64(idle)/2
	return l.nc.SetWriteDeadline(epoch.Add(time.Duration(l.writeArmed)))
}

// interrupt makes the read that blocks now, and every later one, return.
func (l *link) interrupt() {
	l.interrupted.Store(true)
	// The error is a closed connection's, which ends reads as well.
	_ = l.nc.SetReadDeadline(time.Unix(1, 0))
}

// resume undoes interrupt. Only the reader may call it.
func (l *link) resume() {
	l.interrupted.Store(false)
	l.readArmed = -1
}

// abort resets the connection: the peer must not take what it has for whole.
func (l *link) abort() {
	if l.closed.Swap(true) {
		return
	}
	if lingerer, ok := l.tcp.(interface{ SetLinger(sec int) error }); ok {
		_ = lingerer.SetLinger(0) // without it the close is an orderly one
	}
	// Closing what is under TLS sends no close_notify and waits for nobody.
	_ = l.tcp.Close()
}

// close ends the connection in good order.
func (l *link) close() {
	if l.closed.Swap(true) {
		return
	}
	_ = l.nc.Close() // nothing is left to be told about it
}

// closeWrite tells the peer that no more comes.
func (l *link) closeWrite() error {
	if half, ok := l.nc.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return nil
}

// quiet reports, without blocking, that an unused connection is open and has
// nothing to read. Anything else (end of stream, reset, bytes that nobody
// asked for, a connection that cannot be asked) makes it unfit for reuse.
func (l *link) quiet() bool {
	if l.raw == nil || l.holds != nil && l.holds.Buffered() || !l.clearDeadline() {
		return false
	}
	if err := l.raw.Read(l.peek); err != nil {
		return false
	}
	return errors.Is(l.err, syscall.EAGAIN)
}

// gone reports, without blocking, that the peer closed or reset. Bytes that
// wait to be read hide it.
func (l *link) gone() bool {
	if l.closed.Load() {
		return true
	}
	if l.raw == nil || !l.clearDeadline() || l.raw.Read(l.peek) != nil {
		return false
	}
	return l.n == 0 && l.err == nil || l.err != nil && !errors.Is(l.err, syscall.EAGAIN)
}

// clearDeadline makes room for a probe: a deadline that is past refuses even a
// read that would not block.
func (l *link) clearDeadline() bool {
	if l.readArmed == 0 || l.readArmed > instant()+int64(10*time.Millisecond) {
		return true
	}
	l.readArmed = 0
	return l.nc.SetReadDeadline(time.Time{}) == nil && !l.interrupted.Load()
}

// ask sends what q asks on an unused connection, and reads the beginning of the answer if that comes before the first look.
// Where it was asked and no answer came yet, both results are zero. sock.ErrBusy and sock.ErrUnasked are those of AskLent.
func (l *link) ask(q sock.Asker, by int64, look func() error) (int, error) {
	if err := l.armRead(by, true); err != nil {
		return 0, err
	}
	n, err := l.asks.AskLent(q)
	if n > 0 || err == nil || errors.Is(err, sock.ErrBusy) || errors.Is(err, sock.ErrUnasked) {
		return n, err
	}
	return 0, l.again(err, by, look)
}

// turns says whether to let others go on before a read. Under load there mostly is
// something to read then, and neither a vain system call nor a trip through the
// poller was needed; otherwise it is a trip through the scheduler for nothing. So it is
// done as long as it helps, and now and then to see whether it would.
type turns struct {
	skip, left uint8
}

// maxSkip is how many reads are not preceded by a yield at most where none helps.
const maxSkip = 31

func (t *turns) yield() bool {
	if t.left > 0 {
		t.left--
		return false
	}
	runtime.Gosched()
	return true
}

// found is told whether the read after a yield found something at once.
func (t *turns) found(something bool) {
	if something {
		t.skip = 0
	} else {
		t.skip = min(2*t.skip+1, maxSkip)
	}
	t.left = t.skip
}

// await is read into what from lends. It is asked when bytes are there, so that
// nothing is held while the connection waits for a request.
func (l *link) await(by int64, from sock.Lender) (int, error) {
	for {
		if err := l.armRead(by, false); err != nil {
			return 0, err
		}
		var n int
		var err error
		var vain uint32
		yielded := l.vain != nil && l.turns.yield()
		if yielded {
			vain = l.vain.Vain()
		}
		if l.lends != nil {
			n, err = l.lends.ReadLent(from)
		} else if n, err = l.nc.Read(from.Lend()); n == 0 {
			from.Return()
		}
		if yielded {
			l.turns.found(l.vain.Vain() == vain)
		}
		if n > 0 {
			return n, nil
		}
		if err != nil {
			if err := l.again(err, by, nil); err != nil {
				return 0, err
			}
		}
	}
}
