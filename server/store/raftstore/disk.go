package raftstore

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	wal "github.com/hashicorp/raft-wal"
	"github.com/hashicorp/raft-wal/segment"
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
//	instance    what tells it from another one of that name, see Identify
//	wal/        the log, and Raft's term and vote
//	snapshots/  saved states
type disk struct {
	dir       string
	lock      *os.File
	files     *files
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
	// It makes a reserve first: reading writes, too.
	d.files = newFiles(logDir, cfg)
	meta := &metaFile{}
	known, err := meta.Load(logDir)
	if err == nil {
		var end uint64
		end, err = checkTail(logDir, known)
		d.files.end.Store(end)
	}
	if err == nil {
		var done bool
		if done, err = finishRotation(meta, segment.NewFiler(logDir, d.files), known, cfg.SegmentBytes); done {
			d.files.end.Store(0)
		}
	}
	var entries *wal.WAL
	if err == nil {
		entries, err = wal.Open(logDir, wal.WithMetaStore(meta), wal.WithSegmentFiler(segment.NewFiler(logDir, d.files)),
			wal.WithSegmentSize(cfg.SegmentBytes), wal.WithLogger(logger.Named("wal")))
	}
	if errors.Is(err, types.ErrCorrupt) || errors.Is(err, store.ErrCorrupt) {
		return nil, damaged(fmt.Errorf("open the log: %w", err), cfg.Dir)
	}
	if err != nil {
		return nil, fmt.Errorf("open the log in %s: %w", logDir, err)
	}
	d.log = &guardedLog{WAL: entries, files: d.files, fatal: fatal, writes: writes}
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
	if last == 0 && len(snapshots) == 0 {
		return d.forgetBegun()
	}
	return nil
}

// forgetBegun undoes a founding that a crash has interrupted. Raft writes term 1
// first, then the list of members; with the term alone it refuses to found again,
// and without the list it waits for ever. Nobody else has ever term 1 without a
// log: the first election is that of term 2, and a vote is written down.
func (d *disk) forgetBegun() error {
	term, err := d.log.GetUint64([]byte("CurrentTerm"))
	if err != nil {
		return fmt.Errorf("read Raft's term: %w", err)
	}
	vote, err := d.log.GetUint64([]byte("LastVoteTerm"))
	if err != nil {
		return fmt.Errorf("read Raft's vote: %w", err)
	}
	if term != 1 || vote != 0 {
		return nil
	}
	if err := d.log.WAL.SetUint64([]byte("CurrentTerm"), 0); err != nil {
		return fmt.Errorf("forget the founding that was interrupted: %w", err)
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
