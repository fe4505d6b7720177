package fault_test

import (
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/meshd/meshd/tests/fault/cluster"
)

// TestBusyMachine: eight programs that never rest share the machine with the
// servers. A leader that is slow is still the leader.
func TestBusyMachine(t *testing.T) {
	cluster.Row(t, func(r *cluster.Run) {
		c := cluster.New(r.T, cluster.Plan{Servers: 3})
		l := c.Load(r.Random, 8, 50)
		<-time.After(time.Second)
		before := len(c.Elections())
		var busy []*exec.Cmd
		for range 8 {
			cmd := exec.Command("sh", "-c", "while :; do :; done")
			cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
			if err := cmd.Start(); err != nil {
				r.Fatal(err)
			}
			busy = append(busy, cmd)
		}
		began := time.Now()
		for range r.Rounds(1) {
			<-time.After(15 * time.Second)
		}
		n := len(c.Elections()) - before
		lasted := time.Since(began).Round(time.Second)
		for _, cmd := range busy {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
		l.Check(r.T)
		r.Count("8 busy loops for "+lasted.String()+": elections", n, 0, 3)
	})
}

// TestScarce is F20: 64 descriptors, little memory, one processor. What is too much
// is refused, nothing panics, and all is well five seconds after it ends.
func TestScarce(t *testing.T) {
	cluster.Row(t, func(r *cluster.Run) {
		c := cluster.New(r.T, cluster.Plan{Servers: 3, Prepare: func(s *cluster.Server) {
			s.Wrap = []string{"prlimit", "--nofile=64"}
			s.Env = append(s.Env, "GOMAXPROCS=1", "GOMEMLIMIT=48MiB")
		}})
		l := c.Load(r.Random, 8, 100)
		var took []time.Duration
		for range r.Rounds(1) {
			stop := make(chan struct{})
			var crowd sync.WaitGroup
			for _, s := range c.Servers {
				for range 120 {
					crowd.Go(func() { hold(s.Address+":7400", stop) })
				}
			}
			<-time.After(4 * time.Second)
			close(stop)
			crowd.Wait()
			over := l.Now()
			took = append(took, l.NextAck(r.T, over, 15*time.Second))
			for _, s := range c.Servers {
				took = append(took, s.Ready(20*time.Second))
			}
		}
		l.Check(r.T)
		for _, s := range c.Servers {
			if data, err := os.ReadFile(s.Process.Log); err != nil || strings.Contains(string(data), "\npanic: ") || !s.Process.Running() {
				r.Errorf("%s has panicked or ended (%v)", s.Name, err)
			}
		}
		r.Measured("F20 64 descriptors: to service after the crowd has gone", took, 5*time.Second, 5*time.Second, 15*time.Second)
	})
}

// hold keeps a connection that says nothing, as long as the server lets it, and
// connects again, until stop is closed.
func hold(address string, stop <-chan struct{}) {
	for {
		c, err := net.DialTimeout("tcp", address, time.Second)
		if err == nil {
			ended := make(chan struct{})
			go func() {
				defer close(ended)
				_, _ = c.Read(make([]byte, 1))
			}()
			select {
			case <-ended:
			case <-stop:
			}
			_ = c.Close()
			<-ended
		}
		select {
		case <-stop:
			return
		case <-time.After(20 * time.Millisecond):
		}
	}
}
