package fault_test

import (
	"os"
	"strings"
	"testing"
	"time"

	"github.com/meshd/meshd/tests/fault/cluster"
)

// TestClocks is F19: wall clocks jump by an hour, forth and back, and differ between
// servers. Nothing of what keeps the servers together goes by them.
func TestClocks(t *testing.T) {
	cluster.Row(t, func(r *cluster.Run) {
		c := cluster.New(r.T, cluster.Plan{Servers: 3, Clock: true})
		l := c.Load(r.Random, 8, 200)
		before := len(c.Elections())
		offsets := []time.Duration{-time.Hour, 0, time.Hour}
		for round := range r.Rounds(4) {
			for i, s := range c.Servers {
				s.SetClock(offsets[(i+round)%len(offsets)])
			}
			jumped := l.Now()
			l.NextAck(r.T, jumped, 10*time.Second)
			<-time.After(1500 * time.Millisecond)
		}
		n := len(c.Elections()) - before
		// One that starts with a wrong clock is let in by the others all the same.
		last := c.Others(c.Leader())[0]
		for _, offset := range []time.Duration{time.Hour, 0} {
			last.Stop()
			last.SetClock(offset)
			last.Start()
			last.Ready(20 * time.Second)
		}
		for _, s := range c.Servers {
			s.SetClock(0)
		}
		l.Check(r.T)
		r.Count("F19 clocks jump by an hour: elections", n, 0, 0)
		if behind, ahead := jumps(t, c); behind > -3500*time.Second || ahead < 3500*time.Second {
			r.Errorf("the logs jump by %s and %s: the clocks were not moved, so this proves nothing", behind, ahead)
		}
	})
}

// jumps returns the largest steps of time between lines of the servers' logs.
func jumps(t *testing.T, c *cluster.Cluster) (behind, ahead time.Duration) {
	t.Helper()
	for _, s := range c.Servers {
		data, err := os.ReadFile(s.Process.Log)
		if err != nil {
			t.Fatal(err)
		}
		var last time.Time
		for line := range strings.Lines(string(data)) {
			field, _, _ := strings.Cut(strings.TrimPrefix(line, "time="), " ")
			at, err := time.Parse(time.RFC3339Nano, field)
			if err != nil {
				continue
			}
			if step := at.Sub(last); !last.IsZero() {
				behind, ahead = min(behind, step), max(ahead, step)
			}
			last = at
		}
	}
	return behind, ahead
}
