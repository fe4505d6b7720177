package feed

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/proxy"
)

// Listen opens a listener's socket as a file that can be passed on. The file of a unix socket on which nobody listens any more
// is replaced; anything else at its path is an error.
func Listen(ctx context.Context, l proxy.Listener) (*os.File, error) {
	path, ok := l.UnixPath()
	if !ok {
		return listen(ctx, net.ListenConfig{}, "tcp", l.Address)
	}
	mode, err := catalog.ParseSocketMode(l.SocketMode)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	if err := removeDead(ctx, path); err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	config := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		// On Linux bind gives the file the mode of the socket, less the umask: at no moment may others connect than the mode says.
		var chmod error
		err := raw.Control(func(fd uintptr) { chmod = unix.Fchmod(int(fd), uint32(mode)) })
		return errors.Join(err, chmod)
	}}
	file, err := listen(ctx, config, "unix", path)
	if err != nil {
		return nil, err
	}
	if err := Allow(l); err != nil {
		Remove(file)
		return nil, err
	}
	return file, nil
}

func listen(ctx context.Context, config net.ListenConfig, network, address string) (*os.File, error) {
	l, err := config.Listen(ctx, network, address)
	if err != nil {
		return nil, err
	}
	defer l.Close() //nolint:errcheck // its duplicate lives on
	if ul, ok := l.(*net.UnixListener); ok {
		ul.SetUnlinkOnClose(false)
	}
	fl, ok := l.(interface{ File() (*os.File, error) })
	if !ok {
		return nil, fmt.Errorf("listen on %s: no socket", address)
	}
	file, err := fl.File()
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", address, err)
	}
	return file, nil
}

// removeDead removes a unix socket that a process left behind.
func removeDead(ctx context.Context, path string) error {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case info.Mode().Type() != fs.ModeSocket:
		return errors.New("there is something else at this path: remove it or choose another path")
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if err == nil {
		_ = conn.Close()
		return fmt.Errorf("another process listens there: %w", syscall.EADDRINUSE)
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return err
	}
	return os.Remove(path)
}

// Allow gives the file of a listener's unix socket its mode. It does nothing for TCP.
func Allow(l proxy.Listener) error {
	path, ok := l.UnixPath()
	if !ok {
		return nil
	}
	mode, err := catalog.ParseSocketMode(l.SocketMode)
	if err != nil {
		return fmt.Errorf("listen on %s: %w", path, err)
	}
	return os.Chmod(path, mode)
}

// Remove closes a listening socket for good: the file of a unix socket goes, too. Other processes that have the socket accept
// nothing new from it then.
func Remove(f *os.File) {
	if path := unixPath(f); path != "" {
		_ = os.Remove(path) // the next one to listen there removes it otherwise
	}
	_ = f.Close()
}

// unixPath returns where a unix socket is bound, empty for another socket.
func unixPath(f *os.File) string {
	path := ""
	inspect(f, func(sa unix.Sockaddr) {
		if un, ok := sa.(*unix.SockaddrUnix); ok && strings.HasPrefix(un.Name, "/") {
			path = un.Name
		}
	})
	return path
}

// BoundTo reports whether a socket is a listening one and bound where a listener's Address says.
func BoundTo(f *os.File, address string) bool {
	if path, ok := (proxy.Listener{Address: address}).UnixPath(); ok {
		return unixPath(f) == path
	}
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return false
	}
	if host == "" {
		host = "::"
	}
	want, err := netip.ParseAddrPort(net.JoinHostPort(host, port))
	if err != nil {
		return false
	}
	fits := false
	inspect(f, func(sa unix.Sockaddr) { fits = sameAddress(sa, want) })
	return fits
}

// inspect calls look with the address of a listening socket.
func inspect(f *os.File, look func(unix.Sockaddr)) {
	raw, err := f.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Control(func(fd uintptr) { // it is closed otherwise, and then it is bound to nothing
		if on, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ACCEPTCONN); err != nil || on == 0 {
			return
		}
		if sa, err := unix.Getsockname(int(fd)); err == nil {
			look(sa)
		}
	})
}

func sameAddress(sa unix.Sockaddr, want netip.AddrPort) bool {
	var got netip.AddrPort
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		got = netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port)) //nolint:gosec // the kernel's port
	case *unix.SockaddrInet6:
		got = netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), uint16(sa.Port)) //nolint:gosec // the kernel's port
	default:
		return false
	}
	bothAny := got.Addr().IsUnspecified() && want.Addr().IsUnspecified()
	return got.Port() == want.Port() && (bothAny || got.Addr() == want.Addr().Unmap())
}
