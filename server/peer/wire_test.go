package peer_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"golang.org/x/sys/unix"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/ca/builtin"
	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/server/peer"
	"github.com/meshd/meshd/server/store"
)

// pair is two servers of one cluster.
func pair(t *testing.T, first, second setup) (a, b *host) {
	t.Helper()
	w, key := newWorld(), ca.GenerateClusterKey()
	all, addresses := listeners(t, 2)
	for i, s := range []*setup{&first, &second} {
		s.name, s.key, s.expect, s.join, s.listener = fmt.Sprintf("srv-%d", i+1), key, 2, addresses, all[i]
	}
	a, b = start(t, w, first), start(t, w, second)
	a.awaitMember(t)
	b.awaitMember(t)
	return a, b
}

func TestForward(t *testing.T) {
	a, b := pair(t, setup{}, setup{})
	hang := make(chan struct{})
	entered := make(chan struct{}, 1)
	a.cluster.serve = func(ctx context.Context, request []byte) ([]byte, error) {
		switch string(request) {
		case "write":
			return []byte("written"), nil
		case "follower":
			return nil, fmt.Errorf("not here: %w", store.ErrNoLeader)
		case "hang":
			entered <- struct{}{}
			select {
			case <-hang:
			case <-ctx.Done():
			}
			return nil, ctx.Err()
		default:
			return nil, fmt.Errorf("%w, it was wrapped: %w", store.ErrUnknownOutcome, store.ErrNoLeader)
		}
	}
	reply, err := b.Forward(t.Context(), a.id, a.address, []byte("write"))
	if err != nil || string(reply) != "written" {
		t.Errorf("forward: %q, %v", reply, err)
	}
	if _, err := b.Forward(t.Context(), a.id, a.address, []byte("follower")); !errors.Is(err, store.ErrNoLeader) {
		t.Errorf("to one that does not lead: %v", err)
	}
	if _, err := b.Forward(t.Context(), a.id, a.address, []byte("doubt")); err == nil || errors.Is(err, store.ErrNoLeader) {
		t.Errorf("an unknown outcome: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		<-entered
		cancel()
	}()
	if _, err := b.Forward(ctx, a.id, a.address, []byte("hang")); !errors.Is(err, context.Canceled) || errors.Is(err, store.ErrNoLeader) {
		t.Errorf("given up: %v", err)
	}
	ended, end := context.WithCancel(t.Context())
	end()
	if _, err := b.Forward(ended, a.id, a.address, []byte("write")); !errors.Is(err, context.Canceled) {
		t.Errorf("given up before: %v", err)
	}

	failed := make(chan error, 1)
	go func() {
		_, err := b.Forward(t.Context(), a.id, a.address, []byte("hang"))
		failed <- err
	}()
	<-entered
	a.stop() // as if it had died
	if err := <-failed; err == nil || errors.Is(err, store.ErrNoLeader) {
		t.Errorf("the leader died with the request: %v; the outcome is not known", err)
	}
	if _, err := b.Forward(t.Context(), a.id, a.address, []byte("write")); !errors.Is(err, store.ErrNoLeader) || !strings.Contains(err.Error(), "refused") {
		t.Errorf("to a dead leader: %v", err)
	}

	// It comes back, at the same address.
	again := listenAt(t, a.address)
	back := start(t, a.cluster.world, setup{name: "srv-1", key: a.key, expect: 2, listener: again})
	back.cluster.restore(b.cluster)
	back.cluster.serve = func(context.Context, []byte) ([]byte, error) { return []byte("again"), nil }
	reply, err = b.Forward(t.Context(), a.id, a.address, []byte("write"))
	for deadline := time.Now().Add(15 * time.Second); errors.Is(err, store.ErrNoLeader) && time.Now().Before(deadline); {
		reply, err = b.Forward(t.Context(), a.id, a.address, []byte("write")) // a busy machine takes longer than one call waits
	}
	if err != nil || string(reply) != "again" {
		t.Errorf("to a leader that has come back: %q, %v", reply, err)
	}
	b.stop()
	if _, err := b.Forward(t.Context(), a.id, a.address, nil); !errors.Is(err, store.ErrNoLeader) {
		t.Errorf("after the end: %v", err)
	}
}

// TestDrain has a leader that stops while it is at a request: who has forwarded it
// is told what became of it.
func TestDrain(t *testing.T) {
	a, b := pair(t, setup{}, setup{})
	entered, finish := make(chan struct{}), make(chan struct{})
	a.cluster.serve = func(context.Context, []byte) ([]byte, error) {
		close(entered)
		<-finish
		return []byte("written"), nil
	}
	type result struct {
		reply []byte
		err   error
	}
	answered := make(chan result, 1)
	go func() {
		reply, err := b.Forward(t.Context(), a.id, a.address, []byte("write"))
		answered <- result{reply, err}
	}()
	<-entered
	stopped := make(chan struct{})
	go func() {
		a.stop()
		close(stopped)
	}()
	until(t, "the port is closed", func() bool {
		conn, err := net.Dial("tcp", a.address)
		if err == nil {
			_ = conn.Close()
		}
		return err != nil
	})
	close(finish)
	if got := <-answered; got.err != nil || string(got.reply) != "written" {
		t.Errorf("a write that was under way: %q, %v", got.reply, got.err)
	}
	<-stopped
}

// TestPortFails has a port that breaks: Run says so.
func TestPortFails(t *testing.T) {
	admission, err := ca.NewAdmission(ca.GenerateClusterKey(), trustDomain, "srv-1")
	if err != nil {
		t.Fatal(err)
	}
	port := listen(t)
	p, err := peer.New(peer.Config{
		Admission: admission, ID: "srv-1.00000001", Listener: port, Advertise: port.Addr().String(), Dir: t.TempDir(), Expect: 3,
	}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Status(t.Context()); !errors.Is(err, peer.ErrNotRunning) {
		t.Errorf("asked before it runs: %v", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- p.Run(t.Context(), newWorld().stand("srv-1.00000001"), peer.Local{}) }()
	if err := port.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; !errors.Is(err, net.ErrClosed) {
		t.Errorf("it ends with %v", err)
	}
}

// TestQuestions asks all servers; those that fail are named.
func TestQuestions(t *testing.T) {
	local := func(name string) peer.Local {
		return peer.Local{
			Status: func() peer.Status { return peer.Status{Version: name, Agents: 3} },
			Ask: func(ctx context.Context, query []byte, emit func([]byte) error) error {
				for i := range 3 {
					if err := emit(fmt.Appendf(nil, "%s %s %d", name, query, i)); err != nil {
						return err
					}
				}
				if string(query) == "broken" {
					return errors.New("no hosts")
				}
				return nil
			},
			Fleet: func(_ context.Context, query []byte) ([]byte, error) { return append([]byte(name+" "), query...), nil },
		}
	}
	a, b := pair(t, setup{local: local("one")}, setup{local: local("two")})
	status, err := a.Status(t.Context())
	if err != nil || len(status) != 2 || status[0].Err != nil || status[1].Err != nil || status[0].Value.Version+status[1].Value.Version != "onetwo" {
		t.Errorf("status: %+v, %v", status, err)
	}
	second := peer.Server{ID: b.id, Address: b.address}
	fleet, err := a.Fleet(t.Context(), second, []byte("proxies"))
	if err != nil || string(fleet) != "two proxies" {
		t.Errorf("fleet: %s, %v", fleet, err)
	}
	ask := func(query string, emit func(string) error) (said []string, err error) {
		err = a.Ask(t.Context(), second, []byte(query), func(answer []byte) error {
			said = append(said, string(answer))
			return emit(string(answer))
		})
		return said, err
	}
	said, err := ask("tap", func(string) error { return nil })
	if err != nil || len(said) != 3 || said[2] != "two tap 2" {
		t.Errorf("ask: %v, %v", said, err)
	}
	said, err = ask("broken", func(string) error { return nil })
	if err == nil || !strings.Contains(err.Error(), "no hosts") || len(said) != 3 {
		t.Errorf("a server that fails in the middle: %v, %v", said, err)
	}
	full := errors.New("enough")
	said, err = ask("tap", func(string) error { return full })
	if !errors.Is(err, full) || len(said) != 1 {
		t.Errorf("emit that fails: %v, %v", said, err)
	}

	b.stop()
	began := time.Now()
	status, err = a.Status(t.Context())
	if err != nil || len(status) != 2 || status[0].Err != nil || status[1].Err == nil {
		t.Errorf("status without the second: %+v, %v", status, err)
	}
	if fleet, err := a.Fleet(t.Context(), second, nil); err == nil {
		t.Errorf("fleet without the second: %s", fleet)
	}
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("it took %s to learn that a server is dead", took)
	}
}

// TestStrangers has others at the port: another cluster's server, certificates of
// the mesh, plain text, and another server than the one that is meant.
func TestStrangers(t *testing.T) {
	w, key := newWorld(), ca.GenerateClusterKey()
	h := start(t, w, setup{name: "srv-1", key: key, expect: 3})
	other := start(t, newWorld(), setup{name: "srv-2", key: ca.GenerateClusterKey(), expect: 3, join: []string{h.address}})
	until(t, "the stranger says why", func() bool { return strings.Contains(other.Waiting(), "cluster_key_file is another one") })
	until(t, "and the server says so too", func() bool {
		return strings.Contains(h.logs.String(), "is its cluster_key_file or trust_domain another one?")
	})

	admission, err := ca.NewAdmission(key, trustDomain, "srv-9")
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range []spiffe.ID{spiffe.Node(trustDomain, "vm-a"), spiffe.Service(trustDomain, "default", "web"), spiffe.Server(trustDomain, "srv-2")} {
		for _, alpn := range []string{ca.ALPNRaft, ca.ALPNPeer} {
			leaf := issue(t, key, id)
			config := admission.ClientConfig("srv-1", alpn)
			config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return leaf, nil }
			conn, err := tls.Dial("tcp", h.address, config)
			if err == nil { // TLS 1.3: the verdict comes after the client's handshake
				_, err = conn.Read(make([]byte, 1))
				_ = conn.Close()
			}
			if err == nil || !strings.Contains(err.Error(), "tls: ") {
				t.Errorf("%s with %s: %v", id, alpn, err)
			}
		}
		want := id.String() + " is no server of " + trustDomain
		if id.Kind == spiffe.KindServer {
			want = id.String() + " was not admitted by our cluster key"
		}
		if !strings.Contains(h.logs.String(), want) {
			t.Errorf("it is not logged that %s", want)
		}
	}
	conn, err := net.Dial("tcp", h.address)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Write([]byte("GET / HTTP/1.1\r\n\r\n")); err != nil {
		t.Error(err)
	}
	if _, err := io.Copy(io.Discard, conn); err != nil {
		t.Logf("plain text ends with %v", err)
	}
	_ = conn.Close()
	if got := strings.Count(h.logs.String(), "is no server of"); got != 2 {
		t.Errorf("two strangers are logged in %d lines; each says the same several times:\n%s", got, h.logs)
	}
}

// TestSlowStrangers has connections that never finish their handshake: the port
// stays open for servers.
func TestSlowStrangers(t *testing.T) {
	w, key := newWorld(), ca.GenerateClusterKey()
	h := start(t, w, setup{name: "srv-1", key: key, expect: 2})
	for range 200 {
		conn, err := net.Dial("tcp", h.address)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = conn.Close() }()
	}
	began := time.Now()
	start(t, w, setup{name: "srv-2", key: key, expect: 2, join: []string{h.address}}).awaitMember(t)
	if took := time.Since(began); took > 3*time.Second {
		t.Errorf("it took %s to get past them", took)
	}
}

// issue returns a certificate of the mesh's own CA, wrapped under the same cluster
// key.
func issue(t *testing.T, key ca.ClusterKey, id spiffe.ID) *tls.Certificate {
	t.Helper()
	state, err := builtin.Create(key, trustDomain, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	authority, err := builtin.Open(state, key, builtin.Config{})
	if err != nil {
		t.Fatal(err)
	}
	private, err := ca.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	chain, err := authority.Sign(t.Context(), ca.SignRequest{PublicKey: private.Public(), ID: id})
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := ca.NewLeaf(chain, private)
	if err != nil {
		t.Fatal(err)
	}
	return leaf.TLS()
}

// TestRaftStreamSaysWho connects for Raft: to the instance that is meant, and to
// one that has lost its state.
func TestRaftStreamSaysWho(t *testing.T) {
	a, b := pair(t, setup{}, setup{})
	for _, h := range []*host{a, b} {
		transport := h.Transport()
		closer, ok := transport.(raft.WithClose)
		if !ok {
			t.Fatal("Raft can't close its transport")
		}
		t.Cleanup(func() { _ = closer.Close() })
	}
	go func() {
		for {
			select {
			case rpc := <-b.Transport().Consumer():
				rpc.Respond(&raft.RequestPreVoteResponse{Term: 7, Granted: true}, nil)
			case <-t.Context().Done():
				return
			}
		}
	}()
	voter, ok := a.Transport().(raft.WithPreVote)
	if !ok {
		t.Fatal("the transport has no pre-vote")
	}
	for _, test := range []struct {
		id   string
		want error
	}{
		{b.id, nil},
		{"srv-2.ffffffff", peer.ErrOtherServer},
		{"srv-2", peer.ErrOtherServer},
		{"srv-3.00000001", ca.ErrUnexpectedPeer},
		{b.id, nil},
	} {
		var reply raft.RequestPreVoteResponse
		err := voter.RequestPreVote(raft.ServerID(test.id), raft.ServerAddress(b.address), &raft.RequestPreVoteRequest{Term: 7}, &reply)
		if !errors.Is(err, test.want) || (test.want == nil) != (err == nil) || reply.Granted != (err == nil) {
			t.Errorf("to %s: %v, %+v; want %v", test.id, err, reply, test.want)
		}
	}
	if got := string(a.Transport().LocalAddr()); got != a.address {
		t.Errorf("the transport is at %s", got)
	}
}

func FuzzReadGreeting(f *testing.F) {
	f.Add(peer.AppendGreeting(nil, "srv-1.0000abcd"))
	f.Add([]byte{1, 0})
	f.Add([]byte{2, 5, 'a'})
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(b)
		id, err := peer.ReadGreeting(r)
		if err != nil {
			return
		}
		if err := peer.CheckID(id); err != nil {
			t.Errorf("%q was taken: %v", id, err)
		}
		if again := peer.AppendGreeting(nil, id); !bytes.Equal(again, b[:len(b)-r.Len()]) {
			t.Errorf("%q was read as %q", b, id)
		}
	})
}

func FuzzParsePromise(f *testing.F) {
	f.Add([]byte(`{"last":3,"founder":"a.1","attempt":3,"servers":[{"ID":"a.1","Address":"10.0.0.1:7401"},{"ID":"b","Address":"10.0.0.2:7401"}],"complete":true}`))
	f.Add([]byte(`{"joining":["a"]}`))
	f.Add([]byte(`{"founder":"b","servers":[{"ID":"a"}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := peer.ParsePromise(b)
		if err == nil && p.Founder != "" && (len(p.Servers) == 0 || p.Servers[0].ID != p.Founder) {
			t.Errorf("%s was taken", b)
		}
	})
}

// TestLostPacketsAreRepeated reads back what the kernel was told about a connection.
// What that is worth is measured by the fault suite, with every third packet lost.
func TestLostPacketsAreRepeated(t *testing.T) {
	listener := listen(t)
	defer func() { _ = listener.Close() }()
	for _, before := range []string{"", "bbr", "reno"} {
		var d net.Dialer
		conn, err := d.DialContext(t.Context(), "tcp", listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		tcp, ok := conn.(*net.TCPConn)
		if !ok {
			t.Fatalf("%T is no TCP connection", conn)
		}
		raw, err := tcp.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		if err := raw.Control(func(fd uintptr) {
			if before != "" {
				_ = unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION, before) // this machine may not have it
			}
		}); err != nil {
			t.Fatal(err)
		}
		peer.Watchful(conn)
		if err := raw.Control(func(fd uintptr) {
			for option, want := range map[int]int{unix.TCP_USER_TIMEOUT: 2000, unix.TCP_THIN_LINEAR_TIMEOUTS: 1, unix.TCP_NODELAY: 1} {
				if got, err := unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, option); err != nil || got != want {
					t.Errorf("after %q, option %d is %d, %v; want %d", before, option, got, err, want)
				}
			}
			control, err := unix.GetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION)
			if err != nil || strings.HasPrefix(control, "bbr") || before == "reno" && control != "reno" {
				t.Errorf("after %q, the congestion control is %q, %v", before, control, err)
			}
		}); err != nil {
			t.Fatal(err)
		}
		_ = conn.Close() // the test is over
	}
}
