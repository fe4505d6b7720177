package raftstore_test

import (
	"context"
	"testing"
	"time"

	"github.com/meshd/meshd/server/store/raftstore"
)

// A follower may have in its state what the leader knows to be committed and has not
// applied yet. Who read it there does not read, through the leader, what was before.
func TestBarrierCoversWhatIsCommitted(t *testing.T) {
	c := newClusterOf(t, 3, calm)
	leader, follower := c.pick(t, true), c.pick(t, false)
	if _, err := leader.Commit(t.Context(), put("before")); err != nil {
		t.Fatal(err)
	}

	release := raftstore.HoldApply(leader.Engine)
	held := true
	defer func() {
		if held {
			release()
		}
	}()
	written := make(chan error, 2)
	for _, key := range []string{"applied", "committed"} { // the first one holds the leader up
		go func() {
			_, err := leader.Commit(t.Context(), put(key))
			written <- err
		}()
		if key == "applied" {
			eventually(t, "the leader applies one entry more", func() bool { return has(t, leader, key) })
		}
	}
	eventually(t, "a follower applies what the leader has not", func() bool { return has(t, follower, "committed") })
	if has(t, leader, "committed") {
		t.Fatal("the leader has applied it: nothing is tested")
	}
	state, err := follower.List(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	seen := state.Position

	ctx, stop := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer stop()
	if p, err := leader.Barrier(ctx); err == nil && !p.Covers(seen) {
		t.Errorf("a barrier at %v, when a follower was at %v", p, seen)
	} else if err == nil {
		t.Errorf("a barrier at %v, which the leader has not reached", p)
	}
	release()
	held = false
	for range 2 {
		if err := <-written; err != nil {
			t.Error(err)
		}
	}
	p, err := leader.Barrier(t.Context())
	if err != nil || !p.Covers(seen) {
		t.Errorf("a barrier at %v, %v, when a follower was at %v", p, err, seen)
	}
}

// has reports whether the state of m has a key.
func has(t *testing.T, m *member, key string) bool {
	t.Helper()
	s, err := m.List(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	return len(s.Pairs) > 0
}
