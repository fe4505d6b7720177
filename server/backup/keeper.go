package backup

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/server/store"
)

// ErrRoom is wrapped when the file system has too little room for a snapshot.
var ErrRoom = errors.New("not enough room")

const (
	suffix    = ".snapshot"
	unfinish  = ".unfinished-*"
	timeForm  = "20060102T150405Z"
	retryTime = time.Minute
	// reserve is what a snapshot leaves free on its file system, which may be that
	// of the log.
	reserve = 64 << 20
)

// Schedule says how often snapshots are taken, and which are kept.
type Schedule struct {
	// Interval is the time between two; 0 takes none.
	Interval time.Duration
	// Retain is how many of the newest are kept. Of those before, the last of each
	// day is kept, for Days days.
	Retain, Days int
	// MaxBytes bounds the size of all together: the oldest go first, the newest
	// stays whatever its size.
	MaxBytes int64
}

// Keeper takes snapshots into a folder and removes old ones. It is safe for
// concurrent use.
type Keeper struct {
	dir      string
	schedule func() Schedule
	changed  func() <-chan struct{}
	engine   store.Engine
	cluster  Cluster
	log      *slog.Logger

	mu    sync.Mutex
	stats Stats
}

// Stats is what a Keeper has done since it was made.
type Stats struct {
	// Last is when the newest snapshot of the folder was taken; Size its length in
	// bytes. Kept is how many there are. They are known after the first attempt.
	Last time.Time
	Size int64
	Kept int
	// Taken and Failed count attempts.
	Taken, Failed int
}

// NewKeeper returns a Keeper of dir. The schedule is asked for before each wait,
// and again when the channel that changed returned is closed.
func NewKeeper(dir string, schedule func() Schedule, changed func() <-chan struct{}, e store.Engine, c Cluster, log *slog.Logger) *Keeper {
	return &Keeper{dir: dir, schedule: schedule, changed: changed, engine: e, cluster: c, log: log}
}

// Stats returns what was done so far.
func (k *Keeper) Stats() Stats {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.stats
}

// Run takes a snapshot whenever the newest in the folder is older than the
// interval, until ctx ends, and returns nil then. A failure is logged, counted,
// and followed by another attempt a minute later. One member of a cluster at a
// time needs to run it.
func (k *Keeper) Run(ctx context.Context) error {
	failed := false
	for {
		changed, schedule := k.changed(), k.schedule()
		wait := retryTime
		if !failed {
			wait = k.due(schedule)
		}
		var timer <-chan time.Time
		if schedule.Interval > 0 {
			timer = time.After(wait)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
			continue
		case <-timer:
		}
		path, err := k.Take(ctx, time.Now())
		if failed = err != nil; failed && ctx.Err() == nil {
			k.log.ErrorContext(ctx, "no snapshot could be taken; trying again in a minute", slog.String("dir", k.dir), slog.Any("error", err))
		} else if err == nil {
			k.log.InfoContext(ctx, "a snapshot was taken", slog.String("path", path), slog.Int64("bytes", k.Stats().Size))
		}
	}
}

// due is how long the newest snapshot is still new enough.
func (k *Keeper) due(s Schedule) time.Duration {
	files, err := k.files()
	if err != nil || len(files) == 0 {
		return 0
	}
	k.note(files)
	return max(0, min(s.Interval, time.Until(files[0].taken.Add(s.Interval)))) // a clock that was set back delays by one interval
}

// Take takes a snapshot now, verifies it by reading it back, and only then removes
// those that the schedule does not keep. A file appears under its name when all of
// it is on disk.
func (k *Keeper) Take(ctx context.Context, now time.Time) (string, error) {
	path, err := k.take(ctx, now)
	k.mu.Lock()
	if err != nil {
		k.stats.Failed++
	} else {
		k.stats.Taken++
	}
	k.mu.Unlock()
	if err != nil {
		return "", err
	}
	return path, k.prune(now)
}

func (k *Keeper) take(ctx context.Context, now time.Time) (path string, err error) {
	if err := k.prepare(); err != nil {
		return "", err
	}
	file, err := os.CreateTemp(k.dir, unfinish) // mode 0600
	if err != nil {
		return "", fmt.Errorf("take a snapshot: %w", err)
	}
	defer func() {
		_ = file.Close() // closed before, unless it failed
		if err != nil {
			_ = os.Remove(file.Name()) // renamed, unless it failed
		}
	}()
	header, err := Save(ctx, file, k.engine, k.cluster, now)
	if err != nil {
		return "", err
	}
	if err := errors.Join(file.Sync(), file.Close()); err != nil {
		return "", fmt.Errorf("take a snapshot: %w", err)
	}
	if err := verify(file.Name(), k.cluster.Key); err != nil {
		return "", fmt.Errorf("read the snapshot back: %w", err)
	}
	path = filepath.Join(k.dir, fmt.Sprintf("%s-%d%s", header.Created.Format(timeForm), header.Position.Revision, suffix))
	if err := os.Rename(file.Name(), path); err != nil {
		return "", fmt.Errorf("take a snapshot: %w", err)
	}
	if err := syncDir(k.dir); err != nil {
		return "", fmt.Errorf("take a snapshot: %w", err)
	}
	return path, nil
}

// prepare makes the folder, takes away what a crash has left, and looks for room.
func (k *Keeper) prepare() error {
	if err := os.MkdirAll(k.dir, 0o700); err != nil {
		return fmt.Errorf("make the folder for snapshots: %w", err)
	}
	left, err := filepath.Glob(filepath.Join(k.dir, unfinish))
	if err != nil {
		return fmt.Errorf("look for unfinished snapshots: %w", err)
	}
	for _, path := range left {
		if err := os.Remove(path); err != nil {
			return fmt.Errorf("remove an unfinished snapshot: %w", err)
		}
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(k.dir, &fs); err != nil {
		return fmt.Errorf("look for room in %s: %w", k.dir, err)
	}
	free, want := int64(fs.Bavail)*fs.Bsize, k.Stats().Size+reserve //nolint:gosec // a file system's size
	if free < want {
		return fmt.Errorf("take a snapshot in %s: %w: %d MiB are free, and %d MiB are left to the log", k.dir, ErrRoom, free>>20, want>>20)
	}
	return nil
}

func verify(path string, key ca.ClusterKey) error {
	file, err := os.Open(path) //nolint:gosec // just written
	if err != nil {
		return err //nolint:wrapcheck // the caller says what for
	}
	defer func() { _ = file.Close() }() // only read
	_, err = Inspect(file, key)
	return err
}

func syncDir(path string) error {
	dir, err := os.Open(path) //nolint:gosec // the server's own folder
	if err != nil {
		return err //nolint:wrapcheck // the caller says what for
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// saved is a file in the folder.
type saved struct {
	path  string
	taken time.Time
	size  int64
}

// files lists the snapshots, the newest first. Files that are named otherwise are
// somebody else's.
func (k *Keeper) files() ([]saved, error) {
	entries, err := os.ReadDir(k.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list snapshots: %w", err)
	}
	var out []saved
	for _, e := range entries {
		stamp, _, ok := strings.Cut(e.Name(), "-")
		taken, err := time.Parse(timeForm, stamp)
		if !ok || err != nil || !strings.HasSuffix(e.Name(), suffix) || !e.Type().IsRegular() {
			continue
		}
		info, err := e.Info()
		if err != nil {
			continue // removed meanwhile
		}
		out = append(out, saved{path: filepath.Join(k.dir, e.Name()), taken: taken, size: info.Size()})
	}
	slices.SortFunc(out, func(a, b saved) int {
		return cmp.Or(b.taken.Compare(a.taken), strings.Compare(b.path, a.path))
	})
	return out, nil
}

func (k *Keeper) prune(now time.Time) error {
	files, err := k.files()
	if err != nil {
		return err
	}
	keep, drop := k.schedule().keep(files, now)
	for _, f := range drop {
		if err := os.Remove(f.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove an old snapshot: %w", err)
		}
	}
	k.note(keep)
	return nil
}

func (k *Keeper) note(files []saved) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.stats.Kept = len(files); len(files) > 0 {
		k.stats.Last, k.stats.Size = files[0].taken, files[0].size
	}
}

// keep divides files, the newest first.
func (s Schedule) keep(files []saved, now time.Time) (keep, drop []saved) {
	var total int64
	lastDay := ""
	full := false
	for i, f := range files {
		day := f.taken.Format(time.DateOnly)
		recent := i < max(1, s.Retain)
		daily := day != lastDay && now.Sub(f.taken) <= time.Duration(s.Days)*24*time.Hour
		full = full || i > 0 && s.MaxBytes > 0 && total+f.size > s.MaxBytes
		if full || !recent && !daily {
			drop = append(drop, f)
			continue
		}
		keep, total, lastDay = append(keep, f), total+f.size, day
	}
	return keep, drop
}
