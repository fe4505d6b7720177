package raftstore

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"slices"
	"sync/atomic"

	"github.com/hashicorp/raft"
	wal "github.com/hashicorp/raft-wal"

	"github.com/meshd/meshd/server/fault"
	"github.com/meshd/meshd/server/store"
)

// guardedLog stops writing for ever at the first error. After a failed fsync the
// kernel may have dropped the dirty pages and a second fsync succeeds without
// them (Rebello et al., "Can Applications Recover from fsync Failures?", USENIX
// ATC 2020), so the process has to end and read back what is really there.
//
// A write that finds no room is not such an error: it is refused before, or is
// taken back, with store.ErrDiskFull.
type guardedLog struct {
	*wal.WAL

	files  *files
	fatal  func(error)
	writes *watchdog
	broken atomic.Pointer[error]
}

func (g *guardedLog) guard(what string, write func() error) error {
	if err := g.broken.Load(); err != nil {
		return *err
	}
	ended := g.writes.begin()
	err := write()
	ended()
	switch {
	case err == nil:
		return nil
	case errors.Is(err, errNoRoom):
		return fmt.Errorf("%w: %s: %w", store.ErrDiskFull, what, err)
	}
	err = fmt.Errorf("%s: %w", what, err)
	if g.broken.CompareAndSwap(nil, &err) {
		g.fatal(err)
	}
	return err
}

// GetLog implements raft.LogStore. A damaged entry is fatal: it must never be
// applied, and Raft panics when it can't read what it needs.
func (g *guardedLog) GetLog(index uint64, entry *raft.Log) error {
	err := g.get(index, entry)
	if errors.Is(err, raft.ErrLogNotFound) {
		return err
	}
	if err == nil {
		err = unseal(entry)
	}
	if err != nil {
		err = fmt.Errorf("read log entry %d: %w", index, err)
		g.fatal(err)
	}
	return err
}

// get reads an entry. The decoder of raft-wal panics on some lengths that are
// damaged, and its newest file goes on to give what was cut off at its begin: a member
// that lags would be sent all of that file, which may be many times the state.
func (g *guardedLog) get(index uint64, entry *raft.Log) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%w: %v", store.ErrCorrupt, p)
		}
	}()
	first, err := g.WAL.FirstIndex()
	if err != nil {
		return fmt.Errorf("find the first log entry: %w", err)
	}
	if index < first {
		return raft.ErrLogNotFound
	}
	return g.WAL.GetLog(index, entry)
}

// StoreLog implements raft.LogStore.
func (g *guardedLog) StoreLog(entry *raft.Log) error {
	return g.StoreLogs([]*raft.Log{entry})
}

// StoreLogs implements raft.LogStore.
func (g *guardedLog) StoreLogs(entries []*raft.Log) error {
	bytes := uint64(0)
	sealed := make([]*raft.Log, len(entries))
	for i, entry := range entries {
		sealed[i] = seal(entry)
		bytes += uint64(len(entry.Data) + len(sealed[i].Extensions) + entryOverhead)
	}
	if g.files.fits(bytes) != nil {
		g.files.provide() // the next file may only not have been made yet
		if err := g.files.fits(bytes); err != nil {
			return err
		}
	}
	return g.guard("write log entries", func() error {
		if err := fault.Err(fault.LogWriteBefore); err != nil {
			return err
		}
		if err := g.WAL.StoreLogs(sealed); err != nil {
			return err //nolint:wrapcheck // guard does
		}
		return fault.Err(fault.LogWriteAfter)
	})
}

// DeleteRange implements raft.LogStore. What cuts off the end of the log begins a
// new file.
func (g *guardedLog) DeleteRange(first, last uint64) error {
	end, err := g.WAL.LastIndex()
	if err != nil {
		return fmt.Errorf("find the last log entry: %w", err)
	}
	if last >= end && !g.files.spare.Load() {
		g.files.provide()
	}
	return g.guard("cut the log", func() error {
		if err := fault.Err(fault.TruncateBefore); err != nil {
			return err
		}
		if err := g.WAL.DeleteRange(first, last); err != nil {
			return err //nolint:wrapcheck // guard does
		}
		return fault.Err(fault.TruncateAfter)
	})
}

// vote writes one of the three values that Raft must not forget. After a failure
// it does not return: Raft would panic, and the process ends anyhow.
func (g *guardedLog) vote(key []byte, write func() error) error {
	if fault.Bug(fault.ForgetVote) && string(key) != "CurrentTerm" {
		return nil
	}
	err := g.guard("write Raft's term or vote", func() error {
		if err := fault.Err(fault.VoteBefore); err != nil {
			return err
		}
		if err := write(); err != nil {
			return err
		}
		return fault.Err(fault.VoteAfter)
	})
	if err != nil {
		select {}
	}
	return nil
}

// Set implements raft.StableStore.
func (g *guardedLog) Set(key, value []byte) error {
	return g.vote(key, func() error { return g.WAL.Set(key, value) })
}

// SetUint64 implements raft.StableStore.
func (g *guardedLog) SetUint64(key []byte, value uint64) error {
	return g.vote(key, func() error { return g.WAL.SetUint64(key, value) })
}

// entryOverhead is not less than what an entry takes on the disk beside its data
// and extensions.
const entryOverhead = 96

// The log of raft-wal reads its own checksums only when it recovers from a
// crash, so each entry carries a CRC-32C of its own, at the end of the field that
// Raft leaves to its users. It exists on disk only.

// seal returns a copy of entry that carries its checksum.
func seal(entry *raft.Log) *raft.Log {
	sealed := *entry
	sealed.Extensions = binary.BigEndian.AppendUint32(slices.Clip(entry.Extensions), checksum(entry))
	return &sealed
}

// unseal checks the checksum of an entry and takes it off.
func unseal(entry *raft.Log) error {
	body := len(entry.Extensions) - crc32.Size
	if body < 0 {
		return fmt.Errorf("%w: the checksum is missing", store.ErrCorrupt)
	}
	want := binary.BigEndian.Uint32(entry.Extensions[body:])
	if entry.Extensions = entry.Extensions[:body:body]; body == 0 {
		entry.Extensions = nil
	}
	if have := checksum(entry); have != want {
		return fmt.Errorf("%w: the checksum is %08x, computed %08x", store.ErrCorrupt, want, have)
	}
	return nil
}

func checksum(entry *raft.Log) uint32 {
	var head [25]byte
	binary.BigEndian.PutUint64(head[0:], entry.Index)
	binary.BigEndian.PutUint64(head[8:], entry.Term)
	binary.BigEndian.PutUint64(head[16:], uint64(len(entry.Data)))
	head[24] = byte(entry.Type)
	table := crc32.MakeTable(crc32.Castagnoli)
	sum := crc32.Update(0, table, head[:])
	sum = crc32.Update(sum, table, entry.Data)
	return crc32.Update(sum, table, entry.Extensions)
}
