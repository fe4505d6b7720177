package e2e_test

import (
	"os"
	"testing"
	"time"

	"github.com/meshd/meshd/tests/machines"
)

// network is a bridge with hosts around it.
type network struct{ *machines.Network }

func newNetwork(t *testing.T) *network {
	t.Helper()
	return &network{machines.NewNetwork(t, bin)}
}

// host is one machine, with the applications on it.
type host struct {
	*machines.Host

	servers map[int]*process // by port, of applications
}

func (n *network) host(t *testing.T, name string) *host {
	t.Helper()
	return &host{Host: n.Host(t, name)}
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
