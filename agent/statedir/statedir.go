// Package statedir keeps an agent's private files: a directory that only its
// owner enters, files that only their owner reads, replaced whole or not at
// all, and sealed with a checksum so that damage is told from truth.
package statedir

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/google/renameio/v2"
)

const (
	dirMode  fs.FileMode = 0o700
	fileMode fs.FileMode = 0o600
)

// sealPrefix starts the first line of every sealed file. What follows the
// line is the content; a PEM reader skips the line.
const sealPrefix = "meshd-sha256:"

var (
	// ErrTooOpen is wrapped when a directory or file that must be private can
	// be entered or read by others.
	ErrTooOpen = errors.New("readable by others")
	// ErrCorrupt is wrapped when a sealed file does not match its checksum.
	ErrCorrupt = errors.New("damaged: its checksum does not match")
)

// Dir is a private directory. The zero Dir is not usable; see Open.
type Dir struct{ path string }

// Open makes the directory (and its parents) with mode 0700 if it is not
// there, and refuses one that others may enter or that another user owns: it
// wraps ErrTooOpen then.
func Open(path string) (Dir, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return Dir{}, fmt.Errorf("state directory %q: %w", path, err)
	}
	if err := os.MkdirAll(abs, dirMode); err != nil {
		return Dir{}, fmt.Errorf("make the state directory: %w", err)
	}
	info, err := os.Stat(abs)
	if err != nil {
		return Dir{}, fmt.Errorf("state directory: %w", err)
	}
	if !info.IsDir() {
		return Dir{}, fmt.Errorf("state directory %s is a file", abs)
	}
	if mode := info.Mode().Perm(); mode&^dirMode != 0 {
		return Dir{}, fmt.Errorf("state directory %s has mode %04o, it holds private keys: %w; run chmod 0700 %s", abs, mode, ErrTooOpen, abs)
	}
	if owner, ok := info.Sys().(*syscall.Stat_t); ok && int(owner.Uid) != os.Geteuid() {
		return Dir{}, fmt.Errorf("state directory %s belongs to uid %d, this process runs as uid %d: %w", abs, owner.Uid, os.Geteuid(), ErrTooOpen)
	}
	return Dir{path: abs}, nil
}

// Sub opens a directory inside d, under the same rules.
func (d Dir) Sub(name string) (Dir, error) { return Open(filepath.Join(d.path, name)) }

// Path returns the absolute path of a file in d, or of d itself for "".
func (d Dir) Path(name string) string { return filepath.Join(d.path, name) }

// Write seals data and replaces the file in one step: a reader, or a crash,
// sees the old content or the new, never a part. It returns when the content
// and the directory entry are on disk.
func (d Dir) Write(name string, data []byte) error {
	sum := sha256.Sum256(data)
	sealed := make([]byte, 0, len(sealPrefix)+2*len(sum)+1+len(data))
	sealed = append(sealed, sealPrefix...)
	sealed = hex.AppendEncode(sealed, sum[:])
	sealed = append(sealed, '\n')
	sealed = append(sealed, data...)
	if err := renameio.WriteFile(d.Path(name), sealed, fileMode, renameio.IgnoreUmask()); err != nil {
		return fmt.Errorf("write %s: %w", d.Path(name), err)
	}
	return d.sync()
}

// Read returns what Write wrote. It wraps fs.ErrNotExist when there is no such
// file, ErrTooOpen when others may read it, ErrCorrupt when it was damaged.
func (d Dir) Read(name string) ([]byte, error) {
	path := d.Path(name)
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("read state: %w", err)
	}
	if mode := info.Mode().Perm(); mode&^fileMode != 0 {
		return nil, fmt.Errorf("%s has mode %04o: %w; run chmod 0600 %s", path, mode, ErrTooOpen, path)
	}
	sealed, err := os.ReadFile(path) //nolint:gosec // the path is the agent's own state
	if err != nil {
		return nil, fmt.Errorf("read state: %w", err)
	}
	data, err := Unseal(sealed)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return data, nil
}

// Unseal checks the first line of a sealed file against the rest and returns
// the rest, which shares memory with sealed. Errors wrap ErrCorrupt.
func Unseal(sealed []byte) ([]byte, error) {
	rest, ok := bytes.CutPrefix(sealed, []byte(sealPrefix))
	if !ok {
		return nil, fmt.Errorf("%w (no seal)", ErrCorrupt)
	}
	line, data, ok := bytes.Cut(rest, []byte{'\n'})
	sum := sha256.Sum256(data)
	if !ok || !bytes.Equal(line, hex.AppendEncode(nil, sum[:])) {
		return nil, ErrCorrupt
	}
	return data, nil
}

// Remove deletes a file; one that is not there is no error.
func (d Dir) Remove(name string) error {
	if err := os.Remove(d.Path(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove state: %w", err)
	}
	return d.sync()
}

// Names lists the files of d that end in suffix, sorted.
func (d Dir) Names(suffix string) ([]string, error) {
	entries, err := os.ReadDir(d.path)
	if err != nil {
		return nil, fmt.Errorf("list state: %w", err)
	}
	var names []string
	for _, e := range entries {
		if e.Type().IsRegular() && filepath.Ext(e.Name()) == suffix && e.Name()[0] != '.' {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// sync makes changes of directory entries durable.
func (d Dir) sync() error {
	f, err := os.Open(d.path)
	if err != nil {
		return fmt.Errorf("sync state directory: %w", err)
	}
	err = f.Sync()
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("sync state directory: %w", err)
	}
	return nil
}
