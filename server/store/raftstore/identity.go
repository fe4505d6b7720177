package raftstore

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/meshd/meshd/server/store"
)

// instanceFile holds what tells a state directory from the one that was there
// before: 8 hexadecimal digits.
const instanceFile = "instance"

const instanceDigits = 8

// Identify returns the ID of the server called name whose state directory is dir:
// the name and the instance of the directory, which is made when the directory is
// empty. So a server that has lost its state is another member of the cluster,
// and can't vote a second time or be taken for one that holds what it has
// acknowledged. A directory that has a state but no instance is from before there
// were several servers; its ID is the name.
func Identify(dir, name string) (string, error) {
	if name == "" || strings.ContainsAny(name, "./\x00 ") {
		return "", fmt.Errorf("%w: %q is not the name of a server", store.ErrInvalid, name)
	}
	if err := makePrivate(dir); err != nil {
		return "", err
	}
	path := filepath.Join(dir, instanceFile)
	b, err := os.ReadFile(path) //nolint:gosec // a fixed name in the operator's directory
	switch {
	case err == nil:
		instance := strings.TrimSuffix(string(b), "\n")
		if raw, err := hex.DecodeString(instance); err != nil || len(raw)*2 != instanceDigits {
			return "", damaged(fmt.Errorf("%s does not hold %d hexadecimal digits", path, instanceDigits), dir)
		}
		return name + "." + instance, nil
	case !errors.Is(err, fs.ErrNotExist):
		return "", fmt.Errorf("read the instance of the state directory: %w", err)
	}
	if used, err := os.ReadDir(filepath.Join(dir, "wal")); err == nil && len(used) > 0 {
		return name, nil
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("look for a state: %w", err)
	}
	var random [instanceDigits / 2]byte
	_, _ = rand.Read(random[:]) // never fails: crypto/rand.Read ends the process instead
	instance := hex.EncodeToString(random[:])
	if err := writeFile(path, []byte(instance+"\n")); err != nil {
		return "", fmt.Errorf("write the instance of the state directory: %w", err)
	}
	return name + "." + instance, nil
}

// writeFile makes a file with content, or leaves things as they were.
func writeFile(path string, content []byte) (err error) {
	f, err := os.OpenFile(path+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600) //nolint:gosec // beside a file of the operator's directory
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return errors.Join(err, os.Remove(path+".new"))
	}
	if err := os.Rename(path+".new", path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(dir string) error {
	d, err := os.Open(dir) //nolint:gosec // the operator's directory
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
