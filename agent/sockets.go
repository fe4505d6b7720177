package agent

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/meshd/meshd/agent/procnet"
	"github.com/meshd/meshd/proxy"
	"github.com/meshd/meshd/proxy/feed"
)

// ListenerStatus is the state of one listening socket of the plan.
type ListenerStatus struct {
	Name    string `json:"name"`
	Address string `json:"address"`
	// Open says that the agent holds the socket, and passes it on.
	Open bool `json:"open"`
	// Held says that a proxy of ours opened it or got it from an agent before
	// this one: it serves, and the agent takes it over when the proxy restarts.
	Held bool `json:"held,omitzero"`
	// Waiting says why the socket can't be opened, and who holds the port.
	Waiting string    `json:"waiting,omitempty"`
	Since   time.Time `json:"since"`

	inUse bool // another process has the port: find out who
}

// sockets are the listening sockets of the host's proxy. One goroutine uses
// it; status is copied out.
type sockets struct {
	log  *slog.Logger
	held map[string]*os.File
	open map[string]ListenerStatus // of held
	wait map[string]ListenerStatus
}

func newSockets(log *slog.Logger) *sockets {
	return &sockets{log: log, held: map[string]*os.File{}, open: map[string]ListenerStatus{}, wait: map[string]ListenerStatus{}}
}

// follow opens what the plan names and closes what it no longer does. offered
// are sockets that a proxy already has, which are taken over rather than opened
// again; proxies are the processes of our proxies. It reports whether one waits.
func (s *sockets) follow(ctx context.Context, wanted []proxy.Listener, offered map[string]*os.File, proxies []int) (waits bool) {
	names := map[string]bool{}
	for _, l := range wanted {
		names[l.Name] = true
	}
	for _, name := range slices.Sorted(maps.Keys(s.held)) {
		if !names[name] {
			s.drop(name)
		}
	}
	maps.DeleteFunc(s.wait, func(name string, _ ListenerStatus) bool { return !names[name] })
	for _, l := range wanted {
		if s.held[l.Name] != nil && s.open[l.Name].Address == l.Address {
			s.allow(l)
			continue
		}
		s.drop(l.Name) // its address changed
		if f := offered[l.Name]; f != nil && feed.BoundTo(f, l.Address) {
			delete(offered, l.Name)
			s.keep(l, f)
			s.allow(l)
			continue
		}
		f, err := feed.Listen(ctx, l)
		if err != nil {
			s.waiting(l, err, proxies)
			waits = true
			continue
		}
		s.keep(l, f)
	}
	for _, f := range offered {
		_ = f.Close()
	}
	return waits
}

func (s *sockets) keep(l proxy.Listener, f *os.File) {
	if _, waited := s.wait[l.Name]; waited {
		s.log.Info("listener is open now", slog.String("listener", l.Name), slog.String("address", l.Address))
		delete(s.wait, l.Name)
	}
	s.held[l.Name] = f
	s.open[l.Name] = ListenerStatus{Name: l.Name, Address: l.Address, Open: true, Since: time.Now()}
}

// allow gives a unix socket the mode that the plan says now.
func (s *sockets) allow(l proxy.Listener) {
	if err := feed.Allow(l); err != nil {
		s.log.Warn("the mode of a listener's socket can't be set", slog.String("listener", l.Name), slog.Any("error", err))
	}
}

func (s *sockets) drop(name string) {
	if f := s.held[name]; f != nil {
		feed.Remove(f)
		delete(s.held, name)
		delete(s.open, name)
	}
}

// waiting records why a socket can't be opened. Who holds a taken port is for
// others to find out: it takes long.
func (s *sockets) waiting(l proxy.Listener, err error, proxies []int) {
	st := ListenerStatus{Name: l.Name, Address: l.Address, Since: time.Now(), Waiting: err.Error()}
	if address, perr := parseListen(l.Address); perr == nil && errors.Is(err, syscall.EADDRINUSE) {
		st.inUse = len(proxies) == 0 || procnet.HolderOf(address, proxies).PID == 0
		if st.Held = !st.inUse; st.Held {
			st.Waiting = ""
		}
	}
	if before, ok := s.wait[l.Name]; ok && before.Waiting == st.Waiting && before.Held == st.Held && before.Address == st.Address {
		return
	}
	s.wait[l.Name] = st
}

// status returns the state of every socket, sorted by name.
func (s *sockets) status() []ListenerStatus {
	all := slices.Concat(slices.Collect(maps.Values(s.wait)), slices.Collect(maps.Values(s.open)))
	slices.SortFunc(all, func(a, b ListenerStatus) int { return strings.Compare(a.Name, b.Name) })
	return all
}

func (s *sockets) close() {
	// The proxy serves on: the paths of unix sockets stay.
	for name, f := range s.held {
		_ = f.Close()
		delete(s.held, name)
		delete(s.open, name)
	}
}

func parseListen(address string) (netip.AddrPort, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return netip.AddrPort{}, err
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return netip.AddrPort{}, err
	}
	if host == "" {
		return netip.AddrPortFrom(netip.IPv6Unspecified(), uint16(n)), nil
	}
	ip, err := netip.ParseAddr(host)
	return netip.AddrPortFrom(ip, uint16(n)), err
}
