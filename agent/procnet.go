package agent

import (
	"bufio"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// tcpListen is the state of a listening socket in /proc/net/tcp
// (include/net/tcp_states.h, TCP_LISTEN).
const tcpListen = "0A"

// listening is one listening TCP socket of this network namespace.
type listening struct {
	address netip.AddrPort
	inode   string
}

// listeningSockets reads /proc/net/tcp and tcp6. What can't be read is left
// out: it serves diagnosis only.
func listeningSockets() []listening {
	var all []listening
	for _, file := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		f, err := os.Open(file) //nolint:gosec // one of two fixed paths
		if err != nil {
			continue
		}
		all = append(all, parseProcNet(f)...)
		_ = f.Close()
	}
	return all
}

// parseProcNet reads the table format of proc(5): fields 1, 3 and 9 are the
// local address in hexadecimal, the state and the inode. Lines that don't fit
// are left out.
func parseProcNet(r io.Reader) []listening {
	var all []listening
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 10 || fields[3] != tcpListen {
			continue
		}
		address, err := parseProcAddress(fields[1])
		if err != nil {
			continue
		}
		all = append(all, listening{address: address, inode: fields[9]})
	}
	return all
}

// parseProcAddress reads "0100007F:1F90": the address in 32-bit words of the
// host's byte order, the port in hexadecimal.
func parseProcAddress(s string) (netip.AddrPort, error) {
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

// holder is a process that holds a socket.
type holder struct {
	pid  int
	name string
}

// String returns "nginx (pid 811)".
func (h holder) String() string {
	if h.pid == 0 {
		return "another process"
	}
	return fmt.Sprintf("%s (pid %d)", h.name, h.pid)
}

// holderOf finds who listens where binding to the address would clash. Without
// the right to look into other processes the name stays unknown.
func holderOf(address netip.AddrPort) holder {
	for _, l := range listeningSockets() {
		a := l.address
		same := a.Addr().Unmap() == address.Addr().Unmap() || a.Addr().IsUnspecified() || address.Addr().IsUnspecified()
		if a.Port() == address.Port() && same {
			if h := ownerOf(l.inode); h.pid != 0 {
				return h
			}
		}
	}
	return holder{}
}

// ownerOf finds a process with a descriptor of a socket's inode.
func ownerOf(inode string) holder {
	want := "socket:[" + inode + "]"
	fds, err := filepath.Glob("/proc/[0-9]*/fd/*")
	if err != nil {
		return holder{}
	}
	for _, fd := range fds {
		if target, err := os.Readlink(fd); err != nil || target != want {
			continue
		}
		dir := filepath.Dir(filepath.Dir(fd))
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil || pid == os.Getpid() {
			continue
		}
		name, err := os.ReadFile(filepath.Join(dir, "comm")) //nolint:gosec // a path of /proc
		if err != nil {
			name = []byte("?")
		}
		return holder{pid: pid, name: strings.TrimSpace(string(name))}
	}
	return holder{}
}
