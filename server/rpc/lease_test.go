package rpc_test

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/ca/builtin"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/intentions"
	"github.com/meshd/meshd/server/meshpb"
	"github.com/meshd/meshd/server/rpc"
	"github.com/meshd/meshd/server/state"
	"github.com/meshd/meshd/server/store"
)

// pipe is a Sync without a network, so that it can run under a fake clock.
type pipe struct {
	grpc.ServerStream
	ctx context.Context //nolint:containedctx // that is how gRPC's streams are
	up  chan *meshpb.SyncRequest
	// down holds nothing: a server that sends waits until the test reads.
	down chan *meshpb.SyncResponse
}

func (p *pipe) Context() context.Context { return p.ctx }

func (p *pipe) Recv() (*meshpb.SyncRequest, error) {
	select {
	case m, ok := <-p.up:
		if !ok {
			return nil, io.EOF
		}
		return m, nil
	case <-p.ctx.Done():
		return nil, p.ctx.Err()
	}
}

func (p *pipe) Send(m *meshpb.SyncResponse) error {
	select {
	case p.down <- m:
		return nil
	case <-p.ctx.Done():
		return p.ctx.Err()
	}
}

// session is one end of a pipe.
type session struct {
	*pipe
	cut  context.CancelFunc
	done chan error
}

// as returns a context in which calls come from the holder of leaf.
func as(ctx context.Context, leaf *ca.Leaf) context.Context {
	return peer.NewContext(ctx, &peer.Peer{AuthInfo: credentials.TLSInfo{
		State: tls.ConnectionState{HandshakeComplete: true, PeerCertificates: leaf.Chain()},
	}})
}

// dialPipe opens a stream and says hello. Nobody reads from it yet.
func (c *cluster) dialPipe(leaf *ca.Leaf, name string) *session {
	ctx, cut := context.WithCancel(as(context.Background(), leaf))
	s := &session{
		pipe: &pipe{ctx: ctx, up: make(chan *meshpb.SyncRequest), down: make(chan *meshpb.SyncResponse)},
		cut:  cut, done: make(chan error, 1),
	}
	go func() {
		err := c.rpc.Sync(s.pipe)
		s.cut() // as gRPC does when the handler returns
		s.done <- err
	}()
	refused := func() { c.tb.Fatalf("instead of a welcome: %v", <-s.done) }
	select {
	case s.up <- &meshpb.SyncRequest{Message: &meshpb.SyncRequest_Hello{Hello: &meshpb.Hello{Session: name}}}:
	case <-ctx.Done():
		refused()
	}
	select {
	case <-s.down: // the welcome
	case <-ctx.Done():
		refused()
	}
	return s
}

// hangUp breaks the connection and waits until the server has seen it.
func (s *session) hangUp() {
	s.cut()
	<-s.done //nolint:errcheck // however it ended
}

// beat sends heartbeats until ctx ends, and drops what comes back.
func (s *session) beat(ctx context.Context) {
	go func() {
		for {
			select {
			case <-s.down:
			case <-s.ctx.Done():
				return
			}
		}
	}()
	go func() {
		tick := time.NewTicker(rpc.DefaultHeartbeat)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
			case <-ctx.Done():
				return
			case <-s.ctx.Done():
				return
			}
			select {
			case s.up <- &meshpb.SyncRequest{Message: &meshpb.SyncRequest_Heartbeat{}}:
			case <-s.ctx.Done():
				return
			}
		}
	}()
}

// bubble runs fn with a cluster under a fake clock.
func bubble(t *testing.T, fn func(t *testing.T, c *cluster)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		c, wait := startIn(ctx, t, rpc.Config{JoinRate: 1e6}, store.NewMemory(), newAuthority(t))
		fn(t, c)
		cancel()
		wait()
	})
}

// wait lets time pass and everything settle.
func wait(d time.Duration) {
	<-time.After(d)
	synctest.Wait()
}

// lease returns that of vm-a.
func (c *cluster) lease() catalog.Lease {
	rec, _ := state.Leases.Get(c.state.Snapshot(), "vm-a")
	return rec.Value
}

func (c *cluster) lost() int {
	n := 0
	for _, rec := range state.Leases.All(c.state.Snapshot()) {
		if rec.Value.Lost {
			n++
		}
	}
	return n
}

func TestLeaseLife(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, c *cluster) { //nolint:thelper // the body of the test
		leaf := c.join("vm-a", "web")
		if _, err := c.rpc.Register(as(t.Context(), leaf), &meshpb.RegisterRequest{
			Registrations: []*meshpb.Registration{definition(t, "vm-a", web(""), catalog.HealthPassing)},
		}); err != nil {
			t.Fatal(err)
		}
		silent, hush := context.WithCancel(t.Context())
		s := c.dialPipe(leaf, "s1")
		s.beat(silent)
		connected := c.lease()
		if connected.Session != "s1" || connected.Server != "server-1" || connected.Epoch != 1 || connected.Lost {
			t.Fatalf("connected: %+v", connected)
		}
		revision := c.state.Snapshot().Position().Revision
		wait(time.Hour)
		if now := c.state.Snapshot().Position().Revision; now != revision || c.lease() != connected {
			t.Errorf("an hour of heartbeats made %d writes", now-revision)
		}
		hush()
		wait(rpc.DefaultLease - 2*rpc.DefaultHeartbeat)
		if c.lease().Lost {
			t.Error("lost before its lease was over")
		}
		wait(3 * rpc.DefaultHeartbeat)
		if !c.lease().Lost {
			t.Error("silent for longer than its lease, and not lost")
		}
		if reason, _ := meshpb.ReasonOf(<-s.done); reason != meshpb.ReasonSilent {
			t.Errorf("the stream ended by %q", reason)
		}
		if len(c.onA()) != 1 {
			t.Error("a lost node's instances are gone: they are to be used while nothing better exists")
		}
		again := c.dialPipe(leaf, "s1")
		beat, stop := context.WithCancel(t.Context())
		again.beat(beat)
		if back := c.lease(); back.Lost || back.Epoch != 2 {
			t.Errorf("back: %+v", back)
		}
		// SIGTERM of an agent: the stream ends cleanly, and nothing else happens but that the clock runs on.
		stop()
		wait(0)
		close(again.up)
		if err := <-again.done; err != nil {
			t.Errorf("a clean end: %v", err)
		}
		wait(rpc.DefaultLease / 2)
		if c.lease().Lost || len(c.onA()) != 1 {
			t.Errorf("half a lease after a clean end: %+v", c.lease())
		}
		wait(rpc.DefaultLease)
		if !c.lease().Lost {
			t.Error("never lost after a clean end")
		}
		wait(rpc.DefaultReapAfter - time.Minute)
		if len(c.onA()) != 1 {
			t.Error("reaped too early")
		}
		wait(3 * time.Minute)
		if len(c.onA()) != 0 || state.Leases.Len(c.state.Snapshot()) != 0 {
			t.Errorf("after 72 h: %v, %+v", c.onA(), c.lease())
		}
		if n := state.JoinTokens.Len(c.state.Snapshot()); n != 0 {
			t.Errorf("%d join tokens of days ago are kept", n)
		}
	})
}

// More than half of more than five at once are held, until they are released or back.
func TestMassLossIsHeld(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		nodes, silent int
		held          bool
	}{{10, 6, true}, {10, 5, false}, {5, 5, false}, {6, 6, true}} {
		t.Run(fmt.Sprintf("%d of %d", row.silent, row.nodes), func(t *testing.T) {
			t.Parallel()
			bubble(t, func(t *testing.T, c *cluster) { //nolint:thelper // the body of the test
				silent, hush := context.WithCancel(t.Context())
				alive, stop := context.WithCancel(t.Context())
				var sessions []*session
				var leaves []*ca.Leaf
				for i := range row.nodes {
					leaves = append(leaves, c.join(fmt.Sprintf("vm-%d", i)))
					s := c.dialPipe(leaves[i], "s")
					sessions = append(sessions, s)
					ctx := alive
					if i < row.silent {
						ctx = silent
					}
					s.beat(ctx)
					wait(rpc.DefaultHeartbeat / 7) // agents are not in step
				}
				wait(time.Minute)
				hush()
				wait(2 * rpc.DefaultLease)
				lost, held := c.lost(), len(c.rpc.HeldNodes())
				switch {
				case row.held && (lost != 0 || held != row.silent):
					t.Errorf("%d lost, %d held, want all %d held", lost, held, row.silent)
				case !row.held && (lost != row.silent || held != 0):
					t.Errorf("%d lost, %d held, want all %d lost", lost, held, row.silent)
				}
				if row.held {
					back := c.dialPipe(leaves[0], "again")
					back.beat(alive)
					wait(time.Minute)
					if 2*(row.silent-1) > row.nodes && len(c.rpc.HeldNodes()) != row.silent-1 {
						t.Errorf("one is back, %d are held", len(c.rpc.HeldNodes()))
					}
					c.rpc.ReleaseNodes()
					wait(rpc.DefaultLease)
					if c.lost() != row.silent-1 || len(c.rpc.HeldNodes()) != 0 {
						t.Errorf("released: %d lost, %d held", c.lost(), len(c.rpc.HeldNodes()))
					}
					sessions = append(sessions, back)
				}
				stop()
				for _, s := range sessions {
					s.hangUp()
				}
				wait(0)
			})
		})
	}
}

// While a server is away nobody can be heard: after its start every clock begins anew.
func TestLeaseClocksRestart(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		engine, a := store.NewMemory(), newAuthority(t)
		ctx, cancel := context.WithCancel(context.Background())
		c, stopped := startIn(ctx, t, rpc.Config{}, engine, a)
		s := c.dialPipe(c.join("vm-a", "web"), "s1")
		cancel()
		if reason, _ := meshpb.ReasonOf(<-s.done); reason != meshpb.ReasonStopping {
			t.Errorf("a stopping server says %q", reason)
		}
		stopped()
		wait(time.Hour)
		ctx, cancel = context.WithCancel(context.Background())
		c, stopped = startIn(ctx, t, rpc.Config{}, engine, a)
		wait(rpc.DefaultLease - time.Second)
		if c.lease().Lost {
			t.Error("lost for the time that the server was away")
		}
		wait(3 * time.Second)
		if !c.lease().Lost {
			t.Error("never lost after the restart")
		}
		cancel()
		stopped()
	})
}

// An agent that does not read costs nothing but what is the newest when it does, and
// its heartbeats count.
func TestSlowStreamCoalesces(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, c *cluster) { //nolint:thelper // the body of the test
		leaf := c.join("vm-a", "web", "api")
		c.intention("web", "api", intentions.Allow)
		s := c.dialPipe(leaf, "s1")
		s.up <- &meshpb.SyncRequest{Message: &meshpb.SyncRequest_Subscribe{Subscribe: &meshpb.Subscribe{Topics: []*meshpb.Topic{topicUpstream("web", "api")}}}}
		synctest.Wait() // the first batch waits to be read
		key := api("").Instance("vm-a", "10.0.0.1:7443").Key()
		register(t, direct{c, leaf}, definition(t, "vm-a", api(""), catalog.HealthPassing))
		const commits = 5000
		for i := range commits {
			c.update(func(tx *state.Tx) error {
				return state.InstanceStatuses.Put(tx, key, catalog.InstanceStatus{Health: catalog.HealthPassing, Checks: []catalog.CheckState{{Name: fmt.Sprint(i)}}})
			})
			if i%1000 == 0 {
				s.up <- &meshpb.SyncRequest{Message: &meshpb.SyncRequest_Heartbeat{}}
				wait(rpc.DefaultHeartbeat)
			}
		}
		if m := c.rpc.Metrics(); m.Lag < 4*rpc.DefaultHeartbeat || m.Behind < commits/2 || m.Streams != 1 {
			t.Errorf("while it does not read: %+v", m)
		}
		a := &agent{tb: t, held: make(map[string]map[string]string)}
		messages := 0
		for a.at != c.state.Snapshot().Position() {
			a.take(<-s.down)
			messages++
			synctest.Wait()
		}
		if messages > 4 { // a batch and an answer that wait to be read, and the newest of both
			t.Errorf("%d messages for %d commits", messages, commits)
		}
		want := `{"health":"passing","checks":[{"name":"4999","health":"","since":"0001-01-01T00:00:00Z"}]}`
		if diff := cmp.Diff(want, a.held["upstream default/api default/web"]["status/vm-a/api"]); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
		if m := c.rpc.Metrics(); m.Lag != 0 || m.Behind != 0 || m.Sent == 0 {
			t.Errorf("when it has read: %+v", m)
		}
		if c.lease().Lost {
			t.Error("its heartbeats were not heard")
		}
		s.hangUp()
		wait(0)
	})
}

// direct calls the server without a network.
type direct struct {
	c    *cluster
	leaf *ca.Leaf
}

func (d direct) Register(ctx context.Context, in *meshpb.RegisterRequest, _ ...grpc.CallOption) (*meshpb.RegisterResponse, error) {
	return d.c.rpc.Register(as(ctx, d.leaf), in)
}

// Sent deletions are bounded; who missed them gets everything anew.
func TestManyDeletions(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, c *cluster) { //nolint:thelper // the body of the test
		leaf := c.join("vm-a", "web", "api")
		c.intention("web", "api", intentions.Allow)
		s := c.dialPipe(leaf, "s1")
		s.up <- &meshpb.SyncRequest{Message: &meshpb.SyncRequest_Subscribe{Subscribe: &meshpb.Subscribe{Topics: []*meshpb.Topic{topicUpstream("web", "api")}}}}
		synctest.Wait()
		for i := range 3000 {
			key := api(fmt.Sprintf("api-%d", i)).Instance("vm-a", "10.0.0.1:7443").Key()
			c.update(func(tx *state.Tx) error {
				return state.Instances.Put(tx, key, catalog.Instance{Service: "api", ID: key.ID, Node: "vm-a"})
			})
			synctest.Wait()
			if i >= 10 {
				c.update(func(tx *state.Tx) error { state.Instances.Delete(tx, key); return nil })
				synctest.Wait()
			}
		}
		a := &agent{tb: t, held: make(map[string]map[string]string)}
		for a.at != c.state.Snapshot().Position() {
			a.take(<-s.down)
			synctest.Wait()
		}
		if n := len(a.keys("upstream default/api default/web")); n != 11 { // ten, and the lease
			t.Errorf("%d items: %v", n, a.keys("upstream default/api default/web"))
		}
		if a.resets < 2 {
			t.Errorf("%d resets: the deletions were more than are remembered", a.resets)
		}
		s.hangUp()
		wait(0)
	})
}

// A connection outlives its handshake, and not its certificate.
func TestCertificateEnds(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		c, stopped := startIn(ctx, t, rpc.Config{}, store.NewMemory(), newAuthorityWith(t, builtin.Config{NodeTTL: time.Hour}))
		leaf := c.join("vm-a", "web")
		s := c.dialPipe(leaf, "s1")
		s.beat(t.Context())
		wait(time.Hour - time.Minute)
		register(t, direct{c, leaf})
		wait(2 * time.Minute)
		if reason, _ := meshpb.ReasonOf(<-s.done); reason != meshpb.ReasonNoIdentity {
			t.Errorf("the stream ended by %q", reason)
		}
		_, err := c.rpc.Register(as(t.Context(), leaf), &meshpb.RegisterRequest{})
		if reason, _ := meshpb.ReasonOf(err); reason != meshpb.ReasonNoIdentity {
			t.Errorf("a call by an ended certificate: %v", err)
		}
		cancel()
		stopped()
	})
}

// A restored state is older than a renewal, and the renewed node is still the node; a
// host that was replaced is not, however long ago.
func TestRenewedAndReplacedHosts(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, c *cluster) { //nolint:thelper // the body of the test
		first := c.join("vm-a", "web")
		wait(time.Hour)
		renew := func(leaf *ca.Leaf) *ca.Leaf {
			who := newIdentity(t)
			res, err := c.rpc.Sign(as(t.Context(), leaf), &meshpb.SignRequest{Id: leaf.ID().String(), Csr: who.csr})
			if err != nil {
				t.Fatal(err)
			}
			return who.leaf(t, res.GetChain())
		}
		replaced := renew(first)
		wait(time.Hour)
		who := newIdentity(t)
		res, err := c.rpc.Join(t.Context(), &meshpb.JoinRequest{Secret: c.token("vm-a", true, "web"), Csr: who.csr, Node: "vm-a"})
		if err != nil {
			t.Fatal(err)
		}
		old, err := c.engine.List(t.Context(), "")
		if err != nil {
			t.Fatal(err)
		}
		wait(time.Hour)
		renewed := renew(renew(who.leaf(t, res.GetChain())))
		at, err := store.Replace(t.Context(), c.engine, store.Position{}, func(yield func(store.Pair, error) bool) {
			for _, p := range old.Pairs {
				if !yield(p, nil) {
					return
				}
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.state.Await(t.Context(), catalog.Position(at)); err != nil {
			t.Fatal(err)
		}
		for _, row := range []struct {
			name string
			leaf *ca.Leaf
			want meshpb.Reason
		}{
			{"the renewed one", renewed, ""},
			{"renewed again", renew(renewed), ""},
			{"the replaced host", first, meshpb.ReasonNodeReplaced},
			{"the replaced host, renewed before", replaced, meshpb.ReasonNodeReplaced},
		} {
			_, err := c.rpc.Register(as(t.Context(), row.leaf), &meshpb.RegisterRequest{})
			if reason, _ := meshpb.ReasonOf(err); reason != row.want {
				t.Errorf("%s: %v", row.name, err)
			}
		}
	})
}
