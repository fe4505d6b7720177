package fault_test

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/client"
	"github.com/meshd/meshd/server/fault"
	"github.com/meshd/meshd/tests/fault/cluster"
)

// What a server misses while it is away. The leader must have cut its log: it saves its
// state each 8192 entries, and keeps 10240. Here it looks for that every second, not
// every half minute, so that the row is about the link and not about patience.
const (
	looks    = fault.EnvSnapshotInterval + "=1s"
	cuts     = 2
	missed   = 1000   // entries between two looks at that
	missable = 60_000 // entries at most
	services = 4000   // that they are about, so that the state is larger than a MiB
	ownerLen = 250
)

// Figures of a server.
const (
	metricSaved     = "mesh_server_raft_snapshots_saved_total"
	metricInstalled = "mesh_server_raft_snapshots_installed_total"
	metricSize      = "mesh_server_raft_snapshot_bytes"
)

// TestSlowLink is F14: a server that was away is so far behind that it is sent the
// whole state, over a link of 1 Mbit/s. That does not keep the leader's heartbeats
// from it, or from others.
func TestSlowLink(t *testing.T) {
	cluster.Row(t, func(r *cluster.Run) {
		c := cluster.New(r.T, cluster.Plan{Servers: 3, Faulty: true, Prepare: func(s *cluster.Server) { s.Env = append(s.Env, looks) }})
		away := c.Others(c.Leader())[r.Random.IntN(2)]
		away.Stop()
		outgrow(r, c)
		size, saved := metric(r, c.Leader(), metricSize), metric(r, c.Leader(), metricSaved)
		if size < 1<<20 {
			r.Errorf("the state has %.0f bytes: that is over soon", size)
		}
		l := c.Load(r.Random, 8, 50)
		before := len(c.Elections())
		c.Net.Limit(r.T, away.Host, "1mbit")
		began := time.Now()
		away.Start()
		away.Ready(90 * time.Second)
		took := []time.Duration{time.Since(began)}
		for range r.Rounds(1) { // the link stays as it is
			<-time.After(3 * time.Second)
		}
		n := len(c.Elections()) - before
		c.Net.Unlimit(r.T, away.Host)
		installed := metric(r, away, metricInstalled)
		l.Check(r.T)
		if installed == 0 {
			r.Errorf("%s has caught up, and was sent no state", away.Name)
		}
		r.Logf("the leader has saved a state of %.0f bytes (%.0f in all), and %s was sent %.0f", size, saved, away.Name, installed)
		r.Count("F14 a server is sent the state over 1 Mbit/s: elections", n, 0, 0)
		r.Measured("F14 a server is sent the state over 1 Mbit/s: to service", took, 30*time.Second, 30*time.Second, 90*time.Second)
	})
}

func metric(r *cluster.Run, s *cluster.Server, name string) float64 {
	r.Helper()
	value, err := s.Metric(r.Context(), name)
	if err != nil {
		r.Fatal(err)
	}
	return value
}

// outgrow writes until the leader has no entry of its log any more that is as old as
// the first of them.
func outgrow(r *cluster.Run, c *cluster.Cluster) {
	r.Helper()
	for from := 0; metric(r, c.Leader(), metricSaved) < cuts; from += missed {
		if from > missable {
			r.Fatalf("%d entries were written, and the leader has not cut its log", from)
		}
		write(r, c, from, from+missed)
	}
}

// write writes entries, each about one service.
func write(r *cluster.Run, c *cluster.Cluster, from, to int) {
	r.Helper()
	ctx, cancel := context.WithTimeout(r.Context(), time.Minute)
	defer cancel()
	var group errgroup.Group
	group.SetLimit(32)
	api := c.Leader().API()
	for i := from; i < to; i++ {
		group.Go(func() error {
			name := fmt.Sprintf("missed-%d", i%services)
			owner := fmt.Sprintf("%d ", i)
			spec, err := json.Marshal(catalog.Service{Name: name, Namespace: catalog.DefaultNamespace, Owner: owner + strings.Repeat("o", ownerLen-len(owner))})
			for err == nil {
				if _, err = api.Put(ctx, client.Ref{Kind: client.KindService, Parts: []string{catalog.DefaultNamespace, name}}, spec, client.AnyRevision); err == nil {
					return nil
				}
				select { // another leader, on a machine that is busy
				case <-time.After(200 * time.Millisecond):
					err = nil
				case <-ctx.Done():
				}
			}
			return err
		})
	}
	if err := group.Wait(); err != nil {
		r.Fatalf("write what a server misses: %v", err)
	}
}
