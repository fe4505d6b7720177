package ca_test

import (
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/ca/spiffe"
)

// outcome is what both sides of one connection saw. In TLS 1.3 the client is done before the server has judged it, so each side
// also sends and reads one byte.
type outcome struct {
	server, client           error
	serverState, clientState tls.ConnectionState
}

// handshake connects over loopback and returns when both sides are done.
func handshake(tb testing.TB, server, client *tls.Config) outcome {
	tb.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	defer func() { _ = listener.Close() }()
	var out outcome
	done := make(chan struct{})
	go func() {
		defer close(done)
		conn, err := listener.Accept()
		if err != nil {
			out.server = err
			return
		}
		tlsConn := tls.Server(conn, server)
		out.server = exchange(tlsConn)
		out.serverState = tlsConn.ConnectionState()
	}()
	conn, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		tb.Fatal(err)
	}
	tlsConn := tls.Client(conn, client)
	out.client = exchange(tlsConn)
	out.clientState = tlsConn.ConnectionState()
	<-done
	return out
}

func exchange(conn *tls.Conn) error {
	defer func() { _ = conn.Close() }()
	if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return err
	}
	if err := conn.Handshake(); err != nil {
		return err
	}
	if _, err := conn.Write([]byte{1}); err != nil {
		return err
	}
	_, err := io.ReadFull(conn, make([]byte, 1))
	return err
}

func present(leaf *ca.Leaf) func() (*tls.Certificate, error) {
	return func() (*tls.Certificate, error) { return leaf.TLS(), nil }
}

func serve(leaf *ca.Leaf) func(string) (*tls.Certificate, error) {
	return func(string) (*tls.Certificate, error) { return leaf.TLS(), nil }
}

func fixed(b ca.Bundle) func() ca.Bundle { return func() ca.Bundle { return b } }

func TestHandshake(t *testing.T) {
	ours := newAuthority(t, home)
	apiLeaf, webLeaf := ours.leaf(t, api), ours.leaf(t, web)
	const name = "http.api-1.api.default.mesh"
	var asked atomic.Value
	out := handshake(t,
		ca.ServerConfig(ca.ServerOptions{
			Leaf: func(serverName string) (*tls.Certificate, error) {
				asked.Store(serverName)
				return apiLeaf.TLS(), nil
			},
			Bundle: fixed(ours.bundle), Accept: ca.AcceptAny, ALPN: []string{"h2", "http/1.1"},
		}),
		ca.ClientConfig(ca.ClientOptions{
			Leaf: present(webLeaf), Bundle: fixed(ours.bundle), Accept: ca.Expect(api), ServerName: name, ALPN: []string{"http/1.1"},
		}))
	if out.server != nil || out.client != nil {
		t.Fatalf("server: %v; client: %v", out.server, out.client)
	}
	if asked.Load() != name {
		t.Errorf("the server was asked for %q, want %q", asked.Load(), name)
	}
	for side, row := range map[string]struct {
		state tls.ConnectionState
		want  spiffe.ID
	}{"server": {out.serverState, web}, "client": {out.clientState, api}} {
		if got, err := ca.PeerID(row.state); err != nil || got != row.want {
			t.Errorf("%s sees %q, %v; want %q", side, got, err, row.want)
		}
		if row.state.Version != tls.VersionTLS13 || row.state.NegotiatedProtocol != "http/1.1" || row.state.DidResume {
			t.Errorf("%s: version %x, protocol %q, resumed %v", side, row.state.Version, row.state.NegotiatedProtocol, row.state.DidResume)
		}
	}
}

// brokenLeaves is every certificate that a peer must not get in with, on either side.
func brokenLeaves(tb testing.TB, ours, theirs *authority, id spiffe.ID) map[string]struct {
	chain ca.Chain
	key   *ecdsa.PrivateKey
	want  error
} {
	tb.Helper()
	type broken = struct {
		chain ca.Chain
		key   *ecdsa.PrivateKey
		want  error
	}
	key := newKey(tb)
	change := func(a *authority, edit func(*x509.Certificate), want error) broken {
		template := leafTemplate(id)
		edit(template)
		return broken{a.chain(tb, template, key.Public()), key, want}
	}
	selfSigned := leafTemplate(id)
	other := spiffe.ID{TrustDomain: foreign, Kind: id.Kind, Namespace: id.Namespace, Name: id.Name}
	return map[string]broken{
		"expired": change(ours, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) }, ca.ErrExpired),
		"not yet valid": change(ours, func(c *x509.Certificate) {
			c.NotBefore = time.Now().Add(time.Minute)
		}, ca.ErrNotYetValid),
		"foreign CA mints our ID":   change(theirs, func(*x509.Certificate) {}, ca.ErrUntrusted),
		"our CA mints a foreign ID": {ours.chain(tb, leafTemplate(other), key.Public()), key, ca.ErrUntrusted},
		"two URI names": change(ours, func(c *x509.Certificate) {
			c.URIs = append(c.URIs, vm.URL())
		}, spiffe.ErrCertificate),
		"no URI name":     change(ours, func(c *x509.Certificate) { c.URIs, c.DNSNames = nil, []string{"web"} }, spiffe.ErrCertificate),
		"not our grammar": change(ours, func(c *x509.Certificate) { c.URIs[0].Path = "/ns/default/sa/web" }, spiffe.ErrInvalid),
		"CA:true":         change(ours, func(c *x509.Certificate) { c.IsCA = true }, spiffe.ErrCertificate),
		"no extended key usage": change(ours, func(c *x509.Certificate) {
			c.ExtKeyUsage = nil
		}, ca.ErrUsage),
		"another extended key usage": change(ours, func(c *x509.Certificate) {
			c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning}
		}, ca.ErrUsage),
		"any extended key usage": change(ours, func(c *x509.Certificate) {
			c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageAny}
		}, ca.ErrUsage),
		"no digital signature": change(ours, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyAgreement }, ca.ErrUsage),
		"no intermediate":      {ours.chain(tb, leafTemplate(id), key.Public())[:1], key, ca.ErrUntrusted},
		"self-signed":          {ca.Chain{issue(tb, selfSigned, selfSigned, key.Public(), key)}, key, ca.ErrUntrusted},
		"foreign root appended": {
			append(theirs.chain(tb, leafTemplate(id), key.Public()), theirs.root), key, ca.ErrUntrusted,
		},
		"signed by a leaf": func() broken {
			signer := newKey(tb)
			parent := ours.chain(tb, leafTemplate(web), signer.Public())
			return broken{append(ca.Chain{issue(tb, leafTemplate(id), parent[0], key.Public(), signer)}, parent...), key, ca.ErrUntrusted}
		}(),
	}
}

func TestHandshakeRefusesClient(t *testing.T) {
	ours, theirs := newAuthority(t, home), newAuthority(t, foreign)
	both := ours.bundle.Merge(theirs.bundle)
	apiLeaf := ours.leaf(t, api)
	for name, broken := range brokenLeaves(t, ours, theirs, web) {
		t.Run(name, func(t *testing.T) {
			cert := &tls.Certificate{Certificate: broken.chain.DER(), PrivateKey: broken.key}
			out := handshake(t,
				ca.ServerConfig(ca.ServerOptions{Leaf: serve(apiLeaf), Bundle: fixed(both), Accept: ca.AcceptAny}),
				ca.ClientConfig(ca.ClientOptions{
					Leaf: func() (*tls.Certificate, error) { return cert, nil }, Bundle: fixed(both), Accept: ca.Expect(api),
				}))
			if !errors.Is(out.server, broken.want) {
				t.Errorf("server: %v; want %v", out.server, broken.want)
			}
			if out.client == nil {
				t.Error("the client got through")
			}
		})
	}
}

func TestHandshakeRefusesServer(t *testing.T) {
	ours, theirs := newAuthority(t, home), newAuthority(t, foreign)
	both := ours.bundle.Merge(theirs.bundle)
	webLeaf := ours.leaf(t, web)
	for name, broken := range brokenLeaves(t, ours, theirs, api) {
		t.Run(name, func(t *testing.T) {
			cert := &tls.Certificate{Certificate: broken.chain.DER(), PrivateKey: broken.key}
			out := handshake(t,
				ca.ServerConfig(ca.ServerOptions{
					Leaf: func(string) (*tls.Certificate, error) { return cert, nil }, Bundle: fixed(both), Accept: ca.AcceptAny,
				}),
				ca.ClientConfig(ca.ClientOptions{Leaf: present(webLeaf), Bundle: fixed(both), Accept: ca.AcceptAny}))
			if !errors.Is(out.client, broken.want) {
				t.Errorf("client: %v; want %v", out.client, broken.want)
			}
			if out.server == nil {
				t.Error("the server got through")
			}
		})
	}
}

// Each row is a connection between correct certificates that fails all the same.
func TestHandshakeRefusesPairing(t *testing.T) {
	ours, theirs := newAuthority(t, home), newAuthority(t, foreign)
	apiLeaf, webLeaf := ours.leaf(t, api), ours.leaf(t, web)
	foreignLeaf := theirs.leaf(t, spiffe.Service(foreign, "default", "web"))
	denied := errors.New("denied by the test")
	expired := newKey(t)
	past := leafTemplate(web)
	past.NotAfter = time.Now().Add(-time.Minute)
	expiredLeaf, err := ca.NewLeaf(ours.chain(t, past, expired.Public()), expired)
	if err != nil {
		t.Fatal(err)
	}
	plainTLS := ca.ClientConfig(ca.ClientOptions{Leaf: present(webLeaf), Bundle: fixed(ours.bundle), Accept: ca.Expect(api)})
	plainTLS.MinVersion, plainTLS.MaxVersion = 0, tls.VersionTLS12
	goodServer := ca.ServerOptions{Leaf: serve(apiLeaf), Bundle: fixed(ours.bundle), Accept: ca.AcceptAny}
	goodClient := ca.ClientOptions{Leaf: present(webLeaf), Bundle: fixed(ours.bundle), Accept: ca.Expect(api)}
	server := func(edit func(*ca.ServerOptions)) *tls.Config {
		o := goodServer
		edit(&o)
		return ca.ServerConfig(o)
	}
	client := func(edit func(*ca.ClientOptions)) *tls.Config {
		o := goodClient
		edit(&o)
		return ca.ClientConfig(o)
	}
	sameServer, sameClient := ca.ServerConfig(goodServer), ca.ClientConfig(goodClient)
	for _, row := range []struct {
		name                   string
		server, client         *tls.Config
		wantServer, wantClient error // nil: any error
	}{
		{"no client certificate", sameServer, client(func(o *ca.ClientOptions) { o.Leaf = nil }), nil, nil},
		{
			"client has no certificate yet", sameServer,
			client(func(o *ca.ClientOptions) { o.Leaf = func() (*tls.Certificate, error) { return nil, ca.ErrNoLeaf } }), nil, ca.ErrNoLeaf,
		},
		{"client's own certificate expired", sameServer, client(func(o *ca.ClientOptions) { o.Leaf = present(expiredLeaf) }), nil, ca.ErrExpired},
		{"unknown trust domain", sameServer, client(func(o *ca.ClientOptions) { o.Leaf = present(foreignLeaf) }), ca.ErrUnknownTrustDomain, nil},
		{"TLS 1.2 client", sameServer, plainTLS, nil, nil},
		{"wrong expected service", sameServer, client(func(o *ca.ClientOptions) { o.Accept = ca.Expect(web) }), nil, ca.ErrUnexpectedPeer},
		{"server expected", sameServer, client(func(o *ca.ClientOptions) { o.Accept = ca.ExpectKind(home, spiffe.KindServer) }), nil, ca.ErrUnexpectedPeer},
		{"nobody expected", sameServer, client(func(o *ca.ClientOptions) { o.Accept = nil }), nil, ca.ErrUnexpectedPeer},
		{"zero identity expected", sameServer, client(func(o *ca.ClientOptions) { o.Accept = ca.Expect(spiffe.ID{}) }), nil, ca.ErrUnexpectedPeer},
		{"client without roots", sameServer, client(func(o *ca.ClientOptions) { o.Bundle = nil }), nil, ca.ErrUnknownTrustDomain},
		{"server without roots", server(func(o *ca.ServerOptions) { o.Bundle = fixed(ca.Bundle{}) }), sameClient, ca.ErrUnknownTrustDomain, nil},
		{"server accepts nobody", server(func(o *ca.ServerOptions) { o.Accept = nil }), sameClient, ca.ErrUnexpectedPeer, nil},
		{"server denies", server(func(o *ca.ServerOptions) { o.Accept = func(spiffe.ID) error { return denied } }), sameClient, denied, nil},
		{"server has no certificate", server(func(o *ca.ServerOptions) { o.Leaf = nil }), sameClient, ca.ErrNoLeaf, nil},
		{"server's own certificate expired", server(func(o *ca.ServerOptions) { o.Leaf = serve(expiredLeaf) }), sameClient, ca.ErrExpired, nil},
		{
			"no common protocol", server(func(o *ca.ServerOptions) { o.ALPN = []string{"h2"} }),
			client(func(o *ca.ClientOptions) { o.ALPN = []string{"tcp"} }), nil, nil,
		},
	} {
		t.Run(row.name, func(t *testing.T) {
			out := handshake(t, row.server, row.client)
			if out.server == nil || !errors.Is(out.server, row.wantServer) && row.wantServer != nil {
				t.Errorf("server: %v; want %v", out.server, row.wantServer)
			}
			if out.client == nil || !errors.Is(out.client, row.wantClient) && row.wantClient != nil {
				t.Errorf("client: %v; want %v", out.client, row.wantClient)
			}
		})
	}
}

func TestOptionalClientCertificate(t *testing.T) {
	ours, theirs := newAuthority(t, home), newAuthority(t, foreign)
	serverLeaf := ours.leaf(t, server)
	config := ca.ServerConfig(ca.ServerOptions{
		Leaf: serve(serverLeaf), Bundle: fixed(ours.bundle), Accept: ca.ExpectKind(home, spiffe.KindNode),
		ClientCertificate: ca.ClientCertificateOptional,
	})
	connect := func(leaf *ca.Leaf) outcome {
		o := ca.ClientOptions{Bundle: fixed(ours.bundle), Accept: ca.ExpectKind(home, spiffe.KindServer)}
		if leaf != nil {
			o.Leaf = present(leaf)
		}
		return handshake(t, config, ca.ClientConfig(o))
	}

	out := connect(nil)
	if out.server != nil || out.client != nil {
		t.Fatalf("without a certificate: server %v, client %v", out.server, out.client)
	}
	if id, err := ca.PeerID(out.serverState); !errors.Is(err, ca.ErrNoCertificate) {
		t.Errorf("without a certificate the client is %q, %v", id, err)
	}
	out = connect(ours.leaf(t, vm))
	if id, err := ca.PeerID(out.serverState); out.server != nil || err != nil || id != vm {
		t.Errorf("a node: server %v, identity %q, %v", out.server, id, err)
	}
	if out := connect(ours.leaf(t, web)); !errors.Is(out.server, ca.ErrUnexpectedPeer) {
		t.Errorf("a service: server %v, want ErrUnexpectedPeer", out.server)
	}
	if out := connect(theirs.leaf(t, vm)); !errors.Is(out.server, ca.ErrUntrusted) {
		t.Errorf("a node from another CA: server %v, want ErrUntrusted", out.server)
	}
}

// Leaves and roots change under a running listener, and nothing of an earlier handshake is used again.
func TestSwapWithoutResumption(t *testing.T) {
	before, after := newAuthority(t, home), newAuthority(t, home)
	var bundle atomic.Pointer[ca.Bundle]
	var leaf atomic.Pointer[ca.Leaf]
	bundle.Store(&before.bundle)
	leaf.Store(before.leaf(t, api))
	serverConfig := ca.ServerConfig(ca.ServerOptions{
		Leaf: func(string) (*tls.Certificate, error) { return leaf.Load().TLS(), nil }, Bundle: func() ca.Bundle { return *bundle.Load() }, Accept: ca.AcceptAny,
	})
	var clientLeaf atomic.Pointer[ca.Leaf]
	clientLeaf.Store(before.leaf(t, web))
	clientConfig := ca.ClientConfig(ca.ClientOptions{
		Leaf: func() (*tls.Certificate, error) { return clientLeaf.Load().TLS(), nil }, Bundle: func() ca.Bundle { return *bundle.Load() },
		Accept: ca.Expect(api), ServerName: "api",
	})
	// Even a cache that someone adds is not used: the server gives no tickets.
	clientConfig.ClientSessionCache = tls.NewLRUClientSessionCache(8)
	for range 2 {
		if out := handshake(t, serverConfig, clientConfig); out.server != nil || out.client != nil || out.clientState.DidResume || out.serverState.DidResume {
			t.Fatalf("server %v, client %v, resumed %v", out.server, out.client, out.clientState.DidResume)
		}
	}
	bundle.Store(&after.bundle)
	leaf.Store(after.leaf(t, api))
	if out := handshake(t, serverConfig, clientConfig); !errors.Is(out.server, ca.ErrUntrusted) {
		t.Errorf("a client of removed roots: server %v, want ErrUntrusted", out.server)
	}
	clientLeaf.Store(after.leaf(t, web))
	if out := handshake(t, serverConfig, clientConfig); out.server != nil || out.client != nil {
		t.Errorf("after the swap: server %v, client %v", out.server, out.client)
	}
}

// A client that does not verify on resumption would be fooled by a server that resumes; ours verifies each time.
func TestResumedConnectionIsVerified(t *testing.T) {
	ours := newAuthority(t, home)
	apiLeaf := ours.leaf(t, api)
	tickets := &tls.Config{
		MinVersion: tls.VersionTLS13, GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return apiLeaf.TLS(), nil },
	}
	var expected atomic.Pointer[spiffe.ID]
	expected.Store(&api)
	client := ca.ClientConfig(ca.ClientOptions{
		Bundle: fixed(ours.bundle), Accept: func(id spiffe.ID) error { return ca.Expect(*expected.Load())(id) }, ServerName: "api",
	})
	client.ClientSessionCache, client.SessionTicketsDisabled = tls.NewLRUClientSessionCache(8), false
	for i := range 2 {
		out := handshake(t, tickets, client)
		if out.server != nil || out.client != nil || out.clientState.DidResume != (i == 1) {
			t.Fatalf("connection %d: server %v, client %v, resumed %v", i+1, out.server, out.client, out.clientState.DidResume)
		}
	}
	expected.Store(&web)
	if out := handshake(t, tickets, client); !errors.Is(out.client, ca.ErrUnexpectedPeer) {
		t.Errorf("resumed with another expectation: client %v, want ErrUnexpectedPeer", out.client)
	}
}

func TestPinned(t *testing.T) {
	ours, theirs := newAuthority(t, home), newAuthority(t, home)
	serverLeaf := ours.leaf(t, server)
	listen := func(cert *tls.Certificate) *tls.Config {
		return ca.ServerConfig(ca.ServerOptions{
			Leaf: func(string) (*tls.Certificate, error) { return cert, nil }, Bundle: fixed(ours.bundle), Accept: ca.AcceptAny,
			ClientCertificate: ca.ClientCertificateOptional, ALPN: []string{"h2"},
		})
	}
	pin := ours.bundle.Hash(home)
	rotating := ours.bundle.Merge(theirs.bundle)
	out := handshake(t, listen(serverLeaf.TLSWithRoots(ours.bundle)), ca.PinnedConfig(pin, "", []string{"h2"}))
	if out.server != nil || out.client != nil {
		t.Fatalf("server %v, client %v", out.server, out.client)
	}
	if id, err := ca.PeerID(out.clientState); err != nil || id != server {
		t.Errorf("the client sees %q, %v; want %q", id, err, server)
	}
	if out := handshake(t, listen(serverLeaf.TLSWithRoots(rotating)), ca.PinnedConfig(rotating.Hash(home), "", nil)); out.client != nil {
		t.Errorf("two roots: client %v", out.client)
	}
	// An impostor's own CA, whose chain also carries the pinned root.
	impostor := theirs.leaf(t, server)
	mixed := impostor.TLSWithRoots(ours.bundle)
	for _, row := range []struct {
		name   string
		config *tls.Config
		pin    ca.Hash
		want   error
	}{
		{"zero pin", listen(serverLeaf.TLSWithRoots(ours.bundle)), ca.Hash{}, ca.ErrUntrusted},
		{"other pin", listen(serverLeaf.TLSWithRoots(ours.bundle)), theirs.bundle.Hash(home), ca.ErrUntrusted},
		{"roots not presented", listen(serverLeaf.TLS()), pin, ca.ErrUntrusted},
		{"one root more than pinned", listen(serverLeaf.TLSWithRoots(rotating)), pin, ca.ErrUntrusted},
		{"other CA", listen(impostor.TLSWithRoots(theirs.bundle)), pin, ca.ErrUntrusted},
		{"other CA beside the pinned root", listen(mixed), pin, ca.ErrUntrusted},
		{"not a server", listen(ours.leaf(t, vm).TLSWithRoots(ours.bundle)), pin, ca.ErrUnexpectedPeer},
	} {
		if out := handshake(t, row.config, ca.PinnedConfig(row.pin, "", nil)); !errors.Is(out.client, row.want) {
			t.Errorf("%s: client %v, want %v", row.name, out.client, row.want)
		}
	}
}

func BenchmarkHandshake(b *testing.B) {
	ours := newAuthority(b, home)
	server := ca.ServerConfig(ca.ServerOptions{Leaf: serve(ours.leaf(b, api)), Bundle: fixed(ours.bundle), Accept: ca.AcceptAny})
	client := ca.ClientConfig(ca.ClientOptions{Leaf: present(ours.leaf(b, web)), Bundle: fixed(ours.bundle), Accept: ca.Expect(api)})
	b.ReportAllocs()
	for b.Loop() {
		if out := handshake(b, server, client); out.server != nil || out.client != nil {
			b.Fatal(out.server, out.client)
		}
	}
}
