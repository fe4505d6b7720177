package view_test

import (
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"

	"github.com/meshd/meshd/agent/agenttest"
	"github.com/meshd/meshd/agent/view"
	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/server/meshpb"
)

// attempts returns the servers of n attempts, all of which fail; "|" stands where every
// server was tried.
func attempts(c *view.Course, told, configured []string, now time.Time, n int) []string {
	var out []string
	for range n {
		server, again := c.Next(told, configured, now)
		if again {
			out = append(out, "|")
		}
		out = append(out, server)
		c.End(server, false, now)
	}
	return out
}

// Every server is tried once before one is tried again; those that the mesh tells come
// first.
func TestCourseTriesAll(t *testing.T) {
	t.Parallel()
	var c view.Course
	now := time.Unix(1000, 0)
	got := attempts(&c, []string{"a", "b", "c"}, []string{"b", "x", "x"}, now, 8)
	slices.Sort(got[:3])
	slices.Sort(got[5:])
	if diff := cmp.Diff([]string{"a", "b", "c", "x", "|"}, got[:5]); diff != "" {
		t.Errorf("the first round (-want +got):\n%s", diff)
	}
	if server, again := c.Next(nil, nil, now); server != "" || !again {
		t.Errorf("no server: %q, %v", server, again)
	}
}

// The server that was lost, or refused, is not the next; after a while nothing is held
// against it.
func TestCourseLeavesTheServerThatFailed(t *testing.T) {
	t.Parallel()
	var c view.Course
	now := time.Unix(1000, 0)
	all := []string{"a", "b", "c"}
	c.End("a", true, now)
	c.End("b", false, now)
	for range 50 {
		if server, again := c.Next(all, nil, now); server != "c" || again {
			t.Fatalf("after a and b: %q, %v", server, again)
		}
	}
	c.End("c", true, now.Add(time.Second)) // and that one welcomes, and is lost
	counts := map[string]int{}
	for range 300 {
		server, _ := c.Next(all, nil, now.Add(time.Minute))
		counts[server]++
	}
	if counts["c"] != 0 || counts["a"] < 75 || counts["b"] < 75 {
		t.Errorf("the lost one was c, and then: %v", counts)
	}
}

// A configured server is used before a told one that has failed a moment ago.
func TestCoursePrefersWhatDidNotFail(t *testing.T) {
	t.Parallel()
	var c view.Course
	now := time.Unix(1000, 0)
	if got := attempts(&c, []string{"a"}, []string{"x"}, now, 3); !cmp.Equal(got, []string{"a", "x", "|", "a"}) && !cmp.Equal(got, []string{"a", "x", "|", "x"}) {
		t.Errorf("got %v", got)
	}
	var d view.Course
	d.End("a", false, now)
	d.End("x", true, now)
	d.End("x", false, now)
	if server, _ := d.Next([]string{"a"}, []string{"x", "y"}, now.Add(time.Second)); server != "y" {
		t.Errorf("got %q", server)
	}
}

// A server that refuses is left for another one, and where that is was told by the first.
func TestGoesToTheServersThatItWasTold(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	var mu sync.Mutex
	refusing := false
	b.stop()
	b.server.Refuse = func(rpc string, _ spiffe.ID) error {
		mu.Lock()
		defer mu.Unlock()
		if refusing && rpc == "Sync" {
			return meshpb.Refuse(codes.Unavailable, meshpb.ReasonNoQuorum, "no majority", time.Now())
		}
		return nil
	}
	b.start("127.0.0.1:0")
	second := agenttest.NewServer(b.authority)
	stop, err := second.Start(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	for i, address := range []string{b.server.Address, second.Address} {
		b.server.Put(view.Servers(), fmt.Sprint(i), fmt.Appendf(nil, `{"address":%q}`, address))
	}
	b.server.Put(view.Servers(), "odd", []byte(`{"address":"nowhere"}`))

	v := b.view() // knows the first alone
	v.Subscribe([]view.Topic{view.Servers()})
	stopView := b.run(v)
	b.until(v, "the servers", func(s *view.Snapshot) bool { return len(content(s, view.Servers())) == 3 })
	mu.Lock()
	refusing = true
	mu.Unlock()
	b.server.Cut()
	b.poll("it goes to the second", func() bool { return v.Status().Server == second.Address })
	stopView()

	again := b.view() // after a restart it still knows
	b.run(again)
	b.poll("it finds the second again", func() bool { return again.Status().Server == second.Address })
}
