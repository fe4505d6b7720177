package procnet

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// What include/uapi/linux/sock_diag.h and inet_diag.h lay down.
const (
	sockDiagByFamily = 20      // SOCK_DIAG_BY_FAMILY
	stateListen      = 1 << 10 // TCPF_LISTEN
	diagRequest      = 56      // sizeof(struct inet_diag_req_v2)
	diagMessage      = 72      // sizeof(struct inet_diag_msg)
	diagTimeout      = 2       // seconds that an answer of the kernel may take
)

var errDiag = errors.New("unexpected answer of the kernel")

// Scan returns the listening sockets, as Listening does, for those who act on what
// is missing: it returns an error if it can't tell. It asks the kernel for these
// alone (sock_diag(7)), so it costs some ten microseconds on a host with any number
// of connections; the tables of /proc/net cost milliseconds even where they are
// empty, as the kernel walks through its whole hash table of connections. They are
// read where sock_diag is not allowed.
func Scan() ([]Socket, error) {
	all, err := scanDiag()
	if err == nil {
		return all, nil
	}
	all, perr := scanTables()
	if perr != nil {
		return nil, fmt.Errorf("list the listening sockets: %w", errors.Join(err, perr))
	}
	return all, nil
}

func scanDiag() ([]Socket, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.NETLINK_INET_DIAG)
	if err != nil {
		return nil, fmt.Errorf("sock_diag: %w", err)
	}
	defer unix.Close(fd) //nolint:errcheck // nothing was written
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: diagTimeout}); err != nil {
		return nil, fmt.Errorf("sock_diag: %w", err)
	}
	var all []Socket
	buffer := make([]byte, 32<<10) // the most that a dump puts into one datagram
	for _, family := range []byte{unix.AF_INET, unix.AF_INET6} {
		if err := unix.Sendto(fd, request(family), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
			return nil, fmt.Errorf("sock_diag: %w", err)
		}
		for done := false; !done; {
			n, _, err := unix.Recvfrom(fd, buffer, 0)
			if errors.Is(err, unix.EINTR) {
				continue
			}
			if err != nil {
				return nil, fmt.Errorf("sock_diag: %w", err)
			}
			var some []Socket
			if some, done, err = ParseDiag(buffer[:n]); err != nil {
				return nil, fmt.Errorf("sock_diag: %w", err)
			}
			all = append(all, some...)
		}
	}
	return all, nil
}

// request asks for all listening TCP sockets of a family.
func request(family byte) []byte {
	b := make([]byte, unix.SizeofNlMsghdr+diagRequest)
	binary.NativeEndian.PutUint32(b[0:], uint32(len(b))) //nolint:gosec // 72
	binary.NativeEndian.PutUint16(b[4:], sockDiagByFamily)
	binary.NativeEndian.PutUint16(b[6:], unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	body := b[unix.SizeofNlMsghdr:]
	body[0], body[1] = family, unix.IPPROTO_TCP
	binary.NativeEndian.PutUint32(body[4:], stateListen)
	return b
}

// ParseDiag reads one datagram of a dump of sock_diag(7), and whether it is the
// last. Sockets that don't listen are left out.
func ParseDiag(datagram []byte) (all []Socket, done bool, err error) {
	messages, err := syscall.ParseNetlinkMessage(datagram)
	if err != nil {
		return nil, false, fmt.Errorf("%w: %w", errDiag, err)
	}
	if len(messages) == 0 {
		return nil, false, fmt.Errorf("%w: nothing", errDiag)
	}
	for _, m := range messages {
		switch {
		case m.Header.Type == unix.NLMSG_DONE:
			return all, true, nil
		case m.Header.Type == unix.NLMSG_ERROR && len(m.Data) >= 4:
			code := int32(binary.NativeEndian.Uint32(m.Data))                      //nolint:gosec // a negative errno
			return nil, false, fmt.Errorf("%w: %w", errDiag, syscall.Errno(-code)) //nolint:gosec // as above
		case m.Header.Type != sockDiagByFamily || len(m.Data) < diagMessage:
			return nil, false, fmt.Errorf("%w: message of type %d with %d bytes", errDiag, m.Header.Type, len(m.Data))
		}
		if 1<<m.Data[1] != stateListen {
			continue
		}
		ip := netip.AddrFrom4([4]byte(m.Data[8:12]))
		if m.Data[0] == unix.AF_INET6 {
			ip = netip.AddrFrom16([16]byte(m.Data[8:24]))
		}
		inode := binary.NativeEndian.Uint32(m.Data[68:])
		all = append(all, Socket{
			Address: netip.AddrPortFrom(ip, binary.BigEndian.Uint16(m.Data[4:])), Inode: strconv.FormatUint(uint64(inode), 10),
		})
	}
	return all, false, nil
}
