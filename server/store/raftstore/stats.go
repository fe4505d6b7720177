package raftstore

import (
	"sync/atomic"

	"github.com/hashicorp/raft"
)

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
	// SnapshotsSaved and SnapshotsInstalled count the saved states that this
	// process has written, and those that it was sent by a leader because its log
	// was too far behind; SnapshotBytes is the size of the newest one written.
	SnapshotsSaved, SnapshotsInstalled, SnapshotBytes uint64
	// RoomBytes is how much room the state directory has; DiskFull says that it is
	// too little for writes of clients, DiskHung that a write to it does not end.
	RoomBytes          uint64
	DiskFull, DiskHung bool
}

// counters are those of Stats.
type counters struct{ saved, installed, bytes atomic.Uint64 }

// Stats returns the figures of now. It does not block.
func (e *Engine) Stats() Stats {
	r, _, _ := e.current()
	if r == nil {
		return Stats{}
	}
	e.mu.Lock()
	files := e.files
	e.mu.Unlock()
	return Stats{
		SnapshotsSaved: e.counts.saved.Load(), SnapshotsInstalled: e.counts.installed.Load(), SnapshotBytes: e.counts.bytes.Load(),
		RoomBytes: files.free.Load(), DiskFull: files.room() != nil, DiskHung: e.writes.stalled() != nil,
		Leading: r.State() == raft.Leader, Term: r.CurrentTerm(),
		Last: r.LastIndex(), Committed: r.CommitIndex(), Applied: r.AppliedIndex(),
	}
}
