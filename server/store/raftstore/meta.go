package raftstore

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/hashicorp/raft-wal/metadb"
	"github.com/hashicorp/raft-wal/types"
	"golang.org/x/sys/unix"

	"github.com/meshd/meshd/server/store"
)

const (
	metaName   = "meta"
	metaOther  = "meta.other"
	metaBlock  = 16 << 10
	metaMagic  = "meshd-log-meta 1 "
	metaHeader = len(metaMagic) + 8 + 1 // the checksum and a line feed
)

// metaFile keeps what the log knows of its files, and Raft's term and vote: one
// small file, replaced as a whole, under one checksum. The database that raft-wal
// would use instead has checksums for two of its pages only: a flipped bit in the
// others is applied, or panics. Both are written when a file of the log begins or
// ends and when a vote is cast, which is rare.
//
// It implements types.MetaStore; Load comes first.
type metaFile struct {
	mu  sync.Mutex
	dir string
	now metaContent
}

type metaContent struct {
	Log    types.PersistentState
	Stable map[string][]byte
}

var _ types.MetaStore = (*metaFile)(nil)

// Load implements types.MetaStore. In an empty directory it begins.
func (m *metaFile) Load(dir string) (types.PersistentState, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.dir = dir
	// What a crash left between the two names and the disk: the file that is going to
	// be overwritten must not be the one that a power loss would bring back.
	if err := syncDir(dir); err != nil {
		return types.PersistentState{}, fmt.Errorf("sync the log's directory: %w", err)
	}
	data, err := os.ReadFile(filepath.Join(dir, metaName)) //nolint:gosec // a fixed name in the operator's directory
	switch {
	case err == nil:
		if m.now, err = decodeMeta(data); err != nil {
			return types.PersistentState{}, fmt.Errorf("read %s: %w", filepath.Join(dir, metaName), err)
		}
		// What is read may be in the kernel's cache only, after a sync that failed.
		if err := m.write(m.now); err != nil {
			return types.PersistentState{}, err
		}
	case !errors.Is(err, fs.ErrNotExist):
		return types.PersistentState{}, fmt.Errorf("read what the log knows of its files: %w", err)
	default:
		begun, err := m.begin()
		if err != nil {
			return types.PersistentState{}, err
		}
		if err := m.write(begun); err != nil {
			return types.PersistentState{}, err
		}
	}
	if err := os.Remove(filepath.Join(dir, metadb.FileName)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return types.PersistentState{}, fmt.Errorf("remove what %s replaces: %w", metaName, err)
	}
	return m.now.Log, nil
}

// begin returns what a directory without the file holds: nothing, or what an
// earlier version kept in raft-wal's own database.
func (m *metaFile) begin() (metaContent, error) {
	c := metaContent{Stable: map[string][]byte{}}
	if _, err := os.Stat(filepath.Join(m.dir, metadb.FileName)); err == nil {
		var old metadb.BoltMetaDB
		if c.Log, err = old.Load(m.dir); err != nil {
			return c, fmt.Errorf("read %s: %w: %w", metadb.FileName, store.ErrCorrupt, err)
		}
		for _, key := range []string{"CurrentTerm", "LastVoteTerm", "LastVoteCand"} { // Raft's, all of them
			value, err := old.GetStable([]byte(key))
			if err != nil {
				return c, errors.Join(fmt.Errorf("read %s: %w", metadb.FileName, err), old.Close())
			}
			if value != nil {
				c.Stable[key] = value
			}
		}
		return c, old.Close()
	}
	files, err := filepath.Glob(filepath.Join(m.dir, "*.wal"))
	if err == nil && len(files) > 0 {
		// The log would take them for leftovers and delete them.
		err = fmt.Errorf("%w: %s is missing in %s, which holds %d files of a log", store.ErrCorrupt, metaName, m.dir, len(files))
	}
	return c, err
}

// CommitState implements types.MetaStore.
func (m *metaFile) CommitState(log types.PersistentState) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.write(metaContent{Log: log, Stable: m.now.Stable})
}

// GetStable implements types.MetaStore.
func (m *metaFile) GetStable(key []byte) ([]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.now.Stable[string(key)], nil
}

// SetStable implements types.MetaStore.
func (m *metaFile) SetStable(key, value []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	next := metaContent{Log: m.now.Log, Stable: maps.Clone(m.now.Stable)}
	if value == nil {
		delete(next.Stable, string(key))
	} else {
		next.Stable[string(key)] = append([]byte{}, value...)
	}
	return m.write(next)
}

// Close implements types.MetaStore. There is nothing open.
func (*metaFile) Close() error { return nil }

// write replaces the file, durably, and then what GetStable reads. It needs no room
// on the disk: there are two files, both allocated; the other one is overwritten and
// changes its name with the first.
func (m *metaFile) write(c metaContent) error {
	data, err := encodeMeta(c)
	if err != nil {
		return err
	}
	if err := m.replace(data); err != nil {
		return fmt.Errorf("replace what the log knows of its files: %w", err)
	}
	m.now = c
	return nil
}

func (m *metaFile) replace(data []byte) error {
	path, other := filepath.Join(m.dir, metaName), filepath.Join(m.dir, metaOther)
	err := overwrite(other, data)
	if err == nil {
		err = unix.Renameat2(unix.AT_FDCWD, other, unix.AT_FDCWD, path, unix.RENAME_EXCHANGE)
	}
	switch {
	case err == nil:
		return syncDir(m.dir)
	case !slices.ContainsFunc([]error{unix.ENOENT, unix.EINVAL, unix.ENOSYS, unix.ENOSPC, unix.EDQUOT}, func(is error) bool { return errors.Is(err, is) }):
		return err
	}
	// The first time there is nothing to change names with, some file systems can't,
	// and a disk that was full from the beginning has the reserve only. Nothing has
	// changed yet.
	err = writeFile(path, data)
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		if err := os.Remove(filepath.Join(m.dir, reserveName)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("give up the reserve: %w", err)
		}
		err = writeFile(path, data)
	}
	return err
}

// overwrite replaces a file's content where it is, and syncs it.
func overwrite(path string, data []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o600) //nolint:gosec // a fixed name in the operator's directory
	if err != nil {
		return err //nolint:wrapcheck // tells the path
	}
	_, err = f.WriteAt(data, 0)
	if err == nil {
		err = f.Truncate(int64(len(data)))
	}
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// encodeMeta writes a line with the checksum of what follows it, then the content
// as JSON.
func encodeMeta(c metaContent) ([]byte, error) {
	body, err := json.Marshal(c)
	if err != nil {
		return nil, fmt.Errorf("encode what the log knows of its files: %w", err)
	}
	// Of a size that does not change from one to the next.
	body = append(body, bytes.Repeat([]byte{' '}, (metaBlock-(metaHeader+len(body))%metaBlock)%metaBlock)...)
	sum := crc32.Checksum(body, crc32.MakeTable(crc32.Castagnoli))
	return append(fmt.Appendf(nil, "%s%08x\n", metaMagic, sum), body...), nil
}

// decodeMeta takes exactly what encodeMeta writes.
func decodeMeta(data []byte) (metaContent, error) {
	c := metaContent{}
	if len(data) < metaHeader || !strings.HasPrefix(string(data), metaMagic) {
		return c, fmt.Errorf("%w: the first line is not that of such a file", store.ErrCorrupt)
	}
	header, body := string(data[:metaHeader]), data[metaHeader:]
	want := fmt.Sprintf("%s%08x\n", metaMagic, crc32.Checksum(body, crc32.MakeTable(crc32.Castagnoli)))
	if header != want {
		return c, fmt.Errorf("%w: its first line is %q, computed %q", store.ErrCorrupt, header, want)
	}
	if err := json.Unmarshal(body, &c); err != nil {
		return c, fmt.Errorf("%w: %w", store.ErrCorrupt, err)
	}
	if c.Stable == nil {
		c.Stable = map[string][]byte{}
	}
	return c, nil
}
