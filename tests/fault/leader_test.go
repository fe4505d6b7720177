package fault_test

import (
	"context"
	"sync"
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
		var took []time.Duration
		for range r.Rounds(3) {
			<-time.After(time.Duration(300+r.Random.IntN(1000)) * time.Millisecond)
			c.Servers[0].Kill()
			killed := l.Now()
			c.Servers[0].Start()
			took = append(took, l.NextAck(r.T, killed, 15*time.Second))
		}
		l.Check(r.T)
		r.Measured("a lone server is killed and started: to the next write", took, time.Second, 3*time.Second, 10*time.Second)
	})
}

// TestLeaderDies is F1: the leader is killed under 200 writes a second.
func TestLeaderDies(t *testing.T) {
	cluster.Row(t, func(r *cluster.Run) {
		c := cluster.New(r.T, cluster.Plan{Servers: 3})
		l := c.Load(r.Random, 16, 600)
		var took []time.Duration
		for range r.Rounds(4) {
			<-time.After(time.Duration(500+r.Random.IntN(1000)) * time.Millisecond)
			leader := c.Leader()
			leader.Kill()
			killed := l.Now() // it is dead: it takes no write that begins now
			took = append(took, l.NextAck(r.T, killed, 15*time.Second))
			leader.Start()
			leader.Ready(20 * time.Second)
		}
		l.Check(r.T)
		r.Measured("F1 the leader is killed: to the next write", took, time.Second, 1500*time.Millisecond, 8*time.Second)
	})
}

// TestAllDie: all servers are killed at once. Nothing that was acknowledged is lost,
// and they find together again.
func TestAllDie(t *testing.T) {
	cluster.Row(t, func(r *cluster.Run) {
		c := cluster.New(r.T, cluster.Plan{Servers: 3})
		l := c.Load(r.Random, 16, 500)
		var took []time.Duration
		for range r.Rounds(2) {
			<-time.After(time.Duration(500+r.Random.IntN(1000)) * time.Millisecond)
			for _, s := range c.Servers {
				s.Kill()
			}
			killed := l.Now()
			for _, s := range c.Servers {
				s.Start()
			}
			took = append(took, l.NextAck(r.T, killed, 20*time.Second))
		}
		l.Check(r.T)
		r.Measured("all servers are killed and started: to the next write", took, 2*time.Second, 3*time.Second, 15*time.Second)
	})
}

// TestLeaderFreezes is F2: the leader stands still for ten seconds, in which the
// others choose another. When it goes on, nobody may be told what was true before.
func TestLeaderFreezes(t *testing.T) {
	cluster.Row(t, func(r *cluster.Run) {
		c := cluster.New(r.T, cluster.Plan{Servers: 3})
		l := c.Load(r.Random, 16, 300)
		var elected, acked []time.Duration
		for range r.Rounds(1) {
			<-time.After(time.Duration(500+r.Random.IntN(1000)) * time.Millisecond)
			leader, before := c.Leader(), len(c.Elections())
			leader.Freeze()
			frozen := l.Now()
			elected = append(elected, c.NewLeader(before, 10*time.Second))
			acked = append(acked, l.NextAck(r.T, frozen, 15*time.Second))
			// Questions wait at the frozen server when it wakes up, believing in itself.
			var questions sync.WaitGroup
			wait, cancel := context.WithTimeout(r.Context(), 20*time.Second)
			for at := frozen + 6*time.Second; at < frozen+10*time.Second; at += 200 * time.Millisecond {
				<-time.After(at - l.Now())
				questions.Go(func() { l.Ask(wait, leader) })
			}
			leader.Thaw()
			questions.Wait()
			cancel()
		}
		l.Check(r.T)
		r.Measured("F2 the leader freezes: to a new leader", elected, 2*time.Second, 2*time.Second, 8*time.Second)
		r.Measured("F2 the leader freezes: to the next write", acked, 2*time.Second, 2*time.Second, 10*time.Second)
	})
}
