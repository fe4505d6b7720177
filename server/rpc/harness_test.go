package rpc_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"encoding/json"
	"log/slog"
	"net"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/ca/builtin"
	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/intentions"
	"github.com/meshd/meshd/server/acl"
	"github.com/meshd/meshd/server/meshpb"
	"github.com/meshd/meshd/server/rpc"
	"github.com/meshd/meshd/server/state"
	"github.com/meshd/meshd/server/store"
)

const trustDomain = "mesh.test"

// authority is a real CA.
type authority struct {
	*builtin.Authority
}

func (a authority) Bundle() ca.Bundle {
	bundle, err := a.Roots(context.Background())
	if err != nil {
		return ca.Bundle{}
	}
	return bundle
}

func newAuthority(tb testing.TB) authority {
	tb.Helper()
	return newAuthorityWith(tb, builtin.Config{})
}

func newAuthorityWith(tb testing.TB, config builtin.Config) authority {
	tb.Helper()
	key := ca.GenerateClusterKey()
	made, err := builtin.Create(key, trustDomain, time.Now())
	if err != nil {
		tb.Fatal(err)
	}
	opened, err := builtin.Open(made, key, config)
	if err != nil {
		tb.Fatal(err)
	}
	return authority{opened}
}

// cluster is a server with its state, without a network.
type cluster struct {
	tb        testing.TB
	engine    *store.Memory
	state     *state.State
	rpc       *rpc.Server
	authority authority
	address   string
}

// start runs a server on an in-memory store until the end of the test.
func start(tb testing.TB, config rpc.Config) *cluster {
	tb.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	c, wait := startIn(ctx, tb, config, store.NewMemory(), newAuthority(tb))
	tb.Cleanup(func() {
		cancel()
		wait()
	})
	return c
}

// startIn runs a server on a store until ctx ends; wait returns when it has ended.
func startIn(ctx context.Context, tb testing.TB, config rpc.Config, engine *store.Memory, a authority) (c *cluster, wait func()) {
	tb.Helper()
	config.Server, config.TrustDomain = "server-1", trustDomain
	log := slog.New(slog.DiscardHandler)
	st := state.New(engine, log)
	c = &cluster{tb: tb, engine: engine, state: st, authority: a, rpc: rpc.New(config, st, a, log)}
	done := make(chan error, 2)
	go func() { done <- st.Run(ctx) }()
	go func() { done <- c.rpc.Run(ctx) }()
	<-st.Ready()
	c.update(func(tx *state.Tx) error { //nolint:contextcheck // ctx is the server's life
		return state.Namespaces.Put(tx, catalog.DefaultNamespace, catalog.Namespace{Name: catalog.DefaultNamespace})
	})
	return c, func() {
		for range 2 {
			if err := <-done; err != nil {
				tb.Errorf("Run: %v", err)
			}
		}
	}
}

// listen serves the cluster over TLS on loopback.
func (c *cluster) listen() {
	c.tb.Helper()
	server := newIdentity(c.tb)
	chain, err := c.authority.Sign(context.Background(), ca.SignRequest{PublicKey: server.key.Public(), ID: spiffe.Server(trustDomain, "server-1")})
	if err != nil {
		c.tb.Fatal(err)
	}
	leaf, err := ca.NewLeaf(chain, server.key)
	if err != nil {
		c.tb.Fatal(err)
	}
	config := ca.ServerConfig(ca.ServerOptions{
		Leaf:   func(string) (*tls.Certificate, error) { return leaf.TLSWithRoots(c.authority.Bundle()), nil },
		Bundle: c.authority.Bundle, Accept: ca.AcceptAny, ClientCertificate: ca.ClientCertificateOptional, ALPN: []string{"h2"},
	})
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		c.tb.Fatal(err)
	}
	g := grpc.NewServer(grpc.Creds(credentials.NewTLS(config)))
	c.rpc.Attach(g)
	done := make(chan error, 1)
	go func() { done <- g.Serve(listener) }()
	c.tb.Cleanup(func() {
		g.Stop()
		if err := <-done; err != nil {
			c.tb.Errorf("Serve: %v", err)
		}
	})
	c.address = listener.Addr().String()
}

// dial returns a client that presents leaf, or nothing if it is nil.
func (c *cluster) dial(leaf *ca.Leaf) meshpb.MeshClient {
	c.tb.Helper()
	options := ca.ClientOptions{
		Bundle: c.authority.Bundle, Accept: ca.ExpectKind(trustDomain, spiffe.KindServer), ServerName: meshpb.ServerName, ALPN: []string{"h2"},
	}
	if leaf != nil {
		options.Leaf = func() (*tls.Certificate, error) { return leaf.TLS(), nil }
	}
	conn, err := grpc.NewClient("passthrough:///"+c.address, grpc.WithTransportCredentials(credentials.NewTLS(ca.ClientConfig(options))))
	if err != nil {
		c.tb.Fatal(err)
	}
	c.tb.Cleanup(func() { _ = conn.Close() })
	return meshpb.NewMeshClient(conn)
}

func (c *cluster) update(fn func(*state.Tx) error) catalog.Position {
	c.tb.Helper()
	at, err := c.state.Update(context.Background(), fn)
	if err != nil {
		c.tb.Fatalf("Update: %v", err)
	}
	return at
}

func (c *cluster) intention(source, destination string, action intentions.Action) catalog.Position {
	c.tb.Helper()
	value := intentions.Intention{Source: source, Destination: destination, Action: action}
	key, err := value.Key()
	if err != nil {
		c.tb.Fatal(err)
	}
	return c.update(func(tx *state.Tx) error { return state.Intentions.Put(tx, key, value) })
}

// identity is a key pair and its request.
type identity struct {
	key *ecdsa.PrivateKey
	csr []byte
}

func newIdentity(tb testing.TB) identity {
	tb.Helper()
	key, err := ca.GenerateKey()
	if err != nil {
		tb.Fatal(err)
	}
	csr, err := ca.NewCSR(key)
	if err != nil {
		tb.Fatal(err)
	}
	return identity{key: key, csr: csr}
}

func (i identity) leaf(tb testing.TB, der [][]byte) *ca.Leaf {
	tb.Helper()
	chain, err := ca.ParseChain(der)
	if err != nil {
		tb.Fatal(err)
	}
	leaf, err := ca.NewLeaf(chain, i.key)
	if err != nil {
		tb.Fatal(err)
	}
	return leaf
}

// token stores a join token and returns its secret.
func (c *cluster) token(node string, replace bool, services ...string) []byte {
	c.tb.Helper()
	record, secret, err := acl.NewJoinToken(node, services, 0, replace, time.Now())
	if err != nil {
		c.tb.Fatal(err)
	}
	c.update(func(tx *state.Tx) error { return state.JoinTokens.Put(tx, acl.Hash(secret), record) })
	return secret
}

// join admits a node and returns its certificate.
func (c *cluster) join(node string, services ...string) *ca.Leaf {
	c.tb.Helper()
	who := newIdentity(c.tb)
	res, err := c.rpc.Join(context.Background(), &meshpb.JoinRequest{Secret: c.token(node, false, services...), Csr: who.csr, Node: node, Version: "test"})
	if err != nil {
		c.tb.Fatalf("Join: %v", err)
	}
	return who.leaf(c.tb, res.GetChain())
}

// definition returns what an agent registers for one service block.
func definition(tb testing.TB, node string, d catalog.Definition, health catalog.Health) *meshpb.Registration {
	tb.Helper()
	return &meshpb.Registration{
		Service:  encode(tb, d.Service()),
		Instance: encode(tb, d.Instance(node, "10.0.0.1:7443")),
		Status:   encode(tb, catalog.InstanceStatus{Health: health}),
	}
}

func encode(tb testing.TB, v any) []byte {
	tb.Helper()
	raw, err := json.Marshal(v)
	if err != nil {
		tb.Fatal(err)
	}
	return raw
}

func web(id string) catalog.Definition {
	return catalog.Definition{Name: "web", ID: id, Port: 8080, Protocol: catalog.ProtocolHTTP}
}

func api(id string) catalog.Definition {
	return catalog.Definition{Name: "api", ID: id, Port: 8080, Protocol: catalog.ProtocolHTTP}
}

func register(tb testing.TB, client registrar, registrations ...*meshpb.Registration) *meshpb.RegisterResponse {
	tb.Helper()
	res, err := client.Register(context.Background(), &meshpb.RegisterRequest{Registrations: registrations})
	if err != nil {
		tb.Fatalf("Register: %v", err)
	}
	return res
}

// registrar is what register needs of a client.
type registrar interface {
	Register(ctx context.Context, in *meshpb.RegisterRequest, opts ...grpc.CallOption) (*meshpb.RegisterResponse, error)
}
