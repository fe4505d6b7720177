package leaf_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/meshd/meshd/agent/agenttest"
	"github.com/meshd/meshd/agent/leaf"
	"github.com/meshd/meshd/agent/statedir"
	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/server/meshpb"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// signer is the client of a server that signs, or answers as the test says.
type signer struct {
	meshpb.MeshClient
	authority *agenttest.Authority

	mu    sync.Mutex
	err   error
	as    spiffe.ID // sign this instead of what was asked for
	ttl   time.Duration
	calls []time.Time
	keys  map[string]bool
}

func (s *signer) Sign(_ context.Context, req *meshpb.SignRequest, _ ...grpc.CallOption) (*meshpb.SignResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls = append(s.calls, time.Now())
	if s.err != nil {
		return nil, s.err
	}
	id, err := spiffe.Parse(req.GetId())
	if err != nil {
		return nil, err
	}
	if !s.as.IsZero() {
		id = s.as
	}
	key, err := ca.PublicKeyFromCSR(req.GetCsr())
	if err != nil {
		return nil, err
	}
	hash, err := ca.PublicKeyHash(key)
	if err != nil {
		return nil, err
	}
	s.keys[hash.String()] = true
	chain, err := s.authority.Sign(key, id, time.Now().Add(-ca.Backdate), time.Now().Add(s.ttl))
	if err != nil {
		return nil, err
	}
	return &meshpb.SignResponse{Chain: chain.DER()}, nil
}

func (s *signer) answer(err error, as spiffe.ID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.err, s.as = err, as
}

func (s *signer) take() []time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := s.calls
	s.calls = nil
	return out
}

var (
	node = spiffe.Node(agenttest.TrustDomain, "vm-a")                //nolint:gochecknoglobals // a constant
	web  = spiffe.Service(agenttest.TrustDomain, "default", "web")   //nolint:gochecknoglobals // a constant
	api  = spiffe.Service(agenttest.TrustDomain, "default", "api-2") //nolint:gochecknoglobals // a constant
)

type bench struct {
	t      *testing.T
	dir    statedir.Dir
	signer *signer
	bundle ca.Bundle
}

// newBench is called outside of a bubble: the authority is made at the real
// time, long before and after which its root is valid.
func newBench(t *testing.T) *bench {
	t.Helper()
	a, err := agenttest.NewAuthority()
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{t: t, signer: &signer{authority: a, ttl: 24 * time.Hour, keys: map[string]bool{}}}
	if b.bundle, err = a.Bundle(); err != nil {
		t.Fatal(err)
	}
	if b.dir, err = statedir.Open(t.TempDir() + "/leaves"); err != nil {
		t.Fatal(err)
	}
	return b
}

// bubble runs f with a clock that starts now and jumps.
func (b *bench) bubble(f func()) {
	b.t.Helper()
	now := time.Now()
	synctest.Test(b.t, func(*testing.T) {
		<-time.After(time.Until(now)) // the bubble starts in 2000
		f()
	})
}

// open returns a running manager; connected says whether there is a server.
func (b *bench) open(connected bool, want ...spiffe.ID) (m *leaf.Manager, stop func()) {
	b.t.Helper()
	m = leaf.New(leaf.Config{
		Log: slog.New(slog.DiscardHandler), Dir: b.dir, Bundle: func() ca.Bundle { return b.bundle },
		Link: func() (meshpb.MeshClient, <-chan struct{}) {
			if !connected {
				return nil, nil
			}
			return b.signer, nil
		},
	})
	if err := m.Load(); err != nil {
		b.t.Fatal(err)
	}
	m.Want(want)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- m.Run(ctx) }()
	return m, func() {
		cancel()
		if err := <-done; err != nil {
			b.t.Errorf("Run: %v", err)
		}
	}
}

func find(m *leaf.Manager, id spiffe.ID) leaf.Status {
	for _, s := range m.Status() {
		if s.ID == id {
			return s
		}
	}
	return leaf.Status{}
}

func TestRenewedAtHalfLife(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.bubble(func() {
		m, stop := b.open(true, node, web, api)
		defer stop()
		synctest.Wait()
		if n := len(b.signer.take()); n != 3 {
			t.Fatalf("%d certificates were asked for at the start, want 3", n)
		}
		if got := m.Services(); len(got) != 2 || got[0].ID() != api || got[1].ID() != web {
			t.Fatalf("services %v", got)
		}
		start := time.Now()
		first := m.Leaf(web)
		for range 24 {
			<-time.After(time.Hour)
			synctest.Wait()
			for _, id := range []spiffe.ID{node, web, api} {
				if l := m.Leaf(id); l == nil || time.Until(l.NotAfter()) < 10*time.Hour+48*time.Minute-time.Hour {
					t.Fatalf("after %v: %s has %v", time.Since(start), id, l)
				}
			}
		}
		calls := b.signer.take()
		for _, at := range calls[:3] {
			if share := float64(at.Sub(start)) / float64(24*time.Hour); share < 0.45 || share > 0.55 {
				t.Errorf("renewed after %.3f of its life", share)
			}
		}
		if calls[0].Equal(calls[1]) || calls[1].Equal(calls[2]) {
			t.Errorf("renewals are not spread: %v", calls[:3])
		}
		if m.Leaf(web).PublicKey().Equal(first.PublicKey()) {
			t.Error("the key stayed the same")
		}
		if len(b.signer.keys) != len(calls)+3 {
			t.Errorf("%d keys for %d certificates", len(b.signer.keys), len(calls)+3)
		}
	})
}

func TestRestartWithoutServers(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.bubble(func() {
		m, stop := b.open(true, node, web)
		synctest.Wait()
		want := m.Leaf(web)
		stop()
		<-time.After(20 * time.Hour)
		m, stop = b.open(false, node, web)
		synctest.Wait()
		if got := m.Leaf(web); got == nil || !got.PublicKey().Equal(want.PublicKey()) || len(m.Services()) != 1 {
			t.Errorf("after the restart: %v, want %v", got, want)
		}
		if s := find(m, web); !s.Alarm || s.NotAfter.IsZero() {
			t.Errorf("4 of 24 hours left: %+v, want the alarm", s)
		}
		<-time.After(5 * time.Hour)
		synctest.Wait()
		if m.Leaf(web) != nil || m.Services() != nil || m.Leaf(node) != nil {
			t.Error("a leaf is in use after its end")
		}
		stop()
		m, stop = b.open(false, node, web)
		synctest.Wait()
		if m.Leaf(web) != nil {
			t.Error("a leaf that is over came back from disk")
		}
		stop()
	})
	entries, err := os.ReadDir(b.dir.Path(""))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v", e.Name(), info.Mode())
		}
		names = append(names, e.Name())
	}
	if !slices.Equal(names, []string{"node.pem", "service.default.web.pem"}) {
		t.Errorf("files %v", names)
	}
}

func TestFailureKeepsTheOldLeaf(t *testing.T) {
	t.Parallel()
	rows := map[string]struct {
		err     error
		as      spiffe.ID
		want    string
		refused bool
	}{
		"server fails":       {err: status.Error(codes.Unavailable, "no quorum"), want: "no quorum"},
		"permission is lost": {err: meshpb.Refuse(codes.PermissionDenied, meshpb.ReasonNotPermitted, "vm-a may not run web", time.Now()), want: "vm-a may not run web", refused: true},
		"another identity":   {as: api, want: "the server issued an unusable certificate"},
	}
	for name, row := range rows {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBench(t)
			b.bubble(func() {
				m, stop := b.open(true, web)
				defer stop()
				synctest.Wait()
				old := m.Leaf(web)
				b.signer.take()
				b.signer.answer(row.err, row.as)
				<-time.After(17 * time.Hour)
				synctest.Wait()
				s := find(m, web)
				if m.Leaf(web) != old || !strings.Contains(s.Error, row.want) || s.Refused != row.refused || s.Alarm {
					t.Errorf("after 17 h: %v, %+v", m.Leaf(web), s)
				}
				if n := len(b.signer.take()); n < 17-14 || n > 800 {
					t.Errorf("%d attempts", n)
				}
				<-time.After(time.Hour + time.Second)
				synctest.Wait()
				if s := find(m, web); !s.Alarm || m.Leaf(web) != old {
					t.Errorf("a quarter left: %+v, want the alarm and the old leaf", s)
				}
				b.signer.answer(nil, spiffe.ID{})
				<-time.After(2 * time.Minute)
				synctest.Wait()
				if s := find(m, web); s.Alarm || s.Error != "" || m.Leaf(web) == old {
					t.Errorf("after recovery: %+v", s)
				}
			})
		})
	}
}

// TestDiskFails: a leaf that can't be kept is used all the same when the old
// one nears its end, and kept when the disk is back.
func TestDiskFails(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.bubble(func() {
		m, stop := b.open(true, web)
		defer stop()
		synctest.Wait()
		old := m.Leaf(web)
		away := b.dir.Path("") + ".away"
		if err := os.Rename(b.dir.Path(""), away); err != nil {
			t.Fatal(err)
		}
		<-time.After(17 * time.Hour)
		synctest.Wait()
		if s := find(m, web); m.Leaf(web) != old || !strings.Contains(s.Error, "no such file") {
			t.Errorf("after 17 h: %v, %+v", m.Leaf(web), s)
		}
		<-time.After(2 * time.Hour)
		synctest.Wait()
		unkept := m.Leaf(web)
		if s := find(m, web); unkept == old || s.Error == "" {
			t.Errorf("after 19 h: %v, %+v", unkept, s)
		}
		if err := os.Rename(away, b.dir.Path("")); err != nil {
			t.Fatal(err)
		}
		<-time.After(2 * time.Minute)
		synctest.Wait()
		if s := find(m, web); m.Leaf(web) == unkept || s.Error != "" || s.Alarm {
			t.Errorf("with the disk back: %+v", s)
		}
	})
}

func TestRetryAsksAtOnce(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.bubble(func() {
		b.signer.answer(errors.New("not registered yet"), spiffe.ID{})
		m, stop := b.open(true, web)
		defer stop()
		<-time.After(10 * time.Minute)
		b.signer.answer(nil, spiffe.ID{})
		b.signer.take()
		m.Retry()
		synctest.Wait()
		if m.Leaf(web) == nil || len(b.signer.take()) != 1 {
			t.Errorf("no leaf: %+v", find(m, web))
		}
	})
}

func TestUnwantedLeavesGo(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.bubble(func() {
		m, stop := b.open(true, node, web, api)
		defer stop()
		synctest.Wait()
		m.Want([]spiffe.ID{node, web})
		if m.Leaf(api) != nil || len(m.Status()) != 2 {
			t.Errorf("status %+v", m.Status())
		}
	})
	if _, err := os.Stat(b.dir.Path("service.default.api-2.pem")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("its file: %v", err)
	}
}

func TestDamagedFilesAreIgnored(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	var before string
	b.bubble(func() {
		m, stop := b.open(true, node, web)
		synctest.Wait()
		before = fmt.Sprint(m.Leaf(web))
		stop()
	})
	path := b.dir.Path("service.default.web.pem")
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	data[len(data)-200] ^= 1
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(b.dir.Path("node.pem"), b.dir.Path("service.default.other.pem")); err != nil {
		t.Fatal(err)
	}
	b.bubble(func() {
		m, stop := b.open(false, node, web, spiffe.Service(agenttest.TrustDomain, "default", "other"))
		synctest.Wait()
		if len(m.Services()) != 0 || m.Leaf(node) != nil {
			t.Errorf("taken: %v", m.Services())
		}
		stop()
		m, stop = b.open(true, web)
		synctest.Wait()
		if m.Leaf(web) == nil {
			t.Errorf("not asked for again; before: %s", before)
		}
		stop()
	})
}

func TestAdopt(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	long, err := b.signer.authority.Leaf(node, 2*time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	short, err := b.signer.authority.Leaf(node, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	m := leaf.New(leaf.Config{Log: slog.New(slog.DiscardHandler), Dir: b.dir})
	for _, l := range []*ca.Leaf{short, long, short} {
		if err := m.Adopt(l); err != nil {
			t.Fatal(err)
		}
	}
	if m.Leaf(node) != long {
		t.Errorf("holds %v, want %v", m.Leaf(node), long)
	}
	again := leaf.New(leaf.Config{Log: slog.New(slog.DiscardHandler), Dir: b.dir})
	if err := again.Load(); err != nil {
		t.Fatal(err)
	}
	if l := again.Leaf(node); l == nil || !l.PublicKey().Equal(long.PublicKey()) {
		t.Errorf("on disk: %v", l)
	}
}
