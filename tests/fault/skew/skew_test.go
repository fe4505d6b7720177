// Package skew_test lets programs of this tree and of an older commit serve
// together.
package skew_test

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/meshd/meshd/tests/fault/cluster"
)

func TestMain(m *testing.M) {
	os.Exit(cluster.MainWithOlder(m, "../../e2e/older.commit")) //nolint:forbidigo // TestMain is the main of a test
}

// fleet is all that is upgraded, under load.
type fleet struct {
	*cluster.Run
	cluster *cluster.Cluster
	mesh    *cluster.Mesh
	load    *cluster.Load
	traffic *cluster.Traffic
}

// TestUpgrade: an older mesh is upgraded in the order that docs/operations/upgrade.md
// gives, and taken back again, while clients write and requests pass two proxies.
// Nothing is lost, in any mixture on the way.
func TestUpgrade(t *testing.T) {
	cluster.Row(t, func(r *cluster.Run) {
		older, newer := cluster.OlderPrograms(), cluster.Programs()
		f := &fleet{Run: r, cluster: cluster.New(r.T, cluster.Plan{Servers: 3, Prepare: func(s *cluster.Server) { s.Programs = older }})}
		f.mesh = f.cluster.Mesh(older)
		f.load = f.cluster.Load(r.Random, 8, 150)
		f.traffic = f.mesh.Traffic(100)
		for range r.Rounds(1) {
			f.servers(newer)
			f.agents(newer)
			f.proxies(newer)
			f.handOver(newer)
			f.agents(older)
			f.handOver(newer)
			f.proxies(older)
			f.servers(older)
		}
		if sent := f.traffic.End(r.T); sent < 500 {
			r.Errorf("only %d requests were sent: this proves nothing", sent)
		}
		f.load.Check(r.T)
	})
}

// servers replaces the servers' programs, one server after the other, the leader
// last.
func (f *fleet) servers(programs string) {
	f.Helper()
	leader := f.cluster.Leader()
	for _, s := range append(f.cluster.Others(leader), leader) {
		s.Stop()
		s.Programs = programs
		s.Start()
		s.Ready(30 * time.Second)
		f.load.NextAck(f.T, f.load.Now(), 15*time.Second)
		<-time.After(500 * time.Millisecond) // the mixture serves
	}
}

func (f *fleet) agents(programs string) {
	f.Helper()
	for _, m := range []*cluster.Member{f.mesh.Web, f.mesh.API} {
		m.Agent.Kill(syscall.SIGTERM)
		<-m.Agent.Done()
		m.Programs = programs
		m.StartAgent()
		<-time.After(1500 * time.Millisecond)
	}
}

// handOver replaces the proxies, which are new enough, beside agents of either version. No request is to be repeated.
func (f *fleet) handOver(programs string) {
	f.Helper()
	for _, m := range []*cluster.Member{f.mesh.Web, f.mesh.API} {
		if r := m.Run(filepath.Join(programs, "mesh-proxy"), "--restart", "--state", m.Path("proxy")); r.Code != 0 {
			f.Fatalf("hand over on %s: exit %d: %s", m.Name, r.Code, r.Stderr)
		}
		<-time.After(1500 * time.Millisecond)
	}
}

// proxies restarts them as systemd does. What comes meanwhile waits in the agents'
// sockets.
func (f *fleet) proxies(programs string) {
	f.Helper()
	f.traffic.Repeat.Store(true)
	defer f.traffic.Repeat.Store(false)
	for _, m := range []*cluster.Member{f.mesh.Web, f.mesh.API} {
		m.Proxy.Stop(f.T, 40*time.Second)
		m.Programs = programs
		m.StartProxy()
		<-time.After(1500 * time.Millisecond)
	}
}
