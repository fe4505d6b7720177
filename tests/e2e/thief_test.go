package e2e_test

import (
	"context"
	"crypto/tls"
	"log/slog"
	"net"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/meshd/meshd/agent/leaf"
	"github.com/meshd/meshd/agent/statedir"
	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/server/meshpb"
)

// identity reads the certificate and key of the host's node from its disk, as
// root on that host can.
func (m *member) identity() *ca.Leaf {
	m.T.Helper()
	root, err := statedir.Open(m.Path("agent"))
	if err != nil {
		m.T.Fatal(err)
	}
	dir, err := root.Sub("leaves")
	if err != nil {
		m.T.Fatal(err)
	}
	held := leaf.New(leaf.Config{Log: slog.New(slog.DiscardHandler), Dir: dir})
	if err := held.Load(); err != nil {
		m.T.Fatal(err)
	}
	node := held.Leaf(spiffe.Node("mesh.example.com", m.Name))
	if node == nil {
		m.T.Fatalf("no certificate of node %s in %s", m.Name, dir.Path(""))
	}
	return node
}

// TestStolenNodeKey: whoever has all the files of vm-a gets no leaf of api,
// registers no api and sees no policy of api, and cannot speak for vm-b.
func TestStolenNodeKey(t *testing.T) {
	t.Parallel()
	s := newSpine(t)
	s.allowed()
	node := s.web.identity()
	creds := credentials.NewTLS(&tls.Config{
		InsecureSkipVerify: true,
		ServerName:         meshpb.ServerName, MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"},
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return node.TLS(), nil },
	})
	conn, err := grpc.NewClient("passthrough:///"+s.server.Address+":7400", grpc.WithTransportCredentials(creds),
		grpc.WithContextDialer(func(_ context.Context, addr string) (net.Conn, error) { return s.web.Dial(addr) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	mesh := meshpb.NewMeshClient(conn)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	key, err := ca.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	csr, err := ca.NewCSR(key)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		id   string
		want codes.Code
	}{
		{"spiffe://mesh.example.com/ns/default/svc/web", codes.OK}, // the key itself is good
		{"spiffe://mesh.example.com/ns/default/svc/api", codes.PermissionDenied},
		{"spiffe://mesh.example.com/node/vm-b", codes.PermissionDenied},
		{"spiffe://mesh.example.com/server/vm", codes.PermissionDenied},
		{"spiffe://other.example/ns/default/svc/web", codes.PermissionDenied},
	} {
		_, err := mesh.Sign(ctx, &meshpb.SignRequest{Id: c.id, Csr: csr})
		if got := status.Code(err); got != c.want {
			t.Errorf("sign %s: %v, want %v", c.id, err, c.want)
		}
	}
	registered, err := mesh.Register(ctx, &meshpb.RegisterRequest{Registrations: []*meshpb.Registration{{
		Service:  []byte(`{"name":"api","ports":[{"name":"default","protocol":"http"}]}`),
		Instance: []byte(`{"namespace":"default","service":"api","id":"thief","node":"vm-b","mesh_address":"` + s.web.Address + `:7443","ports":[{"name":"default","port":8080}]}`),
		Status:   []byte(`{"health":"passing"}`),
	}}})
	if err == nil && len(registered.GetRefusals()) == 0 {
		t.Error("vm-a registered an instance of api")
	}
	if r := s.meshctl(0, "instances", "api", "-o", "json"); strings.Contains(r.Stdout, "thief") {
		t.Errorf("the instances of api: %s", r.Stdout)
	}
	stream, err := mesh.Sync(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range []*meshpb.SyncRequest{
		{Message: &meshpb.SyncRequest_Hello{Hello: &meshpb.Hello{Session: "thief", FeatureLevel: 1}}},
		{Message: &meshpb.SyncRequest_Subscribe{Subscribe: &meshpb.Subscribe{Topics: []*meshpb.Topic{
			{Kind: "intentions", Name: "default/api"}, {Kind: "upstream", Name: "default/api", Source: "default/api"}, {Kind: "node", Name: "vm-b"}, {Kind: "roots"},
		}}}},
	} {
		if err := stream.Send(m); err != nil {
			t.Fatal(err)
		}
	}
	for rooted := false; !rooted; {
		m, err := stream.Recv()
		if err != nil {
			t.Fatalf("the stream ended before the roots came: %v", err)
		}
		for _, item := range m.GetBatch().GetItems() {
			switch item.GetTopic().GetKind() {
			case "roots":
				rooted = true
			case "node":
				if strings.Contains(string(item.GetJson()), "vm-b") {
					t.Errorf("vm-a was told of vm-b: %s", item.GetJson())
				}
			default:
				t.Errorf("vm-a was told %s %s", item.GetTopic(), item.GetJson())
			}
		}
	}
}
