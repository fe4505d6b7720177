package server_test

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/server"
)

// trio is three servers of one cluster, in this process, over loopback sockets.
type trio struct {
	key     string
	peers   []string // addresses for each other
	running [3]*instance
	dirs    [3]string
}

func listen(tb testing.TB) net.Listener {
	tb.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	return l
}

// buffer is a log that may be read while it is written.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

// Write implements io.Writer.
func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

// String returns all of it.
func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func newTrio(t *testing.T) *trio {
	t.Helper()
	c := &trio{key: filepath.Join(privateDir(t), "cluster.key")}
	if err := ca.WriteClusterKey(c.key, ca.GenerateClusterKey()); err != nil {
		t.Fatal(err)
	}
	for i := range c.dirs {
		// Nobody else has the address, so that the port is free whenever it is needed.
		c.peers = append(c.peers, fmt.Sprintf("127.%d.%d.%d:7401", 64+rand.N(128), rand.N(256), 1+rand.N(254)))
		c.dirs[i] = privateDir(t)
	}
	return c
}

// config is that of one server, without its listeners.
func (c *trio) config(i int) server.Config {
	return server.Config{
		TrustDomain: trustDomain, Name: fmt.Sprintf("server-%d", i+1), DataDir: c.dirs[i], ClusterKeyFile: c.key,
		Advertise: strings.TrimSuffix(c.peers[i], ":7401"), BootstrapExpect: 3, RetryJoin: c.peers,
	}
}

// start begins one server, and does not wait for it.
func (c *trio) start(t *testing.T, i int) {
	t.Helper()
	var lc net.ListenConfig
	peers, err := lc.Listen(t.Context(), "tcp", c.peers[i])
	if err != nil {
		t.Fatal(err)
	}
	log := &buffer{}
	config := c.config(i)
	config.Listener, config.PeerListener = listen(t), peers
	s, err := server.New(config, slog.New(slog.NewTextHandler(log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	var once sync.Once
	one := &instance{Server: s, dir: c.dirs[i]}
	one.stop = func() {
		once.Do(func() {
			cancel()
			if err := <-done; err != nil {
				t.Errorf("server %d: %v", i+1, err)
			}
			if t.Failed() {
				t.Logf("log of server %d:\n%s", i+1, log)
			}
		})
	}
	t.Cleanup(one.stop)
	c.running[i] = one
}

func (c *trio) await(t *testing.T, i int) {
	t.Helper()
	select {
	case <-c.running[i].Started():
	case <-time.After(30 * time.Second):
		t.Fatalf("server %d does not serve", i+1)
	}
}

// TestThreeServers founds a cluster unattended, writes through each server, loses
// one after the other, and gets it back.
func TestThreeServers(t *testing.T) {
	t.Parallel()
	c := newTrio(t)
	for i := range c.dirs {
		c.start(t, i)
	}
	put := func(through int, name string) int {
		return call(t, c.running[through].local(), http.MethodPut, "http://x/v1/nodes/"+name, "", fmt.Sprintf(`{"name":%q}`, name), nil)
	}
	get := func(through int, name string) int {
		return call(t, c.running[through].local(), http.MethodGet, "http://x/v1/nodes/"+name, "", "", nil)
	}
	for i := range c.dirs {
		c.await(t, i)
	}
	for i := range c.dirs {
		if code := put(i, fmt.Sprintf("vm-%d", i)); code != http.StatusOK {
			t.Fatalf("a write through server %d: %d", i+1, code)
		}
		for j := range c.dirs {
			if code := get(j, fmt.Sprintf("vm-%d", i)); code != http.StatusOK {
				t.Errorf("a read through server %d of what was written through %d: %d", j+1, i+1, code)
			}
		}
	}
	// One certificate authority, and one first token.
	tokens := 0
	for _, dir := range c.dirs {
		if found, err := filepath.Glob(filepath.Join(dir, "admin.token")); err != nil {
			t.Fatal(err)
		} else {
			tokens += len(found)
		}
	}
	if tokens != 1 {
		t.Errorf("%d first admin tokens", tokens)
	}
	for i := range c.dirs {
		c.running[i].stop()
		for j := range c.dirs {
			if i == j {
				continue
			}
			name := fmt.Sprintf("vm-%d-%d", i, j)
			until(t, "a write without server "+fmt.Sprint(i+1), func() bool { return put(j, name) == http.StatusOK })
		}
		c.start(t, i)
		c.await(t, i)
		for j := range c.dirs {
			if name := fmt.Sprintf("vm-%d-%d", i, j); i != j && get(i, name) != http.StatusOK {
				t.Errorf("server %d is back and does not know %s", i+1, name)
			}
		}
	}
}

// until repeats what may fail while the servers elect.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(15 * time.Second)
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("%s: not within 15 s", what)
		}
	}
}

// TestClusterConfig refuses clusters that could not work.
func TestClusterConfig(t *testing.T) {
	t.Parallel()
	if err := (server.Config{TrustDomain: trustDomain, BootstrapExpect: 3}).Validate(); err == nil || !strings.Contains(err.Error(), "retry_join") {
		t.Errorf("three servers that do not know each other: %v", err)
	}
	for _, c := range []struct {
		config server.Config
		want   string
	}{
		{server.Config{BootstrapExpect: 2, RetryJoin: []string{"a"}, ClusterKeyFile: "/k"}, "bootstrap_expect"},
		{server.Config{BootstrapExpect: 9, RetryJoin: []string{"a"}, ClusterKeyFile: "/k"}, "bootstrap_expect"},
		{server.Config{BootstrapExpect: 3, RetryJoin: []string{"a"}}, "cluster_key_file"},
		{server.Config{RetryJoin: []string{"a b"}, ClusterKeyFile: "/k"}, "retry_join[0]"},
		{server.Config{NonVoter: true}, "retry_join"},
		{server.Config{NonVoter: true, BootstrapExpect: 1, RetryJoin: []string{"a"}, ClusterKeyFile: "/k"}, "non_voter"},
		{server.Config{Port: 7500, PeerPort: 7500}, "peer_port"},
		{server.Config{Autopilot: server.Autopilot{RemoveDeadAfter: 1}}, "autopilot.remove_dead_after"},
	} {
		c.config.TrustDomain = trustDomain
		if err := c.config.Validate(); err == nil || !strings.Contains(err.Error(), c.want+":") {
			t.Errorf("%+v: %v, want a problem of %s", c.config, err, c.want)
		}
	}
}
