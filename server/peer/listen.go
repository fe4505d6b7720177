package peer

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/server/handed"
)

const (
	// maxHandshakes bounds the connections that have not proved themselves. A
	// further one displaces the oldest of them: who is slow on purpose can't keep a
	// server out, whose handshake takes milliseconds.
	maxHandshakes = 64
	// maxConnections bounds those that have: a server needs about four.
	maxConnections = 512
	// acceptPause follows a failed accept, as when descriptors run out.
	acceptPause = 50 * time.Millisecond
	// complainEvery is how often the same is logged about the same machine.
	complainEvery = time.Minute
	maxComplaints = 256
)

// listener admits other servers, and hands their connections to Raft or to gRPC.
type listener struct {
	inner   net.Listener
	config  *tls.Config
	id      string
	streams *streams
	grpc    *handed.Queue
	log     *slog.Logger

	mu       sync.Mutex
	pending  []net.Conn             // in the handshake, oldest first
	open     map[*admitted]struct{} // after it
	ended    bool
	complain map[string]time.Time // when what was logged last
}

func newListener(inner net.Listener, config *tls.Config, id string, s *streams, log *slog.Logger) *listener {
	return &listener{
		inner: inner, config: config, id: id, streams: s, grpc: handed.NewQueue(inner.Addr()), log: log,
		open: map[*admitted]struct{}{}, complain: map[string]time.Time{},
	}
}

// run accepts until ctx ends, and closes all connections when drained is closed,
// which must follow; or until the port fails.
func (l *listener) run(ctx context.Context, drained <-chan struct{}) error {
	stop := context.AfterFunc(ctx, func() { _ = l.inner.Close() }) // the only way to wake Accept
	defer stop()
	var group sync.WaitGroup
	defer group.Wait()
	defer func() {
		if ctx.Err() != nil { // else the port has failed, and others wait for that to be told
			<-drained
		}
		l.end()
	}()
	for {
		conn, err := l.inner.Accept()
		switch {
		case ctx.Err() != nil:
			if err == nil {
				_ = conn.Close() // too late to be served
			}
			return nil
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("accept servers on %s: %w", l.inner.Addr(), err)
		case err != nil:
			l.log.WarnContext(ctx, "a connection of a server could not be accepted", slog.Any("error", err))
			if !pause(ctx, acceptPause) {
				return nil
			}
		default:
			l.begin(conn)
			group.Go(func() { l.handshake(ctx, conn) })
		}
	}
}

// begin notes a connection that has proved nothing.
func (l *listener) begin(conn net.Conn) {
	watchful(conn)
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.pending) >= maxHandshakes {
		_ = l.pending[0].Close() // its handshake fails, and it leaves the list here
		l.pending = slices.Delete(l.pending, 0, 1)
	}
	l.pending = append(l.pending, conn)
}

// forget ends the handshake of a connection, well or not.
func (l *listener) forget(conn net.Conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if i := slices.Index(l.pending, conn); i >= 0 {
		l.pending = slices.Delete(l.pending, i, i+1)
	}
}

// admit notes a connection that has proved itself, unless there are too many.
func (l *listener) admit(conn *tls.Conn) (*admitted, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ended || len(l.open) >= maxConnections {
		return nil, false
	}
	a := &admitted{Conn: conn, of: l}
	l.open[a] = struct{}{}
	return a, true
}

// end closes what is open.
func (l *listener) end() {
	l.mu.Lock()
	pending, open := l.pending, l.open
	l.pending, l.open, l.ended = nil, map[*admitted]struct{}{}, true
	l.mu.Unlock()
	for _, conn := range pending {
		_ = conn.Close() // its handshake fails
	}
	for conn := range open {
		_ = conn.NetConn().Close() // without a farewell, for which a dead peer would be waited
	}
}

func (l *listener) handshake(ctx context.Context, conn net.Conn) {
	ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	secure := tls.Server(conn, l.config)
	err := secure.HandshakeContext(ctx)
	state := secure.ConnectionState()
	if err == nil && state.NegotiatedProtocol == ca.ALPNRaft {
		deadline, _ := ctx.Deadline()
		_ = conn.SetDeadline(deadline) // a connection that has ended fails at once
		if _, err = secure.Write(appendGreeting(nil, l.id)); err == nil {
			err = conn.SetDeadline(time.Time{})
		}
	}
	l.forget(conn)
	if err != nil {
		l.refused(ctx, conn, err)
		_ = conn.Close() // refused
		return
	}
	entry, ok := l.admit(secure)
	if !ok {
		l.log.WarnContext(ctx, "a server has too many connections open", slog.String("remote", conn.RemoteAddr().String()), slog.Int("limit", maxConnections))
		_ = conn.Close() // over the limit, or too late
		return
	}
	to := l.grpc.Put
	if state.NegotiatedProtocol == ca.ALPNRaft {
		to = l.streams.put
	}
	if !to(ctx, entry) {
		_ = entry.Close() // the server ends, or has no transport
	}
}

// refused logs why a machine was not admitted: the same once a minute. Somebody
// else may knock at this port as often as they like.
func (l *listener) refused(ctx context.Context, conn net.Conn, err error) {
	host, _, splitErr := net.SplitHostPort(conn.RemoteAddr().String())
	if splitErr != nil {
		host = conn.RemoteAddr().String()
	}
	if errors.Is(ctx.Err(), context.Canceled) {
		return // this server ends
	}
	reason := plain(ctx, err).Error()
	now := time.Now()
	l.mu.Lock()
	last, known := l.complain[host+" "+reason]
	quiet := known && now.Sub(last) < complainEvery
	if !quiet {
		if len(l.complain) >= maxComplaints {
			clear(l.complain)
		}
		l.complain[host+" "+reason] = now
	}
	l.mu.Unlock()
	if quiet {
		return
	}
	l.log.WarnContext(ctx, "a connection to the port of servers was refused", slog.String("remote", host), slog.String("reason", reason))
}

// admitted is a connection in listener.open.
type admitted struct {
	*tls.Conn
	of *listener
}

// Close implements net.Conn.
func (a *admitted) Close() error {
	a.of.mu.Lock()
	delete(a.of.open, a)
	a.of.mu.Unlock()
	return a.Conn.Close() //nolint:wrapcheck // a connection's own words
}

// pause waits, and reports whether ctx has not ended.
func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}
