package raftstore

import (
	"sync"
	"sync/atomic"
	"time"

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
	// Syncs tells how long the syncs of the log have taken since the start.
	Syncs Syncs
}

// Syncs is a histogram of durations.
type Syncs struct {
	Count uint64
	Sum   time.Duration
	// Buckets counts those that took at most so many seconds, shorter ones
	// included.
	Buckets map[float64]uint64
}

// syncBounds are the buckets of Syncs, in seconds: from a disk with a battery to
// one that is about to be given up.
func syncBounds() [12]float64 {
	return [...]float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5}
}

// syncTimes collects Syncs.
type syncTimes struct {
	mu      sync.Mutex
	count   uint64
	sum     time.Duration
	buckets [12]uint64 // cumulative
}

func (s *syncTimes) note(took time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.count++
	s.sum += took
	for i, bound := range syncBounds() {
		if took.Seconds() <= bound {
			s.buckets[i]++
		}
	}
}

func (s *syncTimes) stats() Syncs {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := Syncs{Count: s.count, Sum: s.sum, Buckets: make(map[float64]uint64, len(s.buckets))}
	for i, bound := range syncBounds() {
		all.Buckets[bound] = s.buckets[i]
	}
	return all
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
		Syncs:   files.syncs.stats(),
		Leading: r.State() == raft.Leader, Term: r.CurrentTerm(),
		Last: r.LastIndex(), Committed: r.CommitIndex(), Applied: r.AppliedIndex(),
	}
}
