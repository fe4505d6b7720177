package peer

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	gpeer "google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/server/meshpb"
	"github.com/meshd/meshd/server/store"
)

// joinTimeout bounds what the leader does for one joining server.
const joinTimeout = 10 * time.Second

// service answers the other servers.
type service struct {
	meshpb.UnimplementedPeerServer

	peer     *Peer
	cluster  Cluster
	local    Local
	promises *promises
	met      *met
	changing sync.Mutex // of the servers, by Join
}

// caller returns the name of the server that asks.
func caller(ctx context.Context) (string, error) {
	from, ok := gpeer.FromContext(ctx)
	if !ok {
		return "", status.Error(codes.Unauthenticated, "who asks is not known")
	}
	info, ok := from.AuthInfo.(credentials.TLSInfo)
	if !ok {
		return "", status.Error(codes.Unauthenticated, "who asks is not known")
	}
	id, err := ca.PeerID(info.State)
	if err != nil {
		return "", status.Error(codes.Unauthenticated, err.Error())
	}
	return id.Name, nil
}

// Forward implements meshpb.PeerServer.
func (s *service) Forward(ctx context.Context, r *meshpb.ForwardRequest) (*meshpb.ForwardResponse, error) {
	reply, err := s.cluster.Serve(ctx, r.GetRequest())
	switch {
	case err == nil:
		return &meshpb.ForwardResponse{Reply: reply}, nil
	case errors.Is(err, store.ErrUnknownOutcome):
		return nil, status.Error(codes.Unknown, err.Error())
	case errors.Is(err, store.ErrNoLeader):
		return nil, status.Error(codes.FailedPrecondition, err.Error())
	default:
		return nil, status.Error(codes.Unknown, err.Error())
	}
}

// introduction tells who this server is.
func (s *service) introduction() *meshpb.Introduction {
	held := s.promises.current()
	i := &meshpb.Introduction{
		Id: s.peer.cfg.ID, Address: s.peer.cfg.Advertise, Expect: int32(s.peer.cfg.Expect), //nolint:gosec // a number of servers
	}
	if held.Founder == s.peer.cfg.ID {
		i.Attempt = held.Attempt
	}
	// Member last: what it says must not be older than the servers.
	servers := s.cluster.Servers()
	i.Blank, i.Member = len(servers) == 0, s.cluster.Member()
	for _, m := range servers {
		i.Servers = append(i.Servers, &meshpb.KnownServer{Id: m.ID, Address: m.Address, Voter: m.Voter, Leader: m.Leader})
	}
	if i.GetBlank() {
		i.Servers = s.met.servers()
	}
	return i
}

// Hello implements meshpb.PeerServer.
func (s *service) Hello(ctx context.Context, r *meshpb.Introduction) (*meshpb.Introduction, error) {
	name, err := caller(ctx)
	if err != nil {
		return nil, err
	}
	if err := checkIntroduction(r, name); err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	s.met.heard(Member{ID: r.GetId(), Address: r.GetAddress()}, true, time.Now())
	return s.introduction(), nil
}

// checkIntroduction takes what a server says of itself, and refuses what it says
// in another's name.
func checkIntroduction(i *meshpb.Introduction, name string) error {
	if err := checkID(i.GetId()); err != nil {
		return err
	}
	if Name(i.GetId()) != name {
		return fmt.Errorf("%w: %s has the certificate of %s", ErrOtherServer, i.GetId(), name)
	}
	if err := checkAddress(i.GetAddress()); err != nil {
		return err
	}
	if len(i.GetServers()) > maxTargets {
		return fmt.Errorf("it names %d servers, at most %d can be", len(i.GetServers()), maxTargets)
	}
	for _, m := range i.GetServers() {
		if err := errors.Join(checkID(m.GetId()), checkAddress(m.GetAddress())); err != nil {
			return err
		}
	}
	return nil
}

// Promise implements meshpb.PeerServer.
func (s *service) Promise(ctx context.Context, r *meshpb.PromiseRequest) (*meshpb.PromiseResponse, error) {
	name, err := caller(ctx)
	if err != nil {
		return nil, err
	}
	if Name(r.GetFounder()) != name {
		return nil, status.Errorf(codes.PermissionDenied, "%s asks in the name of %s", name, cutText(r.GetFounder()))
	}
	answer, err := s.promises.answer(r, len(s.cluster.Servers()) == 0)
	if err != nil {
		s.peer.log.ErrorContext(ctx, "a promise could not be kept on disk", slog.Any("error", err))
		return nil, status.Error(codes.Internal, err.Error())
	}
	return answer, nil
}

// Join implements meshpb.PeerServer.
func (s *service) Join(ctx context.Context, r *meshpb.PeerJoinRequest) (*meshpb.PeerJoinResponse, error) {
	name, err := caller(ctx)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(checkID(r.GetId()), checkAddress(r.GetAddress())); err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	if !r.GetForwarded() && Name(r.GetId()) != name {
		return nil, status.Errorf(codes.PermissionDenied, "%s asks in the name of %s", name, r.GetId())
	}
	leader, address := s.cluster.Leader()
	switch {
	case leader == "":
		return nil, status.Error(codes.Unavailable, "the cluster has no leader now")
	case leader == s.peer.cfg.ID:
		ctx, cancel := context.WithTimeout(ctx, joinTimeout)
		defer cancel()
		return s.admit(ctx, Member{ID: r.GetId(), Address: r.GetAddress()})
	case r.GetForwarded():
		return nil, status.Errorf(codes.Unavailable, "%s leads now", leader)
	}
	l, err := s.peer.pool.get(Member{ID: leader, Address: address})
	if err == nil {
		err = l.ready(ctx, true)
	}
	if err != nil {
		return nil, status.Errorf(codes.Unavailable, "the leader, %s at %s, can't be reached: %v", leader, address, err)
	}
	return l.client.Join(ctx, &meshpb.PeerJoinRequest{Id: r.GetId(), Address: r.GetAddress(), Forwarded: true}) //nolint:wrapcheck // a status already
}

// admit makes a server a member, or changes its address. It is the leader that
// does. A new member has no vote before it has caught up.
func (s *service) admit(ctx context.Context, joining Member) (*meshpb.PeerJoinResponse, error) {
	s.changing.Lock()
	defer s.changing.Unlock()
	refuse := func(format string, args ...any) (*meshpb.PeerJoinResponse, error) {
		return &meshpb.PeerJoinResponse{Refused: fmt.Sprintf(format, args...), Leader: s.peer.cfg.ID}, nil
	}
	if s.local.Refuse != nil {
		if err := s.local.Refuse(Name(joining.ID), joining.ID); err != nil {
			return &meshpb.PeerJoinResponse{Refused: err.Error(), Leader: s.peer.cfg.ID, Removed: true}, nil
		}
	}
	servers := s.cluster.Servers()
	voter := false
	if i := slices.IndexFunc(servers, func(m Server) bool { return m.ID == joining.ID }); i >= 0 {
		if servers[i].Address == joining.Address {
			return &meshpb.PeerJoinResponse{Leader: s.peer.cfg.ID}, nil
		}
		voter = servers[i].Voter
	}
	// It must be where it says that it is, with the identity that it says: nobody
	// else can prove that name, and whoever had this address is not there any more.
	found, err := s.peer.hello(ctx, joining, s.introduction())
	if err != nil {
		return refuse("the leader, %s, can't reach it at %s: %v", s.peer.cfg.ID, joining.Address, err)
	}
	if found.GetId() != joining.ID {
		return refuse("the leader, %s, finds %s at %s", s.peer.cfg.ID, found.GetId(), joining.Address)
	}
	return s.change(ctx, joining, voter)
}

func (s *service) change(ctx context.Context, joining Member, voter bool) (*meshpb.PeerJoinResponse, error) {
	if err := s.cluster.Add(ctx, joining.ID, joining.Address, voter); err != nil {
		return nil, status.Errorf(codes.Unavailable, "add %s at %s: %v", joining.ID, joining.Address, err)
	}
	s.peer.log.InfoContext(ctx, "a server has joined", slog.String("id", joining.ID), slog.String("address", joining.Address), slog.Bool("voter", voter))
	return &meshpb.PeerJoinResponse{Leader: s.peer.cfg.ID}, nil
}

// Status implements meshpb.PeerServer.
func (s *service) Status(ctx context.Context, _ *meshpb.StatusRequest) (*meshpb.StatusResponse, error) {
	if _, err := caller(ctx); err != nil {
		return nil, err
	}
	if s.local.Status == nil {
		return nil, status.Error(codes.Unimplemented, "this server tells no status")
	}
	text, err := json.Marshal(s.local.Status())
	if err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	return &meshpb.StatusResponse{Id: s.peer.cfg.ID, Status: text}, nil
}

// Ask implements meshpb.PeerServer.
func (s *service) Ask(r *meshpb.AskRequest, stream grpc.ServerStreamingServer[meshpb.AskResponse]) error {
	if s.local.Ask == nil {
		return status.Error(codes.Unimplemented, "this server asks no hosts")
	}
	err := s.local.Ask(stream.Context(), r.GetQuery(), func(answer []byte) error {
		return stream.Send(&meshpb.AskResponse{Answer: answer})
	})
	return spoken(err)
}

// Fleet implements meshpb.PeerServer.
func (s *service) Fleet(ctx context.Context, r *meshpb.FleetRequest) (*meshpb.FleetResponse, error) {
	if s.local.Fleet == nil {
		return nil, status.Error(codes.Unimplemented, "this server tells nothing about agents")
	}
	answer, err := s.local.Fleet(ctx, r.GetQuery())
	if err != nil {
		return nil, spoken(err)
	}
	return &meshpb.FleetResponse{Answer: answer}, nil
}

// spoken makes a status of an error of Local's.
func spoken(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, context.Canceled):
		return status.Error(codes.Canceled, err.Error())
	case errors.Is(err, context.DeadlineExceeded):
		return status.Error(codes.DeadlineExceeded, err.Error())
	default:
		return status.Error(codes.Unknown, err.Error())
	}
}
