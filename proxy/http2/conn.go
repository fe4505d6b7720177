package http2

import (
	"encoding/binary"
	"errors"
	"io"
	"maps"
	"sync"
	"time"

	"github.com/meshd/meshd/proxy/hpack"
	"github.com/meshd/meshd/proxy/l7"
)

// role is what makes a conn a serving or a forwarding end. All of it is called
// by the reader, without the lock.
type role interface {
	// head takes a complete header block, which must be put through c.dec to its
	// end; block is void afterwards. s is the stream if it is open, else nil. end
	// says that the stream ends with it. An error ends the connection.
	head(id uint32, s *stream, block []byte, end bool) error
	// settings is told that the peer's settings were taken.
	settings()
	// pong is told of the answer to [conn.ping].
	pong(data uint64)
	// goAway is told of the peer's GOAWAY.
	goAway(last uint32, code ErrCode, debug []byte)
	// tick looks about once a second, while streams are open, for what is overdue,
	// and returns when it wants to look again if none is; 0 is never. An error
	// ends the connection; io.EOF does so in good order.
	tick(now int64) (next int64, err error)
}

// conn is one connection, the same for both ends: frames, windows, settings,
// and the order in which streams are written.
//
// One goroutine reads, in run. It never waits for anything but its socket: what
// comes is put to streams, and whoever waits for it is woken. Another one
// writes, while there is something to write: it asks the streams that are ready,
// in turns, and sends what they have in as few system calls as possible. It ends
// when the connection is idle. Everything else is done by those who call.
//
// mu guards everything under it, and in streams what they say. It is never held
// while something outside this package, or an [owner], is called.
type conn struct {
	link   link
	role   role
	limits Limits
	count  *Counters
	client bool
	idle   time.Duration // after which a write that does not move is given up
	// headTimeout is for a header block, and for the first SETTINGS.
	headTimeout time.Duration
	lost        l7.Reason // what the end of the connection means to its streams
	wrong       l7.Reason // what malformed frames mean to their stream

	// The reader's.
	in      *buffer
	large   bool // the last read filled the buffer
	dec     *hpack.Decoder
	frame   dataFrame
	block   headBlock
	greeted bool // the peer's first SETTINGS came
	acked   bool // it has taken ours
	prefix  int  // bytes of the preface that came
	began   int64
	looked  int64
	next    int64 // when role.tick wants to be called without streams
	calm    floods
	lists   hpack.Limits // of the peer's field lists

	// The writer's.
	enc      *hpack.Encoder
	out      *buffer // being filled; out.b[:out.w] is to be written
	wide     bool    // more was ready than out had room for
	writing  []byte
	writeRun func()

	mu         sync.Mutex
	streams    map[uint32]*stream
	highest    uint32 // number of the newest stream
	opened     uint64 // bit i: highest-2i was opened
	first      *stream
	last       *stream // of the ready ones
	control    []byte  // frames that no window holds back
	answers    int     // bytes of it that answer the peer
	acks       int     // SETTINGS to be acknowledged
	tableSize  uint32  // that the peer's SETTINGS allow
	peer       peerSettings
	sendWindow int64 // that the peer grants the connection
	recvWindow int64 // that we granted
	unacked    int   // consumed, not yet granted anew
	running    bool  // the writer
	asleep     bool
	leave      bool       // the writer is to end if it has nothing to do
	ticking    bool       // the reader looks up every second
	ending     bool       // nothing is read any more
	failure    *ConnError // why, if it is because of what came
	mute       bool       // nothing can be written any more
	aborted    l7.Reason
	hasty      bool // the reader is to know when the last stream is gone
	resetUpTo  uint32
	spare      int // see floods
	bell       chan struct{}
	done       chan struct{} // closed when the writer ended for good
}

// peerSettings are what the peer announced.
type peerSettings struct {
	window     int64
	frame      int
	maxStreams uint32
	connect    bool // extended CONNECT (RFC 8441)
}

// init prepares c. settings are what this end announces.
func (c *conn) init(r role, l Limits, count *Counters) {
	c.role, c.limits, c.count = r, l.WithDefaults(), count
	c.dec, c.enc = hpack.NewDecoder(), hpack.NewEncoder(4096)
	c.peer = peerSettings{window: initialWindow, frame: maxFrame, maxStreams: unlimitedStreams}
	c.tableSize = 4096
	c.sendWindow, c.recvWindow = initialWindow, int64(c.limits.Window)
	c.spare = c.limits.Control
	c.bell, c.done = make(chan struct{}, 1), make(chan struct{})
	c.writeRun = c.writeLoop
	c.began = l7.Instant()
	c.looked, c.calm.since = c.began, c.began
	c.greet()
}

// greet puts what goes first: preface, SETTINGS, and the connection's window.
func (c *conn) greet() {
	var s [6 * settingSize]byte
	settings := s[:0]
	if c.client {
		c.control = append(c.control, preface...)
		c.prefix = len(preface) // the server sends none
		settings = appendSetting(settings, settingPush, 0)
	} else {
		settings = appendSetting(settings, settingMaxStreams, uint32(c.limits.Streams)) //nolint:gosec // a small number
		settings = appendSetting(settings, settingConnect, 1)
	}
	settings = appendSetting(settings, settingWindow, uint32(c.limits.StreamWindow)) //nolint:gosec // a window
	settings = appendSetting(settings, settingListSize, c.lists.ListSize)
	c.control = append(appendHeader(c.control, len(settings), frameSettings, 0, 0), settings...)
	if more := c.limits.Window - initialWindow; more > 0 {
		c.control = appendWindowUpdate(c.control, 0, more)
	}
}

// run reads until the connection ends, and returns why, with nothing of it left
// running. nil is an orderly end.
func (c *conn) run() error {
	c.mu.Lock()
	c.ring()
	c.mu.Unlock()
	err := c.read()
	failure, _ := errors.AsType[*ConnError](err)
	if failure != nil {
		c.blame(failure)
	}
	c.shut(failure, err)
	<-c.done
	c.in.release()
	c.in = nil
	c.link.close()
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// blame counts what ended the connection.
func (c *conn) blame(e *ConnError) {
	n := &c.count.Violations
	switch e.Err {
	case ErrResets: //nolint:errorlint // each is set as it is
		n = &c.count.Resets
	case ErrControl:
		n = &c.count.Control
	case ErrContinuations:
		n = &c.count.Continuations
	case ErrAnswers:
		n = &c.count.Answers
	case ErrHeadTimeout:
		n = &c.count.HeadTimeouts
	default:
	}
	n.Add(1)
}

// read is the reader's loop. io.EOF is an orderly end.
func (c *conn) read() error {
	for {
		n, err := c.link.read(c.wait(), (*lender)(c))
		if n > 0 {
			c.in.w += n
			c.large = c.in.w == len(c.in.b)
			if err := c.consume(); err != nil {
				return err
			}
		} else if !errors.Is(err, errTick) {
			return c.broken(err)
		}
		if now := l7.Instant(); err != nil || now-c.looked >= tick {
			if err := c.look(now); err != nil {
				return err
			}
		}
	}
}

// broken tells an orderly end from a failure of the socket.
func (c *conn) broken(err error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if errors.Is(err, io.EOF) && len(c.streams) > 0 {
		return io.ErrUnexpectedEOF
	}
	return err
}

// wait returns until when to wait for bytes.
func (c *conn) wait() int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ticking = len(c.streams) > 0 || !c.greeted || c.block.id != 0 || c.running
	if c.ticking {
		return l7.Instant() + tick
	}
	return c.next
}

// look is the reader's look around, about once a second while there are streams.
func (c *conn) look(now int64) error {
	c.looked = now
	if err := c.calm.look(c, now); err != nil {
		return err
	}
	var err error
	if c.next, err = c.role.tick(now); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.streams) == 0 && c.running && c.asleep { // idle: what was needed for streams is given back
		c.streams, c.control = nil, nil
		c.leave = true
		c.ring()
	}
	return nil
}

// lender gives the reader memory when there is something to read.
type lender conn

// Lend implements sock.Lender.
func (l *lender) Lend() []byte {
	switch b := l.in; {
	case b == nil:
		l.in = getBuffer(l.large)
	case l.large && len(b.b) != largeSize:
		l.in = getBuffer(true)
		l.in.w = copy(l.in.b, b.b[b.r:b.w])
		b.release()
	}
	return l.in.b[l.in.w:]
}

// Return implements sock.Lender.
func (l *lender) Return() {
	if b := l.in; b.r == b.w {
		l.in = nil
		b.release()
	}
}

// shut ends all streams, and lets the writer end after it has told the peer why.
func (c *conn) shut(failure *ConnError, err error) {
	c.mu.Lock()
	c.ending, c.failure = true, failure
	switch {
	case failure != nil:
		c.control = appendGoAway(c.control, c.peerHighest(), failure.Code, failure.Err.Error())
		c.link.lastWrites()
	case errors.Is(err, io.EOF):
		c.link.lastWrites()
	default:
		c.mute = true
		c.link.abort()
	}
	reason := c.lost
	if c.aborted != l7.None {
		reason = c.aborted
	}
	all := make(map[uint32]*stream, len(c.streams))
	maps.Copy(all, c.streams)
	c.ring()
	c.mu.Unlock()
	for id, s := range all {
		c.kill(s, id, &l7.Error{Reason: reason, Err: unexpected(err)}, nil)
	}
}

// peerHighest is the number of the peer's newest stream, for GOAWAY.
func (c *conn) peerHighest() uint32 {
	if c.client {
		return 0
	}
	return c.highest
}

func unexpected(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// ping asks the peer to answer data. c.mu must be held.
func (c *conn) ping(data uint64) {
	var b [8]byte
	binary.BigEndian.PutUint64(b[:], data)
	c.control = appendPing(c.control, false, b[:])
	c.ring()
}

// open gives s its number and makes it known. On a serving end the reader calls it, on a forwarding end the writer, from
// owner.sendHead. It reports false if the connection ended.
func (c *conn) open(s *stream, id uint32) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ending {
		return false
	}
	s.id = id
	s.sendWindow, s.recvWindow = c.peer.window, int64(c.limits.StreamWindow)
	if c.streams == nil {
		c.streams = map[uint32]*stream{}
	}
	c.streams[id] = s
	c.note(id)
	c.spare = min(c.spare+sparePerStream, 4*c.limits.Control)
	if !c.ticking {
		c.ticking = true
		if c.client {
			c.link.hurry()
		}
	}
	return true
}

// note marks the number as used.
func (c *conn) note(id uint32) {
	if shift := (id - c.highest) / 2; shift < 64 {
		c.opened <<= shift
	} else {
		c.opened = 0
	}
	c.opened |= 1
	c.highest = id
}

// used reports whether a stream of this number was opened, as far as that is
// remembered.
func (c *conn) used(id uint32) bool {
	if id > c.highest {
		return false
	}
	back := (c.highest - id) / 2
	return back >= 64 || c.opened>>back&1 == 1
}
