package agents_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/meshd/meshd/agent/view"
	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/ca/builtin"
	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/intentions"
	"github.com/meshd/meshd/server/meshpb"
	"github.com/meshd/meshd/server/rpc"
	"github.com/meshd/meshd/server/state"
	"github.com/meshd/meshd/server/store"
	"github.com/meshd/meshd/server/store/raftstore"
	"github.com/meshd/meshd/tests/bench/agents"
)

const trustDomain = "mesh.test"

// authority is a real CA.
type authority struct{ *builtin.Authority }

// Bundle implements rpc.Authority.
func (a authority) Bundle() ca.Bundle {
	bundle, err := a.Roots(context.Background())
	if err != nil {
		return ca.Bundle{}
	}
	return bundle
}

// world is a few servers on one store, on loopback, with a catalog.
type world struct {
	tb        testing.TB
	authority authority
	bundle    ca.Bundle
	states    []*state.State
	servers   []*rpc.Server
	raft      []*raftstore.Engine
	addresses []string
	latencies []uint64 // of the scheduler, at the last look
}

func newWorld(tb testing.TB, servers int) *world {
	tb.Helper()
	key := ca.GenerateClusterKey()
	made, err := builtin.Create(key, trustDomain, time.Now())
	if err != nil {
		tb.Fatal(err)
	}
	opened, err := builtin.Open(made, key, builtin.Config{})
	if err != nil {
		tb.Fatal(err)
	}
	w := &world{tb: tb, authority: authority{opened}, bundle: authority{opened}.Bundle()}
	dir := tb.TempDir() // goes after the servers
	ctx, cancel := context.WithCancel(context.Background())
	group, ctx := errgroup.WithContext(ctx)
	tb.Cleanup(func() {
		cancel()
		if err := group.Wait(); err != nil {
			tb.Errorf("a server: %v", err)
		}
	})
	log := slog.New(slog.DiscardHandler)
	engines := w.engines(ctx, group, servers, dir, log)
	for i, engine := range engines {
		st := state.New(engine, log)
		name := fmt.Sprintf("s%d", i)
		server := rpc.New(rpc.Config{
			Server: name, TrustDomain: trustDomain, Leads: engine.Leading, Quorum: engine.Contact, Alive: func(string) bool { return true },
		}, st, w.authority, log)
		group.Go(func() error { return st.Run(ctx) })
		group.Go(func() error { return server.Run(ctx) })
		<-st.Ready()
		w.states, w.servers = append(w.states, st), append(w.servers, server)
		w.listen(ctx, group, name, server)
	}
	w.raft = engines
	return w
}

// engines founds a cluster on disk, whose members talk within the process.
func (w *world) engines(ctx context.Context, group *errgroup.Group, n int, dir string, log *slog.Logger) []*raftstore.Engine {
	w.tb.Helper()
	byID := map[string]*raftstore.Engine{}
	forward := func(ctx context.Context, id, _ string, request []byte) ([]byte, error) {
		return byID[id].Serve(ctx, request)
	}
	var all []*raftstore.Engine
	var members []raftstore.Member
	var transports []*raft.InmemTransport
	for i := range n {
		id := fmt.Sprintf("s%d.00000000", i)
		address, transport := raft.NewInmemTransport("")
		for _, other := range transports {
			transport.Connect(other.LocalAddr(), other)
			other.Connect(address, transport)
		}
		engine, err := raftstore.New(raftstore.Config{Dir: filepath.Join(dir, id), ID: id, Transport: transport, Forward: forward}, log)
		if err != nil {
			w.tb.Fatal(err)
		}
		byID[id] = engine
		all, transports = append(all, engine), append(transports, transport)
		members = append(members, raftstore.Member{ID: id, Address: string(address)})
	}
	for _, engine := range all {
		group.Go(func() error { return engine.Run(ctx) })
	}
	if err := all[0].Found(ctx, members); err != nil {
		w.tb.Fatal(err)
	}
	return all
}

// term is that of the replicated log: it grows with every election.
func (w *world) term() (term uint64) {
	for _, engine := range w.raft {
		term = max(term, engine.Stats().Term)
	}
	return term
}

// listen serves one server over TLS on loopback.
func (w *world) listen(ctx context.Context, group *errgroup.Group, name string, server *rpc.Server) {
	w.tb.Helper()
	leaf := w.leaf(ctx, spiffe.Server(trustDomain, name))
	config := ca.ServerConfig(ca.ServerOptions{
		Leaf:   func(string) (*tls.Certificate, error) { return leaf.TLSWithRoots(w.bundle), nil },
		Bundle: func() ca.Bundle { return w.bundle }, Accept: ca.AcceptAny, ClientCertificate: ca.ClientCertificateOptional, ALPN: []string{"h2"},
	})
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		w.tb.Fatal(err)
	}
	w.addresses = append(w.addresses, listener.Addr().String())
	g := grpc.NewServer(grpc.Creds(paced{credentials.NewTLS(config), rpc.NewPace()}), grpc.MaxRecvMsgSize(meshpb.MaxMessage), grpc.MaxSendMsgSize(meshpb.MaxMessage))
	server.Attach(g)
	context.AfterFunc(ctx, g.Stop)
	group.Go(func() error { return g.Serve(listener) })
}

// paced lets handshakes compute at the pace of a real server.
type paced struct {
	credentials.TransportCredentials
	pace *rpc.Pace
}

// ServerHandshake implements credentials.TransportCredentials.
func (p paced) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	during := p.pace.Begin(conn)
	defer during.End()
	return p.TransportCredentials.ServerHandshake(during)
}

func (w *world) leaf(ctx context.Context, id spiffe.ID) *ca.Leaf {
	w.tb.Helper()
	key, err := ca.GenerateKey()
	if err != nil {
		w.tb.Fatal(err)
	}
	chain, err := w.authority.Sign(ctx, ca.SignRequest{PublicKey: key.Public(), ID: id})
	if err != nil {
		w.tb.Fatal(err)
	}
	leaf, err := ca.NewLeaf(chain, key)
	if err != nil {
		w.tb.Fatal(err)
	}
	return leaf
}

func (w *world) update(fn func(*state.Tx) error) catalog.Position {
	w.tb.Helper()
	for tries := 1; ; tries++ {
		at, err := w.states[0].Update(context.Background(), fn)
		if err == nil {
			return at
		}
		// A machine that is too busy may elect another leader; writing twice is harmless.
		if again := errors.Is(err, store.ErrUnknownOutcome) || errors.Is(err, store.ErrNoLeader); !again || tries == 10 {
			w.tb.Fatal(err)
		}
		w.tb.Logf("writing again: %v", err)
	}
}

func service(i int) catalog.Name {
	return catalog.Name{Namespace: catalog.DefaultNamespace, Name: fmt.Sprintf("svc-%d", i)}
}

func node(i int) string { return fmt.Sprintf("vm-%d", i) }

// hub is what every agent calls.
func hub() catalog.Name { return service(0) }

// populate makes nodes, and services with four instances each and two intentions.
func (w *world) populate(nodes, services int) {
	w.tb.Helper()
	since := time.Now().Add(-time.Hour)
	for i := range nodes {
		w.update(func(tx *state.Tx) error {
			if err := state.Nodes.Put(tx, node(i), catalog.Node{Name: node(i), Services: []string{"*"}}); err != nil {
				return err
			}
			return state.NodeIdentities.Put(tx, node(i), state.NodeIdentity{Keys: []string{"other"}, Since: since})
		})
	}
	for i := range services {
		w.update(func(tx *state.Tx) error {
			d := catalog.Definition{Name: service(i).Name, Port: 8080, Protocol: catalog.ProtocolHTTP}
			if err := state.Services.Put(tx, service(i), d.Service()); err != nil {
				return err
			}
			for n := range 4 {
				instance := d.Instance(node((i*4+n)%nodes), "10.0.0.1:7443")
				if err := state.Instances.Put(tx, instance.Key(), instance); err != nil {
					return err
				}
				status := catalog.InstanceStatus{Health: catalog.HealthPassing, Checks: []catalog.CheckState{{Name: "http", Health: catalog.HealthPassing, Since: since}}}
				if err := state.InstanceStatuses.Put(tx, instance.Key(), status); err != nil {
					return err
				}
			}
			for _, source := range []string{"*", service((i + 1) % services).Name} {
				if err := w.intention(tx, source, service(i).Name, intentions.Allow); err != nil {
					return err
				}
			}
			return nil
		})
	}
}

func (w *world) intention(tx *state.Tx, source, destination string, action intentions.Action) error {
	value := intentions.Intention{Source: source, Destination: destination, Action: action}
	key, err := value.Key()
	if err != nil {
		return err
	}
	return state.Intentions.Put(tx, key, value)
}

// fleet returns agents that each run four services and call ten and the hub.
func (w *world) fleet(nodes, services int) *agents.Fleet {
	w.tb.Helper()
	who := make([]agents.Agent, nodes)
	var group errgroup.Group
	group.SetLimit(runtime.GOMAXPROCS(0))
	for i := range who {
		group.Go(func() error {
			topics := []view.Topic{view.Roots(), view.Node(), view.Servers(), view.Upstream(service(i%services), hub())}
			for n := range 20 {
				topics = append(topics, view.Intentions(service((i*20+n)/4%services)))
			}
			for n := range 10 {
				topics = append(topics, view.Upstream(service(i%services), service(1+(i*7+n)%(services-1))))
			}
			who[i] = agents.Agent{Leaf: w.leaf(context.Background(), spiffe.Node(trustDomain, node(i))), Topics: topics}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		w.tb.Fatal(err)
	}
	return agents.New(agents.Config{Log: slog.New(slog.DiscardHandler), Bundle: w.authority.Bundle, Servers: func() []string { return w.addresses }}, who)
}

// run runs a fleet until the end of the test, and waits until it has everything.
func (w *world) run(f *agents.Fleet) {
	w.tb.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f.Run(ctx) }()
	w.tb.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			w.tb.Errorf("the fleet: %v", err)
		}
	})
	w.synced(f, time.Now(), "connected")
}

// synced waits until all agents have the newest state, and tells how long that took.
func (w *world) synced(f *agents.Fleet, since time.Time, what string) []time.Duration {
	w.tb.Helper()
	took := w.await(f, w.touch(hub()), since)
	w.tb.Logf("%s and synced: p50 %s, last %s", what, agents.Percentile(took, 0.5), took[len(took)-1])
	return took
}

func (w *world) await(f *agents.Fleet, at catalog.Position, since time.Time) []time.Duration {
	w.tb.Helper()
	return w.awaitSome(f, *fleetSize, at, since)
}

func (w *world) awaitSome(f *agents.Fleet, n int, at catalog.Position, since time.Time) []time.Duration {
	w.tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	took, err := f.AwaitSome(ctx, n, at, since)
	if err != nil {
		for i, s := range w.servers {
			w.tb.Logf("server %d: %+v", i, s.Metrics())
		}
		w.tb.Fatal(err)
	}
	return took
}

// touch changes the health of an instance of a service.
func (w *world) touch(name catalog.Name) catalog.Position {
	w.tb.Helper()
	return w.update(func(tx *state.Tx) error {
		for key := range tx.Snapshot().InstancesOf(name) {
			return state.InstanceStatuses.Put(tx, key, catalog.InstanceStatus{
				Health: catalog.HealthPassing, Checks: []catalog.CheckState{{Name: "http", Health: catalog.HealthPassing, Since: time.Now()}},
			})
		}
		return fmt.Errorf("service %s has no instance", name)
	})
}

// spread returns how long it took n agents to be told, over several changes.
func (w *world) spread(f *agents.Fleet, n, rounds int, change func(round int) catalog.Position) (p50, p99 time.Duration) {
	w.tb.Helper()
	var all []time.Duration
	for round := range rounds {
		since := time.Now()
		took := w.awaitSome(f, n, change(round), since)
		all = append(all, took[len(took)-1])
	}
	slices.Sort(all)
	return agents.Percentile(all, 0.5), agents.Percentile(all, 0.99)
}
