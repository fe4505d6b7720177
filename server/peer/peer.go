package peer

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/server/handed"
	"github.com/meshd/meshd/server/meshpb"
)

// DefaultPort is that of retry_join addresses without one.
const DefaultPort = 7401

// drainTime bounds how long a server that stops goes on with what others have
// asked of it.
const drainTime = time.Second

var (
	// ErrNotRunning says that Run has not begun, or has ended.
	ErrNotRunning = errors.New("this server is not connected to the others yet")
	// ErrOtherServer says that another server, or another instance of it, has the
	// address of the one that was meant.
	ErrOtherServer = errors.New("another server answers")
	// ErrUnreachable says that a server could not be asked: nothing was sent to it.
	ErrUnreachable = errors.New("the server can't be reached")
)

// Cluster is the store as far as servers must know it: *raftstore.Engine, and a
// stand-in for tests. Its methods are safe for concurrent use.
type Cluster interface {
	// Serve is the leader's side of Peer.Forward. An error that wraps
	// store.ErrNoLeader says that nothing was applied.
	Serve(ctx context.Context, request []byte) ([]byte, error)
	// Member reports whether this server has a configuration with itself in it.
	Member() bool
	// Servers are those of the newest configuration that this server has; none
	// without a state.
	Servers() []Server
	// Leader is the one that this server follows, or itself; "" without one.
	Leader() (id, address string)
	// Changed is closed at the next change of leader or servers.
	Changed() <-chan struct{}
	// Found begins a cluster, on a server without a state.
	Found(ctx context.Context, members []Member) error
	// Add makes a server a member, on the leader, in place of one of the same name
	// or address that is dead; or it changes a member's address.
	Add(ctx context.Context, id, address string, voter bool) error
	// Removed tells that the cluster does not know this member any more.
	Removed()
}

// Config says who this server is and whom it is to find. All but Join, Expect and
// Resolver is required.
type Config struct {
	// Admission proves this server to the others, and them to it.
	Admission *ca.Admission
	// ID is Raft's name for this server: its name and the instance of its state
	// directory (raftstore.Identify).
	ID string
	// Listener is that of port 7401, without TLS. Run closes it.
	Listener net.Listener
	// Advertise is host:port under which the other servers reach Listener.
	Advertise string
	// Dir is the private directory where a promise to found a cluster is kept. It
	// must live and die together with the state of the store.
	Dir string
	// Expect is how many servers found a cluster together; 0 only joins one. 1
	// founds alone at once, unless Join names others.
	Expect int
	// Join names servers: host, host:port, IP address, or, with a leading
	// underscore, a DNS SRV name. A host name stands for all of its addresses.
	Join []string
	// Resolver is for the names in Join; nil is net.DefaultResolver.
	Resolver *net.Resolver
}

// Local is what this server answers to others. Functions that are nil answer with
// an error; they are called from many goroutines.
type Local struct {
	// Status is what this server knows of itself.
	Status func() Status
	// Ask puts a question, JSON of flow.Query, to the hosts that are connected to
	// this server, and emits JSON of flow.Answer. It returns when ctx ends or all
	// is said. Emit is called by one goroutine at a time.
	Ask func(ctx context.Context, query []byte, emit func(answer []byte) error) error
	// Fleet answers a question, JSON, about the agents that are connected here.
	Fleet func(ctx context.Context, query []byte) (answer []byte, err error)
	// Refuse says why a server may not join, because it was removed on purpose; nil
	// admits all that hold the cluster key. Only the leader asks it. A server that
	// still has its state is told Cluster.Removed.
	Refuse func(name, id string) error
}

// Peer is this server among the others.
type Peer struct {
	cfg       Config
	log       *slog.Logger
	streams   *streams
	transport func() raft.Transport
	pool      *pool
	met       *met
	running   atomic.Pointer[running]
	waiting   atomic.Pointer[string]
}

// running is what there is while Run runs.
type running struct {
	cluster Cluster
	local   Local
}

// New returns the peer for cfg. Nothing is sent before Run.
func New(cfg Config, log *slog.Logger) (*Peer, error) {
	if err := cfg.validate(); err != nil {
		return nil, fmt.Errorf("configure the connection of servers: %w", err)
	}
	p := &Peer{cfg: cfg, log: log, pool: newPool(cfg.Admission), met: newMet()}
	p.streams = newStreams(cfg.Admission, cfg.Advertise, func(id string) string { return p.met.addressOf(id, time.Now()) })
	p.transport = sync.OnceValue(func() raft.Transport { return newTransport(p.streams) })
	return p, nil
}

func (c Config) validate() error {
	var errs []error
	wrong := func(bad bool, text string) {
		if bad {
			errs = append(errs, errors.New(text))
		}
	}
	wrong(c.Admission == nil, "Admission: missing")
	wrong(c.Listener == nil, "Listener: missing")
	wrong(!filepath.IsAbs(c.Dir), "Dir: name the state directory")
	wrong(c.Expect < 0, "Expect: below 0")
	if err := checkID(c.ID); err != nil {
		wrong(true, "ID: "+err.Error())
	} else {
		wrong(c.Admission != nil && c.Admission.ID().Name != Name(c.ID), "ID: it is not that of the Admission")
	}
	if err := checkAddress(c.Advertise); err != nil {
		wrong(true, "Advertise: "+err.Error())
	}
	for _, join := range c.Join {
		if err := CheckJoin(join); err != nil {
			wrong(true, "Join: "+err.Error())
		}
	}
	return errors.Join(errs...)
}

// Name returns the name of the server within its ID.
func Name(id string) string {
	name, _, _ := strings.Cut(id, ".")
	return name
}

// Transport is how Raft reaches the other servers, the same value every time. Who
// asks for it closes it, as the engine does with its own: it then ends all of its
// connections.
func (p *Peer) Transport() raft.Transport { return p.transport() }

// Run serves the other servers, and sees that this one becomes and stays a member
// of their cluster, until ctx ends; then it closes all connections and returns
// nil. An error says that the port failed, or that a promise can't be kept on
// disk. It runs once, beside the engine.
func (p *Peer) Run(ctx context.Context, cluster Cluster, local Local) error {
	group, ctx := errgroup.WithContext(ctx)
	d, err := openPromises(p.cfg.Dir, p.cfg.ID, p.cfg.Expect)
	if err != nil {
		_ = p.cfg.Listener.Close() // what failed is the promise
		return err
	}
	if !p.running.CompareAndSwap(nil, &running{cluster: cluster, local: local}) {
		return errors.New("the connection of servers runs already")
	}
	defer p.pool.close()
	l := newListener(p.cfg.Listener, p.cfg.Admission.ServerConfig(), p.cfg.ID, p.streams, p.log)
	server := grpc.NewServer(
		grpc.Creds(handed.Credentials{}),
		grpc.MaxRecvMsgSize(meshpb.MaxMessage),
		grpc.MaxSendMsgSize(meshpb.MaxMessage),
		grpc.MaxConcurrentStreams(maxStreams),
	)
	svc := &service{peer: p, cluster: cluster, local: local, promises: d, met: p.met}
	meshpb.RegisterPeerServer(server, svc)
	drained := make(chan struct{})
	group.Go(func() error { return l.run(ctx, drained) })
	group.Go(func() error {
		defer close(drained)
		return serve(ctx, server, l.grpc)
	})
	group.Go(func() error { return p.newSeeker(cluster, svc).run(ctx, p.pool.prune) })
	return group.Wait() //nolint:wrapcheck // each says what failed
}

// serve answers calls until ctx ends, and then those that are under way: a server
// that has forwarded a write is told what became of it, if that is soon.
func serve(ctx context.Context, server *grpc.Server, from net.Listener) error {
	done := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(done)
		late := time.AfterFunc(drainTime, server.Stop)
		defer late.Stop()
		server.GracefulStop()
	})
	err := server.Serve(from)
	if stop() {
		server.Stop()
		return fmt.Errorf("serve the other servers: %w", err)
	}
	<-done
	return nil
}

// Waiting tells what this server waits for before it is a member of a cluster, for
// people; "" when it is one.
func (p *Peer) Waiting() string {
	if text := p.waiting.Load(); text != nil {
		return *text
	}
	return ""
}
