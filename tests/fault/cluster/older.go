package cluster

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// OlderPrograms is the folder of the programs that MainWithOlder built.
func OlderPrograms() string { return filepath.Join(programs, folderOlder) }

// buildOlder builds the programs of the commit that the file names into dir, from
// the repository's history.
func buildOlder(file, dir string) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return fmt.Errorf("read which version is the older one: %w", err)
	}
	commit := strings.TrimSpace(string(text))
	if out, err := exec.Command("git", "cat-file", "-e", commit+"^{commit}").CombinedOutput(); err != nil {
		return fmt.Errorf("find the commit %s of %s in this repository: a shallow clone does not have it, `git fetch --unshallow` does: %w %s", commit, file, err, out)
	}
	tree, err := os.MkdirTemp("", "meshd-older-")
	if err != nil {
		return fmt.Errorf("make a folder for the older version: %w", err)
	}
	defer os.RemoveAll(tree) //nolint:errcheck // a leftover in the temporary folder
	const extract = `cd "$(git rev-parse --show-toplevel)" && git archive "$0" | tar -x -C "$1"`
	if out, err := exec.Command("sh", "-c", extract, commit, tree).CombinedOutput(); err != nil {
		return fmt.Errorf("extract %s: %w\n%s", commit, err, out)
	}
	build := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-X main.version=older", "-o", filepath.Join(dir, folderOlder)+"/", "./cmd/...")
	build.Dir = tree
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build %s: %w\n%s", commit, err, out)
	}
	return nil
}
