// Package server composes a control plane member: the replicated store, the state
// on it, the certificate authority, the HTTP API, and gRPC for agents.
package server

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"

	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/api"
	"github.com/meshd/meshd/server/backup"
	"github.com/meshd/meshd/server/client"
	"github.com/meshd/meshd/server/handed"
	"github.com/meshd/meshd/server/meshpb"
	"github.com/meshd/meshd/server/rpc"
	"github.com/meshd/meshd/server/state"
)

// drainTime is how long running requests may take when the server stops.
const drainTime = 5 * time.Second

// failTime is how long the parts of a server have to end after its store or its
// audit log failed.
const failTime = 250 * time.Millisecond

// Limits of connections; the HTTP figures are those of docs/reference.
const (
	readHeaderTimeout = 10 * time.Second
	idleTimeout       = 5 * time.Minute
	maxHeaderBytes    = 32 << 10
	maxStreams        = 64 // per agent's connection
	readBuffer        = 4 << 10
	keepaliveTime     = 10 * time.Second
	keepaliveTimeout  = 10 * time.Second
	keepaliveMinTime  = time.Second
)

// Server is one member of the control plane.
type Server struct {
	config  Config
	log     *slog.Logger
	bound   chan struct{}
	started chan struct{}
	running atomic.Pointer[running]
	live    live
}

// running is what there is while a server serves.
type running struct {
	address string
	name    string
}

// New returns a server for a valid configuration.
func New(config Config, log *slog.Logger) (*Server, error) {
	if err := config.Validate(); err != nil {
		return nil, fmt.Errorf("configuration of the server: %w", err)
	}
	config = config.withDefaults()
	return &Server{
		config: config, log: log, bound: make(chan struct{}), started: make(chan struct{}),
		live: live{config: config, changed: make(chan struct{})},
	}, nil
}

// Bound returns a channel that is closed when the server has its ports and its
// state. It may still have to wait for the other servers then; see Started.
func (s *Server) Bound() <-chan struct{} { return s.bound }

// Started returns a channel that is closed when the server serves.
func (s *Server) Started() <-chan struct{} { return s.started }

// Address returns host:port under which agents reach the server; "" before Started.
func (s *Server) Address() string {
	if r := s.running.Load(); r != nil {
		return r.address
	}
	return ""
}

// AdminSocket returns the path of the unix socket with the HTTP API for this user
// and root.
func (s *Server) AdminSocket() string { return s.config.AdminSocket }

// Run serves until ctx ends, then drains and returns nil. An error says that the
// server could not start, or that the store failed; the process must end then,
// as what is on disk is known only after a restart. It runs once.
func (s *Server) Run(ctx context.Context) error {
	inner := s.config.Listener
	if inner == nil {
		var err error
		var lc net.ListenConfig
		if inner, err = lc.Listen(ctx, "tcp", net.JoinHostPort(s.config.Bind, fmt.Sprint(s.config.Port))); err != nil {
			return fmt.Errorf("listen for agents and clients: %w", err)
		}
	}
	defer func() { _ = inner.Close() }() // closed before, unless starting has failed
	if err := privateDir(s.config.DataDir); err != nil {
		return err
	}
	name, err := serverName(s.config.Name, s.config.DataDir)
	if err != nil {
		return err
	}
	key, made, err := clusterKey(s.config)
	if err != nil {
		return err //nolint:wrapcheck // says what was read
	}
	if made {
		s.log.WarnContext(ctx, "a cluster key was made: keep a copy where backups of the state do not go; without it the CA is lost",
			slog.String("path", s.config.DataDir+"/cluster.key"))
	}
	joined, err := s.join(ctx, name, key, inner.Addr())
	if err != nil {
		return err
	}
	st := state.New(joined.engine, s.log)
	m := &member{
		Server: s, membership: joined, name: name, begun: time.Now().UTC(), state: st, authority: newAuthority(s.config, st, key, s.log),
	}
	m.keeper = m.newKeeper()
	if m.audit, err = newAuditLog(s.config, name, key, s.log); err != nil {
		return err
	}

	// The store ends after all that writes to it.
	backCtx, stopBack := context.WithCancel(context.WithoutCancel(ctx))
	defer stopBack()
	back, backCtx := errgroup.WithContext(backCtx)
	failed := make(chan error, 1)
	back.Go(func() error { return vital(failed, m.engine.Run(backCtx)) })
	back.Go(func() error { return m.runPeer(backCtx) })
	back.Go(func() error { return m.watchAge(backCtx) })
	back.Go(func() error { return st.Run(backCtx) })
	back.Go(func() error { return vital(failed, m.audit.Run(backCtx)) })
	frontCtx, stopFront := context.WithCancel(ctx)
	defer stopFront()
	defer context.AfterFunc(backCtx, stopFront)()
	ended := make(chan error, 1)
	go func() {
		frontErr := m.serve(frontCtx, inner)
		stopBack()
		if err := back.Wait(); err != nil {
			frontErr = fmt.Errorf("the server must stop: %w", err)
		}
		ended <- frontErr
	}()
	select {
	case err = <-ended:
	case cause := <-failed:
		giveUp(ended)
		return fmt.Errorf("the server must stop: %w", cause)
	}
	select {
	case cause := <-failed: // what ended the store, and not what was ended by it
		return fmt.Errorf("the server must stop: %w", cause)
	default:
		return err
	}
}

// vital tells why a part that a server can't do without has ended, and returns it.
func vital(failed chan<- error, err error) error {
	if err != nil {
		select {
		case failed <- err:
		default: // another part was first
		}
	}
	return err
}

// giveUp returns once all has ended, or after a while: whatever writes to a disk
// that hangs never ends, and the process must.
func giveUp(ended <-chan error) {
	timer := time.NewTimer(failTime)
	defer timer.Stop()
	select {
	case <-ended: //nolint:errcheck // what follows from the cause says nothing new
	case <-timer.C:
	}
}

// member is a server with its parts.
type member struct {
	*Server
	*membership
	name      string
	begun     time.Time
	state     *state.State
	authority *authority
	keeper    *backup.Keeper
	audit     auditLog
}

// serve starts what needs the state, and runs it until ctx ends.
func (m *member) serve(ctx context.Context, inner net.Listener) error {
	close(m.bound)
	if err := m.await(ctx, inner); err != nil || ctx.Err() != nil {
		return err
	}
	if err := m.authority.open(m.state.Snapshot()); err != nil { //nolint:contextcheck // opening does no I/O
		return err
	}
	host, port, err := m.config.advertised(ctx, inner.Addr())
	if err != nil {
		return err
	}
	address := net.JoinHostPort(host, port)
	own := newLeaf(spiffe.Server(m.config.TrustDomain, m.name), certificateHosts(m.config, m.name, host), m.authority, m.log)
	if err := own.issue(ctx); err != nil {
		return err
	}
	agents := rpc.New(rpc.Config{
		Server: m.name, TrustDomain: m.config.TrustDomain, Advertise: []string{address},
		Leads: m.engine.Leading, Alive: m.alive, Quorum: m.engine.Contact, Peers: m.peers,
	}, m.state, m.authority, m.log)
	m.agents.Store(agents)
	admin, err := listenAdmin(m.config.AdminSocket, m.log)
	if err != nil {
		return err
	}
	var handlers *api.API
	requests := newRequestMetrics()
	metrics, err := m.metricsHandler(memberCollector{m, agents, own, func() int { return handlers.Watches() }}, requests)
	if err != nil {
		return err
	}
	handlers = api.New(api.Config{
		State: m.state, Authority: m.authority, Fleet: fleet{rpc: agents, alone: func() bool { return len(m.others()) == 0 }}, Ask: agents.Ask,
		Snapshots: m.snapshots(),
		Cluster:   operators{m},
		Metrics:   metrics,
		Observe:   requests.observe,
		Audit:     m.audit.note, Reserve: m.audit.reserve, AuditLog: clusterAudit{m},
		Settings:  m.config.settings(),
		Log:       m.log,
		Info:      client.Status{Server: m.name, Version: m.config.Version, TrustDomain: m.config.TrustDomain, Started: m.begun},
		Addresses: func() []string { return m.addresses(address) },
		Age:       m.age,
	})
	front := newSplitter(inner, own, m.authority.Bundle, m.log)
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return m.authority.run(ctx) })
	group.Go(func() error { return own.run(ctx) })
	group.Go(func() error { return m.announce(ctx, m.record(address)) })
	group.Go(func() error { return m.lead(ctx) })
	group.Go(func() error { return m.handover(ctx) })
	group.Go(func() error { return m.compare(ctx) })
	group.Go(func() error { return agents.Run(ctx) })
	group.Go(func() error { return m.serveGRPC(ctx, front.grpc, agents) })
	group.Go(func() error { return m.serveHTTP(ctx, front.http, handlers.Handler(false), handlers.EndWatches) }) //nolint:contextcheck // requests bring their own
	group.Go(func() error { return m.serveHTTP(ctx, admin, handlers.Handler(true), handlers.EndWatches) })       //nolint:contextcheck // requests bring their own
	group.Go(func() error { return front.run(ctx) })
	m.running.Store(&running{address: address, name: m.name})
	m.log.InfoContext(ctx, "server is up", slog.String("name", m.name), slog.String("address", address),
		slog.String("trust_domain", m.config.TrustDomain), slog.String("admin_socket", m.config.AdminSocket))
	close(m.started)
	return group.Wait() //nolint:wrapcheck // the parts wrap their own
}

// await returns once there is a state to serve, or ctx has ended.
func (m *member) await(ctx context.Context, inner net.Listener) error {
	defer turnAway(inner)()
	select {
	case <-m.state.Ready():
		return m.settle(ctx)
	case <-ctx.Done():
		return nil
	}
}

// lead runs what one member of the cluster does for all.
func (m *member) lead(ctx context.Context) error {
	err := m.engine.Lead(ctx, func(ctx context.Context) error {
		group, ctx := errgroup.WithContext(ctx)
		group.Go(func() error { return m.authority.renew(ctx) })
		group.Go(func() error { return m.raiseLevel(ctx) })
		group.Go(func() error { return m.steward(ctx) })
		group.Go(func() error { return m.verify(ctx) })
		group.Go(func() error { return m.keeper.Run(ctx) })
		return group.Wait()
	})
	if err != nil && ctx.Err() == nil {
		return fmt.Errorf("lead the cluster: %w", err)
	}
	return nil
}

// record is what this server announces of itself.
func (m *member) record(address string) state.Server {
	return state.Server{
		ID: m.id, Address: address, PeerAddress: m.peerAddress, Version: m.config.Version, FeatureLevel: catalog.FeatureLevel,
		NonVoter: m.config.NonVoter, Started: m.begun,
	}
}

func (m *member) serveGRPC(ctx context.Context, listener net.Listener, agents *rpc.Server) error {
	server := grpc.NewServer(
		grpc.Creds(handed.Credentials{}),
		grpc.MaxRecvMsgSize(meshpb.MaxMessage),
		grpc.MaxSendMsgSize(meshpb.MaxMessage),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.ReadBufferSize(readBuffer), // an agent says little
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: keepaliveTime, Timeout: keepaliveTimeout}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: keepaliveMinTime, PermitWithoutStream: true}),
		grpc.UnaryInterceptor(agentCalls{m.audit}.unary),
	)
	agents.Attach(server)
	err := serveUntil(ctx, func() error { return server.Serve(listener) }, func() {
		// Streams end by themselves: agents.Run tells them.
		force := time.AfterFunc(drainTime, server.Stop)
		defer force.Stop()
		server.GracefulStop()
	})
	if err != nil {
		return fmt.Errorf("serve gRPC: %w", err)
	}
	return nil
}

func (m *member) serveHTTP(ctx context.Context, listener net.Listener, handler http.Handler, ending func()) error {
	server := &http.Server{
		Handler:           handler,
		ReadHeaderTimeout: readHeaderTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
		ErrorLog:          slog.NewLogLogger(m.log.Handler(), slog.LevelDebug),
	}
	server.RegisterOnShutdown(ending)
	err := serveUntil(ctx, func() error { return server.Serve(listener) }, func() {
		drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTime)
		defer cancel()
		if err := server.Shutdown(drain); err != nil {
			_ = server.Close() // what did not end in time is cut
		}
	})
	if err != nil {
		return fmt.Errorf("serve HTTP: %w", err)
	}
	return nil
}

// serveUntil runs serve until ctx ends, and then shutdown. It returns what serve
// failed with before; afterwards the end of a listener is no failure.
func serveUntil(ctx context.Context, serve func() error, shutdown func()) error {
	stopped := make(chan struct{})
	end := func() {
		defer close(stopped)
		shutdown()
	}
	stop := context.AfterFunc(ctx, end)
	err := serve()
	if stop() {
		if ctx.Err() == nil {
			return err
		}
		end() // the listener was closed sooner than this was told of the end
	}
	<-stopped
	return nil
}
