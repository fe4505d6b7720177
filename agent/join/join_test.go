package join_test

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"google.golang.org/grpc/codes"

	"github.com/meshd/meshd/agent/agenttest"
	"github.com/meshd/meshd/agent/join"
	"github.com/meshd/meshd/agent/statedir"
	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/server/meshpb"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type bench struct {
	t      *testing.T
	server *agenttest.Server
	roots  ca.Hash
	cfg    join.Config
	refuse atomic.Pointer[error]
}

func newBench(t *testing.T) *bench {
	t.Helper()
	a, err := agenttest.NewAuthority()
	if err != nil {
		t.Fatal(err)
	}
	bundle, err := a.Bundle()
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{t: t, server: agenttest.NewServer(a), roots: bundle.Hash(agenttest.TrustDomain)}
	b.server.Refuse = func(string, spiffe.ID) error {
		if err := b.refuse.Load(); err != nil {
			return *err
		}
		return nil
	}
	stop, err := b.server.Start(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	dir, err := statedir.Open(filepath.Join(t.TempDir(), "agent"))
	if err != nil {
		t.Fatal(err)
	}
	b.cfg = join.Config{
		Log: slog.New(slog.DiscardHandler), Dir: dir, Node: "vm-a", Version: "test", FeatureLevel: 1,
		TokenFile: filepath.Join(t.TempDir(), "join.token"),
	}
	return b
}

// token writes a token file for the given servers.
func (b *bench) token(roots ca.Hash, servers ...string) {
	b.t.Helper()
	text, err := ca.JoinToken{Servers: servers, Roots: roots, Secret: ca.NewSecret(bytes.Repeat([]byte{7}, 32))}.Encode()
	if err != nil {
		b.t.Fatal(err)
	}
	if err := os.WriteFile(b.cfg.TokenFile, []byte(text+"\n"), 0o600); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) join() (*join.Identity, error) {
	ctx, cancel := context.WithTimeout(b.t.Context(), 20*time.Second)
	defer cancel()
	return join.Join(ctx, b.cfg)
}

func TestJoin(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.token(b.roots, "127.0.0.1:1", b.server.Address) // the first is not there
	got, err := b.join()
	if err != nil {
		t.Fatal(err)
	}
	if got.Leaf.ID() != spiffe.Node(agenttest.TrustDomain, "vm-a") || !cmp.Equal([]string{b.server.Address}, got.Servers) {
		t.Errorf("identity %+v", got)
	}
	kept, err := join.Load(b.cfg.Dir)
	if err != nil {
		t.Fatal(err)
	}
	if !kept.Leaf.PublicKey().Equal(got.Leaf.PublicKey()) || kept.Bundle.Hash(agenttest.TrustDomain) != b.roots ||
		kept.TrustDomain != agenttest.TrustDomain || kept.Node != "vm-a" || !cmp.Equal(kept.Servers, got.Servers) {
		t.Errorf("kept %+v", kept)
	}
	if _, err := os.Stat(b.cfg.TokenFile); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the token file: %v, want it gone", err)
	}
	if _, err := os.Stat(b.cfg.Dir.Path("join.key")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the key file: %v, want it gone", err)
	}
}

// TestLostAnswer: the server took the token, the agent died before it kept the
// answer. The next attempt must show the same key.
func TestLostAnswer(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.token(b.roots, b.server.Address)
	lost := meshpb.Refuse(codes.Unavailable, meshpb.ReasonStore, "the answer is lost", time.Now())
	b.refuse.Store(&lost)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		_, err := join.Join(ctx, b.cfg)
		done <- err
	}()
	until, stop := context.WithTimeout(t.Context(), 20*time.Second)
	defer stop()
	if _, ok := b.server.Until(until, func(s agenttest.Seen) bool { return len(s.Joins) >= 2 }); !ok {
		t.Fatal("an answer to try again later was not tried again")
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Fatalf("ended with %v", err)
	}
	b.refuse.Store(nil)
	if _, err := b.join(); err != nil {
		t.Fatal(err)
	}
	seen, _ := b.server.Seen()
	var keys []ca.Hash
	for _, j := range seen.Joins {
		pub, err := ca.PublicKeyFromCSR(j.GetCsr())
		if err != nil {
			t.Fatal(err)
		}
		hash, err := ca.PublicKeyHash(pub)
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, hash)
	}
	for _, k := range keys {
		if k != keys[0] {
			t.Fatalf("the key changed between attempts: %v", keys)
		}
	}
}

func TestOneCausePerFailure(t *testing.T) {
	t.Parallel()
	refusal := func(code codes.Code, reason meshpb.Reason, text string, off time.Duration) func(*bench) {
		return func(b *bench) {
			b.token(b.roots, b.server.Address)
			err := meshpb.Refuse(code, reason, text, time.Now().Add(off))
			b.refuse.Store(&err)
		}
	}
	rows := map[string]struct {
		prepare func(*bench)
		want    error
		says    string
	}{
		"no token":      {prepare: func(*bench) {}, want: join.ErrNoToken, says: "run `meshctl token join"},
		"garbage":       {prepare: func(b *bench) { writeToken(b, "mesh1.!!!") }, want: join.ErrBadToken, says: "character 7"},
		"used":          {prepare: refusal(codes.PermissionDenied, meshpb.ReasonTokenUsed, "used at noon", 0), want: join.ErrTokenUsed, says: "used at noon"},
		"expired":       {prepare: refusal(codes.PermissionDenied, meshpb.ReasonTokenExpired, "expired at noon", 20*time.Minute), want: join.ErrTokenExpired, says: "(this host's clock is 20m0s behind the server's)"},
		"other node":    {prepare: refusal(codes.PermissionDenied, meshpb.ReasonTokenNode, "admits vm-b", -time.Hour), want: join.ErrOtherNode, says: "(this host's clock is 1h0m0s ahead of the server's)"},
		"unknown":       {prepare: refusal(codes.Unauthenticated, meshpb.ReasonTokenUnknown, "not known", 0), want: join.ErrBadToken, says: "not known"},
		"name in use":   {prepare: refusal(codes.AlreadyExists, meshpb.ReasonNameInUse, "joined at noon", 0), want: join.ErrNameInUse, says: "joined at noon"},
		"server clock":  {prepare: refusal(codes.FailedPrecondition, meshpb.ReasonClock, "set the clocks", 0), want: join.ErrClock, says: "set the clocks"},
		"bad request":   {prepare: refusal(codes.InvalidArgument, meshpb.ReasonBadRequest, "node name", 0), want: join.ErrRefused, says: "node name"},
		"other cluster": {prepare: func(b *bench) { b.token(ca.Hash{1}, b.server.Address) }, want: join.ErrImpostor, says: "pinned is sha256:01"},
		"issued for the past": {prepare: func(b *bench) {
			b.server.NodeTTL = -time.Second
			b.token(b.roots, b.server.Address)
		}, want: join.ErrClock, says: "is not valid now"},
	}
	for name, row := range rows {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBench(t)
			row.prepare(b)
			_, err := b.join()
			if !errors.Is(err, row.want) || !strings.Contains(err.Error(), row.says) {
				t.Errorf("got %v\nwant %v and %q", err, row.want, row.says)
			}
			if _, err := join.Load(b.cfg.Dir); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("an identity was kept: %v", err)
			}
			if _, err := os.Stat(b.cfg.TokenFile); err != nil && !errors.Is(row.want, join.ErrNoToken) {
				t.Errorf("the token is gone: %v", err)
			}
		})
	}
}

func writeToken(b *bench, text string) {
	b.t.Helper()
	if err := os.WriteFile(b.cfg.TokenFile, []byte(text), 0o600); err != nil {
		b.t.Fatal(err)
	}
}

func TestDamagedIdentity(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.token(b.roots, b.server.Address)
	if _, err := b.join(); err != nil {
		t.Fatal(err)
	}
	path := b.cfg.Dir.Path("identity.json")
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(data, bytes.Repeat([]byte{7}, 32)) {
		t.Error("the token's secret is in the identity")
	}
	data[len(data)-20] ^= 1
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := join.Load(b.cfg.Dir); !errors.Is(err, statedir.ErrCorrupt) {
		t.Errorf("loaded: %v", err)
	}
}
