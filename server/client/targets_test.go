package client_test

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/ca/builtin"
	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/server/client"
)

// servers makes listeners whose certificates are of one mesh.
type servers struct {
	roots ca.Bundle
	tls   *tls.Config
}

func newServers(t *testing.T) *servers {
	t.Helper()
	const trustDomain = "mesh.test"
	clusterKey := ca.GenerateClusterKey()
	stored, err := builtin.Create(clusterKey, trustDomain, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	authority, err := builtin.Open(stored, clusterKey, builtin.Config{})
	if err != nil {
		t.Fatal(err)
	}
	key, err := ca.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	chain, err := authority.Sign(t.Context(), ca.SignRequest{PublicKey: key.Public(), ID: spiffe.Server(trustDomain, "s1")})
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := ca.NewLeaf(chain, key)
	if err != nil {
		t.Fatal(err)
	}
	roots, err := authority.Roots(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return &servers{roots: roots, tls: &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{*leaf.TLSWithRoots(roots)}}}
}

// start is a stand-in for one server, which answers every call the same.
func (s *servers) start(t *testing.T, status int, body any) (address string, calls *atomic.Int32) {
	t.Helper()
	calls = new(atomic.Int32)
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		calls.Add(1)
		w.WriteHeader(status)
		_ = json.NewEncoder(w).Encode(body) // the client is gone: nobody to tell
	}))
	server.TLS = s.tls
	server.StartTLS()
	t.Cleanup(server.Close)
	return server.Listener.Addr().String(), calls
}

func closedPort(t *testing.T) string {
	t.Helper()
	l, err := (&net.ListenConfig{}).Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close() //nolint:errcheck // nothing listens from here on
	return l.Addr().String()
}

func TestSeveralServers(t *testing.T) {
	t.Parallel()
	s := newServers(t)
	failure := func(code client.Code) any {
		return map[string]any{"error": client.Error{Code: code, Message: "as the test wants it"}}
	}
	dead := closedPort(t)
	leaderless, asked := s.start(t, http.StatusServiceUnavailable, failure(client.CodeUnavailable))
	good, answered := s.start(t, http.StatusOK, client.Status{Server: "good"})
	unsure, unsureAsked := s.start(t, http.StatusGatewayTimeout, failure(client.CodeUnknown))

	c, err := client.New(client.Config{Address: strings.Join([]string{dead, leaderless, good}, ","), Roots: s.roots})
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		status, err := c.Status(t.Context())
		if err != nil || status.Server != "good" {
			t.Fatalf("status: %+v, %v", status, err)
		}
	}
	if asked.Load() != 1 || answered.Load() != 2 {
		t.Errorf("the server without a leader was asked %d times, the good one %d times; want 1 and 2", asked.Load(), answered.Load())
	}

	// A write that may have happened is not repeated elsewhere.
	if c, err = client.New(client.Config{Address: unsure + "," + good, Roots: s.roots}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Status(t.Context()); client.CodeOf(err) != client.CodeUnknown || unsureAsked.Load() != 1 || answered.Load() != 2 {
		t.Errorf("an unknown outcome: %v, %d and %d calls", err, unsureAsked.Load(), answered.Load())
	}

	if c, err = client.New(client.Config{Address: dead + "," + closedPort(t), Roots: s.roots}); err != nil {
		t.Fatal(err)
	}
	_, err = c.Status(t.Context())
	if client.CodeOf(err) != client.CodeUnreachable || !strings.Contains(err.Error(), dead) {
		t.Errorf("no server at all: %v", err)
	}
	if _, err := client.New(client.Config{Address: good + ",,", Roots: s.roots}); err == nil {
		t.Error("an empty address in the list was taken")
	}
}
