package server

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/google/renameio/v2"

	"github.com/meshd/meshd/ca"
)

// ErrMode is wrapped when a directory or file is open to others than its owner.
var ErrMode = errors.New("not private")

const (
	dirMode     = 0o700
	privateMode = 0o600
	othersMode  = 0o077
)

// privateDir makes a directory for its owner only, or checks that it is one.
func privateDir(path string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil { //nolint:gosec // the parents are nobody's secret
		return fmt.Errorf("make the directory of %s: %w", path, err)
	}
	if err := os.Mkdir(path, dirMode); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("make the state directory: %w", err)
	}
	info, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("check the state directory: %w", err)
	}
	if !info.IsDir() {
		return fmt.Errorf("check the state directory: %s is no directory", path)
	}
	if info.Mode().Perm()&othersMode != 0 {
		return fmt.Errorf("%s has mode %04o: %w; run chmod 0700 %s", path, info.Mode().Perm(), ErrMode, path)
	}
	if owner, ok := info.Sys().(*syscall.Stat_t); ok && int(owner.Uid) != os.Geteuid() {
		return fmt.Errorf("%s belongs to user %d, and this is user %d: %w", path, owner.Uid, os.Geteuid(), ErrMode)
	}
	return nil
}

// readPrivate reads a file that nobody but its owner may read.
func readPrivate(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err //nolint:wrapcheck // tells the path
	}
	if info.Mode().Perm()&othersMode != 0 {
		return nil, fmt.Errorf("%s has mode %04o: %w; run chmod 0600 %s", path, info.Mode().Perm(), ErrMode, path)
	}
	return os.ReadFile(path) //nolint:gosec,wrapcheck // the operator's own path, which the error tells
}

// writePrivate writes a file of mode 0600: all of it, on disk, or nothing.
func writePrivate(path string, data []byte) error {
	if err := renameio.WriteFile(path, data, privateMode, renameio.WithTempDir(filepath.Dir(path)), renameio.IgnoreUmask()); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	defer func() { _ = dir.Close() }() // only read
	if err := dir.Sync(); err != nil {
		return fmt.Errorf("write %s: sync its directory: %w", path, err)
	}
	return nil
}

// clusterKey reads the cluster key. One is made only for a server that never
// stored anything, in its own directory: without the old key its CA would be lost.
func clusterKey(config Config) (key ca.ClusterKey, made bool, err error) {
	path := config.ClusterKeyFile
	if path != "" {
		key, err = ca.ReadClusterKey(path)
		if errors.Is(err, fs.ErrNotExist) {
			return key, false, fmt.Errorf("%w; make it with meshctl operator keygen, or copy it from another server", err)
		}
		return key, false, err //nolint:wrapcheck // tells the path
	}
	path = filepath.Join(config.DataDir, "cluster.key")
	key, err = ca.ReadClusterKey(path)
	if !errors.Is(err, fs.ErrNotExist) {
		return key, false, err //nolint:wrapcheck // tells the path
	}
	if _, err := os.Stat(storeDir(config)); err == nil {
		return key, false, fmt.Errorf("%s is missing, and %s holds state that needs it: restore the key from your backup", path, storeDir(config))
	}
	key = ca.GenerateClusterKey()
	if err := ca.WriteClusterKey(path, key); err != nil {
		return key, false, err //nolint:wrapcheck // tells the path
	}
	return key, true, nil
}

func storeDir(config Config) string { return filepath.Join(config.DataDir, "store") }
