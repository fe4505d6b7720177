package server

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/server/handed"
	"github.com/meshd/meshd/server/meshpb"
	"github.com/meshd/meshd/server/rpc"
)

const (
	handshakeTimeout = 5 * time.Second
	// maxHandshakes bounds the connections that have not shown who they are.
	maxHandshakes = 256
	// maxConnections bounds what is open in all; more wait to be accepted.
	maxConnections = 8192
	// acceptPause follows a failed accept, as when descriptors run out.
	acceptPause = 50 * time.Millisecond
	alpnHTTP2   = "h2"
	alpnHTTP1   = "http/1.1"
)

// splitter serves TLS on one port and gives each connection, after its handshake,
// to gRPC or to HTTP by the server name that the client asked for.
type splitter struct {
	inner  net.Listener
	config *tls.Config
	log    *slog.Logger
	pace   *rpc.Pace // of the handshakes
	grpc   *handed.Queue
	http   *handed.Queue
}

func newSplitter(inner net.Listener, l *leaf, bundle func() ca.Bundle, log *slog.Logger) *splitter {
	return &splitter{
		inner: inner,
		config: ca.ServerConfig(ca.ServerOptions{
			Leaf:              l.certificate,
			Bundle:            bundle,
			Accept:            ca.AcceptAny, // what a caller may do is acl.Authorize's
			ClientCertificate: ca.ClientCertificateOptional,
			ALPN:              []string{alpnHTTP2, alpnHTTP1},
		}),
		log:  log,
		pace: rpc.NewPace(),
		grpc: handed.NewQueue(inner.Addr()),
		http: handed.NewQueue(inner.Addr()),
	}
}

// run accepts until the listener is closed, and waits for the handshakes then.
func (s *splitter) run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { _ = s.inner.Close() }) // the only way to wake Accept
	defer stop()
	defer func() { _ = s.grpc.Close() }() // it never fails
	defer func() { _ = s.http.Close() }() // it never fails
	var group sync.WaitGroup
	defer group.Wait()
	slots := make(chan struct{}, maxHandshakes)
	open := make(chan struct{}, maxConnections)
	for {
		conn, err := s.inner.Accept()
		if ctx.Err() != nil {
			if err == nil {
				_ = conn.Close() // too late to be served
			}
			return nil
		}
		if errors.Is(err, net.ErrClosed) {
			return fmt.Errorf("accept on %s: %w", s.inner.Addr(), err)
		}
		if err != nil {
			s.log.WarnContext(ctx, "a connection could not be accepted", slog.Any("error", err))
			if !pause(ctx, acceptPause) {
				return nil
			}
			continue
		}
		for _, queue := range []chan struct{}{open, slots} {
			select {
			case queue <- struct{}{}:
			case <-ctx.Done():
				_ = conn.Close() // never served
				return nil
			}
		}
		group.Go(func() {
			defer func() { <-slots }()
			s.handshake(ctx, &counted{Conn: conn, open: open})
		})
	}
}

// turnAway closes the connections that come until stop is called: a server that
// waits for the others can't serve, and whoever connects goes to another one at
// once.
func turnAway(listener net.Listener) (stop func()) {
	l, ok := listener.(interface{ SetDeadline(t time.Time) error })
	if !ok {
		return func() {}
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := listener.Accept()
			if err != nil {
				return // the deadline, or a listener that fails whoever serves it next too
			}
			_ = conn.Close() // turned away
		}
	}()
	return func() {
		_ = l.SetDeadline(time.Unix(1, 0)) // fails for a closed listener only, which ends Accept as well
		<-done
		_ = l.SetDeadline(time.Time{})
	}
}

func (s *splitter) handshake(ctx context.Context, conn net.Conn) {
	ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	during := s.pace.Begin(conn)
	secure := tls.Server(during, s.config)
	err := secure.HandshakeContext(ctx)
	during.End()
	if err != nil {
		s.log.DebugContext(ctx, "handshake failed", slog.String("remote", conn.RemoteAddr().String()), slog.Any("error", err))
		_ = conn.Close() // the handshake has failed already
		return
	}
	state := secure.ConnectionState()
	to := s.http
	if state.ServerName == meshpb.ServerName {
		if state.NegotiatedProtocol != alpnHTTP2 {
			_ = secure.Close() // gRPC is HTTP/2
			return
		}
		to = s.grpc
	}
	if !to.Put(context.WithoutCancel(ctx), secure) {
		_ = secure.Close() // the server is stopping
	}
}

// counted gives its place back when it is closed.
type counted struct {
	net.Conn
	open chan struct{}
	once sync.Once
}

// Close implements net.Conn.
func (c *counted) Close() error {
	c.once.Do(func() { <-c.open })
	return c.Conn.Close() //nolint:wrapcheck // a connection's own words
}

// adminListener accepts only connections of this process's user and of root.
type adminListener struct {
	*net.UnixListener
	log *slog.Logger
}

// listenAdmin makes the admin socket. A file that an earlier process left is
// replaced: that the state directory is ours says that nobody serves it.
func listenAdmin(path string, log *slog.Logger) (*adminListener, error) {
	if info, err := os.Lstat(path); err == nil {
		if info.Mode().Type() != os.ModeSocket {
			return nil, fmt.Errorf("listen on the admin socket: %s exists and is no socket; remove it or set admin_socket", path)
		}
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("listen on the admin socket: %w", err)
		}
	}
	// Until the mode is set, the peer's user is what keeps others out.
	inner, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen on the admin socket: %w", err)
	}
	if err := os.Chmod(path, privateMode); err != nil {
		_ = inner.Close() // unusable
		return nil, fmt.Errorf("listen on the admin socket: %w", err)
	}
	return &adminListener{UnixListener: inner, log: log}, nil
}

// Accept implements net.Listener.
func (l *adminListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.AcceptUnix()
		if err != nil {
			return nil, err //nolint:wrapcheck // http.Server tests its type
		}
		uid, err := peerUser(conn)
		if err == nil && (uid == 0 || int64(uid) == int64(os.Geteuid())) {
			return conn, nil
		}
		l.log.Warn("a foreign user was refused on the admin socket", slog.Int64("uid", int64(uid)), slog.Any("error", err))
		_ = conn.Close() // refused
	}
}

// peerUser returns the user that connected.
func peerUser(conn *net.UnixConn) (uint32, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, fmt.Errorf("peer of the admin socket: %w", err)
	}
	var cred *unix.Ucred
	var optErr error
	if err := raw.Control(func(fd uintptr) {
		cred, optErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return 0, fmt.Errorf("peer of the admin socket: %w", err)
	}
	if optErr != nil {
		return 0, fmt.Errorf("peer of the admin socket: %w", optErr)
	}
	return cred.Uid, nil
}
