package view_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/meshd/meshd/agent/agenttest"
	"github.com/meshd/meshd/agent/statedir"
	"github.com/meshd/meshd/agent/view"
	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/meshpb"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	web = catalog.Name{Namespace: "default", Name: "web"} //nolint:gochecknoglobals // a constant
	api = catalog.Name{Namespace: "default", Name: "api"} //nolint:gochecknoglobals // a constant
)

// bench is one view with its stand-in servers.
type bench struct {
	t         *testing.T
	authority *agenttest.Authority
	server    *agenttest.Server
	stop      func()
	dir       statedir.Dir
	dial      func(string) (*grpc.ClientConn, error)
	log       logBuffer
	address   atomic.Value
}

type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func newBench(t *testing.T) *bench {
	t.Helper()
	a, err := agenttest.NewAuthority()
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{t: t, authority: a, server: agenttest.NewServer(a)}
	b.start("127.0.0.1:0")
	t.Cleanup(func() { b.stop() })
	if b.dir, err = statedir.Open(t.TempDir() + "/agent"); err != nil {
		t.Fatal(err)
	}
	bundle, err := a.Bundle()
	if err != nil {
		t.Fatal(err)
	}
	node, err := a.Leaf(spiffe.Node(agenttest.TrustDomain, "vm-a"), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	b.dial = func(server string) (*grpc.ClientConn, error) {
		return grpc.NewClient("passthrough:///"+server, grpc.WithTransportCredentials(credentials.NewTLS(ca.ClientConfig(ca.ClientOptions{
			Leaf:   func() (*tls.Certificate, error) { return node.TLS(), nil },
			Bundle: func() ca.Bundle { return bundle },
			Accept: ca.ExpectKind(agenttest.TrustDomain, spiffe.KindServer), ServerName: meshpb.ServerName, ALPN: []string{"h2"},
		}))))
	}
	return b
}

func (b *bench) start(address string) {
	b.t.Helper()
	stop, err := b.server.Start(b.t.Context(), address)
	if err != nil {
		b.t.Fatal(err)
	}
	b.stop = sync.OnceFunc(stop)
	b.address.Store(b.server.Address)
}

// view returns a loaded view that is not running.
func (b *bench) view() *view.View {
	b.t.Helper()
	v := view.New(view.Config{
		Log: slog.New(slog.NewTextHandler(&b.log, nil)), Dir: b.dir, Dial: b.dial,
		Servers: func() []string { return []string{fmt.Sprint(b.address.Load())} },
		Hello: func() view.Hello {
			return view.Hello{Session: "s", Version: "v", FeatureLevel: 1, Address: "10.0.0.1:7443"}
		},
	})
	if err := v.Load(); err != nil {
		b.t.Fatal(err)
	}
	return v
}

// run runs the view until the test ends or the returned function is called.
func (b *bench) run(v *view.View) (stop func()) {
	b.t.Helper()
	ctx, cancel := context.WithCancel(b.t.Context())
	done := make(chan error, 1)
	go func() { done <- v.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			b.t.Errorf("Run: %v", err)
		}
	})
	b.t.Cleanup(stop)
	return stop
}

func (b *bench) deadline() context.Context {
	ctx, cancel := context.WithTimeout(b.t.Context(), 20*time.Second)
	b.t.Cleanup(cancel)
	return ctx
}

func (b *bench) until(v *view.View, what string, fits func(*view.Snapshot) bool) *view.Snapshot {
	b.t.Helper()
	ctx := b.deadline()
	for {
		changed := v.Changed()
		s := v.Snapshot()
		if fits(s) {
			return s
		}
		select {
		case <-changed:
		case <-ctx.Done():
			b.t.Fatalf("%s: never so; position %v, status %+v", what, s.Position(), v.Status())
		}
	}
}

// poll waits for what announces no change.
func (b *bench) poll(what string, fits func() bool) {
	b.t.Helper()
	ctx := b.deadline()
	for !fits() {
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
			b.t.Fatalf("%s: never so", what)
		}
	}
}

func (b *bench) seen(what string, fits func(agenttest.Seen) bool) agenttest.Seen {
	b.t.Helper()
	seen, ok := b.server.Until(b.deadline(), fits)
	if !ok {
		b.t.Fatalf("%s: the server never saw it: %+v", what, seen)
	}
	return seen
}

func content(s *view.Snapshot, topic view.Topic) map[string]string {
	if !s.Has(topic) {
		return nil
	}
	out := map[string]string{}
	for key, data := range s.Items(topic) {
		out[key] = string(data)
	}
	return out
}

func same(want map[string]string, topic view.Topic) func(*view.Snapshot) bool {
	return func(s *view.Snapshot) bool { return cmp.Equal(want, content(s, topic)) }
}

func TestFollowsAndKeeps(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	odd := `{"z":1, "a":"<&>", "a2":1.50}` // bytes must survive, not only values
	topic := view.Intentions(web)
	b.server.Put(topic, "one", []byte(odd))
	v := b.view()
	v.Subscribe([]view.Topic{view.Roots(), topic})
	stop := b.run(v)
	b.until(v, "first content", same(map[string]string{"one": odd}, topic))
	b.server.Put(topic, "two", []byte(`{}`))
	b.server.Put(topic, "one", nil)
	before := b.until(v, "change", same(map[string]string{"two": `{}`}, topic))
	b.poll("a server confirmed", func() bool { _, ok := v.Age(); return ok })
	seen := b.seen("hello", func(s agenttest.Seen) bool { return len(s.Hellos) == 1 })
	if h := seen.Hellos[0]; h.GetAddress() != "10.0.0.1:7443" || h.GetSession() != "s" {
		t.Errorf("hello %v", h)
	}
	stop()
	b.stop()

	again := b.view() // with every server dead
	again.Subscribe([]view.Topic{view.Roots(), topic})
	after := again.Snapshot()
	if diff := cmp.Diff(content(before, topic), content(after, topic)); diff != "" {
		t.Errorf("after the restart: %s", diff)
	}
	if after.Position() != before.Position() && !after.Position().After(before.Position()) {
		t.Errorf("position %v after the restart, %v before", after.Position(), before.Position())
	}
	if age, ok := again.Age(); !ok || age > time.Minute {
		t.Errorf("age %v, %v after the restart", age, ok)
	}
}

func TestDamagedCacheIsIgnored(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	topic := view.Intentions(web)
	b.server.Put(topic, "one", []byte(`{}`))
	v := b.view()
	v.Subscribe([]view.Topic{topic})
	stop := b.run(v)
	b.until(v, "content", same(map[string]string{"one": `{}`}, topic))
	stop()
	path := b.dir.Path("view.json")
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	data[len(data)/2] ^= 4
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	v = b.view()
	if v.Snapshot().Has(topic) {
		t.Error("damaged content was taken")
	}
	if !strings.Contains(b.log.String(), "the kept view is ignored") {
		t.Errorf("the log does not say so: %s", b.log.String())
	}
	v.Subscribe([]view.Topic{topic})
	b.run(v)
	b.until(v, "content from the server", same(map[string]string{"one": `{}`}, topic))
}

func TestNeverGoesBackWithinAGeneration(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	topic := view.Intentions(web)
	b.server.Rewind("g1", 100)
	b.server.Put(topic, "deny", []byte(`{"new":true}`)) // 101
	v := b.view()
	v.Subscribe([]view.Topic{topic})
	b.run(v)
	b.until(v, "content", same(map[string]string{"deny": `{"new":true}`}, topic))

	// The next stream reaches a server that has seen only revision 50.
	b.server.Rewind("g1", 49)
	b.server.Put(topic, "deny", []byte(`{"new":false}`))
	b.server.Cut()
	b.seen("second stream", func(s agenttest.Seen) bool { return len(s.Hellos) == 2 && len(s.Subscriptions) == 2 })
	b.server.Put(topic, "other", []byte(`{}`)) // 51: still the past
	second := view.Intentions(api)
	v.Subscribe([]view.Topic{topic, second})
	b.server.Put(second, "x", []byte(`{}`)) // 52: never held, so it is taken
	s := b.until(v, "a topic that was not held", same(map[string]string{"x": `{}`}, second))
	if diff := cmp.Diff(map[string]string{"deny": `{"new":true}`}, content(s, topic)); diff != "" {
		t.Errorf("went back: %s", diff)
	}
	if s.Position().Revision < 101 {
		t.Errorf("position went back to %v", s.Position())
	}
	// It catches up: what it sends now counts.
	b.server.Rewind("g1", 200)
	b.server.Put(topic, "later", []byte(`{}`))
	b.until(v, "caught up", same(map[string]string{"deny": `{"new":true}`, "later": `{}`}, topic))
}

func TestNewGenerationReplaces(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	topic, gone := view.Intentions(web), view.Intentions(api)
	b.server.Rewind("g1", 900)
	b.server.Put(topic, "old", []byte(`{}`))
	b.server.Put(gone, "old", []byte(`{}`))
	v := b.view()
	v.Subscribe([]view.Topic{topic, gone})
	b.run(v)
	b.until(v, "content", func(s *view.Snapshot) bool { return s.Has(topic) && s.Has(gone) })
	b.stop()

	restored := agenttest.NewServer(b.authority)
	restored.Rewind("g2", 5)
	restored.Put(topic, "restored", []byte(`{}`))
	b.server = restored
	b.start("127.0.0.1:0")
	s := b.until(v, "restored", func(s *view.Snapshot) bool {
		return cmp.Equal(map[string]string{"restored": `{}`}, content(s, topic)) && !s.Has(gone)
	})
	if want := (catalog.Position{Generation: "g2", Revision: 6}); s.Position() != want {
		t.Errorf("position %v, want %v", s.Position(), want)
	}
}

func TestUnsubscribedTopicsStayWithoutAServer(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	topic, other := view.Intentions(web), view.Intentions(api)
	b.server.Put(topic, "x", []byte(`{}`))
	b.server.Put(other, "x", []byte(`{}`))
	v := b.view()
	v.Subscribe([]view.Topic{topic, other})
	b.run(v)
	b.until(v, "both", func(s *view.Snapshot) bool { return s.Has(topic) && s.Has(other) })
	address := b.server.Address
	b.stop()
	v.Subscribe([]view.Topic{topic})
	if !v.Snapshot().Has(other) {
		t.Error("a topic went without a server's word")
	}
	b.start(address)
	b.until(v, "confirmed", func(s *view.Snapshot) bool { return s.Has(topic) && !s.Has(other) })
}

func TestSilentServerIsLeft(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.server.Lease = 200 * time.Millisecond
	v := b.view()
	b.run(v)
	b.seen("first stream", func(s agenttest.Seen) bool { return len(s.Hellos) == 1 })
	b.server.Silence(true)
	b.seen("second stream", func(s agenttest.Seen) bool { return len(s.Hellos) >= 2 })
	if !strings.Contains(b.log.String(), "the server fell silent") {
		t.Errorf("the log does not say why: %s", b.log.String())
	}
	b.server.Silence(false)
	b.seen("one stream only", func(s agenttest.Seen) bool { return s.Streams == 1 })
}

func TestReconnect(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	v := b.view()
	v.Reconnect() // nothing to end yet
	b.run(v)
	b.seen("first stream", func(s agenttest.Seen) bool { return len(s.Hellos) == 1 && s.Streams == 1 })
	b.poll("a link", func() bool { link, _ := v.Link(); return link != nil })
	v.Reconnect()
	b.seen("second stream", func(s agenttest.Seen) bool { return len(s.Hellos) == 2 && s.Streams == 1 })
}

func TestBrokenProtocolEndsTheStream(t *testing.T) {
	t.Parallel()
	topic := &meshpb.Topic{Kind: "intentions", Name: "default/web"}
	rows := map[string]*meshpb.Batch{
		"no generation":         {Position: &meshpb.Position{Revision: 9}},
		"items before content":  {Position: &meshpb.Position{Generation: "g1", Revision: 9}, Items: []*meshpb.Item{{Topic: topic, Key: "x", Json: []byte("{}")}}},
		"an item of 2 MiB":      {Position: &meshpb.Position{Generation: "g1", Revision: 9}, Reset_: []*meshpb.Topic{topic}, Items: []*meshpb.Item{{Topic: topic, Key: "x", Json: make([]byte, 2<<20)}}},
		"generation, no resets": {Position: &meshpb.Position{Generation: "g9", Revision: 9}, Items: []*meshpb.Item{{Topic: &meshpb.Topic{Kind: "node"}, Key: "x", Json: []byte("{}")}}},
	}
	for name, bad := range rows {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBench(t)
			b.server.Put(view.Node(), "spec", []byte(`{}`))
			v := b.view()
			v.Subscribe([]view.Topic{view.Intentions(web), view.Node()})
			b.run(v)
			before := b.until(v, "content", func(s *view.Snapshot) bool { return s.Has(view.Node()) })
			b.server.Send(&meshpb.SyncResponse{Message: &meshpb.SyncResponse_Batch{Batch: bad}})
			b.seen("second stream", func(s agenttest.Seen) bool { return len(s.Hellos) == 2 })
			after := v.Snapshot()
			if diff := cmp.Diff(content(before, view.Node()), content(after, view.Node())); diff != "" || after.Has(view.Intentions(web)) {
				t.Errorf("something of the bad batch was taken: %s", diff)
			}
		})
	}
}

func TestAppliedIsSentAndSentAgain(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	v := b.view()
	v.Report(view.Applied{Proxy: "p1", Position: catalog.Position{Generation: "g1", Revision: 7}})
	b.run(v)
	b.seen("report", func(s agenttest.Seen) bool { return s.Applied["p1"].GetPosition().GetRevision() == 7 })
	v.Report(view.Applied{Proxy: "p1", Position: catalog.Position{Generation: "g1", Revision: 8}, Closed: 3, Refused: "bad"})
	b.seen("newer report", func(s agenttest.Seen) bool {
		a := s.Applied["p1"]
		return a.GetPosition().GetRevision() == 8 && a.GetClosed() == 3 && a.GetRefused() == "bad"
	})
	b.stop()
	b.server = agenttest.NewServer(b.authority)
	b.start("127.0.0.1:0")
	b.seen("report to the next server", func(s agenttest.Seen) bool { return s.Applied["p1"].GetPosition().GetRevision() == 8 })
}

func TestStatusSaysWhy(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.server.Refuse = func(rpc string, _ spiffe.ID) error {
		return status.Error(codes.PermissionDenied, "node vm-a is not known")
	}
	b.stop()
	b.start("127.0.0.1:0")
	v := b.view()
	stop := b.run(v)
	b.poll("an error", func() bool { return v.Status().Error != "" })
	want := b.server.Address + ": PermissionDenied: node vm-a is not known"
	if got := v.Status(); got.Error != want || got.Server != "" || got.Attempts == 0 {
		t.Errorf("status %+v, want error %q", got, want)
	}
	if link, _ := v.Link(); link != nil {
		t.Error("a link without a welcome")
	}
	stop()
}

func TestReadersNeverSeeAPart(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	topic := view.Intentions(web)
	wire := &meshpb.Topic{Kind: topic.Kind, Name: topic.Name}
	v := b.view()
	v.Subscribe([]view.Topic{topic})
	b.run(v)
	b.seen("stream", func(s agenttest.Seen) bool { return len(s.Subscriptions) == 1 })
	const last = 200
	go func() {
		for i := range last {
			n := []byte(fmt.Sprint(i + 1))
			batch := &meshpb.Batch{Position: &meshpb.Position{Generation: "g1", Revision: uint64(10 + i)}}
			if i%10 == 0 {
				batch.Reset_ = []*meshpb.Topic{wire}
			}
			for _, key := range []string{"a", "b", "c"} {
				batch.Items = append(batch.Items, &meshpb.Item{Topic: wire, Key: key, Json: n, Revision: uint64(10 + i)})
			}
			b.server.Send(&meshpb.SyncResponse{Message: &meshpb.SyncResponse_Batch{Batch: batch}})
		}
	}()
	seen := 0
	b.until(v, "last", func(s *view.Snapshot) bool {
		c := content(s, topic)
		if c["a"] != c["b"] || c["b"] != c["c"] {
			t.Fatalf("a torn snapshot: %v", c)
		}
		now := 0
		if c["a"] != "" {
			if _, err := fmt.Sscan(c["a"], &now); err != nil {
				t.Fatal(err)
			}
		}
		if now < seen {
			t.Fatalf("went back from %d to %d", seen, now)
		}
		seen = now
		return now == last
	})
}
