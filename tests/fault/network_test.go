package fault_test

import (
	"context"
	"testing"
	"time"

	"github.com/meshd/meshd/tests/fault/cluster"
)

// TestLeaderIsCutOff is F10: the leader is parted from all others, and clients still
// reach it. It may not answer as if it led.
func TestLeaderIsCutOff(t *testing.T) {
	cluster.Row(t, func(r *cluster.Run) {
		c := cluster.New(r.T, cluster.Plan{Servers: 3})
		l := c.Load(r.Random, 16, 300)
		var took []time.Duration
		for range r.Rounds(2) {
			<-time.After(time.Duration(500+r.Random.IntN(500)) * time.Millisecond)
			leader := c.Leader()
			c.Net.Cut(r.T, cluster.Hosts(leader), cluster.Hosts(c.Others(leader)...))
			cut := l.Now()
			took = append(took, l.NextAck(r.T, cut, 15*time.Second))
			for range 3 { // it answers nobody, or the truth
				ctx, cancel := context.WithTimeout(r.Context(), 2*time.Second)
				l.Ask(ctx, leader)
				cancel()
			}
			c.Net.Heal(r.T)
			leader.Ready(20 * time.Second)
		}
		l.Check(r.T)
		r.Measured("F10 the leader is cut off: to the next write", took, 1500*time.Millisecond, 3*time.Second, 10*time.Second)
	})
}

// TestOneWay is F11: what the leader sends does not arrive, or what it is sent.
func TestOneWay(t *testing.T) {
	cluster.Row(t, func(r *cluster.Run) {
		c := cluster.New(r.T, cluster.Plan{Servers: 3})
		l := c.Load(r.Random, 16, 300)
		var took []time.Duration
		first := r.Random.IntN(2)
		for round := range r.Rounds(2) {
			<-time.After(time.Duration(500+r.Random.IntN(500)) * time.Millisecond)
			leader := c.Leader()
			for _, s := range c.Others(leader) {
				if (round+first)%2 == 0 {
					c.Net.Drop(r.T, 100, leader.Host, s.Host)
				} else {
					c.Net.Drop(r.T, 100, s.Host, leader.Host)
				}
			}
			cut := l.Now()
			took = append(took, l.NextAck(r.T, cut, 15*time.Second))
			<-time.After(time.Second)
			c.Net.Heal(r.T)
			leader.Ready(20 * time.Second)
		}
		l.Check(r.T)
		r.Measured("F11 one way to or from the leader is cut: to the next write", took, 1500*time.Millisecond, 3*time.Second, 10*time.Second)
	})
}

// TestBridge is F12: two servers reach a third one and not each other.
func TestBridge(t *testing.T) {
	cluster.Row(t, func(r *cluster.Run) {
		c := cluster.New(r.T, cluster.Plan{Servers: 3})
		l := c.Load(r.Random, 16, 200)
		for range r.Rounds(1) {
			<-time.After(2 * time.Second)
			leader, before := c.Leader(), len(c.Elections())
			far := c.Others(leader)[r.Random.IntN(2)]
			cut := l.Now()
			c.Net.Cut(r.T, cluster.Hosts(leader), cluster.Hosts(far))
			l.NextAck(r.T, cut, 10*time.Second)
			<-time.After(15 * time.Second)
			n := len(c.Elections()) - before
			healed := l.Now()
			r.Share("F12 A–B–C: acknowledged writes in a second, beside before", l.Rate(cut, healed), l.Rate(cut-time.Second, cut), 30, 5)
			c.Net.Heal(r.T)
			r.Count("F12 A–B–C: elections in 15 s", n, 0, 3)
			far.Ready(20 * time.Second)
		}
		l.Check(r.T)
	})
}

// TestLoss is F13: every third packet between servers is lost.
func TestLoss(t *testing.T) {
	cluster.Row(t, func(r *cluster.Run) {
		c := cluster.New(r.T, cluster.Plan{Servers: 3})
		l := c.Load(r.Random, 32, 200)
		<-time.After(3 * time.Second)
		began := l.Now()
		for _, a := range c.Servers {
			for _, b := range c.Others(a) {
				c.Net.Drop(r.T, 30, a.Host, b.Host)
			}
		}
		for range r.Rounds(1) {
			<-time.After(12 * time.Second)
		}
		ended := l.Now()
		c.Net.Heal(r.T)
		for _, s := range c.Servers {
			s.Ready(20 * time.Second)
		}
		l.Check(r.T)
		r.Share("F13 30 % of packets are lost: acknowledged writes", l.Rate(began, ended), l.Rate(began-2*time.Second, began), 50, 1)
	})
}
