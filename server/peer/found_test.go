package peer_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/meshd/meshd/server/peer"
	"github.com/meshd/meshd/server/store"
)

// town is servers whose messages are lost, doubled and late, and which crash: by a
// seed.
type town struct {
	random   *rand.Rand
	seats    []*peer.Seat
	stands   []*quiet
	loss     float64
	late     []func()            // messages that arrive some time
	busy     map[*peer.Seat]bool // in a step
	errs     []error
	ctx      context.Context //nolint:containedctx // the test's
	clusters [][]string
}

// quiet is a peer.Cluster whose members learn of it late: by learn.
type quiet struct {
	town   *town
	at     int
	in     []peer.Server
	leader string
}

var errLost = errors.New("lost")

func newTown(t *testing.T, seed uint64, n, expect int) *town {
	t.Helper()
	w := &town{ctx: t.Context(), busy: map[*peer.Seat]bool{}, random: rand.New(rand.NewPCG(seed, 0)), loss: 0.1 * float64(seed%6)}
	var addresses []string
	for i := range n {
		addresses = append(addresses, fmt.Sprintf("10.0.0.%d:7401", i+1))
	}
	for i := range n {
		q := &quiet{town: w, at: i}
		seat := &peer.Seat{ID: fmt.Sprintf("srv-%d.00000001", i+1), Address: addresses[i], Expect: expect, Cluster: q, Targets: addresses}
		seat.Say = func(to peer.Member, call func(*peer.Seat) error) error { return w.say(to, call) }
		seat.Boot()
		w.seats, w.stands = append(w.seats, seat), append(w.stands, q)
	}
	return w
}

func (w *town) say(to peer.Member, call func(*peer.Seat) error) error {
	i := slices.IndexFunc(w.seats, func(s *peer.Seat) bool { return s.Address == to.Address })
	if i < 0 {
		return errLost
	}
	w.meanwhile()
	defer w.meanwhile()
	if w.random.Float64() < w.loss {
		if w.random.IntN(3) == 0 && len(w.late) < 8 {
			w.late = append(w.late, func() { _ = call(w.seats[i]) }) // it arrives when nobody waits for it any more
		}
		return errLost
	}
	err := call(w.seats[i])
	if w.random.Float64() < w.loss {
		return errLost // the answer is
	}
	return err
}

func (q *quiet) Serve(context.Context, []byte) ([]byte, error) { return nil, store.ErrNoLeader }
func (q *quiet) Member() bool                                  { return len(q.in) > 0 }
func (q *quiet) Servers() []peer.Server                        { return q.in }
func (q *quiet) Leader() (id, address string)                  { return q.leader, "" }
func (q *quiet) Changed() <-chan struct{}                      { return nil }
func (q *quiet) Removed()                                      {}

func (q *quiet) Found(_ context.Context, members []peer.Member) error {
	if len(q.in) > 0 {
		return errors.New("it has a state")
	}
	if q.town.random.IntN(4) == 0 {
		return errors.New("it crashed before")
	}
	q.town.meanwhile()
	if len(q.in) > 0 {
		return errors.New("it has a state")
	}
	var ids []string
	for _, m := range members {
		q.in = append(q.in, peer.Server{ID: m.ID, Address: m.Address, Voter: true})
		ids = append(ids, m.ID)
	}
	q.leader = members[0].ID
	q.town.clusters = append(q.town.clusters, ids)
	return nil
}

// Add takes a server on any member: it stands for the leader.
func (q *quiet) Add(_ context.Context, id, address string, voter bool) error {
	if len(q.in) == 0 {
		return store.ErrNoLeader
	}
	q.in = slices.Clone(q.in)
	if i := slices.IndexFunc(q.in, func(s peer.Server) bool { return s.ID == id }); i >= 0 {
		q.in[i].Address = address
	} else {
		q.in = append(q.in, peer.Server{ID: id, Address: address, Voter: voter})
	}
	return nil
}

// learn has a member tell another one of the cluster, as a leader does.
func (w *town) learn() {
	from := w.stands[w.random.IntN(len(w.stands))]
	for _, s := range from.in {
		to := w.stands[slices.IndexFunc(w.seats, func(seat *peer.Seat) bool { return seat.ID == s.ID })]
		if w.random.Float64() < w.loss || to == from {
			continue
		}
		for _, known := range from.in {
			if !slices.ContainsFunc(to.in, func(s peer.Server) bool { return s.ID == known.ID }) {
				to.in = append(slices.Clone(to.in), known)
			}
		}
		to.leader = from.leader
	}
}

// meanwhile does something else in the middle of a server's step.
func (w *town) meanwhile() {
	if len(w.busy) < 3 && w.random.IntN(8) == 0 {
		w.act()
	}
}

// act is one step of the schedule.
func (w *town) act() {
	seat := w.seats[w.random.IntN(len(w.seats))]
	switch w.random.IntN(8) {
	case 0:
		if !w.busy[seat] {
			seat.Boot() // it crashed, and knows what it has kept
		}
	case 1:
		w.learn()
	case 2, 3:
		if len(w.late) > 0 {
			i := w.random.IntN(len(w.late))
			message := w.late[i]
			w.late = slices.Delete(w.late, i, i+1)
			message()
		}
	default:
		if w.busy[seat] {
			return
		}
		w.busy[seat] = true
		_, err := seat.Step(w.ctx)
		delete(w.busy, seat)
		w.errs = append(w.errs, err)
	}
}

// TestNeverTwoClusters tries schedules of loss, delay and crashes: there is never a
// second cluster, and with a network that works again everybody is in the first.
func TestNeverTwoClusters(t *testing.T) {
	type shape struct{ servers, expect int }
	for _, s := range []shape{{3, 3}, {4, 3}, {5, 3}, {5, 5}, {6, 3}, {7, 3}, {7, 5}} {
		t.Run(fmt.Sprintf("%d of %d", s.expect, s.servers), func(t *testing.T) {
			founded := 0
			for seed := range uint64(120) {
				w := newTown(t, seed, s.servers, s.expect)
				for range 150 {
					w.act()
				}
				if len(w.clusters) == 1 {
					founded++
				}
				w.loss = 0
				member := func(q *quiet) bool { return q.Member() }
				for i := 0; i < 5000 && !all(w.stands, member); i++ {
					w.act()
				}
				if err := errors.Join(w.errs...); err != nil {
					t.Fatalf("seed %d: %v", seed, err)
				}
				if len(w.clusters) != 1 {
					t.Fatalf("seed %d: %d clusters: %v", seed, len(w.clusters), w.clusters)
				}
				if !all(w.stands, member) {
					var waits []string
					for _, seat := range w.seats {
						text, _ := seat.Step(t.Context())
						waits = append(waits, seat.ID+": "+text+fmt.Sprintf(" %+v", seat.Kept))
					}
					t.Fatalf("seed %d: somebody is left out:\n%s", seed, strings.Join(waits, "\n"))
				}
				if got := w.clusters[0]; len(got) != s.expect {
					t.Fatalf("seed %d: founded with %v", seed, got)
				}
			}
			if founded == 0 {
				t.Error("no schedule founded a cluster over a bad network: the test shows nothing")
			}
		})
	}
}

// TestLost has a member without a leader: it asks to be taken again only where a
// leader is, and this server is not.
func TestLost(t *testing.T) {
	for _, test := range []struct {
		name        string
		leads, has  bool
		at          string
		wantAdded   bool
		wantWaiting string
	}{
		{"the others have no leader either", false, false, "10.0.0.1:7401", false, ""},
		{"it is known, and just not reached", true, true, "10.0.0.1:7401", false, ""},
		{"it was removed", true, false, "10.0.0.1:7401", true, "the leader, srv-2.00000001, which takes it"},
		{"it has moved", true, true, "10.0.0.9:7401", true, "the leader, srv-2.00000001, which takes it"},
	} {
		w := newTown(t, 0, 3, 3)
		for i, q := range w.stands {
			for j, seat := range w.seats {
				if j != 0 || i == 0 || test.has {
					q.in = append(q.in, peer.Server{ID: seat.ID, Address: seat.Address, Voter: true, Leader: i != 0 && j == 1 && test.leads})
				}
			}
		}
		w.seats[0].Address = test.at
		w.seats[0].Boot()
		w.stands[1].leader = w.seats[1].ID
		before := len(w.stands[1].in)
		if got := w.seats[0].Lost(t.Context()); got != test.wantWaiting {
			t.Errorf("%s: it waits for %q, want %q", test.name, got, test.wantWaiting)
		}
		if added := len(w.stands[1].in) > before || w.stands[1].in[0].Address == test.at && test.at != "10.0.0.1:7401"; added != test.wantAdded {
			t.Errorf("%s: added is %t", test.name, added)
		}
	}
}

func all[T any](items []T, ok func(T) bool) bool {
	return !slices.ContainsFunc(items, func(i T) bool { return !ok(i) })
}
