package raftstore_test

import (
	"testing"

	"github.com/hashicorp/raft"

	"github.com/meshd/meshd/server/store"
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
