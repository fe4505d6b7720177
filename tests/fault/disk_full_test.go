package fault_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/meshd/meshd/server/client"
	"github.com/meshd/meshd/tests/fault/cluster"
	"github.com/meshd/meshd/tests/machines"
)

// TestDiskFull is F8: the leader's disk is full, then those of all servers. Reads and
// the data plane go on, writes are refused with an error that says so, and come back
// when there is room, without help.
func TestDiskFull(t *testing.T) {
	cluster.Row(t, func(r *cluster.Run) {
		c := cluster.New(r.T, cluster.Plan{Servers: diskServers, Prepare: smallDisk(500)})
		m := c.Mesh(cluster.Programs())
		l := c.Load(r.Random, 8, 150)
		traffic := m.Traffic(100)
		var moved, recovered []time.Duration
		for range r.Rounds(1) {
			leader := c.Leader()
			elections := len(c.Elections())
			free := []func(){fillDisk(r, leader)}
			full := l.Now()
			c.NewLeader(elections, 15*time.Second)
			moved = append(moved, nextChange(r, l, full+time.Second, 15*time.Second))
			for _, s := range c.Others(leader) {
				free = append(free, fillDisk(r, s))
			}
			refused(r, c)
			for _, s := range c.Servers {
				readable(r, s)
			}
			<-time.After(2 * time.Second)
			refused(r, c)
			began := l.Now()
			for _, f := range free {
				f()
			}
			recovered = append(recovered, nextChange(r, l, began, 20*time.Second))
		}
		if sent := traffic.End(r.T); sent < 200 {
			r.Errorf("only %d requests were sent: this proves nothing", sent)
		}
		l.Check(r.T)
		r.Measured("F8 the leader's disk is full: from a second later to the next write", moved, 5*time.Second, 5*time.Second, 15*time.Second)
		r.Measured("F8 there is room again: to the next write", recovered, 5*time.Second, 5*time.Second, 15*time.Second)
	})
}

// refused wants a write to be answered with the error for a full disk, soon.
func refused(r *cluster.Run, c *cluster.Cluster) {
	r.Helper()
	n := 0
	machines.Eventually(r.T, 10*time.Second, "a write is refused as the disk is full", func() string {
		n++
		spec := json.RawMessage(fmt.Sprintf(`{"name":"full-%d"}`, n))
		_, err := c.Servers[n%len(c.Servers)].API().Put(r.Context(), client.Ref{Kind: client.KindNamespace, Parts: []string{fmt.Sprintf("full-%d", n)}},
			spec, client.AnyRevision)
		if client.CodeOf(err) != client.CodeDiskFull {
			return fmt.Sprintf("it is answered %v", err)
		}
		return ""
	})
}

// readable wants a server to answer a linearizable read.
func readable(r *cluster.Run, s *cluster.Server) {
	r.Helper()
	ctx, cancel := context.WithTimeout(r.Context(), 5*time.Second)
	defer cancel()
	if _, err := s.API().List(ctx, client.KindNamespace, client.Selection{}); err != nil {
		r.Errorf("a read of %s while all disks are full: %v", s.Name, err)
	}
}

// fillDisk takes all that is free on a server's disk, and returns what gives it back.
func fillDisk(r *cluster.Run, s *cluster.Server) (free func()) {
	r.Helper()
	path := filepath.Join(s.Data(), "ballast")
	f, err := os.Create(path)
	if err != nil {
		r.Fatal(err)
	}
	defer f.Close() //nolint:errcheck // it holds nothing of value
	block := make([]byte, 1<<20)
	// The server may be about to allocate a file of its log, and give that up.
	for range 3 {
		for size := len(block); size > 0; {
			if _, err := f.Write(block[:size]); errors.Is(err, unix.ENOSPC) {
				size /= 2
			} else if err != nil {
				r.Fatal(err)
			}
		}
		<-time.After(300 * time.Millisecond)
	}
	return func() {
		if err := os.Remove(path); err != nil {
			r.Fatal(err)
		}
	}
}

// smallDisk mounts a data directory of a limited size, for cluster.Plan.
func smallDisk(megabytes int) func(s *cluster.Server) {
	return func(s *cluster.Server) {
		s.T.Helper()
		share(s)
		if err := unix.Mount("tmpfs", s.Data(), "tmpfs", 0, fmt.Sprintf("size=%dm,mode=0700", megabytes)); err != nil {
			s.T.Fatal(err)
		}
		s.T.Cleanup(func() {
			if s.Process != nil {
				s.Kill()
			}
			if err := unix.Unmount(s.Data(), unix.MNT_DETACH); err != nil {
				s.T.Error(err)
			}
		})
	}
}
