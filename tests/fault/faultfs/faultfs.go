// Package faultfs is a filesystem in memory that fails as disks do: it delays,
// hangs or fails a sync, is full, and at a power loss forgets what was not
// synced. Programs use it through FUSE like any other.
//
// It keeps every file and folder twice: as programs see it, and as it would be
// found after a power loss. Only fsync copies from the first to the second, a
// file's for its content and a folder's for its entries. That is less than real
// filesystems give, and all that POSIX promises: a program that loses nothing
// here depends on no filesystem's kindness.
//
// What is left out: extended attributes, hard and symbolic links, permissions
// (the kernel checks none for root). Owners, modes and times are never lost.
package faultfs

import (
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// ErrMounted says that a mounted filesystem was mounted again.
var ErrMounted = errors.New("mounted already")

// Faults is what is wrong with the disk now. The zero value is a healthy one.
type Faults struct {
	// SyncDelay is added to every fsync.
	SyncDelay time.Duration
	// HangSync and HangWrite keep fsync and write from returning until they are
	// switched off. A thread that hangs so can be killed, as on NFS.
	HangSync, HangWrite bool
	// FailSyncs is how many of the next fsyncs fail with EIO. As on Linux, what
	// such a one should have written counts as clean afterwards: the next fsync
	// succeeds without it, and programs go on seeing it until the power loss.
	FailSyncs int
	// Capacity is the size of the disk in bytes, 0 for no limit. A write, a
	// fallocate or a new file beyond it fails with ENOSPC.
	Capacity int64
}

// Loss says what a power loss does to what was not synced.
type Loss int

// Kinds of loss. Sectors have 512 bytes.
const (
	// Drop forgets all of it.
	Drop Loss = iota
	// Tear keeps some sectors and forgets others, keeps the first of the changes
	// of folders, and leaves a file with a size between its old and its new one.
	Tear
	// Garble is Tear, but some of the sectors hold random bytes where they were being
	// changed. Bytes of the same sector that were synced and not changed stay: what
	// SQLite's manual calls powersafe overwrite, which a log that goes on in the middle
	// of a sector relies on.
	Garble
)

// Lost counts what a power loss took.
type Lost struct {
	Sectors int // that are not as programs last saw them
	Entries int // creations, removals and renames undone
}

// Stats counts what the filesystem did since New.
type Stats struct {
	Syncs   int // that succeeded, of files and folders
	Failed  int // syncs that failed with EIO
	Full    int // calls that failed with ENOSPC
	Hanging int // calls that hang now
	Used    int64
}

// FS is a filesystem. It is safe for concurrent use.
type FS struct {
	mu      sync.Mutex
	faults  Faults
	changed chan struct{} // closed when faults change or a call begins or ends to hang
	stats   Stats
	nodes   map[uint64]*node // that the kernel or a folder knows
	next    uint64
	root    *node
	journal []change // of folders, not synced, in their order
	dir     string
	server  *fuse.Server
}

// New returns an empty filesystem, which is not mounted.
func New() *FS {
	f := &FS{changed: make(chan struct{}), nodes: map[uint64]*node{}, next: fuse.FUSE_ROOT_ID}
	f.root = f.newNode(unix.S_IFDIR|0o755, 0, 0)
	return f
}

// Mount mounts the filesystem at an existing folder, which needs root, and
// serves it until Unmount.
func (f *FS) Mount(dir string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.server != nil {
		return fmt.Errorf("mount faultfs at %s: %w at %s", dir, ErrMounted, f.dir)
	}
	server, err := fuse.NewServer(&calls{RawFileSystem: fuse.NewDefaultRawFileSystem(), fs: f}, dir, &fuse.MountOptions{
		FsName:            "faultfs",
		Name:              "faultfs",
		DirectMountStrict: true,
		DisableXAttrs:     true,
		MaxBackground:     256,
		Logger:            slog.NewLogLogger(slog.DiscardHandler, slog.LevelError), // it says what the errors say
	})
	if err != nil {
		return fmt.Errorf("mount faultfs at %s: %w", dir, err)
	}
	f.dir, f.server = dir, server
	go server.Serve() // until Unmount, which waits for it
	f.mu.Unlock()
	err = server.WaitMount()
	f.mu.Lock()
	if err != nil {
		return fmt.Errorf("mount faultfs at %s: %w", dir, err)
	}
	return nil
}

// Unmount takes the filesystem off its folder. What is in it stays, for the next
// Mount. It fails while a process uses the filesystem. Without a mount it does
// nothing.
func (f *FS) Unmount() error {
	f.mu.Lock()
	server := f.server
	f.mu.Unlock()
	if server == nil {
		return nil
	}
	if err := server.Unmount(); err != nil {
		return fmt.Errorf("unmount faultfs: %w", err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.server = nil
	for id, n := range f.nodes { // the kernel has forgotten all of them
		n.lookups = 0
		if !n.linked && n != f.root {
			delete(f.nodes, id)
		}
	}
	return nil
}

// Set replaces all faults.
func (f *FS) Set(faults Faults) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.faults = faults
	f.turn()
}

// Stats returns the counters.
func (f *FS) Stats() Stats {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := f.stats
	s.Used = f.used() * pageSize
	return s
}

// Changed returns a channel that is closed when Set is called, when a sync ends,
// or when a call begins or ends to hang. Take it before Stats.
func (f *FS) Changed() <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.changed
}

func (f *FS) turn() {
	close(f.changed)
	f.changed = make(chan struct{})
}

// PowerLoss makes the filesystem what it would be after a power loss now, and
// mounts it again where it was. All processes that used it must have ended. Tear
// and Garble take their choices from rnd. Faults stay as they are.
func (f *FS) PowerLoss(loss Loss, rnd *rand.Rand) (Lost, error) {
	f.mu.Lock()
	dir, mounted := f.dir, f.server != nil
	f.mu.Unlock()
	if err := f.Unmount(); err != nil {
		return Lost{}, fmt.Errorf("power loss: %w", err)
	}
	lost := f.lose(loss, rnd)
	if !mounted {
		return lost, nil
	}
	return lost, f.Mount(dir)
}

func (f *FS) lose(loss Loss, rnd *rand.Rand) Lost {
	f.mu.Lock()
	defer f.mu.Unlock()
	kept := 0
	if loss != Drop {
		kept = rnd.IntN(len(f.journal) + 1)
	}
	lost := Lost{Entries: len(f.journal) - kept}
	for _, c := range f.journal[:kept] {
		c.apply(disk)
	}
	f.journal = nil
	// In the order of their numbers, so that a seed gives the same losses.
	alive := map[uint64]*node{}
	var found []uint64
	for todo := []*node{f.root}; len(todo) > 0; {
		n := todo[0]
		todo = todo[1:]
		if alive[n.id] == nil {
			alive[n.id] = n
			found = append(found, n.id)
		}
		for _, name := range sortedKeys(n.entries[disk]) {
			todo = append(todo, n.entries[disk][name])
		}
	}
	slices.Sort(found)
	for _, n := range f.nodes {
		n.linked = false
	}
	for _, id := range found {
		n := alive[id]
		n.linked = true
		lost.Sectors += n.lose(loss, rnd)
	}
	f.nodes = alive
	return lost
}
