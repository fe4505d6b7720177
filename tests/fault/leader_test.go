package fault_test

import (
	"testing"
	"time"

	"github.com/meshd/meshd/tests/fault/cluster"
)

// TestLoneServerDies: the only server is killed again and again while clients write.
// Whatever it acknowledged is there when it is back.
func TestLoneServerDies(t *testing.T) {
	cluster.Row(t, func(r *cluster.Run) {
		c := cluster.New(r.T, cluster.Plan{})
		l := c.Load(r.Random, 16, 400)
		for range r.Rounds(4) {
			<-time.After(time.Duration(300+r.Random.IntN(1200)) * time.Millisecond)
			killed := l.Now()
			c.Servers[0].Kill()
			c.Servers[0].Start()
			r.Logf("writes again %s after the kill", l.NextAck(r.T, killed, 10*time.Second).Round(time.Millisecond))
		}
		l.Check(r.T)
	})
}
