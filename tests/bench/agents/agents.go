// Package agents is a fleet of simulated agents, for load on servers. Each one is the
// connection of a real agent: its own TLS connection with its own node certificate,
// gRPC, heartbeats, and the view that a host keeps of its topics, with the agent's own
// way of choosing a server and of coming back. What it lacks is the host: no proxy, no
// checks, nothing on disk.
//
// A [Fleet] is the connections; a [Mesh] is what they are for: nodes that have joined,
// services that they run and call, and who may call whom.
package agents

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/meshd/meshd/agent/view"
	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/meshpb"
	"github.com/meshd/meshd/server/rpc"
)

// Agent is who one agent is, and what it asks for.
type Agent struct {
	Leaf   *ca.Leaf
	Topics []view.Topic
}

// Config is what all agents of a fleet share.
type Config struct {
	Log    *slog.Logger
	Bundle func() ca.Bundle
	// Servers returns the addresses, host:port, that an agent tries to reach from now on.
	Servers func() []string
}

// Fleet is a number of agents. It is safe for concurrent use; see New.
type Fleet struct {
	cfg     Config
	members []*member
	streams atomic.Int64 // begun since the start
	pace    *rpc.Pace
}

// member is one agent of a fleet.
type member struct {
	Agent
	view *view.View

	mu       sync.Mutex
	arrivals []arrival // the newest last, one per position
	conn     net.Conn  // the newest
	stalled  chan struct{}
}

type arrival struct {
	at   catalog.Position
	time time.Time
}

// keptArrivals bounds how many positions ago Await can look at.
const keptArrivals = 64

// pollInterval is how often Await looks.
const pollInterval = 2 * time.Millisecond

// tcpTimeout is that of the agent.
const tcpTimeout = 3 * time.Second

// ErrIncomplete is wrapped when agents did not get something in time.
var ErrIncomplete = errors.New("not all agents have it")

// New returns a fleet that does nothing yet.
func New(cfg Config, who []Agent) *Fleet {
	f := &Fleet{cfg: cfg, pace: rpc.NewPace()}
	for i, a := range who {
		m := &member{Agent: a}
		m.view = view.New(view.Config{
			Log:     cfg.Log,
			Dial:    func(server string) (*grpc.ClientConn, error) { return f.dial(m, server) },
			Servers: cfg.Servers,
			Hello: func() view.Hello {
				return view.Hello{
					Session: fmt.Sprintf("simulated-%d", f.streams.Add(1)), Version: "simulated", FeatureLevel: catalog.FeatureLevel,
					Address: meshAddress(i),
				}
			},
		})
		m.view.Subscribe(a.Topics)
		f.members = append(f.members, m)
	}
	return f
}

// meshAddress is where the proxy of an agent would be.
func meshAddress(i int) string {
	return fmt.Sprintf("10.%d.%d.%d:7443", i>>16&255, i>>8&255, i&255)
}

func (f *Fleet) dial(m *member, server string) (*grpc.ClientConn, error) {
	config := ca.ClientConfig(ca.ClientOptions{
		Leaf:   func() (*tls.Certificate, error) { return m.Leaf.TLS(), nil },
		Bundle: f.cfg.Bundle, ServerName: meshpb.ServerName, ALPN: []string{"h2"},
		Accept: ca.ExpectKind(m.Leaf.ID().TrustDomain, spiffe.KindServer),
	})
	return grpc.NewClient("passthrough:///"+server,
		grpc.WithTransportCredentials(paced{credentials.NewTLS(config), f.pace}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(meshpb.MaxMessage)),
		grpc.WithContextDialer(m.connect))
}

// paced lets no more handshakes compute at once than there are processors: agents do
// not share theirs with each other, nor with a server in the same process.
type paced struct {
	credentials.TransportCredentials
	pace *rpc.Pace
}

// ClientHandshake implements credentials.TransportCredentials.
func (p paced) ClientHandshake(ctx context.Context, authority string, conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	during := p.pace.Begin(conn)
	defer during.End()
	return p.TransportCredentials.ClientHandshake(ctx, authority, during)
}

// Clone implements credentials.TransportCredentials.
func (p paced) Clone() credentials.TransportCredentials {
	return paced{p.TransportCredentials.Clone(), p.pace}
}

// connect makes the TCP connection, which Cut and Stall reach.
func (m *member) connect(ctx context.Context, address string) (net.Conn, error) {
	d := net.Dialer{Timeout: tcpTimeout}
	conn, err := d.DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.conn = conn
	return stalling{conn, m}, nil
}

// stalling is a connection from which nothing is read while its member is stalled.
type stalling struct {
	net.Conn
	member *member
}

// Read implements net.Conn.
func (s stalling) Read(p []byte) (int, error) {
	n, err := s.Conn.Read(p)
	s.member.mu.Lock()
	wait := s.member.stalled
	s.member.mu.Unlock()
	if wait != nil {
		<-wait
	}
	return n, err
}

// Run connects all agents at once, and keeps them connected until ctx ends. It returns
// nil. Call it once.
func (f *Fleet) Run(ctx context.Context) error {
	var group sync.WaitGroup
	for _, m := range f.members {
		group.Go(func() { _ = m.view.Run(ctx) }) // nil
		group.Go(func() { m.follow(ctx) })
	}
	group.Wait()
	return nil
}

// follow notes when what arrives.
func (m *member) follow(ctx context.Context) {
	for {
		changed := m.view.Changed()
		m.note(m.view.Snapshot().Position(), time.Now())
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

func (m *member) note(at catalog.Position, now time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if n := len(m.arrivals); at == (catalog.Position{}) || n > 0 && m.arrivals[n-1].at == at {
		return
	}
	m.arrivals = append(m.arrivals, arrival{at, now})
	if len(m.arrivals) > keptArrivals {
		m.arrivals = slices.Delete(m.arrivals, 0, len(m.arrivals)-keptArrivals)
	}
}

// reached returns when the member first had the position or a newer one.
func (m *member) reached(at catalog.Position) (time.Time, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, a := range m.arrivals {
		if a.at == at || a.at.After(at) {
			return a.time, true
		}
	}
	return time.Time{}, false
}

// Connected returns how many agents hold a stream, by the server's name for itself.
func (f *Fleet) Connected() map[string]int {
	out := map[string]int{}
	for _, m := range f.members {
		if link, _ := m.view.Link(); link != nil {
			out[link.ID]++
		}
	}
	return out
}

// AwaitConnected waits until every agent holds a stream.
func (f *Fleet) AwaitConnected(ctx context.Context) error {
	for _, m := range f.members {
		for {
			link, changed := m.view.Link()
			if link != nil {
				break
			}
			select {
			case <-changed:
			case <-ctx.Done():
				return fmt.Errorf("%w: a connection; %d agents, connected by server: %v", ErrIncomplete, len(f.members), f.Connected())
			}
		}
	}
	return nil
}

// AwaitSome waits until as many agents as n have been told of a position, or a newer
// one, and returns how long after since each of them was, in rising order. Only
// agents that a change concerns are told at once; others with the next heartbeat.
func (f *Fleet) AwaitSome(ctx context.Context, n int, at catalog.Position, since time.Time) ([]time.Duration, error) {
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	took := map[int]time.Duration{}
	for {
		for i, m := range f.members {
			if _, known := took[i]; known {
				continue
			}
			if when, ok := m.reached(at); ok {
				took[i] = max(0, when.Sub(since))
			}
		}
		if len(took) >= n {
			break
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil, fmt.Errorf("%w: %d of %d have position %d", ErrIncomplete, len(took), n, at.Revision)
		}
	}
	out := make([]time.Duration, 0, len(took))
	for _, d := range took {
		out = append(out, d)
	}
	slices.Sort(out)
	return out, nil
}

// Cut breaks the connections of all agents at once.
func (f *Fleet) Cut() {
	for _, m := range f.members {
		m.mu.Lock()
		conn := m.conn
		m.mu.Unlock()
		if conn != nil {
			_ = conn.Close() // it may be gone
		}
	}
}

// Stall makes one agent read nothing more, although it goes on to say that it lives,
// until resume is called.
func (f *Fleet) Stall(i int) (resume func()) {
	m, stalled := f.members[i], make(chan struct{})
	m.mu.Lock()
	defer m.mu.Unlock()
	m.stalled = stalled
	return sync.OnceFunc(func() {
		m.mu.Lock()
		m.stalled = nil
		m.mu.Unlock()
		close(stalled)
	})
}

// Percentile returns the smallest of sorted figures that p of them (0 to 1) do not
// exceed; 0 of none.
func Percentile(sorted []time.Duration, p float64) time.Duration {
	if len(sorted) == 0 {
		return 0
	}
	return sorted[min(len(sorted)-1, int(p*float64(len(sorted))))]
}
