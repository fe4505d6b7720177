package main_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestReferenceNamesEveryCommand: what can be typed is in docs/reference/meshctl.md.
func TestReferenceNamesEveryCommand(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile(filepath.Join("..", "..", "docs", "reference", "meshctl.md"))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if out, err := exec.Command(filepath.Join(bin, "meshctl"), "man", dir).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	manuals, err := filepath.Glob(filepath.Join(dir, "meshctl-*.1"))
	if err != nil || len(manuals) < 40 {
		t.Fatalf("%d manuals, %v", len(manuals), err)
	}
	for _, path := range manuals {
		name := strings.TrimSuffix(strings.TrimPrefix(filepath.Base(path), "meshctl-"), ".1")
		if strings.HasPrefix(name, "completion-") {
			continue // "completion SHELL"
		}
		command := strings.NewReplacer("can-i", "can-i", "list-peers", "list-peers", "-", " ").Replace(name)
		command = strings.Replace(command, "nodes ", "node ", 1)
		if !strings.Contains(string(page), "`"+command) {
			t.Errorf("the reference does not name %q", command)
		}
	}
}
