package raftstore

import "github.com/hashicorp/raft"

// Stats are figures of an engine's log at one moment, for metrics.
type Stats struct {
	// Leading says that this member leads; an engine that does not run leads
	// nothing and has zeros.
	Leading bool
	Term    uint64
	// Last, Committed and Applied are indexes of the log: the newest entry, the
	// newest that is durable on a majority, and the newest that is part of the
	// state.
	Last, Committed, Applied uint64
}

// Stats returns the figures of now. It does not block.
func (e *Engine) Stats() Stats {
	r, _, _ := e.current()
	if r == nil {
		return Stats{}
	}
	return Stats{
		Leading: r.State() == raft.Leader, Term: r.CurrentTerm(),
		Last: r.LastIndex(), Committed: r.CommitIndex(), Applied: r.AppliedIndex(),
	}
}
