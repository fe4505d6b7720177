package peer_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/server/peer"
	"github.com/meshd/meshd/server/store"
)

const trustDomain = "mesh.example.com"

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// world is what the stand-ins of the store share: each cluster that was founded,
// and who is in it. It replaces Raft, which tells its members itself.
type world struct {
	mu       sync.Mutex
	clusters []*founded
	stands   map[string]*stand
}

type founded struct {
	servers []peer.Server
	leader  string
}

func newWorld() *world { return &world{stands: map[string]*stand{}} }

// stand is one server's part of a world: a peer.Cluster.
type stand struct {
	world   *world
	id      string
	changed chan struct{}
	in      *founded
	serve   func(ctx context.Context, request []byte) ([]byte, error)
	removed bool
}

func (w *world) stand(id string) *stand {
	w.mu.Lock()
	defer w.mu.Unlock()
	s := &stand{world: w, id: id, changed: make(chan struct{})}
	w.stands[id] = s
	return s
}

// tell spreads what has changed, as a leader would.
func (w *world) tell() {
	for _, s := range w.stands {
		close(s.changed)
		s.changed = make(chan struct{})
	}
}

func (w *world) founded() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.clusters)
}

func (s *stand) Serve(ctx context.Context, request []byte) ([]byte, error) {
	if s.serve == nil {
		return nil, fmt.Errorf("stand-in: %w", store.ErrNoLeader)
	}
	return s.serve(ctx, request)
}

func (s *stand) Member() bool {
	s.world.mu.Lock()
	defer s.world.mu.Unlock()
	return s.in != nil && slices.ContainsFunc(s.in.servers, func(m peer.Server) bool { return m.ID == s.id })
}

func (s *stand) Servers() []peer.Server {
	s.world.mu.Lock()
	defer s.world.mu.Unlock()
	if s.in == nil {
		return nil
	}
	servers := slices.Clone(s.in.servers)
	for i := range servers {
		servers[i].Leader, servers[i].Self = servers[i].ID == s.in.leader, servers[i].ID == s.id
	}
	return servers
}

func (s *stand) Leader() (id, address string) {
	for _, m := range s.Servers() {
		if m.Leader {
			return m.ID, m.Address
		}
	}
	return "", ""
}

func (s *stand) Changed() <-chan struct{} {
	s.world.mu.Lock()
	defer s.world.mu.Unlock()
	return s.changed
}

func (s *stand) Found(_ context.Context, members []peer.Member) error {
	s.world.mu.Lock()
	defer s.world.mu.Unlock()
	if s.in != nil {
		return errors.New("it has a state")
	}
	c := &founded{leader: s.id}
	for _, m := range members {
		c.servers = append(c.servers, peer.Server{ID: m.ID, Address: m.Address, Voter: true})
	}
	s.world.clusters = append(s.world.clusters, c)
	for _, m := range members {
		if other := s.world.stands[m.ID]; other != nil && other.in == nil {
			other.in = c
		}
	}
	s.world.tell()
	return nil
}

func (s *stand) Add(_ context.Context, id, address string, voter bool) error {
	s.world.mu.Lock()
	defer s.world.mu.Unlock()
	if s.in == nil || s.in.leader != s.id {
		return store.ErrNoLeader
	}
	servers := slices.DeleteFunc(slices.Clone(s.in.servers), func(m peer.Server) bool {
		return m.ID == id || peer.Name(m.ID) == peer.Name(id) || m.Address == address
	})
	s.in.servers = append(servers, peer.Server{ID: id, Address: address, Voter: voter})
	if other := s.world.stands[id]; other != nil && other.in == nil {
		other.in = s.in
	}
	s.world.tell()
	return nil
}

// restore gives s the state of another member.
func (s *stand) restore(of *stand) {
	s.world.mu.Lock()
	defer s.world.mu.Unlock()
	s.in = of.in
	s.world.tell()
}

func (s *stand) Removed() {
	s.world.mu.Lock()
	defer s.world.mu.Unlock()
	s.removed = true
}

// host is one server of a test.
type host struct {
	*peer.Peer
	id, address string
	key         ca.ClusterKey
	cluster     *stand
	logs        *logs
	stop        func()
}

type setup struct {
	name, instance string
	key            ca.ClusterKey
	expect         int
	join           []string
	listener       net.Listener // nil: a new one
	advertise      string
	dir            string // "": a new one
	local          peer.Local
	resolver       *net.Resolver
}

func listen(t *testing.T) net.Listener {
	t.Helper()
	return listenAt(t, "127.0.0.1:0")
}

func listenAt(t *testing.T, address string) net.Listener {
	t.Helper()
	var lc net.ListenConfig
	l, err := lc.Listen(t.Context(), "tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// start runs a server until the test ends or stop is called.
func start(t *testing.T, w *world, s setup) *host {
	t.Helper()
	if s.listener == nil {
		s.listener = listen(t)
	}
	if s.dir == "" {
		s.dir = t.TempDir()
	}
	if s.instance == "" {
		s.instance = "00000001"
	}
	if s.advertise == "" {
		s.advertise = s.listener.Addr().String()
	}
	admission, err := ca.NewAdmission(s.key, trustDomain, s.name)
	if err != nil {
		t.Fatal(err)
	}
	h := &host{key: s.key, id: s.name + "." + s.instance, address: s.advertise, logs: &logs{}}
	h.cluster = w.stand(h.id)
	h.Peer, err = peer.New(peer.Config{
		Admission: admission, ID: h.id, Listener: s.listener, Advertise: s.advertise, Dir: s.dir, Expect: s.expect, Join: s.join, Resolver: s.resolver,
	}, slog.New(slog.NewTextHandler(h.logs, nil)))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- h.Run(ctx, h.cluster, s.local) }()
	h.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("%s: %v", h.id, err)
		}
	})
	t.Cleanup(h.stop)
	return h
}

// until waits for a condition, which changes or logs of any server may bring.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.NewTimer(20 * time.Second)
	defer deadline.Stop()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline.C:
			t.Fatalf("not in 20 s: %s", what)
		}
	}
}

func (h *host) awaitMember(t *testing.T) {
	t.Helper()
	until(t, h.id+" is a member; it waits for "+h.Waiting(), func() bool { return h.cluster.Member() && h.Waiting() == "" })
}

// logs keeps what a server logs.
type logs struct {
	mu   sync.Mutex
	text []byte
}

func (l *logs) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.text = append(l.text, b...)
	return len(b), nil
}

func (l *logs) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return string(l.text)
}
