package dataplane

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/meshd/meshd/proxy"
	"github.com/meshd/meshd/proxy/sock"
)

// acceptPause is how long accepting rests after an error such as "too many open files".
const acceptPause = 20 * time.Millisecond

// listener is one socket that is accepted from.
type listener struct {
	name   string
	kind   proxy.ListenerKind
	cookie uint64
	ln     net.Listener // TCP or, for an upstream, unix
	open   atomic.Int64
}

// Listeners returns duplicates, which are the caller's, of the sockets that are accepted from, by listener name.
func (p *Plane) Listeners() (map[string]*os.File, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := make(map[string]*os.File, len(p.listeners))
	for name, l := range p.listeners {
		socket, ok := l.ln.(interface{ File() (*os.File, error) })
		err := errors.ErrUnsupported
		if ok {
			out[name], err = socket.File()
		}
		if err != nil {
			delete(out, name)
			for _, f := range out {
				_ = f.Close()
			}
			return nil, fmt.Errorf("duplicate the socket of listener %s: %w", name, err)
		}
	}
	return out, nil
}

// listen starts and stops listeners as a plan says. p.mu is held.
func (p *Plane) listen(ctx context.Context, wanted []proxy.Listener, sockets map[string]*os.File) {
	if p.draining.Load() {
		return
	}
	keep := make(map[string]bool, len(wanted))
	for _, want := range wanted {
		keep[want.Name] = true
		file := sockets[want.Name]
		have := p.listeners[want.Name]
		if file == nil {
			if have == nil {
				p.log.LogAttrs(ctx, slog.LevelWarn, "listener waits for its socket", slog.String("listener", want.Name))
			}
			continue
		}
		cookie, err := socketCookie(file)
		if err == nil && have != nil && have.cookie == cookie && have.kind == want.Kind {
			continue
		}
		var l *listener
		if err == nil {
			l, err = newListener(want, file, cookie)
		}
		if err != nil {
			p.log.LogAttrs(ctx, slog.LevelError, "socket can't be used", slog.String("listener", want.Name), slog.Any("error", err))
			continue
		}
		if have != nil {
			_ = have.ln.Close()
		}
		p.listeners[want.Name] = l
		if p.spawn != nil {
			p.spawn(l)
		}
	}
	for name, l := range p.listeners {
		if !keep[name] {
			_ = l.ln.Close()
			delete(p.listeners, name)
		}
	}
}

func newListener(want proxy.Listener, file *os.File, cookie uint64) (*listener, error) {
	ln, err := net.FileListener(file)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", want.Address, err)
	}
	if !boundTo(ln.Addr(), want.Address) {
		_ = ln.Close()
		return nil, fmt.Errorf("listen on %s: the socket is bound to %s", want.Address, ln.Addr())
	}
	return &listener{name: want.Name, kind: want.Kind, cookie: cookie, ln: ln}, nil
}

// boundTo reports whether a socket's address is the one that a plan names.
func boundTo(addr net.Addr, address string) bool {
	if have, ok := addr.(*net.UnixAddr); ok {
		return address == proxy.UnixAddress(have.Name)
	}
	have, ok := addr.(*net.TCPAddr)
	if !ok {
		return false
	}
	want, err := net.ResolveTCPAddr("tcp", address) // numeric: Validate has seen to it
	if err != nil || want.Port != 0 && want.Port != have.Port {
		return false
	}
	if want.IP == nil || want.IP.IsUnspecified() {
		return have.IP.IsUnspecified()
	}
	return want.IP.Equal(have.IP)
}

// socketCookie identifies a socket over all its duplicates (SO_COOKIE).
func socketCookie(f *os.File) (uint64, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return 0, fmt.Errorf("identify a socket: %w", err)
	}
	var cookie uint64
	var cookieErr error
	err = raw.Control(func(fd uintptr) {
		cookie, cookieErr = unix.GetsockoptUint64(int(fd), unix.SOL_SOCKET, unix.SO_COOKIE)
	})
	if err := errors.Join(err, cookieErr); err != nil {
		return 0, fmt.Errorf("identify a socket: %w", err)
	}
	return cookie, nil
}

func (p *Plane) closeListeners() {
	for name, l := range p.listeners {
		_ = l.ln.Close()
		delete(p.listeners, name)
	}
}

func (p *Plane) accept(ctx context.Context, l *listener) {
	side := outbound
	if l.kind == proxy.ListenMesh {
		side = inbound
	}
	overload := p.metrics.refused.WithLabelValues(string(side), string(ReasonOverload))
	for {
		nc, err := l.ln.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			p.log.LogAttrs(ctx, slog.LevelWarn, "accept failed", slog.String("listener", l.name), slog.Any("error", err))
			select {
			case <-time.After(acceptPause):
				continue
			case <-ctx.Done():
				return
			}
		}
		if l.open.Add(1) > int64(p.current().limits.Connections) {
			l.open.Add(-1)
			overload.Inc()
			reset(nc)
			continue
		}
		p.links.enter()
		p.tasks.Go(func() {
			defer p.links.leave()
			defer l.open.Add(-1)
			s, ok := nc.(sock.Stream)
			if !ok { // Validate has TCP and unix sockets only
				reset(nc)
				return
			}
			if tc, ok := nc.(*net.TCPConn); ok {
				// The error is that of a connection which is gone already.
				_ = tc.SetKeepAliveConfig(keepAlive())
			}
			if l.kind == proxy.ListenMesh {
				p.serveMesh(ctx, sock.New(s))
			} else {
				p.serveUpstream(ctx, sock.New(s), l.name)
			}
		})
	}
}

// reset ends a connection so that its peer can't take it for complete: RST, without TLS's goodbye.
func reset(nc net.Conn) {
	nc = under(nc)
	if l, ok := nc.(interface{ SetLinger(sec int) error }); ok {
		_ = l.SetLinger(0) // the error is that of a closed connection
	}
	_ = nc.Close()
}

// under returns what is below every layer of TLS.
func under(nc net.Conn) net.Conn {
	for {
		layer, ok := nc.(interface{ NetConn() net.Conn })
		if !ok {
			return nc
		}
		nc = layer.NetConn()
	}
}
