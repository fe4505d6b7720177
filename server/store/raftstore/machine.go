package raftstore

import (
	"fmt"
	"io"

	"github.com/hashicorp/raft"

	"github.com/meshd/meshd/server/store"
)

// machine feeds committed log entries to the Space. Raft calls it from one
// goroutine, except for the Persist of a snapshot.
type machine struct {
	space *store.Space
	fatal func(error)
	// moved is called after the claim to the leadership may have changed.
	moved  func()
	broken error // set once: no entry is applied after one that can't be read
}

var _ raft.BatchingFSM = (*machine)(nil)

// outcome is what a log entry led to, the same on every member.
type outcome struct {
	position store.Position
	epoch    uint64
	err      error
}

// Apply implements raft.FSM. It returns an outcome.
func (m *machine) Apply(entry *raft.Log) any {
	if entry.Type != raft.LogCommand {
		return outcome{}
	}
	if m.broken != nil {
		return outcome{err: m.broken}
	}
	c, err := decodeCommand(entry.Data)
	if err != nil {
		m.broken = fmt.Errorf("apply log entry %d: %w", entry.Index, err)
		m.fatal(m.broken)
		return outcome{err: m.broken}
	}
	return m.change(c)
}

// ApplyBatch implements raft.BatchingFSM.
func (m *machine) ApplyBatch(entries []*raft.Log) []any {
	outcomes := make([]any, len(entries))
	for i, entry := range entries {
		outcomes[i] = m.Apply(entry)
	}
	return outcomes
}

func (m *machine) change(c command) outcome {
	var o outcome
	switch c.Kind {
	case commandBegin:
		o.position = m.space.Begin(c.Generation)
	case commandCommit:
		o.position, o.err = m.space.Commit(c.Txn, c.Epoch)
	case commandClaim:
		o.epoch = m.space.Claim(c.Holder)
		m.moved()
	case commandResign:
		m.space.Resign(c.Epoch)
		m.moved()
	case commandOpenStage:
		m.space.OpenStage(c.Generation)
	case commandWriteStage:
		o.err = m.space.WriteStage(c.Generation, c.Txn.Ops)
	case commandActivate:
		o.position, o.err = m.space.Activate(c.Generation, c.From)
	case commandDropStage:
		m.space.DropStage(c.Generation)
	}
	return o
}

// Snapshot implements raft.FSM, in constant time.
func (m *machine) Snapshot() (raft.FSMSnapshot, error) {
	if m.broken != nil {
		return nil, m.broken
	}
	return savedState{saved: m.space.Save(), fatal: m.fatal}, nil
}

// Restore implements raft.FSM.
func (m *machine) Restore(r io.ReadCloser) error {
	err := m.space.Load(r)
	if closed := r.Close(); err == nil {
		err = closed
	}
	if err == nil {
		m.moved()
	}
	return err
}

type savedState struct {
	saved store.Saved
	fatal func(error)
}

// Persist implements raft.FSMSnapshot. A failed write (a full disk) costs only
// this snapshot; a failed fsync, which Close does, is fatal.
func (s savedState) Persist(sink raft.SnapshotSink) error {
	if _, err := s.saved.WriteTo(sink); err != nil {
		_ = sink.Cancel() // the write's error is the one to tell
		return fmt.Errorf("write snapshot %s: %w", sink.ID(), err)
	}
	if err := sink.Close(); err != nil {
		err = fmt.Errorf("sync snapshot %s: %w", sink.ID(), err)
		s.fatal(err)
		return err
	}
	return nil
}

// Release implements raft.FSMSnapshot.
func (savedState) Release() {}
