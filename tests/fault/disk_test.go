package fault_test

import (
	"os"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/meshd/meshd/tests/fault/cluster"
	"github.com/meshd/meshd/tests/fault/faultfs"
	"github.com/meshd/meshd/tests/fault/history"
	"github.com/meshd/meshd/tests/machines"
)

// diskServers is how many servers the rows of disks have.
const diskServers = 3

// disks are the servers' data directories as filesystems that can be broken.
type disks map[*cluster.Server]*faultfs.FS

// prepare mounts one, for cluster.Plan.
func (d disks) prepare(s *cluster.Server) {
	s.T.Helper()
	share(s)
	fs := faultfs.New()
	if err := fs.Mount(s.Data()); err != nil {
		s.T.Fatal(err)
	}
	if err := os.Chmod(s.Data(), 0o700); err != nil {
		s.T.Fatal(err)
	}
	d[s] = fs
	s.T.Cleanup(func() {
		fs.Set(faultfs.Faults{}) // let go of what hangs
		if s.Process != nil {
			s.Kill()
		}
		if err := fs.Unmount(); err != nil {
			s.T.Error(err)
		}
	})
}

// share makes a server's data directory, for something to be mounted there. Each
// server has a mount namespace of its own, a copy of this one: what is unmounted
// here must be there, too.
func share(s *cluster.Server) {
	s.T.Helper()
	if err := unix.Mount("", "/", "", unix.MS_SHARED|unix.MS_REC, ""); err != nil {
		s.T.Fatal(err)
	}
	if err := os.Mkdir(s.Data(), 0o700); err != nil {
		s.T.Fatal(err)
	}
}

// set gives the same faults to all.
func (d disks) set(faults faultfs.Faults) {
	for _, fs := range d {
		fs.Set(faults)
	}
}

// ends waits for a server's process to end by itself, and says how long it took.
func ends(r *cluster.Run, s *cluster.Server, limit time.Duration) time.Duration {
	r.Helper()
	began := time.Now()
	select {
	case <-s.Process.Done():
	case <-time.After(limit):
		r.Fatalf("%s still runs after %s:\n%s", s.Name, limit, machines.Tail(s.Process.Log, 30))
	}
	took := time.Since(began)
	if err := s.Process.Err(); err == nil {
		r.Errorf("%s ended as if all were well", s.Name)
	}
	return took
}

// nextChange waits until a compare-and-set is acknowledged that began after a time
// of the history, and returns how long after it that was. A write of what is there
// already is no change, and needs no disk.
func nextChange(r *cluster.Run, l *cluster.Load, after, limit time.Duration) (took time.Duration) {
	r.Helper()
	machines.Eventually(r.T, limit, "another change is acknowledged", func() string {
		for _, op := range l.Ops() {
			if op.Kind == history.Write && op.Outcome == history.OK && !op.Any && op.Invoked > after {
				took = op.Returned - after
				return ""
			}
		}
		return "none is"
	})
	return took
}

// powerCut kills all servers at once, takes from their disks what was not synced,
// and starts them. It returns how long it took until all served.
func powerCut(r *cluster.Run, c *cluster.Cluster, d disks, loss faultfs.Loss) (took time.Duration, lost faultfs.Lost) {
	r.Helper()
	for _, s := range c.Servers {
		if s.Process.Running() {
			if err := syscall.Kill(s.Process.PID(), syscall.SIGKILL); err != nil {
				r.Fatal(err)
			}
		}
	}
	for _, s := range c.Servers {
		s.Kill() // waits
		one, err := d[s].PowerLoss(loss, r.Random)
		if err != nil {
			r.Fatal(err)
		}
		lost.Sectors += one.Sectors
		lost.Entries += one.Entries
	}
	began := time.Now()
	for _, s := range c.Servers {
		s.Start()
	}
	for _, s := range c.Servers {
		s.Ready(20 * time.Second)
	}
	return time.Since(began), lost
}

// TestPowerLoss is F3: the power of all servers fails, and with it goes what was
// not synced, or is garbled.
func TestPowerLoss(t *testing.T) {
	cluster.Row(t, func(r *cluster.Run) {
		d := disks{}
		c := cluster.New(r.T, cluster.Plan{Servers: diskServers, Prepare: d.prepare})
		l := c.Load(r.Random, 16, 400)
		d.set(faultfs.Faults{SyncDelay: 15 * time.Millisecond}) // so that something is under way
		var took []time.Duration
		var lost faultfs.Lost
		for round := range r.Rounds(3) {
			<-time.After(time.Duration(300+r.Random.IntN(700)) * time.Millisecond)
			one, gone := powerCut(r, c, d, faultfs.Loss(round%3))
			took = append(took, one)
			lost.Sectors += gone.Sectors
			lost.Entries += gone.Entries
		}
		l.NextAck(r.T, l.Now(), 10*time.Second)
		l.Check(r.T)
		r.Logf("%d sectors and %d names were lost", lost.Sectors, lost.Entries)
		if lost.Sectors == 0 {
			r.Error("the disks lost nothing, so this proves nothing")
		}
		r.Measured("F3 power loss of all servers: from start to serving", took, 3*time.Second, 3*time.Second, 15*time.Second)
	})
}

// TestDiskHangs is F5: the leader's disk neither writes nor fails. Another leads
// soon, and the stuck process ends by itself.
func TestDiskHangs(t *testing.T) {
	cluster.Row(t, func(r *cluster.Run) {
		d := disks{}
		c := cluster.New(r.T, cluster.Plan{Servers: diskServers, Prepare: d.prepare})
		l := c.Load(r.Random, 16, 300)
		var moved, ended []time.Duration
		for range r.Rounds(1) {
			<-time.After(time.Duration(500+r.Random.IntN(500)) * time.Millisecond)
			leader := c.Leader()
			hung := l.Now()
			d[leader].Set(faultfs.Faults{HangSync: true, HangWrite: r.Random.IntN(2) == 0})
			began := time.Now()
			const begun = 100 * time.Millisecond // what had passed the disk by then is answered
			moved = append(moved, begun+nextChange(r, l, hung+begun, 15*time.Second))
			ends(r, leader, 20*time.Second)
			ended = append(ended, time.Since(began))
			d[leader].Set(faultfs.Faults{})
			leader.Start()
			leader.Ready(20 * time.Second)
		}
		l.Check(r.T)
		r.Measured("F5 the leader's disk hangs: to the next write", moved, 3*time.Second, 3*time.Second, 8*time.Second)
		r.Measured("F5 the leader's disk hangs: to the end of its process", ended, 6*time.Second, 6*time.Second, 15*time.Second)
	})
}

// TestSlowDisks is F6: every sync takes 200 ms longer. That is slow, and no reason
// for an election.
func TestSlowDisks(t *testing.T) {
	cluster.Row(t, func(r *cluster.Run) {
		d := disks{}
		c := cluster.New(r.T, cluster.Plan{Servers: diskServers, Prepare: d.prepare})
		l := c.Load(r.Random, 16, 300)
		before := len(c.Elections())
		d.set(faultfs.Faults{SyncDelay: 200 * time.Millisecond})
		slow := l.Now()
		for range r.Rounds(1) {
			<-time.After(8 * time.Second)
		}
		rate := l.Rate(slow, l.Now())
		n := len(c.Elections()) - before
		d.set(faultfs.Faults{})
		l.Check(r.T)
		r.Logf("%.0f writes/s were acknowledged meanwhile", rate)
		r.Count("F6 syncs take 200 ms: elections", n, 0, 0)
	})
}

// TestSyncFails is F7: one sync fails with EIO, of the leader or of a follower. The
// process must not go on, and not take for written what the kernel has forgotten:
// when the power fails after its restart, nothing is lost.
func TestSyncFails(t *testing.T) {
	cluster.Row(t, func(r *cluster.Run) {
		d := disks{}
		c := cluster.New(r.T, cluster.Plan{Servers: diskServers, Prepare: d.prepare})
		l := c.Load(r.Random, 16, 300)
		var ended []time.Duration
		for round := range r.Rounds(3) {
			<-time.After(time.Duration(300+r.Random.IntN(500)) * time.Millisecond)
			victim := c.Leader()
			if others := c.Others(victim); round%2 == 1 && len(others) > 0 {
				victim = others[r.Random.IntN(len(others))]
			}
			failed := d[victim].Stats().Failed
			d[victim].Set(faultfs.Faults{FailSyncs: 1})
			machines.Eventually(r.T, 10*time.Second, "a sync fails", func() string {
				if d[victim].Stats().Failed == failed {
					return "none did"
				}
				return ""
			})
			ended = append(ended, ends(r, victim, 10*time.Second))
			victim.Start()
			victim.Ready(20 * time.Second)
			l.NextAck(r.T, l.Now(), 10*time.Second)
			powerCut(r, c, d, faultfs.Drop)
		}
		l.NextAck(r.T, l.Now(), 10*time.Second)
		l.Check(r.T)
		r.Measured("F7 a sync fails: to the end of the process", ended, time.Second, time.Second, 5*time.Second)
	})
}
