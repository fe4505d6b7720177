package peer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"

	"github.com/meshd/meshd/ca"
)

const (
	// raftTimeout is for one exchange, and for every 256 KiB of a snapshot. A dead
	// machine is noticed by silence; this is for one whose process stands still, and
	// long enough for a disk that hangs or a line of 1 Mbit/s. Every server has its
	// own goroutines in Raft, so that none waits for another.
	raftTimeout = 10 * time.Second
	// raftPool is how many idle connections are kept per server: Raft uses one to
	// replicate, one for heartbeats, and one for votes.
	raftPool = 3
)

// raftTransport tells the streams which server is meant: Raft gives them an
// address only, and keeps connections by what it gives.
type raftTransport struct{ *raft.NetworkTransport }

func newTransport(s *streams) raft.Transport {
	return raftTransport{raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{
		Stream:          s,
		MaxPool:         raftPool,
		MaxRPCsInFlight: raft.DefaultMaxRPCsInFlight,
		Timeout:         raftTimeout,
		Logger:          hclog.NewNullLogger(), // the calls return what fails, and Raft logs that
	})}
}

var (
	_ raft.Transport   = raftTransport{}
	_ raft.WithPreVote = raftTransport{}
	_ raft.WithClose   = raftTransport{}
)

func meant(id raft.ServerID, target raft.ServerAddress) raft.ServerAddress {
	return raft.ServerAddress(id) + "@" + target
}

// AppendEntriesPipeline implements raft.Transport.
func (t raftTransport) AppendEntriesPipeline(id raft.ServerID, target raft.ServerAddress) (raft.AppendPipeline, error) {
	return t.NetworkTransport.AppendEntriesPipeline(id, meant(id, target))
}

// AppendEntries implements raft.Transport.
func (t raftTransport) AppendEntries(id raft.ServerID, target raft.ServerAddress, args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) error {
	return t.NetworkTransport.AppendEntries(id, meant(id, target), args, resp)
}

// RequestVote implements raft.Transport.
func (t raftTransport) RequestVote(id raft.ServerID, target raft.ServerAddress, args *raft.RequestVoteRequest, resp *raft.RequestVoteResponse) error {
	return t.NetworkTransport.RequestVote(id, meant(id, target), args, resp)
}

// RequestPreVote implements raft.WithPreVote.
func (t raftTransport) RequestPreVote(id raft.ServerID, target raft.ServerAddress, args *raft.RequestPreVoteRequest, resp *raft.RequestPreVoteResponse) error {
	return t.NetworkTransport.RequestPreVote(id, meant(id, target), args, resp)
}

// InstallSnapshot implements raft.Transport.
func (t raftTransport) InstallSnapshot(
	id raft.ServerID, target raft.ServerAddress, args *raft.InstallSnapshotRequest, resp *raft.InstallSnapshotResponse, data io.Reader,
) error {
	return t.NetworkTransport.InstallSnapshot(id, meant(id, target), args, resp, data)
}

// TimeoutNow implements raft.Transport.
func (t raftTransport) TimeoutNow(id raft.ServerID, target raft.ServerAddress, args *raft.TimeoutNowRequest, resp *raft.TimeoutNowResponse) error {
	return t.NetworkTransport.TimeoutNow(id, meant(id, target), args, resp)
}

// streams is Raft's stream layer: it is fed the connections that were accepted,
// and opens others. Closing it closes all of them.
type streams struct {
	admission *ca.Admission
	address   streamAddr
	moved     func(id string) string // where a server has said that it is, or ""
	accepted  chan net.Conn

	mu     sync.Mutex
	open   map[*stream]struct{}
	ctx    context.Context //nolint:containedctx // ends the dialling at Close, which has no other way to be told
	cancel context.CancelFunc
}

func newStreams(admission *ca.Admission, advertise string, moved func(id string) string) *streams {
	ctx, cancel := context.WithCancel(context.Background())
	return &streams{
		admission: admission, address: streamAddr(advertise), moved: moved, accepted: make(chan net.Conn),
		open: map[*stream]struct{}{}, ctx: ctx, cancel: cancel,
	}
}

// stream is a connection that is in streams.open.
type stream struct {
	net.Conn
	of *streams
}

// Close implements net.Conn.
func (s *stream) Close() error {
	s.of.mu.Lock()
	delete(s.of.open, s)
	s.of.mu.Unlock()
	return s.Conn.Close() //nolint:wrapcheck // a connection's own words
}

// keep makes a stream of conn, or closes it when it is too late.
func (s *streams) keep(conn net.Conn) (*stream, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ctx.Err() != nil {
		_ = conn.Close() // nobody will use it
		return nil, net.ErrClosed
	}
	kept := &stream{Conn: conn, of: s}
	s.open[kept] = struct{}{}
	return kept, nil
}

// put hands an accepted connection to Raft, and reports whether it was taken
// before ctx ended. Nobody takes any before there is a transport.
func (s *streams) put(ctx context.Context, conn net.Conn) bool {
	kept, err := s.keep(conn)
	if err != nil {
		return false
	}
	select {
	case s.accepted <- kept:
		return true
	case <-s.ctx.Done():
	case <-ctx.Done():
		_ = kept.Close() // not taken
	}
	return false
}

// Accept implements net.Listener.
func (s *streams) Accept() (net.Conn, error) {
	select {
	case conn := <-s.accepted:
		return conn, nil
	case <-s.ctx.Done():
		return nil, net.ErrClosed
	}
}

// Dial implements raft.StreamLayer. The target is what meant made; the time-out is
// for exchanges, dialling has its own. Where the server has said that it is goes
// before what the cluster's list says: servers that have all moved could not agree
// on another list.
func (s *streams) Dial(target raft.ServerAddress, _ time.Duration) (net.Conn, error) {
	id, address, ok := strings.Cut(string(target), "@")
	if !ok {
		return nil, fmt.Errorf("connect to %q: it does not say which server is meant", target)
	}
	if now := s.moved(id); now != "" && now != address {
		if conn, err := s.dial(id, now); err == nil {
			return conn, nil
		}
	}
	return s.dial(id, address)
}

func (s *streams) dial(id, address string) (net.Conn, error) {
	conn, err := dial(s.ctx, s.admission, Name(id), address, ca.ALPNRaft)
	if err != nil {
		return nil, fmt.Errorf("connect to server %s at %s: %w", id, address, err)
	}
	kept, err := s.keep(conn)
	if err != nil {
		return nil, err
	}
	if err := kept.expect(id); err != nil {
		_ = kept.Close() // of no use
		return nil, fmt.Errorf("connect to server %s at %s: %w", id, address, err)
	}
	return kept, nil
}

// expect reads who accepted the connection.
func (s *stream) expect(id string) error {
	_ = s.SetReadDeadline(time.Now().Add(dialTimeout)) // a connection that has ended fails below
	found, err := readGreeting(s)
	if err != nil {
		return plain(context.Background(), err)
	}
	if found != id {
		return fmt.Errorf("%w: %s; it lost its state, or has another's address", ErrOtherServer, found)
	}
	return s.SetReadDeadline(time.Time{}) //nolint:wrapcheck // a connection's own words
}

// Close implements net.Listener.
func (s *streams) Close() error {
	s.mu.Lock()
	s.cancel()
	open := s.open
	s.open = map[*stream]struct{}{}
	s.mu.Unlock()
	var errs []error
	for conn := range open {
		if err := cut(conn.Conn); err != nil && !errors.Is(err, net.ErrClosed) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// cut closes a connection without a farewell, for which a dead peer would be
// waited.
func cut(conn net.Conn) error {
	if secure, ok := conn.(interface{ NetConn() net.Conn }); ok {
		return secure.NetConn().Close() //nolint:wrapcheck // a connection's own words
	}
	return conn.Close() //nolint:wrapcheck // a connection's own words
}

// Addr implements net.Listener: what the other servers dial.
func (s *streams) Addr() net.Addr { return s.address }

// streamAddr is a host:port that others resolve.
type streamAddr string

// Network implements net.Addr.
func (streamAddr) Network() string { return "tcp" }

// String implements net.Addr.
func (a streamAddr) String() string { return string(a) }
