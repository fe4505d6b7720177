package conformance_test

import (
	"context"
	"crypto/tls"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/intentions"
	"github.com/meshd/meshd/tests/conformance/rig"
)

// tool builds programs of a folder that is a module of its own, and returns where
// they are.
func tool(t *testing.T, folder string, packages ...string) string {
	t.Helper()
	dir := t.TempDir()
	build := exec.Command("go", append([]string{"build", "-o", dir + "/"}, packages...)...)
	build.Dir = folder
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build %s: %v\n%s", folder, err, out)
	}
	return dir
}

// proxies are two of them before one application, which web may call.
type proxies struct {
	*rig.Pair

	authority *rig.Authority
	web       *ca.Leaf
}

// pair starts two proxies before one application.
func pair(t *testing.T, address string, protocol catalog.Protocol) *proxies {
	t.Helper()
	dir, err := os.MkdirTemp("", "mesh-c-") //nolint:usetesting // it must be short, for sockets lie in it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	authority, err := rig.NewAuthority(trustDomain)
	if err != nil {
		t.Fatal(err)
	}
	source := spiffe.Service(trustDomain, catalog.DefaultNamespace, "web")
	web, err := authority.Leaf(source)
	if err != nil {
		t.Fatal(err)
	}
	p, err := rig.NewPair(t.Context(), rig.Config{
		Proxy: meshProxy, Dir: dir, Authority: authority, Source: source,
		Apps: []rig.App{{
			Name: "app", Address: address, Protocol: protocol,
			Intentions: []intentions.Intention{{Source: "web", Destination: "app", Action: intentions.Allow}},
		}},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	return &proxies{Pair: p, authority: authority, web: web}
}

// dialMesh opens a connection of HTTP/2 to the mesh port, as web's proxy would.
func (p *proxies) dialMesh(ctx context.Context) (net.Conn, error) {
	d := tls.Dialer{NetDialer: &net.Dialer{Timeout: patience}, Config: ca.ClientConfig(ca.ClientOptions{
		Leaf:       func() (*tls.Certificate, error) { return p.web.TLS(), nil },
		Bundle:     func() ca.Bundle { return p.authority.Bundle },
		Accept:     ca.Expect(spiffe.Service(trustDomain, catalog.DefaultNamespace, "app")),
		ServerName: rig.ServerName("app"), ALPN: []string{"h2"},
	})}
	return d.DialContext(ctx, "tcp", p.Mesh)
}

// free is a port for a program that opens it itself.
func free(t *testing.T) (address, port string) {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close() //nolint:errcheck // it is given away
	_, port, err = net.SplitHostPort(l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	return l.Addr().String(), port
}

// TestGRPCInterop: grpc-go's interoperability suite, client and server, through
// two proxies.
func TestGRPCInterop(t *testing.T) {
	t.Parallel()
	dir := tool(t, "interop", ".", "google.golang.org/grpc/interop/server")
	address, port := free(t)
	server, err := rig.Start(filepath.Join(dir, "server"), []string{"--port", port}, rig.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Stop(); err != nil {
			t.Error(err)
		}
	})
	listening(t, address)
	p := pair(t, address, catalog.ProtocolGRPC)
	for _, name := range []string{
		"empty_unary", "large_unary", "client_streaming", "server_streaming", "ping_pong", "empty_stream", "timeout_on_sleeping_server",
		"cancel_after_begin", "cancel_after_first_response", "status_code_and_message", "special_status_message", "custom_metadata",
		"unimplemented_method", "unimplemented_service", "orca_per_rpc", "orca_oob", "rpc_soak", "channel_soak",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if out, err := exec.CommandContext(t.Context(), filepath.Join(dir, "interop"), p.Upstreams["app"], name).CombinedOutput(); err != nil {
				t.Errorf("%v\n%s", err, out)
			}
		})
	}
}

// listening waits until somebody listens.
func listening(t *testing.T, address string) {
	t.Helper()
	for deadline := time.Now().Add(patience); ; {
		nc, err := net.Dial("tcp", address)
		if err == nil {
			_ = nc.Close()
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
		tick := time.NewTimer(20 * time.Millisecond)
		<-tick.C
	}
}
