package fault_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/tests/bench/agents"
	"github.com/meshd/meshd/tests/fault/cluster"
	"github.com/meshd/meshd/tests/machines"
)

// reconnecting is the mesh of TestReconnect.
func reconnecting() agents.Size {
	return agents.Size{Agents: 1000, Services: 250, Instances: 1000, Intentions: 500, Upstreams: 5}
}

// TestReconnect is F33: a thousand agents lose their server at once, and each comes
// back with a new connection and all its topics. The leader holds.
func TestReconnect(t *testing.T) {
	cluster.Row(t, func(r *cluster.Run) {
		c := cluster.New(r.T, cluster.Plan{Servers: 3})
		size := reconnecting()
		victim := c.Others(c.Leader())[r.Random.IntN(2)]
		// All of them are at one server that does not lead.
		mesh := agents.NewMesh(size, c.Leader().API(), []string{victim.Address + ":7400"})
		f := connect(r, mesh)
		l := c.Load(r.Random, 4, 50)
		before := len(c.Elections())
		marks := 0
		synced := func(since time.Time) time.Duration {
			marks++
			return synced(r, mesh, f, fmt.Sprintf("mark-%d", marks), since)
		}
		r.Logf("%d agents are at %v after another %s", size.Agents, f.Connected(), synced(time.Now()).Round(time.Millisecond))

		var died, cut []time.Duration
		mesh.Aim(addresses(c.Servers...))
		began := time.Now()
		victim.Kill()
		died = append(died, synced(began))
		r.Logf("their server died, and they are at %v", f.Connected())
		victim.Start()
		victim.Ready(20 * time.Second)

		for round := range r.Rounds(2) {
			// The last time all of them come to the leader.
			if round%2 == 1 {
				mesh.Use(c.Leader().API())
				mesh.Aim(addresses(c.Leader()))
			} else {
				mesh.Aim(addresses(c.Servers...))
			}
			began := time.Now()
			f.Cut()
			cut = append(cut, synced(began))
			r.Logf("their connections were cut, and they are at %v", f.Connected())
		}
		n := len(c.Elections()) - before
		l.Check(r.T)
		r.Measured("F33 1,000 agents lose their server: to the last one that is in step", died, 10*time.Second, 10*time.Second, 60*time.Second)
		r.Measured("F33 1,000 connections are cut: to the last agent that is in step", cut, 10*time.Second, 10*time.Second, 60*time.Second)
		r.Count("F33 1,000 agents come back: elections", n, 0, 3)
	})
}

// connect fills a mesh and runs its agents until the test ends.
func connect(r *cluster.Run, mesh *agents.Mesh) *agents.Fleet {
	r.Helper()
	began := time.Now()
	filling, cancel := context.WithTimeout(r.Context(), 2*time.Minute)
	defer cancel()
	if err := mesh.Join(filling); err != nil {
		r.Fatal(err)
	}
	joined := time.Since(began)
	f := mesh.Fleet()
	running, stop := context.WithCancel(r.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = f.Run(running) // nil
	}()
	r.Cleanup(func() { stop(); <-done })
	if err := f.AwaitConnected(filling); err != nil {
		r.Fatal(err)
	}
	connected := time.Since(began)
	if err := mesh.Register(filling, f); err != nil {
		r.Fatal(err)
	}
	if err := mesh.Allow(filling); err != nil {
		r.Fatal(err)
	}
	r.Logf("agents joined after %s, were connected after %s, and had registered after %s", joined.Round(time.Millisecond),
		connected.Round(time.Millisecond), time.Since(began).Round(time.Millisecond))
	return f
}

// synced changes what all agents follow, and returns how long after since the last one
// had it.
func synced(r *cluster.Run, mesh *agents.Mesh, f *agents.Fleet, mark string, since time.Time) time.Duration {
	r.Helper()
	ctx, cancel := context.WithTimeout(r.Context(), time.Minute)
	defer cancel()
	var at catalog.Position
	machines.Eventually(r.T, 30*time.Second, "what all agents follow is written", func() string {
		var err error
		if at, err = mesh.Mark(ctx, mark); err != nil {
			return err.Error()
		}
		return ""
	})
	took, err := mesh.Marked(ctx, f, mark, at, since)
	if err != nil {
		r.Fatal(err)
	}
	return took[len(took)-1]
}

// addresses are where agents find servers.
func addresses(servers ...*cluster.Server) []string {
	var out []string
	for _, s := range servers {
		out = append(out, s.Address+":7400")
	}
	return out
}
