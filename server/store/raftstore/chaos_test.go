package raftstore_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"github.com/meshd/meshd/server/store"
	"github.com/meshd/meshd/server/store/raftstore"
)

// event is one call of a client on the register of a key: a write, or a read
// through a barrier. Revision is that of the value written or read.
type event struct {
	write       bool
	begun, done int64 // on one clock; done is 0 when the outcome is unknown
	revision    uint64
	value       string
}

// register is a key that several clients write and read through random members,
// with what they have seen.
type register struct {
	key    string
	clock  *atomic.Int64
	mu     sync.Mutex
	events []event
}

func (r *register) note(e event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.events = append(r.events, e)
}

// use writes and reads until ctx ends.
func (r *register) use(ctx context.Context, client int, member func() *raftstore.Engine) {
	for n := 0; ctx.Err() == nil; n++ {
		call, stop := context.WithTimeout(ctx, time.Second)
		e, m := event{write: n%2 == 0, begun: r.clock.Add(1)}, member()
		var err error
		if e.write {
			e.value = fmt.Sprintf("%d/%d", client, n)
			var p store.Position
			p, err = m.Commit(call, store.Txn{Ops: []store.Op{{Key: r.key, Value: []byte(e.value)}}})
			e.revision = p.Revision
		} else {
			err = r.read(call, m, &e)
		}
		stop()
		e.done = r.clock.Add(1)
		switch {
		case err == nil:
			r.note(e)
		case e.write && errors.Is(err, store.ErrUnknownOutcome):
			e.done = 0
			r.note(e)
		}
	}
}

func (r *register) read(ctx context.Context, m *raftstore.Engine, e *event) error {
	if _, err := m.Barrier(ctx); err != nil {
		return err
	}
	s, err := m.List(ctx, r.key)
	if err != nil {
		return err
	}
	for _, p := range s.Pairs {
		e.revision, e.value = p.ModRevision, string(p.Value)
	}
	return nil
}

// check demands that the order of the revisions is one in which all calls could
// have happened one after the other: every call sees at least what was done
// before it began, and nobody sees what was not begun.
func (r *register) check(t *testing.T) (writes, reads, unknown int) {
	t.Helper()
	written := map[string]event{}
	for _, e := range r.events {
		if e.write {
			written[e.value] = e
		}
	}
	at := map[uint64]string{}
	for _, e := range r.events {
		switch {
		case e.done == 0:
			unknown++
			continue
		case e.write:
			writes++
		default:
			reads++
		}
		if e.revision == 0 {
			continue
		}
		if before, ok := at[e.revision]; ok && before != e.value {
			t.Errorf("%s: revision %d is %q and %q", r.key, e.revision, before, e.value)
		}
		at[e.revision] = e.value
		w, ok := written[e.value]
		if !ok || w.begun > e.done {
			t.Errorf("%s: %q at revision %d was read and not written before", r.key, e.value, e.revision)
		}
		if ok && w.done != 0 && w.revision != e.revision {
			t.Errorf("%s: %q was written at revision %d and read at %d", r.key, e.value, w.revision, e.revision)
		}
	}
	for _, e := range r.events {
		for _, f := range r.events {
			if f.done == 0 || e.done == 0 || f.done > e.begun {
				continue
			}
			if e.revision < f.revision || e.write && e.revision == f.revision {
				t.Errorf("%s: revision %d (write %v) at %d..%d, after revision %d was seen at %d..%d",
					r.key, e.revision, e.write, e.begun, e.done, f.revision, f.begun, f.done)
			}
		}
	}
	return writes, reads, unknown
}

// Five members are cut off, restarted and made leader at random while clients use
// all of them: what was acknowledged is kept, reads are linearizable on every
// member, there is one reign at a time, and all states are equal in the end.
func TestChaos(t *testing.T) {
	const span = 8 * time.Second
	c := newCluster(t, 5)
	ctx, stop := context.WithTimeout(t.Context(), span)
	defer stop()
	var (
		clients sync.WaitGroup
		clock   atomic.Int64
		claims  sync.Map // epochs, by the position of their first write
	)
	registers := []*register{{key: "a", clock: &clock}, {key: "b", clock: &clock}}
	for i := range 6 {
		clients.Go(func() {
			registers[i%2].use(ctx, i, func() *raftstore.Engine { return c.member(rand.IntN(5)).Engine })
		})
	}
	for i := range 5 {
		clients.Go(func() { c.reign(ctx, t, i, &claims) })
	}
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	c.harm(ctx, t, rand.New(rand.NewPCG(seed, 0)))
	clients.Wait()
	for i := range 5 {
		c.connect(i)
	}
	writes, reads, unknown := 0, 0, 0
	for _, r := range registers {
		w, d, u := r.check(t)
		writes, reads, unknown = writes+w, reads+d, unknown+u
	}
	t.Logf("%d writes, %d reads, %d unknown outcomes", writes, reads, unknown)
	if writes < 50 || reads < 50 {
		t.Error("too few calls succeeded")
	}
	eventually(t, "a write succeeds", func() bool {
		_, err := c.member(0).Commit(t.Context(), put("end"))
		return err == nil
	})
	c.agree(t)
}

func (c *cluster) member(i int) *member {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.members[i]
}

// reign has member i campaign, and write as the leader whenever it leads.
func (c *cluster) reign(ctx context.Context, t *testing.T, i int, claims *sync.Map) {
	t.Helper()
	for ctx.Err() == nil {
		m := c.member(i)
		err := m.Lead(ctx, func(reign context.Context) error {
			for reign.Err() == nil {
				p, err := m.Commit(reign, store.Txn{Leader: true, Ops: []store.Op{{Key: "leader", Value: []byte(m.cfg.ID)}}})
				if err != nil {
					return nil //nolint:nilerr // the reign is over, or about to be
				}
				if who, taken := claims.LoadOrStore(p.Revision, m.cfg.ID); taken {
					t.Errorf("%s and %v both wrote revision %d", m.cfg.ID, who, p.Revision)
				}
			}
			return nil
		})
		if err != nil && !errors.Is(err, store.ErrClosed) {
			t.Errorf("lead: %v", err)
		}
	}
}

// harm does one thing to the cluster after the other.
func (c *cluster) harm(ctx context.Context, t *testing.T, dice *rand.Rand) {
	t.Helper()
	tick := time.NewTicker(700 * time.Millisecond)
	defer tick.Stop()
	for {
		i := dice.IntN(5)
		switch dice.IntN(4) {
		case 0:
			c.isolate(i)
		case 1:
			c.restart(t, i) //nolint:contextcheck // a member lives until the test ends
		case 2:
			leader := c.member(i)
			_ = leader.Transfer(ctx, "") // most do not lead
		default:
			for j := range 5 {
				c.connect(j)
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// restart ends member i and runs it again with the same directory and address.
func (c *cluster) restart(t *testing.T, i int) {
	t.Helper()
	old := c.member(i)
	if err := errors.Join(old.Close(), <-old.done); err != nil {
		t.Errorf("member %d: %v", i, err)
	}
	old.done <- nil
	cfg := old.cfg
	_, transport := raft.NewInmemTransport(c.transports[i].LocalAddr())
	cfg.Transport = transport
	c.mu.Lock()
	c.transports[i] = transport
	c.mu.Unlock()
	c.connect(i)
	m := run(t, cfg)
	c.mu.Lock()
	c.members[i] = m
	c.mu.Unlock()
}
