package fault_test

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/meshd/meshd/tests/fault/cluster"
	"github.com/meshd/meshd/tests/machines"
)

// TestMembership is F16: servers are added, taken out and replaced under load, and
// one that was taken out comes back with its old state. No term has two leaders, no
// write is lost, and the stranger disturbs nobody.
func TestMembership(t *testing.T) {
	cluster.Row(t, func(r *cluster.Run) {
		c := cluster.New(r.T, cluster.Plan{Servers: 3})
		l := c.Load(r.Random, 8, 200)
		first := slices.Clone(c.Servers)
		var added, replaced []time.Duration
		for _, name := range []string{"s4", "s5"} {
			s := c.Add(name)
			s.Configure(0, c.Addresses(s))
			began := time.Now()
			s.Start()
			votes(r.T, c, name)
			added = append(added, time.Since(began))
		}
		// A follower's machine burns down, and another one takes its name.
		burnt := c.Others(append(c.Servers[3:], c.Leader())...)[0]
		before := l.Now()
		burnt.Kill()
		if err := os.RemoveAll(filepath.Join(burnt.Data(), "store")); err != nil {
			r.Fatal(err)
		}
		began := time.Now()
		burnt.Start()
		votes(r.T, c, burnt.Name)
		replaced = append(replaced, time.Since(began))
		l.NextAck(r.T, before, 10*time.Second)

		// The leader is taken out as the manual says, and one that is dead.
		stale := c.Leader()
		stale.Stop()
		l.NextAck(r.T, l.Now(), 15*time.Second)
		remove(r.T, c, stale)
		dead := c.Others(stale, burnt, c.Leader())[0]
		dead.Kill()
		remove(r.T, c, dead)
		l.NextAck(r.T, l.Now(), 15*time.Second)

		// Both come back with what they have.
		elections := len(c.Elections())
		stale.Start()
		dead.Start()
		for range r.Rounds(1) {
			<-time.After(4 * time.Second)
		}
		l.NextAck(r.T, l.Now(), 5*time.Second)
		r.Count("F16 servers that were taken out come back: elections", len(c.Elections())-elections, 0, 1)
		for _, s := range []*cluster.Server{stale, dead} {
			if _, listed := member(r.T, c, s.Name); listed {
				r.Errorf("%s is a member again, with the state that it had", s.Name)
			}
			s.Kill()
		}
		l.Check(r.T)
		r.Logf("%d servers at first, %d later", len(first), len(c.Servers))
		r.Measured("F16 a server is added under load: to its vote", added, 15*time.Second, 15*time.Second, 60*time.Second)
		r.Measured("F16 a server that lost its state is replaced: to its vote", replaced, 15*time.Second, 15*time.Second, 60*time.Second)
	})
}

// remove takes a server that is stopped out of the cluster.
func remove(t *testing.T, c *cluster.Cluster, s *cluster.Server) {
	t.Helper()
	s.Leave()
	machines.Eventually(t, 20*time.Second, s.Name+" is taken out", func() string {
		if _, err := c.Leader().API().RemoveServer(t.Context(), s.Name); err != nil {
			if _, listed := member(t, c, s.Name); listed {
				return err.Error()
			}
		}
		return ""
	})
}

// votes waits until a server of that name has its vote.
func votes(t *testing.T, c *cluster.Cluster, name string) {
	t.Helper()
	machines.Eventually(t, time.Minute, name+" has its vote", func() string {
		if voter, listed := member(t, c, name); !voter {
			return map[bool]string{true: "it has none yet", false: "it is not listed"}[listed]
		}
		return ""
	})
}

// member tells what the leader says of a server.
func member(t *testing.T, c *cluster.Cluster, name string) (voter, listed bool) {
	t.Helper()
	machines.Eventually(t, 20*time.Second, "members are listed", func() string {
		all, err := c.Leader().API().Members(t.Context())
		if err != nil {
			return err.Error()
		}
		voter, listed = false, false
		for _, m := range all.Members {
			if m.Name == name {
				voter, listed = m.Voter && m.Problem == "", true
			}
		}
		return ""
	})
	return voter, listed
}
