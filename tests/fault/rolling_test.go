package fault_test

import (
	"syscall"
	"testing"
	"time"

	"github.com/meshd/meshd/tests/fault/cluster"
)

// TestRollingRestart is F17: servers are restarted one after the other, then the
// agents, while requests pass two proxies and clients write. Neither loses anything.
func TestRollingRestart(t *testing.T) {
	cluster.Row(t, func(r *cluster.Run) {
		c := cluster.New(r.T, cluster.Plan{Servers: 3})
		m := c.Mesh(cluster.Programs())
		l := c.Load(r.Random, 8, 150)
		traffic := m.Traffic(200)
		var took []time.Duration
		for range r.Rounds(1) {
			for _, s := range c.Servers {
				began := l.Now()
				leads := c.Leader() == s
				s.Stop()
				if leads {
					took = append(took, l.NextAck(r.T, began, 15*time.Second))
				}
				s.Start()
				s.Ready(20 * time.Second)
				l.NextAck(r.T, l.Now(), 15*time.Second)
			}
			for _, h := range []*cluster.Member{m.Web, m.API} {
				h.Agent.Kill(syscall.SIGTERM)
				<-h.Agent.Done()
				<-time.After(300 * time.Millisecond)
				h.StartAgent()
				<-time.After(700 * time.Millisecond)
			}
		}
		if sent := traffic.End(r.T); sent < 500 {
			r.Errorf("only %d requests were sent: this proves nothing", sent)
		}
		l.Check(r.T)
		r.Measured("F17 the leader is asked to end: to the next write", took, 500*time.Millisecond, time.Second, 10*time.Second)
	})
}
