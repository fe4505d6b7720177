package fault_test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"
	"time"

	"github.com/meshd/meshd/tests/fault/cluster"
	"github.com/meshd/meshd/tests/machines"
)

// healing is the command that a damaged server prints.
var healing = regexp.MustCompile(`run '([^']+)' and start this server`) //nolint:gochecknoglobals // compiled once, never changed

// TestDamageIsHealed is the part of F9 that needs other servers: a bit of what one
// of three keeps is flipped while it is down. It refuses to start and says which
// command heals it; after exactly that command it comes back and has everything.
// Which bits are noticed is tested in tests/fault/disk.
func TestDamageIsHealed(t *testing.T) {
	cluster.Row(t, func(r *cluster.Run) {
		c := cluster.New(r.T, cluster.Plan{Servers: diskServers})
		l := c.Load(r.Random, 8, 200)
		<-time.After(time.Second)
		damages := []string{"store/wal/*-*.wal", "store/wal/meta"}
		var took, whole []time.Duration
		for round := range r.Rounds(len(damages)) {
			damage := damages[round%len(damages)]
			victim := c.Others(c.Leader())[r.Random.IntN(diskServers-1)]
			victim.Kill()
			where := flipIn(r, filepath.Join(victim.Data(), damage))
			victim.Start()
			ends(r, victim, 20*time.Second)
			said := machines.Tail(victim.Process.Log, 5)
			command := healing.FindStringSubmatch(said)
			if command == nil {
				r.Fatalf("%s: %s says no command that heals it:\n%s", where, victim.Name, said)
			}
			if out, err := exec.CommandContext(r.Context(), "sh", "-c", command[1]).CombinedOutput(); err != nil {
				r.Fatalf("%s: %s: %v\n%s", where, command[1], err, out)
			}
			began := time.Now()
			victim.Start()
			victim.Ready(30 * time.Second)
			took = append(took, time.Since(began))
			whole = append(whole, complete(r, c))
		}
		l.Check(r.T)
		r.Measured("F9 a damaged server is healed by the command that it prints: from start to serving", took, 5*time.Second, 5*time.Second, 30*time.Second)
		r.Measured("F9 a damaged server is healed: until it has a vote, and its old self none", whole, 20*time.Second, 20*time.Second, time.Minute)
	})
}

// complete waits until the cluster can lose a server again: each of its members
// answers and has a vote.
func complete(r *cluster.Run, c *cluster.Cluster) time.Duration {
	r.Helper()
	return machines.Eventually(r.T, 90*time.Second, "the cluster is complete", func() string {
		ctx, cancel := context.WithTimeout(r.Context(), 3*time.Second)
		defer cancel()
		all, err := c.Leader().API().Members(ctx)
		if err != nil {
			return err.Error()
		}
		for _, m := range all.Members {
			if !m.Voter || m.Problem != "" || len(all.Members) != len(c.Servers) {
				return fmt.Sprintf("%+v", all.Members)
			}
		}
		return ""
	})
}

// flipIn flips one bit in the middle of what the newest file of a pattern holds. Of a
// log it is one of a service that clients wrote: what lies between entries, and when
// they came, may be lost.
func flipIn(r *cluster.Run, pattern string) string {
	r.Helper()
	paths, err := filepath.Glob(pattern)
	if err != nil || len(paths) == 0 {
		r.Fatalf("%s: %v, %v", pattern, paths, err)
	}
	path := paths[len(paths)-1]
	data, err := os.ReadFile(path)
	if err != nil {
		r.Fatal(err)
	}
	used := len(bytes.TrimRight(data, "\x00"))
	at := used/4 + r.Random.IntN(used/4)
	if filepath.Ext(path) == ".wal" {
		text := []byte(`"owner"`)
		next := bytes.Index(data[at:used], text)
		if next < 0 {
			r.Fatalf("%s: clients wrote nothing behind byte %d of %d", path, at, used)
		}
		at += next + r.Random.IntN(len(text))
	}
	data[at] ^= 1 << r.Random.IntN(8)
	if err := os.WriteFile(path, data, 0o600); err != nil {
		r.Fatal(err)
	}
	return path
}
