package peer

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/meshd/meshd/ca"
)

const (
	// handshakeTimeout bounds a handshake on the port, dialTimeout the way to one:
	// with a lost first packet, which TCP repeats after 1 s (RFC 6298), and some more.
	handshakeTimeout = 5 * time.Second
	dialTimeout      = 3 * time.Second
	// silence is after how long without an acknowledgement by the other machine's
	// kernel a connection is given up, idle or not. A busy or stopped process does
	// not count: its kernel acknowledges.
	silence = 2 * time.Second
)

// dial opens a connection to the server called name, "" being any, at address.
func dial(ctx context.Context, admission *ca.Admission, name, address, alpn string) (*tls.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	dialer := net.Dialer{KeepAlive: -1} // watchful sets it
	conn, err := dialer.DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, plain(ctx, err)
	}
	watchful(conn)
	secure := tls.Client(conn, admission.ClientConfig(name, alpn))
	if err := secure.HandshakeContext(ctx); err != nil {
		_ = conn.Close() // the handshake has failed already
		return nil, plain(ctx, err)
	}
	return secure, nil
}

// Options of sockets since Linux 6.15 (include/uapi/linux/tcp.h), in microseconds.
const (
	tcpRTOMin    = 45 // TCP_RTO_MIN_US
	tcpDelackMax = 46 // TCP_DELACK_MAX_US
)

// Between servers a lost packet is sent again after 10 ms and the round trip, where
// the kernel's least is 200 ms (RFC 6298 even says 1 s), and then at that pace: six
// times, where the wait would double each time. Acknowledgements are not put off for
// longer than half of it. With every third packet lost, a cluster of three makes 7 %
// of its writes without all this, half of them with the shorter wait only, and more
// than three quarters with both.
const (
	resendAfter = 10 * time.Millisecond
	ackWithin   = 5 * time.Millisecond
)

// watchful has the kernel notice a dead machine soon, and lost packets sooner. A
// connection that is no TCP is left alone, and so is one that has ended already.
func watchful(conn net.Conn) {
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		return
	}
	_ = tcp.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: time.Second, Interval: time.Second, Count: 2}) // it may have ended
	raw, err := tcp.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Control(func(fd uintptr) {
		// RFC 5482; for Linux it counts for keep-alive probes too.
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(silence.Milliseconds())) // it may have ended
		// Kernels that do not know them go on as they did.
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, tcpRTOMin, int(resendAfter.Microseconds()))
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, tcpDelackMax, int(ackWithin.Microseconds()))
		steady(int(fd))
	})
}

// steady has the kernel repeat at an even pace what gets no acknowledgement, while
// fewer than four packets are under way (Linux, tcp_retransmit_timer). It does so
// once a loss has set the threshold of slow start, which BBR never sets; Reno, the
// congestion control that every kernel has and every process may choose, does.
func steady(fd int) {
	_ = unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_THIN_LINEAR_TIMEOUTS, 1) // it may have ended
	if control, err := unix.GetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION); err == nil && strings.HasPrefix(control, "bbr") {
		_ = unix.SetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION, "reno") // as above
	}
}

// plain leaves of a network error what a person needs beside the address.
func plain(ctx context.Context, err error) error {
	if op, ok := errors.AsType[*net.OpError](err); ok {
		if op.Op == "remote error" { // an alert, which crypto/tls has no type for
			return fmt.Errorf("it refused our certificate (%w): is its cluster_key_file or trust_domain another one?", op.Err)
		}
		if op.Timeout() || ctx.Err() != nil {
			return fmt.Errorf("no answer within %s", dialTimeout)
		}
		return op.Err
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("no answer within %s", dialTimeout)
	}
	if errors.Is(err, io.EOF) {
		return errors.New("it closed the connection in the handshake")
	}
	return err
}

// A greeting is the first that is said on a connection for Raft: the accepting
// server's ID. Raft's messages carry no receiver, and a server that lost its state
// must not vote in the name of the one that it was.
const greetingVersion = 1

func appendGreeting(b []byte, id string) []byte {
	return append(append(b, greetingVersion, byte(len(id))), id...) //nolint:gosec // checkID bounds it
}

// readGreeting reads no byte too many.
func readGreeting(r io.Reader) (id string, err error) {
	var head [2]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return "", err //nolint:wrapcheck // the connection's own words
	}
	if head[0] != greetingVersion {
		return "", fmt.Errorf("it greets in version %d, this program knows %d", head[0], greetingVersion)
	}
	name := make([]byte, head[1])
	if _, err := io.ReadFull(r, name); err != nil {
		return "", err //nolint:wrapcheck // the connection's own words
	}
	if err := checkID(string(name)); err != nil {
		return "", err
	}
	return string(name), nil
}
