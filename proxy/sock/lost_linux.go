package sock

import (
	"time"

	"golang.org/x/sys/unix"
)

// Unanswered returns how long the peer has acknowledged nothing although there is something to acknowledge: bytes that were
// sent more than once, or questions whether it has room again. It is 0 for a peer that is merely slow, which answers those, and
// for sockets other than TCP.
//
// Keep-alive does not see this: it rests while bytes are on their way. TCP_USER_TIMEOUT would, but it cuts a peer, too, that
// answers and has no room.
func (c *Conn) Unanswered() time.Duration {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0
	}
	var info *unix.TCPInfo
	if failed := raw.Control(func(fd uintptr) {
		info, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
	}); failed != nil || err != nil {
		return 0
	}
	if info.Unacked > 0 && info.Retransmits > 2 || info.Probes > 2 {
		return time.Duration(info.Last_ack_recv) * time.Millisecond
	}
	return 0
}
