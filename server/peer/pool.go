package peer

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/stats"
	"google.golang.org/grpc/status"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/server/handed"
	"github.com/meshd/meshd/server/meshpb"
	"github.com/meshd/meshd/server/store"
)

const (
	// connectPatience is how long a call waits for a connection that is not there:
	// a leader that has just begun may still be connecting back.
	connectPatience = 2 * time.Second
	// forwardPatience is that of a request of the store, which tries again, with
	// whoever leads then.
	forwardPatience = 200 * time.Millisecond
	maxStreams      = 4096
)

// pool keeps one gRPC connection per server.
type pool struct {
	admission *ca.Admission

	mu     sync.Mutex
	links  map[Member]*link // by ID, or by name where no ID is known, and address
	closed bool
}

func newPool(admission *ca.Admission) *pool {
	return &pool{admission: admission, links: map[Member]*link{}}
}

// link is a connection to one server, remade by gRPC whenever it breaks.
type link struct {
	conn   *grpc.ClientConn
	client meshpb.PeerClient
	failed atomic.Pointer[error] // why the newest connection was not made
}

// get returns the link to a server: ID "" is whoever has the address.
func (p *pool) get(to Member) (*link, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, ErrNotRunning
	}
	if l, ok := p.links[to]; ok {
		return l, nil
	}
	l := &link{}
	name := Name(to.ID)
	conn, err := grpc.NewClient("passthrough:///"+to.Address,
		grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
			conn, err := dial(ctx, p.admission, name, address, ca.ALPNPeer)
			if err != nil {
				l.failed.Store(&err)
				return nil, err
			}
			return conn, nil
		}),
		grpc.WithTransportCredentials(handed.Credentials{}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(meshpb.MaxMessage), grpc.MaxCallSendMsgSize(meshpb.MaxMessage)),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second},
			MinConnectTimeout: dialTimeout,
		}),
		grpc.WithStatsHandler(sentHandler{}),
		grpc.WithNoProxy(),
	)
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", to.Address, err)
	}
	l.conn, l.client = conn, meshpb.NewPeerClient(conn)
	p.links[to] = l
	return l, nil
}

// prune closes the links that keep does not name.
func (p *pool) prune(keep func(Member) bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for to, l := range p.links {
		if !keep(to) {
			_ = l.conn.Close() // it is not used any more
			delete(p.links, to)
		}
	}
}

func (p *pool) close() {
	p.prune(func(Member) bool { return false })
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
}

// ready waits until the link is connected; nothing was sent when it returns an
// error. Who is patient waits through failures as well.
func (l *link) ready(ctx context.Context, patient bool) error {
	patience, cancel := context.WithTimeout(ctx, connectPatience)
	defer cancel()
	for {
		state := l.conn.GetState()
		switch state {
		case connectivity.Ready:
			return nil
		case connectivity.Shutdown:
			return ErrNotRunning
		case connectivity.Idle:
			l.conn.Connect()
		case connectivity.TransientFailure:
			l.conn.ResetConnectBackoff() // what failed may work by now
			if !patient {
				return l.reason(ctx)
			}
		case connectivity.Connecting:
		}
		if !l.conn.WaitForStateChange(patience, state) {
			return l.reason(ctx)
		}
	}
}

func (l *link) reason(ctx context.Context) error {
	if errors.Is(ctx.Err(), context.Canceled) {
		return ctx.Err() //nolint:wrapcheck // the caller's
	}
	if err := l.failed.Load(); err != nil {
		return *err
	}
	if ctx.Err() != nil {
		return ctx.Err() //nolint:wrapcheck // the caller's
	}
	return fmt.Errorf("no answer within %s", connectPatience)
}

// Forward hands a request of the store to the leader, which has the given ID and
// address. An error wraps store.ErrNoLeader when it was not sent or not applied;
// after any other the outcome is unknown.
func (p *Peer) Forward(ctx context.Context, id, address string, request []byte) ([]byte, error) {
	l, err := p.pool.get(Member{ID: id, Address: address})
	if err == nil {
		waiting, cancel := context.WithTimeout(ctx, forwardPatience)
		err = l.ready(waiting, true)
		cancel()
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %s at %s can't be reached: %w", store.ErrNoLeader, id, address, err)
	}
	var sent sentFlag
	reply, err := l.client.Forward(context.WithValue(ctx, sentKey{}, &sent), &meshpb.ForwardRequest{Request: request})
	switch {
	case err == nil:
		return reply.GetReply(), nil
	case status.Code(err) == codes.FailedPrecondition:
		return nil, fmt.Errorf("%w: %s at %s: %s", store.ErrNoLeader, id, address, status.Convert(err).Message())
	case !sent.Load():
		return nil, fmt.Errorf("%w: %s at %s was not asked: %w", store.ErrNoLeader, id, address, cause(ctx, err))
	default:
		return nil, fmt.Errorf("forwarded to %s at %s: %w", id, address, cause(ctx, err))
	}
}

// sentFlag is set when a request has been handed to a connection.
type (
	sentFlag = atomic.Bool
	sentKey  struct{}
)

// sentHandler sets the flag of a call, if it has one.
type sentHandler struct{}

// TagRPC implements stats.Handler.
func (sentHandler) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context { return ctx }

// HandleRPC implements stats.Handler.
func (sentHandler) HandleRPC(ctx context.Context, s stats.RPCStats) {
	if _, ok := s.(*stats.OutHeader); !ok {
		return // headers go first; what has none has nothing on the wire
	}
	if sent, ok := ctx.Value(sentKey{}).(*sentFlag); ok {
		sent.Store(true)
	}
}

// TagConn implements stats.Handler.
func (sentHandler) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }

// HandleConn implements stats.Handler.
func (sentHandler) HandleConn(context.Context, stats.ConnStats) {}
