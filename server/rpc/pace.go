package rpc

import (
	"net"
	"runtime"
	"sync"
)

// Pace bounds how many goroutines of a crowd compute at a time, by the number of
// processors. Those that wait are not in the scheduler's queue, so that what is due at
// once, as the heartbeats between servers are, finds a processor within milliseconds
// while a whole fleet connects. It is safe for concurrent use.
type Pace struct{ turns chan struct{} }

// NewPace returns a Pace of its own.
func NewPace() *Pace { return &Pace{make(chan struct{}, runtime.GOMAXPROCS(0))} }

// do runs something that computes and waits for nobody.
func (p *Pace) do(f func()) {
	p.turns <- struct{}{}
	defer func() { <-p.turns }()
	f()
}

// Begin returns conn for a handshake. Whoever reads from it computes, from when a Read
// returns until the next Read, Write or End, in a turn of p; while it waits for its
// peer it has none, so that a slow peer holds up nobody. After End it is like conn.
func (p *Pace) Begin(conn net.Conn) *Paced { return &Paced{Conn: conn, pace: p} }

// Paced is a connection during its handshake; see Pace.Begin.
type Paced struct {
	net.Conn
	pace *Pace

	mu      sync.Mutex
	holding bool
	over    bool
}

// Read implements net.Conn.
func (c *Paced) Read(b []byte) (int, error) {
	if c.release(false) {
		return c.Conn.Read(b) //nolint:wrapcheck // a connection's own words
	}
	n, err := c.Conn.Read(b)
	if err == nil {
		c.pace.turns <- struct{}{}
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.over {
			<-c.pace.turns
		} else {
			c.holding = true
		}
	}
	return n, err //nolint:wrapcheck // a connection's own words
}

// Write implements net.Conn.
func (c *Paced) Write(b []byte) (int, error) {
	c.release(false)
	return c.Conn.Write(b) //nolint:wrapcheck // a connection's own words
}

// End is called when the handshake is done or has failed.
func (c *Paced) End() { c.release(true) }

// release gives the turn back, if there is one, and reports whether there will be no
// more.
func (c *Paced) release(end bool) (over bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.holding {
		c.holding = false
		<-c.pace.turns
	}
	c.over = c.over || end
	return c.over
}
