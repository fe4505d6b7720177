package raftstore

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	wal "github.com/hashicorp/raft-wal"
	"github.com/hashicorp/raft-wal/types"
	"golang.org/x/sys/unix"

	"github.com/meshd/meshd/server/store"
)

// Errors of opening a state directory.
var (
	// ErrMode says that the state directory is open to others than its owner.
	ErrMode = errors.New("state directory is not private")
	// ErrInUse says that another engine uses the state directory.
	ErrInUse = errors.New("state directory is in use")
)

// snapshotsKept is how many snapshots stay on disk.
const snapshotsKept = 2

// disk is an opened state directory:
//
//	lock        held while an engine uses the directory
//	wal/        the log, and Raft's term and vote
//	snapshots/  saved states
type disk struct {
	dir       string
	lock      *os.File
	log       *guardedLog
	snapshots snapshots
}

// openDisk opens or creates the state directory and checks that everything in it
// can be read. Fatal is called, from any goroutine, with the first error of a
// later write.
func openDisk(cfg Config, logger hclog.Logger, fatal func(error), writes *watchdog) (_ *disk, err error) {
	d := &disk{dir: cfg.Dir}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.close())
		}
	}()
	if err := makePrivate(cfg.Dir); err != nil {
		return nil, err
	}
	if d.lock, err = lockDir(cfg.Dir); err != nil {
		return nil, err
	}
	logDir := filepath.Join(cfg.Dir, "wal")
	if err := os.MkdirAll(logDir, 0o700); err != nil {
		return nil, fmt.Errorf("create the log's directory: %w", err)
	}
	meta := &metaFile{}
	files, err := meta.Load(logDir)
	if err == nil {
		err = checkTail(logDir, files)
	}
	var entries *wal.WAL
	if err == nil {
		entries, err = wal.Open(logDir, wal.WithMetaStore(meta), wal.WithSegmentSize(cfg.SegmentBytes), wal.WithLogger(logger.Named("wal")))
	}
	if errors.Is(err, types.ErrCorrupt) || errors.Is(err, store.ErrCorrupt) {
		return nil, damaged(fmt.Errorf("open the log: %w", err), cfg.Dir)
	}
	if err != nil {
		return nil, fmt.Errorf("open the log in %s: %w", logDir, err)
	}
	d.log = &guardedLog{WAL: entries, fatal: fatal, writes: writes}
	if d.snapshots, err = openSnapshots(cfg.Dir, logger); err != nil {
		return nil, err
	}
	// The names of the folders that were made, and that of the directory.
	if err := errors.Join(syncDir(cfg.Dir), syncDir(filepath.Dir(cfg.Dir))); err != nil {
		return nil, fmt.Errorf("sync the state directory: %w", err)
	}
	return d, d.verify()
}

func (d *disk) close() error {
	var errs []error
	if d.log != nil {
		errs = append(errs, d.log.WAL.Close())
	}
	if d.lock != nil {
		errs = append(errs, d.lock.Close())
	}
	return errors.Join(errs...)
}

func makePrivate(dir string) error {
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil { //nolint:gosec // the parent is not ours alone
		return fmt.Errorf("create the parent of the state directory: %w", err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return fmt.Errorf("create the state directory: %w", err)
	}
	info, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("look at the state directory: %w", err)
	}
	if !info.IsDir() {
		return fmt.Errorf("%w: %s is not a directory", ErrMode, dir)
	}
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		return fmt.Errorf("%w: %s has mode %04o, which lets others in; check who could read it, then chmod 700", ErrMode, dir, mode)
	}
	return nil
}

func lockDir(dir string) (*os.File, error) {
	path := filepath.Join(dir, "lock")
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600) //nolint:gosec // a fixed name in the operator's directory
	if err != nil {
		return nil, fmt.Errorf("open the lock of the state directory: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close() // nothing was written
		return nil, fmt.Errorf("%w: lock %s: %w", ErrInUse, path, err)
	}
	return f, nil
}

// verify reads the newest snapshot and the whole log once. A damaged state is
// refused before anything of it is applied; Raft itself would fall back to an
// older snapshot, or panic.
func (d *disk) verify() error {
	snapshots, err := d.snapshots.List()
	if err != nil {
		return fmt.Errorf("list the snapshots: %w", err)
	}
	saved := uint64(0)
	if len(snapshots) > 0 {
		saved = snapshots[0].Index
		if err := d.verifySnapshot(snapshots[0].ID); err != nil {
			return damaged(fmt.Errorf("snapshot %s: %w", snapshots[0].ID, err), d.dir)
		}
	}
	first, err := d.log.FirstIndex()
	if err != nil {
		return fmt.Errorf("find the first log entry: %w", err)
	}
	last, err := d.log.LastIndex()
	if err != nil {
		return fmt.Errorf("find the last log entry: %w", err)
	}
	if first > saved+1 {
		return damaged(fmt.Errorf("the log begins with entry %d, the newest readable snapshot ends with %d", first, saved), d.dir)
	}
	var entry raft.Log
	for i := max(first, 1); i <= last; i++ {
		if err := d.log.GetLog(i, &entry); err != nil {
			return damaged(fmt.Errorf("log entry %d: %w", i, err), d.dir)
		}
		if entry.Index != i {
			return damaged(fmt.Errorf("log entry %d says that it is %d", i, entry.Index), d.dir)
		}
	}
	return nil
}

// damaged tells how to heal a state that can't be read.
func damaged(err error, dir string) error {
	return fmt.Errorf("%w: %w; if other servers have the state, run 'mv %s %s.damaged' and start this server: "+
		"it joins as a new member; if it was the only one, do the same and restore a snapshot", store.ErrCorrupt, err, dir, dir)
}

func (d *disk) verifySnapshot(id string) (err error) {
	_, r, err := d.snapshots.Open(id)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	return store.NewSpace().Load(r)
}

// guardedLog stops writing for ever at the first error. After a failed fsync the
// kernel may have dropped the dirty pages and a second fsync succeeds without
// them (Rebello et al., "Can Applications Recover from fsync Failures?", USENIX
// ATC 2020), so the process has to end and read back what is really there.
type guardedLog struct {
	*wal.WAL

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
	if err == nil {
		return nil
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
// damaged.
func (g *guardedLog) get(index uint64, entry *raft.Log) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%w: %v", store.ErrCorrupt, p)
		}
	}()
	return g.WAL.GetLog(index, entry)
}

// StoreLog implements raft.LogStore.
func (g *guardedLog) StoreLog(entry *raft.Log) error {
	return g.StoreLogs([]*raft.Log{entry})
}

// StoreLogs implements raft.LogStore.
func (g *guardedLog) StoreLogs(entries []*raft.Log) error {
	sealed := make([]*raft.Log, len(entries))
	for i, entry := range entries {
		sealed[i] = seal(entry)
	}
	return g.guard("write log entries", func() error { return g.WAL.StoreLogs(sealed) })
}

// DeleteRange implements raft.LogStore.
func (g *guardedLog) DeleteRange(first, last uint64) error {
	return g.guard("cut the log", func() error { return g.WAL.DeleteRange(first, last) })
}

// Set implements raft.StableStore.
func (g *guardedLog) Set(key, value []byte) error {
	return g.guard("write Raft's vote", func() error { return g.WAL.Set(key, value) })
}

// SetUint64 implements raft.StableStore.
func (g *guardedLog) SetUint64(key []byte, value uint64) error {
	return g.guard("write Raft's term", func() error { return g.WAL.SetUint64(key, value) })
}

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
