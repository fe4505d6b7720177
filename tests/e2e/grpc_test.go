package e2e_test

import (
	"context"
	"fmt"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/reflection"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
)

const grpcNginx = `
daemon off;
worker_processes 1;
pid %[1]s/grpc.pid;
error_log %[1]s/grpc.error.log;
events { worker_connections 1024; }
http {
  access_log off;
  client_body_temp_path %[1]s/grpc-body;
  proxy_temp_path %[1]s/grpc-proxy;
  fastcgi_temp_path %[1]s/grpc-fastcgi;
  uwsgi_temp_path %[1]s/grpc-uwsgi;
  scgi_temp_path %[1]s/grpc-scgi;
  server {
    listen 127.0.0.1:9802 http2;
    location / { grpc_pass grpc://127.0.0.1:9801; grpc_read_timeout 60s; }
  }
}
`

// TestGRPCPeers: grpc-go, its health service and reflection, and nginx's grpc_pass
// through two proxies; and what the proxies themselves say to callers of gRPC.
func TestGRPCPeers(t *testing.T) { //nolint:tparallel // the peers share two hosts
	t.Parallel()
	m := newReal(t, offer{name: "greeter", protocol: "grpc", port: 8801, local: 9801})
	srv, healthy := grpc.NewServer(), health.NewServer()
	healthpb.RegisterHealthServer(srv, healthy)
	reflection.Register(srv)
	go func() { _ = srv.Serve(m.far.Listen("127.0.0.1:8801")) }()
	t.Cleanup(srv.Stop)
	conf := m.web.Write(fmt.Sprintf(grpcNginx, m.web.Dir), 0o644, "grpc.conf")
	m.web.serve(9802, "/usr/sbin/nginx", "-c", conf, "-p", m.web.Dir, "-e", m.web.Path("grpc-start.error.log"))
	for name, addr := range map[string]string{"direct": "127.0.0.1:9801", "from nginx": "127.0.0.1:9802"} {
		t.Run(name, func(t *testing.T) {
			cc := m.web.grpc(t, addr)
			t.Run("health", func(t *testing.T) { watchHealth(t, cc, healthy, name) })
			t.Run("reflection", func(t *testing.T) { reflect(t, cc) })
		})
	}
	t.Run("denied", m.deniedGRPC)
}

// grpc returns a client that connects from inside the host.
func (h *host) grpc(t *testing.T, addr string) *grpc.ClientConn {
	t.Helper()
	dial := h.dialer()
	cc, err := grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(_ context.Context, addr string) (net.Conn, error) { return dial(addr) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cc.Close() })
	return cc
}

// watchHealth asks once, for what is there and what is not, and then watches how
// it changes.
func watchHealth(t *testing.T, cc *grpc.ClientConn, server *health.Server, service string) {
	t.Helper()
	client := healthpb.NewHealthClient(cc)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if resp, err := client.Check(ctx, &healthpb.HealthCheckRequest{}, grpc.WaitForReady(true)); err != nil || resp.GetStatus() != healthpb.HealthCheckResponse_SERVING {
		t.Errorf("check: %v, %v", resp, err)
	}
	if _, err := client.Check(ctx, &healthpb.HealthCheckRequest{Service: "nobody " + service}); status.Code(err) != codes.NotFound {
		t.Errorf("check of what is not there: %v", err)
	}
	watch, err := client.Watch(ctx, &healthpb.HealthCheckRequest{Service: service})
	if err != nil {
		t.Fatal(err)
	}
	want := healthpb.HealthCheckResponse_SERVICE_UNKNOWN
	for i := range 20 {
		resp, err := watch.Recv()
		if err != nil || resp.GetStatus() != want {
			t.Fatalf("watch, message %d: %v, %v, want %v", i, resp, err, want)
		}
		want = []healthpb.HealthCheckResponse_ServingStatus{healthpb.HealthCheckResponse_SERVING, healthpb.HealthCheckResponse_NOT_SERVING}[i%2]
		server.SetServingStatus(service, want)
	}
}

// reflect lists the services and fetches a descriptor on one stream, as grpcurl
// does.
func reflect(t *testing.T, cc *grpc.ClientConn) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	stream, err := reflectionpb.NewServerReflectionClient(cc).ServerReflectionInfo(ctx, grpc.WaitForReady(true))
	if err != nil {
		t.Fatal(err)
	}
	ask := func(r *reflectionpb.ServerReflectionRequest) *reflectionpb.ServerReflectionResponse {
		t.Helper()
		if err := stream.Send(r); err != nil {
			t.Fatal(err)
		}
		resp, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		return resp
	}
	var names []string
	for _, s := range ask(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{}}).GetListServicesResponse().GetService() {
		names = append(names, s.GetName())
	}
	if !slices.Contains(names, "grpc.health.v1.Health") {
		t.Errorf("services: %v", names)
	}
	file := ask(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_FileContainingSymbol{FileContainingSymbol: "grpc.health.v1.Health"}})
	if d := file.GetFileDescriptorResponse().GetFileDescriptorProto(); len(d) == 0 || !strings.Contains(string(d[0]), "HealthCheckResponse") {
		t.Errorf("the descriptor: %v", file)
	}
	if err := stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
}

// deniedGRPC: rules by method, and a refusal that is a status of gRPC's.
func (m *real) deniedGRPC(t *testing.T) {
	m.meshctl(0, "intention", "allow", "web", "greeter", "--http", "POST /grpc.health.v1.Health/Check", "--replace", "--wait")
	client := healthpb.NewHealthClient(m.web.grpc(t, "127.0.0.1:9801"))
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if _, err := client.Check(ctx, &healthpb.HealthCheckRequest{}, grpc.WaitForReady(true)); err != nil {
		t.Errorf("the allowed method: %v", err)
	}
	if _, err := client.List(ctx, &healthpb.HealthListRequest{}); status.Code(err) != codes.PermissionDenied {
		t.Errorf("a method that is not allowed: %v, want PermissionDenied", err)
	}
}
