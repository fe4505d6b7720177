package rpc

import (
	"context"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/meshd/meshd/server/meshpb"
)

const (
	// quorumPatience is for how long a server without a majority keeps its agents.
	quorumPatience = 2 * time.Second
	quorumInterval = 100 * time.Millisecond
	// admissionWait is for how long an agent waits for its turn; then it had better
	// ask another server.
	admissionWait = 5 * time.Second
	// admissionHold is for how long a stream keeps its turn at most, however slowly
	// its agent reads.
	admissionHold = 2 * time.Second
)

// admission lets streams begin a few at a time: when a whole fleet connects at once,
// what each of them is sent first must not keep the server from its heartbeats, nor
// from those of its peers.
type admission struct {
	turns   chan struct{}
	waiting atomic.Int64
}

func newAdmission(at int) *admission { return &admission{turns: make(chan struct{}, at)} }

// enter waits for a turn. leave, which may be called more than once, ends it; it ends
// by itself after admissionHold. ok is false if there was none in time.
func (a *admission) enter(ctx context.Context) (leave func(), ok bool) {
	a.waiting.Add(1)
	defer a.waiting.Add(-1)
	timer := time.NewTimer(admissionWait)
	defer timer.Stop()
	select {
	case a.turns <- struct{}{}:
	case <-timer.C:
		return nil, false
	case <-ctx.Done():
		return nil, false
	}
	done := sync.OnceFunc(func() { <-a.turns })
	late := time.AfterFunc(admissionHold, done)
	return func() { late.Stop(); done() }, true
}

// watchQuorum turns agents away while this server has no majority behind it: what it
// would tell them is old, and another server may have one.
func (s *Server) watchQuorum(ctx context.Context) error {
	if s.config.Quorum == nil {
		return nil
	}
	tick := time.NewTicker(quorumInterval)
	defer tick.Stop()
	told := false // who starts has sent nobody elsewhere
	for {
		away := s.config.Quorum()
		switch isolated := away > quorumPatience; {
		case isolated == s.isolated.Load():
		case isolated:
			s.isolated.Store(true)
			s.log.WarnContext(ctx, "no majority of the servers is in reach: agents are sent to another server", slog.Duration("for", away))
			s.fleet.closeAll(s.noQuorum())
			s.watchers.closeAll(s.noQuorum())
			told = true
		default:
			s.leases.restart()
			s.isolated.Store(false)
			if told {
				s.log.InfoContext(ctx, "a majority of the servers is in reach again: agents are served")
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// quorate refuses agents while the server has no majority behind it.
func (s *Server) quorate() error {
	if s.isolated.Load() {
		return s.noQuorum()
	}
	return nil
}

func (s *Server) noQuorum() error {
	return s.refuse(codes.Unavailable, meshpb.ReasonNoQuorum,
		"server %s does not reach a majority of the servers: use another one; what was told before stays in force", s.config.Server)
}
