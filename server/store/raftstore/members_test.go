package raftstore_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/meshd/meshd/server/store"
	"github.com/meshd/meshd/server/store/raftstore"
)

func addressOf(m *member) string { return string(m.cfg.Transport.LocalAddr()) }

// list returns the servers as m knows them: "id voter leader".
func list(m *member) []string {
	var all []string
	for _, s := range m.Servers() {
		line := s.ID
		if s.Voter {
			line += " voter"
		}
		if s.Leader {
			line += " leader"
		}
		all = append(all, line)
	}
	return all
}

func expectList(t *testing.T, m *member, want ...string) {
	t.Helper()
	eventually(t, fmt.Sprintf("%s knows %q", m.cfg.ID, want), func() bool { return cmp.Equal(list(m), want) })
}

func (c *cluster) join(t *testing.T, id string) *member {
	t.Helper()
	cfg := small(filepath.Join(t.TempDir(), "state"))
	cfg.CommitInterval = time.Millisecond
	return c.start(t, cfg, id)
}

// A member is added without a vote, promoted, made leader, demoted and removed.
func TestMembership(t *testing.T) {
	c := newClusterOf(t, 3, calm)
	leader := c.members[2] // has founded
	c.elect(t, leader)
	ctx, stop := context.WithTimeout(t.Context(), time.Minute)
	defer stop()
	if err := c.members[0].Add(ctx, "x", "x", true); !errors.Is(err, store.ErrNoLeader) {
		t.Errorf("add on a follower: %v", err)
	}
	if err := leader.Found(ctx, []raftstore.Member{{ID: leader.cfg.ID, Address: "x"}}); !errors.Is(err, raftstore.ErrFounded) {
		t.Errorf("found a second time: %v", err)
	}
	at, err := leader.Commit(ctx, put("before"))
	if err != nil {
		t.Fatal(err)
	}

	fresh := c.join(t, "server-3")
	if fresh.Member() || len(fresh.Servers()) != 0 || fresh.Leading() {
		t.Error("an empty server belongs to a cluster")
	}
	if err := leader.Add(ctx, "server-3", addressOf(fresh), false); err != nil {
		t.Fatal(err)
	}
	follow(t, fresh, at)
	for _, m := range c.members {
		expectList(t, m, "server-0 voter", "server-1 voter", "server-2 voter leader", "server-3")
	}
	eventually(t, "the new member has caught up", func() bool {
		s := leader.Servers()[3]
		return s.Contact >= 0 && s.Contact < time.Second && s.Last == leader.Stats().Last
	})
	if err := leader.Transfer(ctx, "server-3"); !errors.Is(err, raftstore.ErrAlone) {
		t.Errorf("transfer to a member without a vote: %v", err)
	}
	if err := leader.Add(ctx, "server-3", addressOf(fresh), true); err != nil {
		t.Fatal(err)
	}
	c.elect(t, fresh)
	for _, m := range c.members {
		expectList(t, m, "server-0 voter", "server-1 voter", "server-2 voter", "server-3 voter leader")
	}
	if err := fresh.Demote(ctx, "server-0"); err != nil {
		t.Fatal(err)
	}
	if err := fresh.Remove(ctx, "nobody"); !errors.Is(err, raftstore.ErrUnknownServer) {
		t.Errorf("remove a stranger: %v", err)
	}
	// The leader removes itself: another one does it.
	if err := fresh.Remove(ctx, "server-3"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the rest agrees", func() bool {
		return len(list(c.members[0])) == 3 && len(list(c.members[1])) == 3 && len(list(c.members[2])) == 3
	})
	if _, err := c.pick(t, true).Commit(ctx, put("after")); err != nil {
		t.Error(err)
	}
}

// A member that was removed learns it from the others, and ends.
func TestRemoved(t *testing.T) {
	c := newCluster(t, 3)
	leader := c.pick(t, true)
	gone := c.members[(c.index(leader)+1)%3]
	gone.Removed() // a lie: there is a leader
	if err := leader.Remove(t.Context(), gone.cfg.ID); err != nil {
		t.Fatal(err)
	}
	eventually(t, "nobody leads the removed member", func() bool { return gone.Contact() > 2*time.Second || gone.closed() })
	gone.Removed()
	if err := <-gone.done; !errors.Is(err, raftstore.ErrRemoved) {
		t.Errorf("run of a removed member: %v", err)
	}
	gone.done <- nil
	if _, err := leader.Commit(t.Context(), put("a")); err != nil {
		t.Error(err)
	}
}

// A server that has lost its state comes back under another ID and takes the
// place of what it was, but not that of a member that is alive.
func TestWiped(t *testing.T) {
	c := newCluster(t, 3)
	leader := c.pick(t, true)
	at, err := leader.Commit(t.Context(), put("kept"))
	if err != nil {
		t.Fatal(err)
	}
	alive := c.members[(c.index(leader)+1)%3]
	lost := c.members[(c.index(leader)+2)%3]
	if err := leader.Add(t.Context(), alive.cfg.ID+".00000000", "elsewhere", false); !errors.Is(err, raftstore.ErrTaken) {
		t.Errorf("a second server of one name: %v", err)
	}
	if err := errors.Join(lost.Close(), <-lost.done); err != nil {
		t.Fatal(err)
	}
	lost.done <- nil
	fresh := c.join(t, lost.cfg.ID+".00000001")
	eventually(t, "the lost server has been silent for long enough", func() bool {
		err := leader.Add(t.Context(), fresh.cfg.ID, addressOf(fresh), true)
		if err != nil && !errors.Is(err, raftstore.ErrTaken) {
			t.Fatal(err)
		}
		return err == nil
	})
	follow(t, fresh, at)
	if got := strings.Join(list(leader), ", "); strings.Contains(got, lost.cfg.ID+" ") || strings.Count(got, "voter") != 3 {
		t.Errorf("the servers are %s", got)
	}
}

// Members that hash their states at one mark get equal sums.
func TestVerify(t *testing.T) {
	c := newCluster(t, 3)
	if _, err := c.members[0].Commit(t.Context(), put("a")); err != nil {
		t.Fatal(err)
	}
	last := uint64(0)
	for i, m := range c.members {
		if err := m.Verify(t.Context()); err != nil {
			t.Fatal(err)
		}
		var (
			at  uint64
			sum [32]byte
		)
		for _, m := range c.members {
			eventually(t, "all have hashed the same mark", func() bool {
				mark, hash, ok := m.Hash()
				if ok && mark > last && at == 0 {
					at, sum = mark, hash
				}
				return ok && mark == at && hash == sum
			})
		}
		last = at
		if _, err := m.Commit(t.Context(), put(fmt.Sprint(i))); err != nil {
			t.Fatal(err)
		}
	}
}

// Of three servers two are lost for ever: the third goes on with what it has, and
// takes new ones.
func TestRecover(t *testing.T) {
	c := newCluster(t, 3)
	at, err := c.members[0].Commit(t.Context(), put("kept"))
	if err != nil {
		t.Fatal(err)
	}
	kept := c.members[1]
	follow(t, kept, at)
	alone := []raftstore.Member{{ID: kept.cfg.ID, Address: "elsewhere"}}
	if err := raftstore.Recover(kept.cfg.Dir, kept.cfg.ID, alone); !errors.Is(err, raftstore.ErrInUse) {
		t.Errorf("recover a running server: %v", err)
	}
	for _, m := range c.members {
		if err := errors.Join(m.Close(), <-m.done); err != nil {
			t.Fatal(err)
		}
		m.done <- nil
	}
	if err := raftstore.Recover(kept.cfg.Dir, "server-9", alone); !errors.Is(err, store.ErrInvalid) {
		t.Errorf("recover without the own server: %v", err)
	}
	empty := filepath.Join(t.TempDir(), "state")
	if err := raftstore.Recover(empty, kept.cfg.ID, alone); !errors.Is(err, store.ErrInvalid) {
		t.Errorf("recover without a state: %v", err)
	}
	if err := raftstore.Recover(kept.cfg.Dir, kept.cfg.ID, alone); err != nil {
		t.Fatal(err)
	}
	c.members, c.transports = nil, nil
	again := serving(t, c.start(t, kept.cfg, kept.cfg.ID))
	if s, err := again.List(t.Context(), "kept"); err != nil || len(s.Pairs) != 1 || !s.Position.Covers(at) {
		t.Fatalf("after the recovery: %v, %v", s, err)
	}
	eventually(t, "its address on the list is the new one", func() bool { return again.Servers()[0].Address == addressOf(again) })
	fresh := c.join(t, "server-7")
	if err := again.Add(t.Context(), fresh.cfg.ID, addressOf(fresh), true); err != nil {
		t.Fatal(err)
	}
	follow(t, fresh, at)
}

func TestIdentify(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	id, err := raftstore.Identify(dir, "srv-1")
	if err != nil || !strings.HasPrefix(id, "srv-1.") || len(id) != len("srv-1.")+8 {
		t.Fatalf("a new server is %q, %v", id, err)
	}
	if again, err := raftstore.Identify(dir, "srv-1"); err != nil || again != id {
		t.Errorf("%q became %q, %v", id, again, err)
	}
	if other, err := raftstore.Identify(filepath.Join(t.TempDir(), "state"), "srv-1"); err != nil || other == id {
		t.Errorf("another directory is %q too, %v", other, err)
	}
	old := small(filepath.Join(t.TempDir(), "state"))
	m := serving(t, run(t, old))
	if err := errors.Join(m.Close(), <-m.done); err != nil {
		t.Fatal(err)
	}
	m.done <- nil
	if id, err := raftstore.Identify(old.Dir, "server-1"); err != nil || id != "server-1" {
		t.Errorf("a server from before is %q, %v", id, err)
	}
	if err := os.WriteFile(filepath.Join(dir, "instance"), []byte("0123\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if id, err := raftstore.Identify(dir, "srv-1"); !errors.Is(err, store.ErrCorrupt) {
		t.Errorf("a damaged instance: %q, %v", id, err)
	}
	for _, name := range []string{"", "a.b", "a/b", "a b"} {
		if id, err := raftstore.Identify(dir, name); !errors.Is(err, store.ErrInvalid) {
			t.Errorf("the name %q: %q, %v", name, id, err)
		}
	}
}
