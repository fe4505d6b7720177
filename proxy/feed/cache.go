package feed

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/google/renameio/v2"

	"github.com/meshd/meshd/proxy"
)

const (
	// planFile and keysFile are the files of a DiskCache. They are apart so that a plan which changes each second does not
	// write the keys each second.
	planFile = "plan"
	keysFile = "keys"
	// cacheMagic starts the first line of both, followed by the SHA-256 of the rest.
	cacheMagic = "mesh-proxy 1 sha256:"
	// maxCacheFile bounds what is read back.
	maxCacheFile = 256 << 20
)

var (
	// ErrCorrupt is wrapped when a file of the cache is not as it was written. Nothing of it is used.
	ErrCorrupt = errors.New("cache file is damaged")
	// ErrMode is wrapped when the cache may be read or written by others than its owner. mesh-proxy refuses to start with it.
	ErrMode = errors.New("mode is too wide")
)

// DiskCache keeps the last plan that was taken, and the keys, so that mesh-proxy boots alone. The directory has mode 0700, the
// files 0600; anything wider is refused, not repaired, because the keys must be taken for known to others. Files are
// replaced as a whole: a crash leaves the old one or the new one. One process uses a directory at a time.
type DiskCache struct {
	dir string
}

// NewDiskCache returns the cache in a directory, which is made when it is first needed.
func NewDiskCache(dir string) *DiskCache { return &DiskCache{dir: dir} }

// CheckMode makes the directory if there is none, and tells whether it and its files are for their owner alone. Errors about
// that wrap ErrMode.
func (d *DiskCache) CheckMode() error {
	if err := os.MkdirAll(d.dir, 0o700); err != nil {
		return fmt.Errorf("make the state directory: %w", err)
	}
	for _, path := range []string{d.dir, d.path(planFile), d.path(keysFile)} {
		stat := os.Lstat
		if path == d.dir { // which may be a link, as systemd makes one for a dynamic user
			stat = os.Stat
		}
		info, err := stat(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("check the state directory: %w", err)
		}
		want, isDir := fs.FileMode(0o600), path == d.dir
		if isDir {
			want = 0o700
		}
		if info.IsDir() != isDir || !isDir && !info.Mode().IsRegular() {
			return fmt.Errorf("%w: %s is of another kind than expected: %s", ErrMode, path, info.Mode())
		}
		if info.Mode().Perm()&^want != 0 {
			return fmt.Errorf("%w: %s has %#o; its keys may be known to others: renew them, then chmod %#o", ErrMode, path, info.Mode().Perm(), want)
		}
	}
	return nil
}

// Plan returns the parts that SavePlan wrote. Errors wrap ErrCorrupt, or fs.ErrNotExist if there are none.
func (d *DiskCache) Plan() ([]proxy.Part, error) { return load[proxy.Part](d, planFile) }

// Keys returns the keys that SaveKeys wrote. Errors wrap ErrCorrupt, or fs.ErrNotExist if there are none.
func (d *DiskCache) Keys() ([]Key, error) { return load[Key](d, keysFile) }

// SavePlan replaces the plan. It returns once the plan is on the disk.
func (d *DiskCache) SavePlan(parts []proxy.Part) error { return save(d, planFile, parts) }

// SaveKeys replaces the keys. It returns once they are on the disk.
func (d *DiskCache) SaveKeys(keys []Key) error { return save(d, keysFile, keys) }

func (d *DiskCache) path(name string) string { return filepath.Join(d.dir, name) }

func save[T any](d *DiskCache, name string, content []T) error {
	body, err := json.Marshal(content)
	if err != nil {
		return fmt.Errorf("save %s: %w", d.path(name), err)
	}
	data := make([]byte, 0, len(body)+len(cacheMagic)+2*sha256.Size+1)
	sum := sha256.Sum256(body)
	data = append(data, cacheMagic...)
	data = hex.AppendEncode(data, sum[:])
	data = append(data, '\n')
	data = append(data, body...)
	err = renameio.WriteFile(d.path(name), data, 0o600, renameio.WithTempDir(d.dir), renameio.WithStaticPermissions(0o600))
	if err != nil {
		return fmt.Errorf("save %s: %w", d.path(name), err)
	}
	return d.sync()
}

// sync makes a rename durable.
func (d *DiskCache) sync() error {
	dir, err := os.Open(d.dir)
	if err != nil {
		return fmt.Errorf("sync the state directory: %w", err)
	}
	err = dir.Sync()
	if err := errors.Join(err, dir.Close()); err != nil {
		return fmt.Errorf("sync the state directory: %w", err)
	}
	return nil
}

func load[T any](d *DiskCache, name string) ([]T, error) {
	path := d.path(name)
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("load the cache: %w", err)
	}
	if info.Size() > maxCacheFile {
		return nil, fmt.Errorf("%w: %s has %d bytes, at most %d are read", ErrCorrupt, path, info.Size(), maxCacheFile)
	}
	data, err := os.ReadFile(path) //nolint:gosec // a fixed name in our own directory
	if err != nil {
		return nil, fmt.Errorf("load the cache: %w", err)
	}
	content, err := decodeCache[T](data)
	if err != nil {
		return nil, fmt.Errorf("%w: %s: %w; it is not used, and is replaced by the next plan from the agent", ErrCorrupt, path, err)
	}
	return content, nil
}

func decodeCache[T any](data []byte) ([]T, error) {
	rest, ok := bytes.CutPrefix(data, []byte(cacheMagic))
	if !ok {
		return nil, errors.New("it does not start as this version writes it")
	}
	digits, body, ok := bytes.Cut(rest, []byte{'\n'})
	sum := sha256.Sum256(body)
	if !ok || string(digits) != hex.EncodeToString(sum[:]) {
		return nil, errors.New("the checksum is wrong")
	}
	var content []T
	if err := json.Unmarshal(body, &content); err != nil {
		return nil, fmt.Errorf("read it as JSON: %w", err)
	}
	return content, nil
}
