// Package rpc serves the agents: it admits nodes, signs their certificates,
// registers what they run, holds their leases, and streams them the part of the
// catalog that concerns them.
//
// Who calls is taken from the verified client certificate, never from a message;
// what it may do is the word of the node's record at that moment.
package rpc

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/acl"
	"github.com/meshd/meshd/server/meshpb"
	"github.com/meshd/meshd/server/state"
	"github.com/meshd/meshd/server/store"
)

// Defaults of Config.
const (
	DefaultHeartbeat = 2 * time.Second
	DefaultLease     = 10 * time.Second
	DefaultReapAfter = 72 * time.Hour
	DefaultJoinRate  = 200 // per second, of all hosts together
	DefaultSignRate  = 20  // per second and node
	DefaultSyncs     = 32  // at once
)

// Bounds of what one node may ask for.
const (
	maxTopics        = 4096
	maxRegistrations = 2048
	// burst is how many seconds' worth of a rate may come at once: a node that
	// starts asks for the leaves of all its services.
	burst = 20
	// freshTimeout bounds the question to the other servers whether a node that this
	// one does not know is known.
	freshTimeout = 5 * time.Second
)

// Authority is what rpc needs of a certificate authority. Bundle is called often
// and must not block.
type Authority interface {
	Sign(ctx context.Context, req ca.SignRequest) (ca.Chain, error)
	Bundle() ca.Bundle
}

// Config has defaults for everything but the first two.
type Config struct {
	// Server is this server's ID.
	Server      string
	TrustDomain string
	// Advertise lists host:port of the servers, for as long as none has announced
	// itself in the state (state.Servers).
	Advertise []string
	// Leads tells whether this server leads the cluster: then it watches the leases
	// of servers that are not Alive too, and removes what is long dead. Both are asked
	// often and must not block. Without them the server is alone, and leads.
	Leads func() bool
	Alive func(server string) bool
	// Quorum is for how long this server has not known a leader with a majority; 0
	// when it has. Beyond 2 s agents are sent elsewhere. Nil: it always has.
	Quorum func() time.Duration
	// Peers are the other servers of the cluster, those that are out of reach
	// included. Nil: there are none.
	Peers func() []Peer
	// Syncs is how many agents are sent their first topics at once; others wait.
	Syncs int
	// Heartbeat is how often an agent is told to show that it is alive; a node
	// whose agent is silent for Lease is stale; its instances are removed when it
	// was so for ReapAfter.
	Heartbeat, Lease, ReapAfter time.Duration
	// JoinRate and SignRate bound the calls per second: of Join by everybody
	// together, of Sign by each node.
	JoinRate, SignRate float64
}

func (c Config) withDefaults() Config {
	if c.Heartbeat == 0 {
		c.Heartbeat = DefaultHeartbeat
	}
	if c.Lease == 0 {
		c.Lease = DefaultLease
	}
	if c.ReapAfter == 0 {
		c.ReapAfter = DefaultReapAfter
	}
	if c.JoinRate == 0 {
		c.JoinRate = DefaultJoinRate
	}
	if c.SignRate == 0 {
		c.SignRate = DefaultSignRate
	}
	if c.Syncs == 0 {
		c.Syncs = DefaultSyncs
	}
	return c
}

func (c Config) leads() bool { return c.Leads == nil || c.Leads() }

// alive reports whether the nodes of a server are its own to watch.
func (c Config) alive(server string) bool {
	return server == c.Server || c.Alive != nil && c.Alive(server)
}

func (c Config) peers() []Peer {
	if c.Peers == nil {
		return nil
	}
	return c.Peers()
}

// Server implements meshpb.MeshServer. Its methods are safe for concurrent use.
type Server struct {
	meshpb.UnimplementedMeshServer

	config    Config
	state     *state.State
	authority Authority
	log       *slog.Logger
	limits    *limits
	feeds     *feeds
	leases    *leases
	fleet     *fleet
	watchers  *watchers
	admission *admission
	pace      *Pace
	isolated  atomic.Bool // it has no majority behind it

	stop     chan struct{} // closed when Run ends
	stopOnce sync.Once
}

var _ meshpb.MeshServer = (*Server)(nil)

// New returns a server that serves once Run runs; before, calls wait or are
// refused as unavailable.
func New(config Config, st *state.State, authority Authority, log *slog.Logger) *Server {
	config = config.withDefaults()
	s := &Server{
		config: config, state: st, authority: authority, log: log,
		limits: newLimits(config), fleet: newFleet(), watchers: newWatchers(),
		admission: newAdmission(config.Syncs), pace: NewPace(), stop: make(chan struct{}),
	}
	s.feeds = newFeeds(config, st, authority, log)
	s.leases = newLeases(config, st, log)
	s.leases.lost = func(node string) { s.fleet.close(node, s.silent(node)) }
	s.leases.elsewhere, s.leases.away = s.silentElsewhere, s.isolated.Load
	s.isolated.Store(config.Quorum != nil)
	return s
}

// Attach adds the service to a gRPC server, which must present verified client
// certificates as credentials.TLSInfo.
func (s *Server) Attach(g *grpc.Server) { meshpb.RegisterMeshServer(g, s) }

// Run follows the state, watches leases and removes what is long dead, until ctx
// ends. Then it closes all streams, tells their agents to go elsewhere, and
// returns nil. It runs once.
func (s *Server) Run(ctx context.Context) error {
	defer s.stopOnce.Do(func() { close(s.stop) })
	select {
	case <-s.state.Ready():
	case <-ctx.Done():
		return nil
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return s.feeds.run(ctx, s.fleet.moved) })
	group.Go(func() error { return s.watchQuorum(ctx) })
	group.Go(func() error { return s.leases.run(ctx) })
	group.Go(func() error { return s.holdLeases(ctx) })
	group.Go(func() error { return s.prune(ctx) })
	return group.Wait() //nolint:wrapcheck // the parts wrap their own
}

// caller is an authenticated node.
type caller struct {
	node string
	key  string // ca.Hash of the public key of its certificate
	// until is when the certificate ends: connections outlive handshakes.
	until time.Time
	// signed is when the certificate was signed; zero if there is none yet.
	signed time.Time
}

// authenticate returns the node that calls and may do what it asks for.
func (s *Server) authenticate(ctx context.Context, resource acl.Resource) (caller, error) {
	select {
	case <-s.state.Ready():
	default:
		return caller{}, s.refuse(codes.Unavailable, meshpb.ReasonStore, "the server is starting: its state is not read yet")
	}
	if err := s.quorate(); err != nil {
		return caller{}, err
	}
	cert, id, err := peerIdentity(ctx)
	if err != nil {
		return caller{}, s.refuse(codes.Unauthenticated, meshpb.ReasonNoIdentity, "present the node's certificate: %v", err)
	}
	if id.Kind != spiffe.KindNode || id.TrustDomain != s.config.TrustDomain {
		return caller{}, s.refuse(codes.PermissionDenied, meshpb.ReasonNoIdentity, "%s is no node of trust domain %s", id, s.config.TrustDomain)
	}
	c := caller{node: id.Name, key: publicKeyHash(cert), until: cert.NotAfter, signed: cert.NotBefore.Add(ca.Backdate)}
	if err := s.expired(c); err != nil {
		return caller{}, err
	}
	if err := s.admit(s.state.Snapshot(), c); err != nil {
		// It may have joined, or renewed its key, at another server a moment ago.
		if err := s.admitFresh(ctx, c); err != nil {
			return caller{}, err
		}
	}
	who := acl.Identity{Subject: acl.Host, Name: c.node}
	if err := acl.Authorize(who, acl.Request{Verb: acl.Write, Resource: resource, Name: c.node}); err != nil {
		return caller{}, s.refuse(codes.PermissionDenied, meshpb.ReasonNotPermitted, "%v", err)
	}
	return c, nil
}

// expired refuses a caller whose certificate has ended since the handshake.
func (s *Server) expired(c caller) error {
	if time.Now().Before(c.until) {
		return nil
	}
	return s.refuse(codes.Unauthenticated, meshpb.ReasonNoIdentity,
		"the certificate of node %s ended at %s: connect again with a newer one", c.node, c.until.UTC().Format(time.RFC3339))
}

// admit refuses a node whose record is gone, or whose name went to another host.
// r may be a transaction, which then depends on both.
func (s *Server) admit(r state.Reader, c caller) error {
	if _, ok := state.Nodes.Get(r, c.node); !ok {
		return s.refuse(codes.PermissionDenied, meshpb.ReasonNodeUnknown,
			"node %s has no record: it was deleted, or never joined; join it again with a new token", c.node)
	}
	identity, ok := state.NodeIdentities.Get(r, c.node)
	if ok && identity.Err == nil {
		// The host before was last signed for before this one joined, give or take
		// the clocks of two servers, which is what Backdate allows for.
		later := c.signed.After(identity.Value.Since.Add(ca.Backdate))
		if later || slices.Contains(identity.Value.Keys, c.key) {
			return nil
		}
	}
	return s.refuse(codes.PermissionDenied, meshpb.ReasonNodeReplaced,
		"this certificate of node %s is no longer good: another host has joined under the name", c.node)
}

// admitFresh is admit by what no server has newer.
func (s *Server) admitFresh(ctx context.Context, c caller) error {
	ctx, cancel := context.WithTimeout(ctx, freshTimeout)
	defer cancel()
	newest, err := s.state.Fresh(ctx)
	if err != nil {
		return s.storeError(err, "look up node "+c.node)
	}
	return s.admit(newest, c)
}

// peerIdentity returns the verified leaf of the caller and whom it names.
func peerIdentity(ctx context.Context) (*x509.Certificate, spiffe.ID, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil, spiffe.ID{}, errors.New("the connection is not known")
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok {
		return nil, spiffe.ID{}, errors.New("the connection is not encrypted")
	}
	id, err := ca.PeerID(info.State)
	if err != nil {
		return nil, spiffe.ID{}, err //nolint:wrapcheck // the caller says what was tried
	}
	return info.State.PeerCertificates[0], id, nil
}

// publicKeyHash is ca.PublicKeyHash of the certificate's key.
func publicKeyHash(cert *x509.Certificate) string {
	return ca.Hash(sha256.Sum256(cert.RawSubjectPublicKeyInfo)).String()
}

func (s *Server) refuse(code codes.Code, reason meshpb.Reason, format string, args ...any) error {
	return meshpb.Refuse(code, reason, fmt.Sprintf(format, args...), time.Now())
}

// storeError turns an error of State into a gRPC status. It passes on what is one.
func (s *Server) storeError(err error, doing string) error {
	if _, is := status.FromError(err); is {
		return err // nil, or a refusal from within the transaction
	}
	switch {
	case errors.Is(err, context.Canceled):
		return s.refuse(codes.Canceled, meshpb.ReasonStore, "%s: %v", doing, err)
	case errors.Is(err, store.ErrUnknownOutcome), errors.Is(err, store.ErrNoLeader), errors.Is(err, store.ErrNotLeader), errors.Is(err, store.ErrDiskFull),
		errors.Is(err, store.ErrClosed), errors.Is(err, context.DeadlineExceeded):
		return s.refuse(codes.Unavailable, meshpb.ReasonStore, "%s: %v", doing, err)
	case errors.Is(err, state.ErrContention):
		return s.refuse(codes.Aborted, meshpb.ReasonStore, "%s: %v", doing, err)
	case errors.Is(err, state.ErrFeatureLevel), errors.Is(err, store.ErrTooLarge), errors.Is(err, store.ErrInvalid):
		return s.refuse(codes.FailedPrecondition, meshpb.ReasonStore, "%s: %v", doing, err)
	default:
		s.log.Error("store failed", slog.String("doing", doing), slog.Any("error", err))
		return s.refuse(codes.Internal, meshpb.ReasonStore, "%s: the store failed, see the server's log", doing)
	}
}

// toWire turns a position into the wire's form.
func toWire(p catalog.Position) *meshpb.Position {
	return &meshpb.Position{Generation: p.Generation, Revision: p.Revision}
}

func fromWire(p *meshpb.Position) catalog.Position {
	return catalog.Position{Generation: p.GetGeneration(), Revision: p.GetRevision()}
}
