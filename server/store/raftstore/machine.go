package raftstore

import (
	"errors"
	"fmt"
	"io"

	"github.com/hashicorp/raft"

	"github.com/meshd/meshd/server/fault"
	"github.com/meshd/meshd/server/store"
)

// machine feeds committed log entries to the Space. Raft calls it from one
// goroutine, except for the Persist of a snapshot.
type machine struct {
	space *store.Space
	fatal func(error)
	// moved is called after the claim to the leadership may have changed, arrived
	// after any change, configured with each list of servers, and verify at each
	// mark with the index of its entry.
	moved, arrived func()
	configured     func(raft.Configuration)
	verify         func(index uint64)
	counts         *counters
	// reached is told the index of the newest entry that is part of the state.
	reached func(index uint64)

	broken error   // set once: no entry is applied after one that can't be read
	again  command // the planted bug ApplyTwice
}

var (
	_ raft.BatchingFSM        = (*machine)(nil)
	_ raft.ConfigurationStore = (*machine)(nil)
)

func (e *Engine) newMachine() *machine {
	return &machine{
		space: e.space, fatal: e.fail, counts: &e.counts, reached: e.applied.Store, moved: e.claimMoved, arrived: e.arrived, configured: e.configured,
		verify: func(index uint64) { e.marks.take(index, e.space.Save(), e.spawn) },
	}
}

// outcome is what a log entry led to, the same on every member.
type outcome struct {
	position store.Position
	epoch    uint64
	index    uint64 // of the entry
	err      error
}

// Apply implements raft.FSM. It returns an outcome.
func (m *machine) Apply(entry *raft.Log) any {
	o := m.apply(entry)
	m.reached(entry.Index)
	m.arrived()
	return o
}

// ApplyBatch implements raft.BatchingFSM.
func (m *machine) ApplyBatch(entries []*raft.Log) []any {
	outcomes := make([]any, len(entries))
	for i, entry := range entries {
		if entry.Type == raft.LogConfiguration {
			m.StoreConfiguration(entry.Index, raft.DecodeConfiguration(entry.Data))
			continue
		}
		outcomes[i] = m.apply(entry)
		m.reached(entry.Index)
	}
	m.arrived()
	return outcomes
}

// StoreConfiguration implements raft.ConfigurationStore.
func (m *machine) StoreConfiguration(_ uint64, c raft.Configuration) { m.configured(c) }

func (m *machine) apply(entry *raft.Log) outcome {
	if entry.Type != raft.LogCommand {
		return outcome{}
	}
	if m.broken != nil {
		return outcome{err: m.broken}
	}
	fault.Point(fault.ApplyBefore)
	c, err := decodeCommand(entry.Data)
	if err != nil {
		m.broken = fmt.Errorf("apply log entry %d: %w", entry.Index, err)
		m.fatal(m.broken)
		return outcome{err: m.broken}
	}
	o := m.change(c, entry.Index)
	o.index = entry.Index
	if fault.Bug(fault.ApplyTwice) {
		m.applyAgain(c, entry.Index, o)
	}
	fault.Point(fault.ApplyAfter)
	return o
}

// applyAgain is the planted bug ApplyTwice: every 16th entry, if it is a
// transaction that was applied, is applied once more after its successor.
func (m *machine) applyAgain(c command, index uint64, o outcome) {
	if m.again.Kind == commandCommit && !m.again.Txn.Leader {
		_, _ = m.space.Commit(store.Txn{Ops: m.again.Txn.Ops}, 0) // it was answered before
	}
	m.again = command{}
	if index%16 == 0 && o.err == nil {
		m.again = c
	}
}

func (m *machine) change(c command, index uint64) outcome {
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
	case commandMark:
		m.verify(index)
	}
	return o
}

// Snapshot implements raft.FSM, in constant time.
func (m *machine) Snapshot() (raft.FSMSnapshot, error) {
	if m.broken != nil {
		return nil, m.broken
	}
	return savedState{saved: m.space.Save(), fatal: m.fatal, counts: m.counts}, nil
}

// Restore implements raft.FSM.
func (m *machine) Restore(r io.ReadCloser) error {
	fault.Point(fault.SnapshotInstallBefore)
	err := m.space.Load(r)
	if closed := r.Close(); err == nil {
		err = closed
	}
	if err == nil {
		m.again = command{}
		m.counts.installed.Add(1)
		m.moved()
		m.arrived()
	}
	fault.Point(fault.SnapshotInstallAfter)
	return err
}

type savedState struct {
	saved  store.Saved
	fatal  func(error)
	counts *counters
}

// Persist implements raft.FSMSnapshot. A failed write (a full disk) costs only
// this snapshot; a failed fsync, which Close does, is fatal.
func (s savedState) Persist(sink raft.SnapshotSink) error {
	size := int64(0)
	err := fault.Err(fault.SnapshotWriteBefore)
	if err == nil {
		size, err = s.saved.WriteTo(sink)
	}
	if err == nil {
		err = fault.Err(fault.SnapshotWriteMiddle)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("write snapshot %s: %w", sink.ID(), err), sink.Cancel())
	}
	if err := sink.Close(); err != nil {
		err = fmt.Errorf("sync snapshot %s: %w", sink.ID(), err)
		s.fatal(err)
		return err
	}
	s.counts.saved.Add(1)
	s.counts.bytes.Store(uint64(size))
	fault.Point(fault.SnapshotWriteAfter)
	return nil
}

// Release implements raft.FSMSnapshot.
func (savedState) Release() {}
