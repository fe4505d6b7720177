package raftstore_test

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/raft"

	"github.com/meshd/meshd/server/store"
	"github.com/meshd/meshd/server/store/raftstore"
)

// A former leader has an entry that nobody else has. The next leader compares the
// entry before it and says that more is committed: the entry must not be applied.
func TestCommitIsBoundedByWhatWasCompared(t *testing.T) {
	c := newClusterOf(t, 3, calm)
	old := c.pick(t, true)
	if _, err := old.Commit(t.Context(), store.Txn{Ops: []store.Op{{Key: "acked"}}}); err != nil {
		t.Fatal(err)
	}
	c.isolate(c.index(old))
	before, lost := old.Stats(), make(chan error, 1)
	go func() {
		_, err := old.Commit(t.Context(), store.Txn{Ops: []store.Op{{Key: "lost"}}})
		lost <- err
	}()
	eventually(t, "the entry is in the log", func() bool { return old.Stats().Last > before.Last })
	_, stranger := raft.NewInmemTransport("")
	stranger.Connect(old.cfg.Transport.LocalAddr(), c.transports[c.index(old)])
	request := &raft.AppendEntriesRequest{
		RPCHeader: raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: []byte("server-9"), Addr: []byte("server-9")},
		Term:      before.Term + 1, PrevLogEntry: before.Last, PrevLogTerm: before.Term, LeaderCommitIndex: before.Last + 5,
	}
	var reply raft.AppendEntriesResponse
	if err := stranger.AppendEntries(raft.ServerID(old.cfg.ID), old.cfg.Transport.LocalAddr(), request, &reply); err != nil || !reply.Success {
		t.Fatalf("the next leader's first request: %+v, %v", reply, err)
	}
	if now := old.Stats(); now.Committed != before.Last {
		t.Errorf("the log was compared up to %d; committed up to %d", before.Last, now.Committed)
	}
	if err := <-lost; err == nil {
		t.Error("a write without a majority was acknowledged")
	}
	snapshot, err := old.List(t.Context(), "lost")
	if err != nil || len(snapshot.Pairs) != 0 {
		t.Errorf("an entry that no majority has was applied: %v, %v", snapshot, err)
	}
}

// A member votes once in a term, also over a restart.
func TestVotesOnce(t *testing.T) {
	c := newClusterOf(t, 3, calm)
	voter := c.members[2]
	for i := range c.members {
		c.isolate(i)
	}
	ask := func(candidate *member, term uint64) bool {
		t.Helper()
		_, stranger := raft.NewInmemTransport("")
		to := c.transports[c.index(voter)]
		stranger.Connect(to.LocalAddr(), to)
		request := &raft.RequestVoteRequest{
			RPCHeader: raft.RPCHeader{
				ProtocolVersion: raft.ProtocolVersionMax, ID: []byte(candidate.cfg.ID), Addr: []byte(addressOf(candidate)),
			},
			Term: term, LastLogIndex: 1 << 20, LastLogTerm: term - 1,
			LeadershipTransfer: true, // else it is refused because there is a leader
		}
		var reply raft.RequestVoteResponse
		if err := stranger.RequestVote(raft.ServerID(voter.cfg.ID), to.LocalAddr(), request, &reply); err != nil {
			t.Fatal(err)
		}
		return reply.Granted
	}
	term := voter.Stats().Term + 5
	if !ask(c.members[0], term) {
		t.Error("the first vote is refused")
	}
	if ask(c.members[1], term) {
		t.Error("a second vote in one term")
	}
	c.restart(t, 2)
	voter = c.members[2]
	eventually(t, "the member is up", func() bool { return voter.Stats().Term >= term })
	if ask(c.members[1], term) {
		t.Error("a second vote in one term, after a restart")
	}
}

// What a request with entries says to be committed is applied before the entries
// are written, and no more than that.
func TestCommitIsToldBeforeEntries(t *testing.T) {
	_, inner := raft.NewInmemTransport("")
	w, stop := raftstore.NewWire(inner)
	defer stop()
	_, leader := raft.NewInmemTransport("")
	leader.Connect(inner.LocalAddr(), inner)
	ask := func(previous, committed uint64, entries int) []raft.AppendEntriesRequest {
		t.Helper()
		request := &raft.AppendEntriesRequest{Term: 1, PrevLogEntry: previous, LeaderCommitIndex: committed}
		for i := range entries {
			request.Entries = append(request.Entries, &raft.Log{Index: previous + uint64(i) + 1})
		}
		done := make(chan error, 1)
		go func() { done <- leader.AppendEntries("f", inner.LocalAddr(), request, &raft.AppendEntriesResponse{}) }()
		var got []raft.AppendEntriesRequest
		for {
			select {
			case rpc := <-w.Consumer():
				a, ok := rpc.Command.(*raft.AppendEntriesRequest)
				if !ok {
					t.Fatalf("%T", rpc.Command)
				}
				got = append(got, *a)
				rpc.Respond(&raft.AppendEntriesResponse{}, nil)
			case err := <-done:
				if err != nil {
					t.Fatal(err)
				}
				return got
			}
		}
	}
	for _, row := range []struct {
		name                string
		previous, committed uint64
		entries             int
		want                [][2]uint64 // commit index and number of entries
	}{
		{"nothing is committed", 5, 0, 2, [][2]uint64{{0, 2}}},
		{"a part is committed", 7, 4, 1, [][2]uint64{{4, 0}, {4, 1}}},
		{"it is known already", 8, 4, 1, [][2]uint64{{4, 1}}},
		{"all and more is committed", 9, 20, 2, [][2]uint64{{9, 0}, {11, 2}}},
		{"no entries", 11, 20, 0, [][2]uint64{{11, 0}}},
	} {
		var have [][2]uint64
		for _, a := range ask(row.previous, row.committed, row.entries) {
			have = append(have, [2]uint64{a.LeaderCommitIndex, uint64(len(a.Entries))})
		}
		if diff := cmp.Diff(row.want, have); diff != "" {
			t.Errorf("%s: -want +got:\n%s", row.name, diff)
		}
	}
}
