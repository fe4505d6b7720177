package server

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync/atomic"
	"time"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/peer"
	"github.com/meshd/meshd/server/rpc"
	"github.com/meshd/meshd/server/state"
	"github.com/meshd/meshd/server/store/raftstore"
)

const (
	// handoverTime bounds how long a server that stops tries to give its leadership
	// away, so that the others need no election.
	handoverTime = 2 * time.Second
	// ageInterval is how finely the age of the state is known while entries wait to be
	// applied.
	ageInterval = 100 * time.Millisecond
	// anyServer stands for whichever server is most up to date.
	anyServer = "*"
)

var errStarting = errors.New("the server is starting")

// membership is this server among the others: the replicated store, and the way
// to its other members.
type membership struct {
	engine *raftstore.Engine
	peer   *peer.Peer // nil for a server that nobody can join
	id     string     // of the member of the store
	// peerAddress is host:port for the other servers.
	peerAddress string
	agents      atomic.Pointer[rpc.Server]
	apart       atomic.Int64 // servers whose state differed from this one's, while it leads
	caughtUp    atomic.Int64 // when nothing was left to apply, in unix nanoseconds
}

// join makes the parts and starts none.
func (s *Server) join(ctx context.Context, name string, key ca.ClusterKey, api net.Addr) (*membership, error) {
	id, err := raftstore.Identify(storeDir(s.config), name)
	if err != nil {
		return nil, fmt.Errorf("open the store: %w", err)
	}
	m := &membership{id: id}
	config := raftstore.Config{Dir: storeDir(s.config), ID: id}
	if !s.config.alone() {
		if err := s.openPeer(ctx, m, name, key, api); err != nil {
			return nil, err
		}
		config.Transport, config.Forward = m.peer.Transport(), m.peer.Forward
	}
	if m.engine, err = raftstore.New(config, s.log); err != nil {
		return nil, fmt.Errorf("open the store: %w", err)
	}
	return m, nil
}

// openPeer listens for other servers. The listener is closed by the peer's Run.
func (s *Server) openPeer(ctx context.Context, m *membership, name string, key ca.ClusterKey, api net.Addr) error {
	listener := s.config.PeerListener
	if listener == nil {
		var err error
		var lc net.ListenConfig
		if listener, err = lc.Listen(ctx, "tcp", net.JoinHostPort(s.config.Bind, fmt.Sprint(s.config.PeerPort))); err != nil {
			return fmt.Errorf("listen for other servers: %w", err)
		}
	}
	host, _, err := s.config.advertised(ctx, api)
	if err != nil {
		_ = listener.Close() // never used
		return err
	}
	port := s.config.PeerPort
	if tcp, ok := listener.Addr().(*net.TCPAddr); ok {
		port = uint16(tcp.Port) //nolint:gosec // a port
	}
	m.peerAddress = net.JoinHostPort(host, fmt.Sprint(port))
	admission, err := ca.NewAdmission(key, s.config.TrustDomain, name)
	if err == nil {
		m.peer, err = peer.New(peer.Config{
			Admission: admission, ID: m.id, Listener: listener, Advertise: m.peerAddress, Dir: storeDir(s.config),
			Expect: s.config.BootstrapExpect, Join: s.config.RetryJoin,
		}, s.log)
	}
	if err != nil {
		_ = listener.Close() // never used
		return fmt.Errorf("connect to other servers: %w", err)
	}
	return nil
}

// runPeer serves the other servers until ctx ends, if there can be any.
func (m *member) runPeer(ctx context.Context) error {
	if m.peer == nil {
		return nil
	}
	return m.peer.Run(ctx, m.engine, peer.Local{ //nolint:wrapcheck // says what failed
		Status: m.peerStatus, Ask: m.serveAsk, Fleet: m.serveFleet, Refuse: m.refuse,
	})
}

// others are the other members of the cluster.
func (m *membership) others() []raftstore.Server {
	return slices.DeleteFunc(m.engine.Servers(), func(s raftstore.Server) bool { return s.Self })
}

// named returns the member of a name, or of an ID.
func (m *membership) named(name string) (raftstore.Server, bool) {
	for _, s := range m.engine.Servers() {
		if nameOf(s.ID) == name || s.ID == name {
			return s, true
		}
	}
	return raftstore.Server{}, false
}

// alive tells the leader whether the server of a name answers.
func (m *membership) alive(name string) bool {
	s, ok := m.named(name)
	return ok && (s.Self || s.Contact >= 0 && s.Contact <= aliveWithin)
}

// age tells how old this server's state is at most.
func (m *membership) age() time.Duration {
	age := m.engine.Contact()
	if stats := m.engine.Stats(); stats.Applied < stats.Committed {
		return max(age, time.Since(time.Unix(0, m.caughtUp.Load())))
	}
	return age
}

// watchAge notes when nothing was left to apply, until ctx ends.
func (m *membership) watchAge(ctx context.Context) error {
	for pause(ctx, ageInterval) {
		if stats := m.engine.Stats(); stats.Applied >= stats.Committed {
			m.caughtUp.Store(time.Now().UnixNano())
		}
	}
	return nil
}

// handover gives the leadership to another server when ctx ends.
func (m *member) handover(ctx context.Context) error {
	<-ctx.Done()
	if !m.engine.Leading() || len(m.others()) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), handoverTime)
	defer cancel()
	if err := m.engine.Transfer(ctx, ""); err != nil {
		m.log.WarnContext(ctx, "the leadership could not be handed over: the others elect", slog.Any("error", err))
	}
	return nil
}

// peerStatus is what this server tells the others of itself.
func (m *member) peerStatus() peer.Status {
	out := peer.Status{
		Version: m.config.Version, FeatureLevel: catalog.FeatureLevel, Started: m.begun, Applied: m.engine.Stats().Applied,
		ContactMS: m.engine.Contact().Milliseconds(),
	}
	at := m.state.Snapshot().Position()
	out.Generation, out.Revision = at.Generation, at.Revision
	if agents := m.agents.Load(); agents != nil {
		out.Agents = len(agents.Nodes())
	}
	if at, sum, ok := m.engine.Hash(); ok {
		out.HashAt, out.Hash = at, hex.EncodeToString(sum[:])
	}
	return out
}

func (m *member) serveAsk(ctx context.Context, query []byte, emit func([]byte) error) error {
	agents := m.agents.Load()
	if agents == nil {
		return errStarting
	}
	return agents.ServeAsk(ctx, query, emit) //nolint:wrapcheck // says what was asked
}

// demand is what a server asks of another one beside what package rpc does: an
// operator's change of the cluster, which only the leader can make.
type demand struct {
	Remove   string `json:"remove,omitempty"`   // the name or ID of a server
	Transfer string `json:"transfer,omitempty"` // to the server of this name or ID, or anyServer
}

// serveFleet answers what another server asks of the agents that are connected
// here, or does what it demands of the leader.
func (m *member) serveFleet(ctx context.Context, query []byte) ([]byte, error) {
	var d demand
	if err := json.Unmarshal(query, &d); err == nil && d != (demand{}) {
		var said verdict
		if err := m.judge(m.obey(ctx, d)); err != nil && !errors.As(err, &said.Error) {
			return nil, err
		}
		return json.Marshal(said) //nolint:wrapcheck // our own type
	}
	if answer, asked, err := m.serveAudit(ctx, query); asked {
		return answer, err
	}
	agents := m.agents.Load()
	if agents == nil {
		return nil, errStarting
	}
	return agents.ServeFleet(query) //nolint:wrapcheck // says what was asked
}

// obey does, on the leader, what an operator wants of the cluster.
func (m *member) obey(ctx context.Context, d demand) error {
	if d.Transfer == anyServer {
		return m.engine.Transfer(ctx, "") //nolint:wrapcheck // says what was done
	}
	name := d.Remove + d.Transfer
	server, ok := m.named(name)
	if !ok {
		return fmt.Errorf("%w: %s", raftstore.ErrUnknownServer, name)
	}
	if err := m.allowed(ctx, d, server); err != nil {
		return err
	}
	switch {
	case d.Remove != "":
		return m.removeServer(ctx, server.ID, true)
	default:
		return m.engine.Transfer(ctx, server.ID) //nolint:wrapcheck // says what was done
	}
}

// refuse says why a server may not join: an operator has removed it.
func (m *member) refuse(name, id string) error {
	record, ok := state.Servers.Get(m.state.Snapshot(), name)
	if !ok || !slices.Contains(record.Value.Removed, id) {
		return nil
	}
	return fmt.Errorf("an operator has removed %s from the cluster: to bring it back as a new server, stop it, move the folder store in its data_dir away, and start it", name)
}

// peers are the other servers, as package rpc asks them.
func (m *member) peers() []rpc.Peer {
	var out []rpc.Peer
	for _, other := range m.others() {
		to := peer.Server{ID: other.ID, Address: other.Address}
		out = append(out, rpc.Peer{
			Name: nameOf(other.ID),
			Fleet: func(ctx context.Context, request []byte) ([]byte, error) {
				return m.peer.Fleet(ctx, to, request) //nolint:wrapcheck // says what was asked
			},
			Ask: func(ctx context.Context, query []byte, emit func([]byte) error) error {
				return m.peer.Ask(ctx, to, query, emit) //nolint:wrapcheck // says what was asked
			},
		})
	}
	return out
}
