package fault_test

import (
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/server/client"
	"github.com/meshd/meshd/server/fault"
	"github.com/meshd/meshd/tests/fault/cluster"
)

// TestFailpoints is F4 for servers under load: one of three, the leader or not,
// panics in the middle of something and is started again. What lies in the way of a
// lone store's whole life, such as its snapshots, is in tests/fault/planted.
func TestFailpoints(t *testing.T) {
	cluster.Row(t, func(r *cluster.Run) {
		c := cluster.New(r.T, cluster.Plan{Servers: 3, Faulty: true})
		l := c.Load(r.Random, 8, 200)
		points := slices.DeleteFunc(fault.Points(), func(p string) bool {
			return strings.HasPrefix(p, "snapshot-") || strings.HasPrefix(p, "truncate-") || strings.HasPrefix(p, "key-")
		})
		r.Random.Shuffle(len(points), func(i, j int) { points[i], points[j] = points[j], points[i] })
		for i, point := range points {
			victim := c.Leader()
			if i%2 == 1 {
				victim = c.Others(victim)[r.Random.IntN(2)]
			}
			victim.Kill()
			dies(r, victim, point+"=panic")
			victim.Start()
			victim.Ready(20 * time.Second)
			l.NextAck(r.T, l.Now(), 10*time.Second)
		}
		l.Check(r.T)
		r.Logf("MEASURED F4 panics under load: %d of %d points hit, 0 acknowledged writes lost", len(points), len(points))
	})
}

// TestFirstStart is F4 for what happens once: a server dies before or after the key
// of its certificate authority is stored. The next start makes or finds one cluster.
func TestFirstStart(t *testing.T) {
	cluster.Row(t, func(r *cluster.Run) {
		c := cluster.New(r.T, cluster.Plan{Faulty: true})
		s := c.Servers[0]
		for _, point := range []string{fault.KeyWriteBefore, fault.KeyWriteAfter, fault.CASignBefore} {
			s.Kill()
			if err := os.RemoveAll(s.Data()); err != nil {
				r.Fatal(err)
			}
			dies(r, s, point+"=exit")
			c.Roots = ca.Bundle{}
			s.Start()
			s.Ready(20 * time.Second)
			if n := len(c.Roots.Roots("mesh.example.com")); n != 1 {
				r.Errorf("%s: %d roots", point, n)
			}
			s.Kill()
			s.Start()
			s.Ready(20 * time.Second)
			if _, err := s.API().List(r.Context(), client.KindNamespace, client.Selection{}); err != nil {
				r.Errorf("%s: the certificate authority is another one after a restart: %v", point, err)
			}
		}
	})
}

// dies starts a server with a failpoint and waits until that has ended it.
func dies(r *cluster.Run, s *cluster.Server, failpoint string) {
	r.Helper()
	env := s.Env
	s.Env = append(slices.Clone(env), fault.EnvPoints+"="+failpoint)
	s.Start()
	s.Env = env
	ends(r, s, 20*time.Second)
	point, _, _ := strings.Cut(failpoint, "=")
	if log, err := os.ReadFile(s.Process.Log); err != nil || !strings.Contains(string(log), "failpoint "+point) {
		r.Fatalf("%s ended, and not at %s: %v", s.Name, point, err)
	}
}
