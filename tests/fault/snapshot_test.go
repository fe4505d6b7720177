package fault_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"testing"
	"time"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/client"
	"github.com/meshd/meshd/tests/fault/cluster"
	"github.com/meshd/meshd/tests/machines"
)

// TestBackup is F18: a snapshot is saved under load; then it is restored again and
// again, and servers are killed in the middle of that. What is there then is all of
// the snapshot, or all of what was there before.
func TestBackup(t *testing.T) {
	cluster.Row(t, func(r *cluster.Run) {
		c := cluster.New(r.T, cluster.Plan{Servers: 3})
		paint(r.T, c, saved)
		l := c.Load(r.Random, 8, 200)
		<-time.After(time.Second)
		snapshot := save(r.T, c.Servers[r.Random.IntN(len(c.Servers))])
		l.Check(r.T)

		began := time.Now()
		restored, err := restore(r.Context(), c.Servers[0], snapshot)
		if err != nil {
			r.Fatalf("restore: %v", err)
		}
		whole := time.Since(began)
		r.Logf("a snapshot of %d bytes, taken under load, is restored in %s, to %v", len(snapshot), whole.Round(time.Millisecond), restored.Position)
		if got := colour(r.T, c.Servers[0]); got != saved {
			r.Fatalf("after the restore the state is %s, want %s", got, saved)
		}
		outcomes, torn := map[string]int{}, 0
		for range r.Rounds(8) {
			paint(r.T, c, present)
			victims := c.Servers
			if r.Random.IntN(2) == 0 {
				victims = []*cluster.Server{c.Leader()}
			}
			acknowledged := make(chan error, 1)
			through := c.Servers[r.Random.IntN(len(c.Servers))]
			go func() {
				_, err := restore(r.Context(), through, snapshot)
				acknowledged <- err
			}()
			<-time.After(time.Duration(r.Random.Int64N(int64(whole)*5/4 + 1)))
			for _, s := range victims {
				s.Kill()
			}
			err := <-acknowledged
			for _, s := range victims {
				s.Start()
			}
			for _, s := range c.Servers {
				s.Ready(20 * time.Second)
			}
			is := colour(r.T, through)
			outcomes[is]++
			switch {
			case is != saved && is != present:
				torn++
				r.Errorf("a kill in the middle of a restore left a mixture: %s", is)
			case err == nil && is != saved:
				r.Error("a restore was acknowledged, and is not there")
			}
			c.Agree(r.T)
		}
		r.Count(fmt.Sprintf("F18 kills in the middle of a restore (%d left the snapshot, %d what was there before): mixtures", outcomes[saved], outcomes[present]), torn, 0, 0)
	})
}

// Colours.
const (
	saved   = "saved"
	present = "present"
)

// painted is how many services have a colour: too many for one transaction.
const painted = 2000

// paint gives all services a colour, as their owner.
func paint(t *testing.T, c *cluster.Cluster, colour string) {
	t.Helper()
	req := client.ApplyRequest{Set: "painted"}
	for i := range painted {
		spec, err := json.Marshal(catalog.Service{Name: fmt.Sprintf("painted-%d", i), Namespace: catalog.DefaultNamespace, Owner: colour})
		if err != nil {
			t.Fatal(err)
		}
		req.Resources = append(req.Resources, client.Resource{Kind: client.KindService, Spec: spec})
	}
	machines.Eventually(t, 30*time.Second, "services are written", func() string {
		if _, err := c.Servers[0].API().Apply(t.Context(), req); err != nil {
			return err.Error()
		}
		return ""
	})
}

// colour is what all services have, or how many have which.
func colour(t *testing.T, s *cluster.Server) string {
	t.Helper()
	var counts map[string]int
	machines.Eventually(t, 20*time.Second, "services are listed", func() string {
		all, err := s.API().List(t.Context(), client.KindService, client.Selection{Namespace: catalog.DefaultNamespace, Prefix: "painted-"})
		if err != nil {
			return err.Error()
		}
		counts = map[string]int{}
		for _, i := range all.Items {
			var spec catalog.Service
			if err := json.Unmarshal(i.Spec, &spec); err != nil {
				return err.Error()
			}
			counts[spec.Owner]++
		}
		return ""
	})
	for colour, n := range counts {
		if n == painted {
			return colour
		}
	}
	return fmt.Sprint(counts)
}

func save(t *testing.T, s *cluster.Server) []byte {
	t.Helper()
	var out bytes.Buffer
	if _, err := s.API().SaveSnapshot(t.Context(), &out); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func restore(ctx context.Context, s *cluster.Server, snapshot []byte) (client.Restored, error) {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	return s.API().RestoreSnapshot(ctx, bytes.NewReader(snapshot)) //nolint:wrapcheck // it says what it did
}
