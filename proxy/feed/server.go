package feed

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/proxy"
)

const (
	// helloTimeout bounds how long a new session may stay silent.
	helloTimeout = 5 * time.Second
	// maxSessions bounds the sessions at a time: a host has few proxies.
	maxSessions = 256
)

// ErrPeer is wrapped when a process that may not be fed connects.
var ErrPeer = errors.New("peer may not use the feed")

// ServerConfig configures a Server.
type ServerConfig struct {
	// Log is required.
	Log *slog.Logger
	// AllowUID says which users may connect, besides root and our own. nil allows no others.
	AllowUID func(uid uint32) bool
}

// Server is the agent's side. All its methods are safe for concurrent use, and none but Run blocks on a proxy.
type Server struct {
	cfg ServerConfig

	mu       sync.Mutex
	wanted   map[string]*wanted
	sessions map[*session]struct{}
	changed  chan struct{}
	seq      uint64
	queries  map[uint64]*asked
	restarts map[uint64]*restarting
}

// wanted is what one proxy should have.
type wanted struct {
	planSeq  uint64 // 0: no plan yet
	position catalog.Position
	parts    []proxy.Part
	keysSet  bool
	keys     map[spiffe.ID]heldKey
	// passed are sockets that SetSockets gave; offered are those that the proxy opened itself and gave us to keep.
	passed, offered map[string]heldSocket
}

type heldKey struct {
	key  Key
	hash string
}

type heldSocket struct {
	file   *os.File
	cookie uint64
}

// ProxyStatus is what is known of one connected proxy process.
type ProxyStatus struct {
	Proxy        string           `json:"proxy"`
	Session      string           `json:"session"`
	PID          int              `json:"pid"`
	UID          uint32           `json:"uid"`
	Version      string           `json:"version"`
	FeatureLevel int              `json:"feature_level"`
	State        State            `json:"state"`
	Since        time.Time        `json:"since"`
	Wanted       catalog.Position `json:"wanted"`  // of the plan that it should have
	Applied      catalog.Position `json:"applied"` // of the plan in force
	// Refused, if not empty, says why it did not take the plan of RefusedPosition. It is cleared by the next plan that is taken.
	Refused         string           `json:"refused,omitempty"`
	RefusedPosition catalog.Position `json:"refused_position,omitzero"`
	// Closed counts live connections and streams that changes cut, in this session.
	Closed uint64 `json:"closed"`
	// Open is how many connections were open at the last report.
	Open int `json:"open"`
	// Until is when a draining process cuts what is left; zero is never.
	Until time.Time `json:"until,omitzero"`
	// Sockets are the names of the listening sockets that it was given or offered, sorted.
	Sockets []string `json:"sockets,omitempty"`
}

// NewServer returns a server that feeds nothing yet.
func NewServer(cfg ServerConfig) *Server {
	return &Server{
		cfg:      cfg,
		wanted:   map[string]*wanted{},
		sessions: map[*session]struct{}{},
		changed:  make(chan struct{}),
		queries:  map[uint64]*asked{},
		restarts: map[uint64]*restarting{},
	}
}

// Run accepts sessions on l, a unix stream socket, which it closes. It blocks, returns nil after ctx ends, and then no session
// and none of its goroutines is left; what was set stays, so Run may be called again.
func (s *Server) Run(ctx context.Context, l net.Listener) error {
	g, ctx := errgroup.WithContext(ctx)
	stop := context.AfterFunc(ctx, func() { _ = l.Close() })
	defer stop()
	g.Go(func() error {
		for {
			nc, err := l.Accept()
			if ctx.Err() != nil {
				if err == nil {
					_ = nc.Close()
				}
				return nil
			}
			if err != nil {
				return fmt.Errorf("accept a proxy on %s: %w", l.Addr(), err)
			}
			uc, ok := nc.(*net.UnixConn)
			if !ok {
				_ = nc.Close()
				return fmt.Errorf("accept a proxy on %s: not a unix socket", l.Addr())
			}
			g.Go(func() error {
				s.serve(ctx, uc)
				return nil
			})
		}
	})
	return g.Wait()
}

// Close closes the sockets that the server holds. Call it after Run returned, if the proxies need not keep their ports.
func (s *Server) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, w := range s.wanted {
		for _, sockets := range []map[string]heldSocket{w.passed, w.offered} {
			for name, held := range sockets {
				errs = append(errs, held.file.Close())
				delete(sockets, name)
			}
		}
	}
	return errors.Join(errs...)
}

// SetPlan makes cfg the plan of every process of the proxy, connected now or later; the newest call wins. It takes no
// reference to cfg. It does not validate the plan: the proxy does. An error means that the plan can't be sent at all, and
// leaves the one before.
func (s *Server) SetPlan(proxyID string, cfg proxy.Config) error {
	parts, err := proxy.Split(cfg)
	if err != nil {
		return fmt.Errorf("set the plan of proxy %s: %w", proxyID, err)
	}
	for _, p := range parts {
		if len(p.JSON) > maxPart {
			return fmt.Errorf("set the plan of proxy %s: part %s has %d bytes, at most %d can be sent", proxyID, p.Key(), len(p.JSON), maxPart)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seq++
	w := s.want(proxyID)
	w.planSeq, w.position, w.parts = s.seq, cfg.Position, parts
	s.wake(proxyID)
	s.announce()
	return nil
}

// SetKeys makes leaves the identities that the proxy can prove: the whole set, one leaf per identity.
func (s *Server) SetKeys(proxyID string, leaves []*ca.Leaf) error {
	keys := make(map[spiffe.ID]heldKey, len(leaves))
	for _, leaf := range leaves {
		k, err := keyOf(leaf)
		if err != nil {
			return fmt.Errorf("set the keys of proxy %s: %w", proxyID, err)
		}
		keys[k.ID] = heldKey{key: k, hash: k.hash()}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	w := s.want(proxyID)
	w.keys, w.keysSet = keys, true
	s.wake(proxyID)
	return nil
}

// SetSockets makes sockets the listening sockets that the proxy is given, by listener name: the whole set. One that was given
// before and is not in it is closed, here and there. The server duplicates the files; the caller keeps, and closes, its own.
// Sockets that the proxy opened itself are not touched by this, unless sockets has the name.
func (s *Server) SetSockets(proxyID string, sockets map[string]*os.File) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	w := s.want(proxyID)
	next := make(map[string]heldSocket, len(sockets))
	var fresh []*os.File
	for name, file := range sockets {
		cookie, err := socketCookie(file)
		if err != nil {
			closeFiles(fresh)
			return fmt.Errorf("set socket %s of proxy %s: %w", name, proxyID, err)
		}
		if held, ok := w.passed[name]; ok && held.cookie == cookie {
			next[name] = held
			continue
		}
		dup, err := dupFile(file)
		if err != nil {
			closeFiles(fresh)
			return fmt.Errorf("set socket %s of proxy %s: %w", name, proxyID, err)
		}
		fresh = append(fresh, dup)
		next[name] = heldSocket{file: dup, cookie: cookie}
	}
	for name, held := range w.passed {
		if next[name].file != held.file {
			_ = held.file.Close()
		}
	}
	for name := range next {
		if held, ok := w.offered[name]; ok {
			_ = held.file.Close()
			delete(w.offered, name)
		}
	}
	w.passed = next
	s.wake(proxyID)
	s.announce()
	return nil
}

// Sockets returns duplicates, which the caller owns, of all sockets that are known for the proxy: those that were set, and
// those that it opened itself while there was no agent. An agent that starts takes them over instead of opening its own.
func (s *Server) Sockets(proxyID string) (map[string]*os.File, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := map[string]*os.File{}
	w := s.want(proxyID)
	for _, sockets := range []map[string]heldSocket{w.offered, w.passed} {
		for name, held := range sockets {
			if out[name] != nil {
				continue
			}
			dup, err := dupFile(held.file)
			if err != nil {
				closeFiles(slices.Collect(maps.Values(out)))
				return nil, fmt.Errorf("take socket %s of proxy %s: %w", name, proxyID, err)
			}
			out[name] = dup
		}
	}
	return out, nil
}

// SetState asks one process of a proxy, by its session, to become active or draining. A session that is gone is no error.
func (s *Server) SetState(proxyID, sessionID string, to State) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for sess := range s.sessions {
		if sess.status.Proxy == proxyID && sess.status.Session == sessionID {
			sess.stateWanted = to
			sess.wake()
		}
	}
}

// Status returns what is known of every connected process, sorted by proxy and age.
func (s *Server) Status() []ProxyStatus {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]ProxyStatus, 0, len(s.sessions))
	for sess := range s.sessions {
		st := sess.status
		w := s.want(st.Proxy)
		st.Wanted = w.position
		names := slices.Concat(slices.Collect(maps.Keys(w.passed)), slices.Collect(maps.Keys(w.offered)))
		slices.Sort(names)
		st.Sockets = slices.Compact(names)
		out = append(out, st)
	}
	slices.SortFunc(out, func(a, b ProxyStatus) int {
		return cmp.Or(cmp.Compare(a.Proxy, b.Proxy), a.Since.Compare(b.Since), cmp.Compare(a.Session, b.Session))
	})
	return out
}

// Changed returns a channel that is closed when Status may have changed since the call.
func (s *Server) Changed() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.changed
}

// want returns the entry of a proxy. s.mu is held, here and below.
func (s *Server) want(proxyID string) *wanted {
	w := s.wanted[proxyID]
	if w == nil {
		w = &wanted{offered: map[string]heldSocket{}}
		s.wanted[proxyID] = w
	}
	return w
}

func (s *Server) wake(proxyID string) {
	for sess := range s.sessions {
		if sess.status.Proxy == proxyID {
			sess.wake()
		}
	}
}

func (s *Server) announce() {
	close(s.changed)
	s.changed = make(chan struct{})
}
