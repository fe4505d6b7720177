package e2e_test

import (
	"os"
	"testing"
	"time"

	"github.com/meshd/meshd/tests/canary"
	"github.com/meshd/meshd/tests/machines"
)

// network is a bridge with hosts around it.
type network struct {
	*machines.Network

	hosts   []*host
	secrets []canary.Secret // that lie in no file of a host

	machines    []*machine // whose files only they see, while they run
	sweptInside bool
}

// newNetwork makes a network. When the test ends, all that its hosts' programs have
// left is searched for secrets.
func newNetwork(t *testing.T) *network {
	t.Helper()
	t.TempDir() // cleanups run in the reverse order: the folders go last
	n := &network{Network: machines.NewNetwork(t, bin)}
	t.Cleanup(func() { mustBeClean(t, n.secrets, n.folders()...) })
	return n
}

// host is one machine, with the applications on it.
type host struct {
	*machines.Host

	servers map[int]*process // by port, of applications
}

func (n *network) host(t *testing.T, name string) *host {
	t.Helper()
	h := &host{Host: n.Host(t, name)}
	n.hosts = append(n.hosts, h)
	return h
}

type (
	process = machines.Process
	result  = machines.Result
)

func fileExists(p string) bool {
	_, err := os.Stat(p)
	return err == nil
}

func tail(path string, lines int) string { return machines.Tail(path, lines) }

func eventually(t *testing.T, limit time.Duration, what string, f func() string) time.Duration {
	t.Helper()
	return machines.Eventually(t, limit, what, f)
}
