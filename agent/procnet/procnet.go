// Package procnet tells which TCP sockets of this network namespace listen, and
// which process holds them, from /proc. For diagnosis what can't be read is left
// out; Scan says so.
package procnet

import (
	"bufio"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// tcpListen is the state of a listening socket in /proc/net/tcp
// (include/net/tcp_states.h, TCP_LISTEN).
const tcpListen = "0A"

// Socket is one listening TCP socket.
type Socket struct {
	Address netip.AddrPort
	Inode   string
}

// Listening returns the listening sockets, of /proc/net/tcp and tcp6.
func Listening() []Socket {
	var all []Socket
	for _, file := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		f, err := os.Open(file) //nolint:gosec // one of two fixed paths
		if err != nil {
			continue
		}
		all = append(all, Parse(f)...)
		_ = f.Close()
	}
	return all
}

// scanTables reads both tables, or returns an error.
func scanTables() ([]Socket, error) {
	var all []Socket
	for _, file := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		f, err := os.Open(file) //nolint:gosec // one of two fixed paths
		if errors.Is(err, fs.ErrNotExist) && file == "/proc/net/tcp6" {
			continue // a host without IPv6
		}
		if err != nil {
			return nil, err
		}
		found, err := parse(f)
		_ = f.Close()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		all = append(all, found...)
	}
	return all, nil
}

// Covers reports whether a connection to the address would reach the socket, as
// far as the table tells: it does not say which sockets of IPv6 take IPv4, too,
// so all that listen on every address do.
func (s Socket) Covers(address netip.AddrPort) bool {
	own := s.Address.Addr().Unmap()
	if s.Address.Port() != address.Port() {
		return false
	}
	return own == address.Addr().Unmap() || own == netip.IPv6Unspecified() || own.IsUnspecified() && address.Addr().Unmap().Is4()
}

// Parse reads the table format of proc(5): fields 1, 3 and 9 are the local
// address in hexadecimal, the state and the inode. Lines that don't fit are
// left out.
func Parse(r io.Reader) []Socket {
	all, _ := parse(r) // what came before an error is what there is
	return all
}

func parse(r io.Reader) ([]Socket, error) {
	var all []Socket
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 10 || fields[3] != tcpListen {
			continue
		}
		address, err := parseAddress(fields[1])
		if err != nil {
			continue
		}
		all = append(all, Socket{Address: address, Inode: fields[9]})
	}
	return all, lines.Err()
}

// parseAddress reads "0100007F:1F90": the address in 32-bit words of the
// host's byte order, the port in hexadecimal.
func parseAddress(s string) (netip.AddrPort, error) {
	host, port, ok := strings.Cut(s, ":")
	raw, err := hex.DecodeString(host)
	if !ok || err != nil || len(raw) != 4 && len(raw) != 16 {
		return netip.AddrPort{}, fmt.Errorf("no address: %q", s)
	}
	n, err := strconv.ParseUint(port, 16, 16)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("no port: %q", s)
	}
	for i := 0; i < len(raw); i += 4 {
		binary.NativeEndian.PutUint32(raw[i:], binary.BigEndian.Uint32(raw[i:]))
	}
	ip, _ := netip.AddrFromSlice(raw)
	return netip.AddrPortFrom(ip, uint16(n)), nil
}

// Holder is a process that holds a socket. The zero Holder is one that this
// process may not look into.
type Holder struct {
	PID  int
	Name string
}

// String returns "nginx (pid 811)".
func (h Holder) String() string {
	if h.PID == 0 {
		return "another process"
	}
	return fmt.Sprintf("%s (pid %d)", h.Name, h.PID)
}

// HolderOf finds who listens where binding to the address would clash: one of
// the given processes or, for nil, any but this one. The latter looks at every
// descriptor of the host, which may take seconds on a busy one.
func HolderOf(address netip.AddrPort, pids []int) Holder {
	for _, l := range Listening() {
		a := l.Address
		same := a.Addr().Unmap() == address.Addr().Unmap() || a.Addr().IsUnspecified() || address.Addr().IsUnspecified()
		if a.Port() == address.Port() && same {
			if h := ownerOf(l.Inode, pids); h.PID != 0 {
				return h
			}
		}
	}
	return Holder{}
}

// ownerOf finds a process with a descriptor of a socket's inode.
func ownerOf(inode string, pids []int) Holder {
	want := "socket:[" + inode + "]"
	if pids == nil {
		pids = processes()
	}
	for _, pid := range pids {
		dir := filepath.Join("/proc", strconv.Itoa(pid))
		fds, err := os.ReadDir(filepath.Join(dir, "fd"))
		if err != nil {
			continue // it ended, or is another user's
		}
		for _, fd := range fds {
			if target, err := os.Readlink(filepath.Join(dir, "fd", fd.Name())); err != nil || target != want {
				continue
			}
			name, err := os.ReadFile(filepath.Join(dir, "comm")) //nolint:gosec // a path of /proc
			if err != nil {
				name = []byte("?")
			}
			return Holder{PID: pid, Name: strings.TrimSpace(string(name))}
		}
	}
	return Holder{}
}

// processes lists all but this one.
func processes() []int {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	var pids []int
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil && pid != os.Getpid() {
			pids = append(pids, pid)
		}
	}
	return pids
}
