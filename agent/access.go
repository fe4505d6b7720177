package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// errPeer is wrapped when a process that may not use the local API connects.
var errPeer = errors.New("only root, the agent's user and its group may use this socket")

// access says who may use the sockets, beside root and our own user. The zero
// value adds nobody.
type access struct {
	gid      int // -1: no such group
	proxyUID int // -1: no such user
}

// newAccess looks up the names of the configuration. A name that does not exist
// on this host admits nobody.
func newAccess(cfg Config) (access, error) {
	a := access{gid: -1, proxyUID: -1}
	if g, err := user.LookupGroup(cfg.Group); err == nil {
		if a.gid, err = strconv.Atoi(g.Gid); err != nil {
			return access{}, fmt.Errorf("group %s: %w", cfg.Group, err)
		}
	}
	if u, err := user.Lookup(cfg.Proxy.User); err == nil {
		if a.proxyUID, err = strconv.Atoi(u.Uid); err != nil {
			return access{}, fmt.Errorf("user %s: %w", cfg.Proxy.User, err)
		}
	}
	return a, nil
}

// proxy reports whether a user may be fed.
func (a access) proxy(uid uint32) bool { return a.proxyUID >= 0 && int64(uid) == int64(a.proxyUID) }

// api refuses a process that may not use the local API.
func (a access) api(c *unix.Ucred) error {
	if owner(c) {
		return nil
	}
	if a.gid >= 0 {
		if int64(c.Gid) == int64(a.gid) {
			return nil
		}
		if u, err := user.LookupId(strconv.FormatUint(uint64(c.Uid), 10)); err == nil {
			if groups, err := u.GroupIds(); err == nil && slices.Contains(groups, strconv.Itoa(a.gid)) {
				return nil
			}
		}
	}
	return fmt.Errorf("uid %d: %w", c.Uid, errPeer)
}

// owner reports whether a process is root's or of our own user.
func owner(c *unix.Ucred) bool { return c.Uid == 0 || int64(c.Uid) == int64(os.Geteuid()) }

// guarded is a unix listener that closes connections of those who may not use
// it.
type guarded struct {
	net.Listener
	allow func(*unix.Ucred) error
}

// Accept implements net.Listener.
func (g guarded) Accept() (net.Conn, error) {
	for {
		c, err := g.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if cred, err := peerOf(c); err == nil && g.allow(cred) == nil {
			return c, nil
		}
		_ = c.Close()
	}
}

// peerOf returns the credentials of the process at the other end (SO_PEERCRED,
// unix(7)).
func peerOf(c net.Conn) (*unix.Ucred, error) {
	uc, ok := c.(*net.UnixConn)
	if !ok {
		return nil, fmt.Errorf("%w: no unix socket", errPeer)
	}
	raw, err := uc.SyscallConn()
	if err != nil {
		return nil, err
	}
	var cred *unix.Ucred
	var cerr error
	if err := raw.Control(func(fd uintptr) { cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return nil, err
	}
	return cred, cerr
}

// listenUnix opens a unix socket of mode 0660 for the group. A socket that a
// dead process left is replaced; one that is served is an error.
func listenUnix(ctx context.Context, path string, gid int) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil { //nolint:gosec // others must reach the socket; its own mode decides
		return nil, err
	}
	if info, err := os.Lstat(path); err == nil {
		if info.Mode()&fs.ModeSocket == 0 {
			return nil, fmt.Errorf("%s is there and no socket", path)
		}
		var d net.Dialer
		c, err := d.DialContext(ctx, "unix", path)
		if err == nil {
			_ = c.Close()
			return nil, fmt.Errorf("%s: %w", path, ErrRunning)
		}
		if !errors.Is(err, syscall.ECONNREFUSED) {
			return nil, err
		}
		if err := os.Remove(path); err != nil {
			return nil, err
		}
	}
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	if gid >= 0 {
		err = os.Chown(path, -1, gid)
		if errors.Is(err, fs.ErrPermission) {
			err = nil // not of the group ourselves: root and our own user are left
		}
	}
	if err == nil {
		err = os.Chmod(path, 0o660) //nolint:gosec // the group may connect
	}
	if err != nil {
		_ = l.Close()
		return nil, err
	}
	return l, nil
}
