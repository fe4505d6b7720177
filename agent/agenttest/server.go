package agenttest

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/meshd/meshd/agent/view"
	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/server/meshpb"
)

// Heartbeat is the interval that a Server asks for.
const Heartbeat = 50 * time.Millisecond

// Server is the stand-in. Its zero value is not usable: see NewServer.
type Server struct {
	meshpb.UnimplementedMeshServer

	Authority *Authority
	Address   string // host:port, set by Start
	// Lease is the lease that Welcome tells; 2 s when zero.
	Lease time.Duration
	// Refuse, if set, may refuse a call by the name of its RPC. Set it before
	// Start.
	Refuse func(rpc string, node spiffe.ID) error
	// LeafTTL and NodeTTL are the lifetimes of what Sign and Join issue.
	LeafTTL, NodeTTL time.Duration

	mu            sync.Mutex
	generation    string
	revision      uint64
	topics        map[view.Topic]map[string][]byte
	streams       map[*stream]bool
	changed       chan struct{}
	registered    []*meshpb.Registration
	registers     int
	refusals      []*meshpb.Refusal
	hellos        []*meshpb.Hello
	subscriptions [][]view.Topic
	applied       map[string]*meshpb.Applied
	joins         []*meshpb.JoinRequest
	signs         []*meshpb.SignRequest
	left          int
	silent        bool
	watch         *Watch
}

// NewServer returns a stand-in that holds nothing.
func NewServer(authority *Authority) *Server {
	return &Server{
		Authority: authority, LeafTTL: time.Hour, NodeTTL: time.Hour, generation: "g1", revision: 1,
		topics: map[view.Topic]map[string][]byte{}, streams: map[*stream]bool{}, changed: make(chan struct{}),
		applied: map[string]*meshpb.Applied{},
	}
}

// Start serves on address ("127.0.0.1:0" for any port) until the returned
// function is called, which waits for the end.
func (s *Server) Start(ctx context.Context, address string) (stop func(), err error) {
	bundle, err := s.Authority.Bundle()
	if err != nil {
		return nil, err
	}
	leaf, err := s.Authority.Leaf(spiffe.Server(TrustDomain, "s1"), time.Hour)
	if err != nil {
		return nil, err
	}
	config := ca.ServerConfig(ca.ServerOptions{
		Leaf:   func(string) (*tls.Certificate, error) { return leaf.TLSWithRoots(bundle), nil },
		Bundle: func() ca.Bundle { return bundle },
		Accept: ca.ExpectKind(TrustDomain, spiffe.KindNode), ClientCertificate: ca.ClientCertificateOptional,
		ALPN: []string{"h2"},
	})
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", address)
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	s.Address = l.Addr().String()
	g := grpc.NewServer(grpc.Creds(credentials.NewTLS(config)))
	meshpb.RegisterMeshServer(g, s)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = g.Serve(l) // nil after Stop; before it, every call of the test fails
	}()
	return func() {
		g.Stop()
		<-done
	}, nil
}

// Put sets one item of a topic and sends it to every stream; empty data
// removes it.
func (s *Server) Put(topic view.Topic, key string, data []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.revision++
	b := &meshpb.Batch{}
	if s.topics[topic] == nil {
		s.topics[topic] = map[string][]byte{}
		b.Reset_ = []*meshpb.Topic{{Kind: topic.Kind, Name: topic.Name, Source: topic.Source}}
	}
	if len(data) == 0 {
		delete(s.topics[topic], key)
	} else {
		s.topics[topic][key] = data
	}
	b.Position, b.Items = s.position(), []*meshpb.Item{wireItem(topic, key, data, s.revision)}
	for st := range s.streams {
		if st.wanted[topic] {
			st.push(&meshpb.SyncResponse{Message: &meshpb.SyncResponse_Batch{Batch: b}})
		}
	}
}

// PutJSON is Put of a value's JSON.
func (s *Server) PutJSON(topic view.Topic, key string, value any) error {
	data, err := json.Marshal(value)
	if err != nil {
		return err
	}
	s.Put(topic, key, data)
	return nil
}

// Send sends a message as it is to every stream.
func (s *Server) Send(m *meshpb.SyncResponse) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for st := range s.streams {
		st.push(m)
	}
}

// Rewind sets the position: another generation, or a revision of the past as a
// server has that lags. Streams that are open stay as they are.
func (s *Server) Rewind(generation string, revision uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.generation, s.revision = generation, revision
}

// Silence stops all answers to heartbeats, or begins them again.
func (s *Server) Silence(on bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.silent = on
}

// SetRefusals makes Register answer with refusals.
func (s *Server) SetRefusals(r ...*meshpb.Refusal) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.refusals = r
}

// Cut ends all streams.
func (s *Server) Cut() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for st := range s.streams {
		st.cancel()
	}
}

// Seen is what a Server was told so far. Messages must not be changed.
type Seen struct {
	Registers     int
	Registered    []*meshpb.Registration
	Hellos        []*meshpb.Hello
	Subscriptions [][]view.Topic
	Applied       map[string]*meshpb.Applied
	Joins         []*meshpb.JoinRequest
	Signs         []*meshpb.SignRequest
	Left          int
	Streams       int
}

// Seen returns what the server was told, and a channel that is closed when
// there is more.
func (s *Server) Seen() (Seen, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return Seen{
		Registers: s.registers, Registered: slices.Clone(s.registered), Hellos: slices.Clone(s.hellos),
		Subscriptions: slices.Clone(s.subscriptions), Applied: maps.Clone(s.applied),
		Joins: slices.Clone(s.joins), Signs: slices.Clone(s.signs), Left: s.left, Streams: len(s.streams),
	}, s.changed
}

// Until waits until what was seen fits; it returns the last Seen and whether
// it fitted before ctx ended.
func (s *Server) Until(ctx context.Context, fits func(Seen) bool) (Seen, bool) {
	for {
		seen, more := s.Seen()
		if fits(seen) {
			return seen, true
		}
		select {
		case <-more:
		case <-ctx.Done():
			return seen, false
		}
	}
}

// note wakes Until. s.mu is held.
func (s *Server) note() {
	close(s.changed)
	s.changed = make(chan struct{})
}

func (s *Server) position() *meshpb.Position {
	return &meshpb.Position{Generation: s.generation, Revision: s.revision}
}

// admit refuses a call without a certificate, or as Refuse says.
func (s *Server) admit(ctx context.Context, rpc string) error {
	var id spiffe.ID
	if p, ok := peer.FromContext(ctx); ok {
		if info, ok := p.AuthInfo.(credentials.TLSInfo); ok && len(info.State.PeerCertificates) > 0 {
			var err error
			if id, err = ca.PeerID(info.State); err != nil {
				return status.Error(codes.Unauthenticated, err.Error())
			}
		}
	}
	if id.IsZero() && rpc != "Join" {
		return status.Error(codes.Unauthenticated, "no certificate")
	}
	if s.Refuse != nil {
		return s.Refuse(rpc, id)
	}
	return nil
}

// Join implements meshpb.MeshServer.
func (s *Server) Join(ctx context.Context, req *meshpb.JoinRequest) (*meshpb.JoinResponse, error) {
	s.mu.Lock()
	s.joins = append(s.joins, req)
	s.note()
	s.mu.Unlock()
	if err := s.admit(ctx, "Join"); err != nil {
		return nil, err
	}
	key, err := ca.PublicKeyFromCSR(req.GetCsr())
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	chain, err := s.Authority.Sign(key, spiffe.Node(TrustDomain, req.GetNode()), time.Now().Add(-ca.Backdate), time.Now().Add(s.NodeTTL))
	if err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	bundle, err := s.Authority.Bundle()
	if err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	data, err := json.Marshal(bundle)
	if err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	return &meshpb.JoinResponse{Chain: chain.DER(), TrustDomain: TrustDomain, Bundle: data, Servers: []string{s.Address}}, nil
}

// Sign implements meshpb.MeshServer.
func (s *Server) Sign(ctx context.Context, req *meshpb.SignRequest) (*meshpb.SignResponse, error) {
	s.mu.Lock()
	s.signs = append(s.signs, req)
	ttl := s.LeafTTL
	s.note()
	s.mu.Unlock()
	if err := s.admit(ctx, "Sign"); err != nil {
		return nil, err
	}
	id, err := spiffe.Parse(req.GetId())
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	if id.Kind == spiffe.KindNode {
		ttl = s.NodeTTL
	}
	key, err := ca.PublicKeyFromCSR(req.GetCsr())
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	chain, err := s.Authority.Sign(key, id, time.Now().Add(-ca.Backdate), time.Now().Add(ttl))
	if err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	return &meshpb.SignResponse{Chain: chain.DER()}, nil
}

// Register implements meshpb.MeshServer.
func (s *Server) Register(ctx context.Context, req *meshpb.RegisterRequest) (*meshpb.RegisterResponse, error) {
	if err := s.admit(ctx, "Register"); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.registered = req.GetRegistrations()
	s.registers++
	s.revision++
	s.note()
	return &meshpb.RegisterResponse{Position: s.position(), Refusals: s.refusals}, nil
}

// Leave implements meshpb.MeshServer. As a real server does, it ends the streams before
// it answers.
func (s *Server) Leave(ctx context.Context, _ *meshpb.LeaveRequest) (*meshpb.LeaveResponse, error) {
	if err := s.admit(ctx, "Leave"); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.left++
	s.registered = nil
	for st := range s.streams {
		st.cancel()
	}
	s.note()
	return &meshpb.LeaveResponse{Position: s.position()}, nil
}
