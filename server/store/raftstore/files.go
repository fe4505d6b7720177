package raftstore

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	walfs "github.com/hashicorp/raft-wal/fs"
	"github.com/hashicorp/raft-wal/types"
	"golang.org/x/sys/unix"

	"github.com/meshd/meshd/server/fault"
	"github.com/meshd/meshd/server/store"
)

// A full disk must not catch the log in the middle of a write, and must not take
// the leader's office or its followers' votes: they need a few bytes each.
const (
	// minFree is how much room the state directory must have for a write of a
	// client to be taken.
	minFree = 16 << 20
	// spareName is the next file of the log, allocated in advance: a rotation
	// needs no room.
	spareName = "spare"
	// reserveName is a file that gives its room to a vote when there is no other.
	reserveName  = "reserve"
	reserveBytes = 256 << 10
	// roomInterval is how often the room is looked at.
	roomInterval = 250 * time.Millisecond
)

// errNoRoom says that a write found no room before anything was synced: it can be
// repeated.
var errNoRoom = errors.New("no space left on device")

// files are the files of the log, as raft-wal sees the file system.
type files struct {
	*walfs.FS

	dir   string
	bytes uint64 // of a file of the log
	left  func(dir string) (uint64, error)
	syncs syncTimes

	mu    sync.Mutex // held while spare is made or taken
	spare atomic.Bool
	free  atomic.Uint64 // bytes, when last looked at
	end   atomic.Uint64 // of what is written in the newest file
}

var _ types.VFS = (*files)(nil)

// newFiles looks at the room in dir and allocates what a full disk would lack
// later, as far as there is room.
func newFiles(dir string, cfg Config) *files {
	f := &files{FS: walfs.New(), dir: dir, bytes: uint64(cfg.SegmentBytes), left: cfg.left} //nolint:gosec // positive by Config.Validate
	path := filepath.Join(dir, spareName)
	if info, err := os.Stat(path); err == nil && info.Size() == int64(cfg.SegmentBytes) {
		f.spare.Store(true)
	} else if err == nil {
		_ = os.Remove(path) // of another configuration; what can't be removed is not used
	}
	f.provide()
	return f
}

// watch keeps looking until ctx ends.
func (f *files) watch(ctx context.Context) {
	tick := time.NewTicker(roomInterval)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			f.provide()
		case <-ctx.Done():
			return
		}
	}
}

// provide looks at the room and makes the spare file and the reserve, if they are
// missing. What fails is tried again.
func (f *files) provide() {
	free, err := f.left(f.dir)
	if err != nil {
		return
	}
	f.free.Store(free)
	path := filepath.Join(f.dir, reserveName)
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		_ = writeFile(path, make([]byte, reserveBytes))
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.spare.Load() || free < f.bytes+minFree {
		return
	}
	path = filepath.Join(f.dir, spareName)
	made, err := f.FS.Create(f.dir, spareName+".new", f.bytes)
	if err == nil {
		err = errors.Join(made.Sync(), made.Close())
	}
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		_ = os.Remove(path + ".new")
		return
	}
	f.spare.Store(true)
}

// left returns how many bytes the file system of dir has left.
func left(dir string) (uint64, error) {
	var room unix.Statfs_t
	if err := unix.Statfs(dir, &room); err != nil {
		return 0, fmt.Errorf("look at the room in %s: %w", dir, err)
	}
	return room.Bavail * uint64(room.Bsize), nil //nolint:gosec // a block has a positive size
}

// room returns store.ErrDiskFull when a client's write has to be refused.
func (f *files) room() error {
	if free := f.free.Load(); free < minFree {
		return fmt.Errorf("%w: %s has %d bytes left, less than %d; writes are taken again when there is room",
			store.ErrDiskFull, f.dir, free, minFree)
	}
	return nil
}

// fits returns store.ErrDiskFull when the newest file of the log may not take
// some more bytes, in some entries, and there is no next one.
func (f *files) fits(bytes uint64) error {
	if f.spare.Load() {
		return nil
	}
	end := f.end.Load()
	// Its index takes four bytes for each entry, which has at least forty.
	if end+bytes+end/10+64<<10 > f.bytes {
		return fmt.Errorf("%w: the file of the log in %s ends, and there is no room for another", store.ErrDiskFull, f.dir)
	}
	return nil
}

// Create implements types.VFS.
func (f *files) Create(dir, name string, size uint64) (types.WritableFile, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.end.Store(0)
	if f.spare.Load() && size == f.bytes {
		f.spare.Store(false)
		// The name is durable before the content: what once had content is never
		// found as a spare file again.
		err := os.Rename(filepath.Join(f.dir, spareName), filepath.Join(dir, name))
		if err == nil {
			err = syncDir(dir)
		}
		if err == nil {
			return f.OpenWriter(dir, name)
		}
		return nil, fmt.Errorf("begin a file of the log: %w", err)
	}
	made, err := f.FS.Create(dir, name, size)
	if err != nil {
		return nil, err //nolint:wrapcheck // names the file
	}
	return &file{WritableFile: made, files: f}, nil
}

// OpenWriter implements types.VFS.
func (f *files) OpenWriter(dir, name string) (types.WritableFile, error) {
	opened, err := f.FS.OpenWriter(dir, name)
	if err != nil {
		return nil, err //nolint:wrapcheck // names the file
	}
	return &file{WritableFile: opened, files: f}, nil
}

// file is the newest file of the log.
type file struct {
	types.WritableFile

	files *files
}

// WriteAt implements io.WriterAt.
func (f *file) WriteAt(b []byte, at int64) (int, error) {
	n, err := f.WritableFile.WriteAt(b, at)
	if err == nil {
		f.files.end.Store(uint64(at) + uint64(n)) //nolint:gosec // an offset
	}
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return n, fmt.Errorf("%w: %w", errNoRoom, err)
	}
	return n, err
}

// Sync implements types.WritableFile.
func (f *file) Sync() error {
	if err := fault.Err(fault.FsyncBefore); err != nil {
		return err
	}
	if fault.Bug(fault.SkipFsync) {
		return nil
	}
	begun := time.Now()
	if err := f.WritableFile.Sync(); err != nil {
		return err //nolint:wrapcheck // names the file
	}
	f.files.syncs.note(time.Since(begun))
	return fault.Err(fault.FsyncAfter)
}
