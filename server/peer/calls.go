package peer

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	gpeer "google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/server/handed"
	"github.com/meshd/meshd/server/meshpb"
)

const (
	// callTimeout bounds what servers say to each other about themselves.
	callTimeout = 2 * time.Second
	// joinPatience is that of a server that joins: the leader asks back.
	joinPatience = joinTimeout + callTimeout
)

// link connects to a server, for one call.
func (p *Peer) link(ctx context.Context, to Member) (*link, error) {
	l, err := p.pool.get(to)
	if err != nil {
		return nil, err
	}
	return l, l.ready(ctx, false)
}

// reach is link for those who ask in the name of people.
func (p *Peer) reach(ctx context.Context, to Server) (*link, error) {
	l, err := p.link(ctx, Member{ID: to.ID, Address: to.Address})
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnreachable, err)
	}
	return l, nil
}

// hello implements calls. ID "" is whoever has the address.
func (p *Peer) hello(ctx context.Context, to Member, own *meshpb.Introduction) (*meshpb.Introduction, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	l, err := p.link(ctx, to)
	if err != nil {
		return nil, err
	}
	var from gpeer.Peer
	reply, err := l.client.Hello(ctx, own, grpc.Peer(&from))
	if err != nil {
		return nil, cause(ctx, err)
	}
	info, ok := from.AuthInfo.(credentials.TLSInfo)
	if !ok {
		return nil, handed.ErrNoTLS
	}
	id, err := ca.PeerID(info.State)
	if err != nil {
		return nil, err //nolint:wrapcheck // says what is wrong
	}
	if err := checkIntroduction(reply, id.Name); err != nil {
		return nil, err
	}
	return reply, nil
}

// promise implements calls.
func (p *Peer) promise(ctx context.Context, to Member, r *meshpb.PromiseRequest) (*meshpb.PromiseResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	l, err := p.link(ctx, to)
	if err != nil {
		return nil, err
	}
	reply, err := l.client.Promise(ctx, r)
	if err != nil {
		return nil, cause(ctx, err)
	}
	return reply, nil
}

// join implements calls.
func (p *Peer) join(ctx context.Context, to Member, r *meshpb.PeerJoinRequest) (*meshpb.PeerJoinResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, joinPatience)
	defer cancel()
	l, err := p.link(ctx, to)
	if err != nil {
		return nil, err
	}
	reply, err := l.client.Join(ctx, r)
	if err != nil {
		return nil, cause(ctx, err)
	}
	return reply, nil
}

// Answer is what one server says, or why it says nothing.
type Answer[T any] struct {
	Server Server
	Value  T
	Err    error
}

// all asks the other servers at once. Every one of them is in the result.
func all[T any](servers []Server, ask func(Server) (T, error)) []Answer[T] {
	answers := make([]Answer[T], len(servers))
	var group sync.WaitGroup
	for i, s := range servers {
		group.Go(func() {
			value, err := ask(s)
			answers[i] = Answer[T]{Server: s, Value: value, Err: err}
		})
	}
	group.Wait()
	return answers
}

// Status asks every server of the cluster what it knows of itself, this one
// included. It takes at most two seconds; who does not answer has an error.
func (p *Peer) Status(ctx context.Context) ([]Answer[Status], error) {
	r := p.running.Load()
	if r == nil {
		return nil, ErrNotRunning
	}
	return all(r.cluster.Servers(), func(s Server) (Status, error) {
		if s.ID == p.cfg.ID {
			if r.local.Status == nil {
				return Status{}, errors.New("this server tells no status")
			}
			return r.local.Status(), nil
		}
		return p.statusOf(ctx, s)
	}), nil
}

func (p *Peer) statusOf(ctx context.Context, s Server) (Status, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	l, err := p.reach(ctx, s)
	if err != nil {
		return Status{}, err
	}
	reply, err := l.client.Status(ctx, &meshpb.StatusRequest{})
	if err != nil {
		return Status{}, cause(ctx, err)
	}
	if reply.GetId() != s.ID {
		return Status{}, fmt.Errorf("%w: %s, at the address of %s", ErrOtherServer, cutText(reply.GetId()), s.ID)
	}
	var found Status
	if err := json.Unmarshal(reply.GetStatus(), &found); err != nil {
		return Status{}, fmt.Errorf("read the status of %s: %w", s.ID, err)
	}
	return found, nil
}

// Ask puts a question, JSON of flow.Query, to the hosts of one other server, and
// emits what they answer, JSON of flow.Answer. It returns nil when all is said; its
// own error, ctx's or emit's means that answers may be missing.
func (p *Peer) Ask(ctx context.Context, s Server, query []byte, emit func([]byte) error) error {
	l, err := p.reach(ctx, s)
	if err != nil {
		return err
	}
	stream, err := l.client.Ask(ctx, &meshpb.AskRequest{Query: query})
	if err != nil {
		return cause(ctx, err)
	}
	for {
		reply, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return cause(ctx, err)
		}
		if err := emit(reply.GetAnswer()); err != nil {
			return err
		}
	}
}

// Fleet asks one other server about the agents that are connected to it, in JSON.
func (p *Peer) Fleet(ctx context.Context, s Server, query []byte) ([]byte, error) {
	l, err := p.reach(ctx, s)
	if err != nil {
		return nil, err
	}
	reply, err := l.client.Fleet(ctx, &meshpb.FleetRequest{Query: query})
	if err != nil {
		return nil, cause(ctx, err)
	}
	return reply.GetAnswer(), nil
}

// cause prefers the caller's own end over gRPC's description of it.
func cause(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		if errors.Is(ctx.Err(), context.DeadlineExceeded) {
			return fmt.Errorf("it did not answer in time: %w", ctx.Err())
		}
		return context.Cause(ctx) //nolint:wrapcheck // the caller's
	}
	if status.Code(err) == codes.Unavailable {
		return fmt.Errorf("the connection broke: %s", status.Convert(err).Message())
	}
	return errors.New(status.Convert(err).Message())
}
