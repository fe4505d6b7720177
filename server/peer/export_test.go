package peer

import (
	"context"
	"log/slog"
	"time"

	"github.com/meshd/meshd/server/meshpb"
)

// Seat is a server without a network, for tests of the founding: calls go through
// Say, and what it keeps on disk is Kept.
type Seat struct {
	ID, Address string
	Expect      int
	Cluster     Cluster
	Targets     []string
	Say         func(to Member, call func(*Seat) error) error
	Kept        promise

	seeker  *seeker
	service *service
}

// Boot starts the server anew with what it has kept.
func (s *Seat) Boot() {
	p := &promises{id: s.ID, expect: s.Expect, path: "/nonexistent/promise", now: s.Kept}
	p.save = func(next promise) error { s.Kept = next; return nil }
	self := &Peer{cfg: Config{ID: s.ID, Advertise: s.Address, Expect: s.Expect}, log: slog.New(slog.DiscardHandler)}
	s.service = &service{peer: self, cluster: s.Cluster, promises: p, met: newMet()}
	s.seeker = &seeker{
		id: s.ID, address: s.Address, expect: s.Expect, cluster: s.Cluster, promises: p, met: s.service.met, calls: s,
		each: func(n int, do func(int)) {
			for i := range n {
				do(i)
			}
		},
		introduce: s.service.introduction, log: self.log,
		find: func(context.Context) ([]string, []string) { return s.Targets, nil },
		tell: func(context.Context, string) {},
	}
}

// Step does what the server does between two pauses.
func (s *Seat) Step(ctx context.Context) (string, error) {
	var leaderless time.Time
	return s.seeker.step(ctx, &leaderless)
}

// Lost does what a member does that has had no leader for long.
func (s *Seat) Lost(ctx context.Context) string {
	return s.seeker.lost(ctx, s.Cluster.Servers())
}

func (s *Seat) hello(_ context.Context, to Member, own *meshpb.Introduction) (reply *meshpb.Introduction, err error) {
	err = s.Say(to, func(other *Seat) error {
		if err := checkIntroduction(own, Name(s.ID)); err != nil {
			return err
		}
		other.service.met.heard(Member{ID: own.GetId(), Address: own.GetAddress()}, true, time.Now())
		reply = other.service.introduction()
		return checkIntroduction(reply, Name(other.ID))
	})
	return reply, err
}

func (s *Seat) promise(_ context.Context, to Member, r *meshpb.PromiseRequest) (reply *meshpb.PromiseResponse, err error) {
	err = s.Say(to, func(other *Seat) (err error) {
		reply, err = other.service.promises.answer(r, len(other.Cluster.Servers()) == 0)
		return err
	})
	return reply, err
}

func (s *Seat) join(ctx context.Context, to Member, r *meshpb.PeerJoinRequest) (reply *meshpb.PeerJoinResponse, err error) {
	err = s.Say(to, func(other *Seat) error {
		leader, _ := other.Cluster.Leader()
		reply = &meshpb.PeerJoinResponse{Leader: leader}
		return other.Cluster.Add(ctx, r.GetId(), r.GetAddress(), false)
	})
	return reply, err
}

// ParsePromise and ReadGreeting are what is decoded by hand.
var (
	ReadGreeting   = readGreeting
	AppendGreeting = appendGreeting
	ParsePromise   = parsePromise
	CheckID        = checkID
)

// Watchful is what every connection between servers goes through.
var Watchful = watchful
