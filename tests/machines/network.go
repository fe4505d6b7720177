// Package machines makes hosts for tests: each in a network namespace of its
// own, all on one bridge, with daemons whose output is kept. Nothing on the
// bridge reaches the machine's own network. It needs root.
package machines

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
)

// Network is a bridge with hosts around it. Its methods are for the test's own
// goroutine.
type Network struct {
	// Bridge is the namespace of the bridge br0. Empty: the test's own.
	Bridge string

	prefix string
	number int32
	bin    string
	next   int
}

var networks atomic.Int32 //nolint:gochecknoglobals // keeps the names of networks apart

// NewNetwork makes a bridge in a namespace of its own. Programs are looked up in
// bin first. All of it is gone when the test is.
func NewNetwork(t *testing.T, bin string) *Network {
	t.Helper()
	n := newNetwork(bin)
	n.Bridge = n.prefix + "-br"
	n.addNamespace(t, n.Bridge)
	IP(t, "-n", n.Bridge, "link", "add", "br0", "type", "bridge")
	IP(t, "-n", n.Bridge, "link", "set", "br0", "up")
	return n
}

// NewLocalNetwork makes a bridge in the namespace that the test itself is in, so
// that the test reaches its hosts, from 10.77.0.1. There can be one at a time; the
// test must be in a namespace of its own: see Isolate.
func NewLocalNetwork(t *testing.T, bin string) *Network {
	t.Helper()
	n := newNetwork(bin)
	IP(t, "link", "add", "br0", "type", "bridge")
	t.Cleanup(func() { IP(t, "link", "del", "br0") })
	IP(t, "link", "set", "br0", "up")
	IP(t, "addr", "add", "10.77.0.1/24", "dev", "br0")
	return n
}

func newNetwork(bin string) *Network {
	number := networks.Add(1)
	return &Network{prefix: fmt.Sprintf("m%d-%d", os.Getpid(), number), number: number, bin: bin, next: 10}
}

// on returns the start of an ip command that works where the bridge is.
func (n *Network) on(args ...string) []string {
	if n.Bridge == "" {
		return args
	}
	return append([]string{"-n", n.Bridge}, args...)
}

func (n *Network) addNamespace(t *testing.T, name string) {
	t.Helper()
	IP(t, "netns", "add", name)
	t.Cleanup(func() { IP(t, "netns", "del", name) })
	IP(t, "-n", name, "link", "set", "lo", "up")
}

// IP runs iproute2's ip.
func IP(t *testing.T, args ...string) {
	t.Helper()
	run(t, "ip", args...)
}

func run(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
}

// Host adds a host to the network.
func (n *Network) Host(t *testing.T, name string) *Host {
	t.Helper()
	h := &Host{
		T: t, Name: name, Namespace: n.prefix + "-" + name, Address: fmt.Sprintf("10.77.0.%d", n.next),
		Dir: filepath.Join(t.TempDir(), name), Port: fmt.Sprintf("p%d-%d", n.number, n.next), network: n,
	}
	n.next++
	if err := os.MkdirAll(h.Dir, 0o755); err != nil {
		t.Fatal(err)
	}
	n.addNamespace(t, h.Namespace)
	link := []string{"link", "add", "eth0", "netns", h.Namespace, "type", "veth", "peer", "name", h.Port}
	if n.Bridge != "" {
		link = append(link, "netns", n.Bridge)
	}
	IP(t, link...)
	// The kernel takes its time to empty a namespace, and the name is used again.
	t.Cleanup(func() { IP(t, n.on("link", "del", h.Port)...) })
	IP(t, n.on("link", "set", h.Port, "master", "br0", "up")...)
	IP(t, "-n", h.Namespace, "addr", "add", h.Address+"/24", "dev", "eth0")
	IP(t, "-n", h.Namespace, "link", "set", "eth0", "up")
	return h
}
