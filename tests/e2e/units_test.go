package e2e_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestUnits: systemd understands the units that come with the programs, and finds
// them exposed no more than their pages say.
func TestUnits(t *testing.T) {
	t.Parallel()
	for unit, exposure := range map[string]string{ // the threshold, in tenths
		"cmd/meshd/systemd/meshd-server.service":    "20",
		"cmd/meshd/systemd/meshd-agent.service":     "35",
		"cmd/mesh-proxy/systemd/mesh-proxy.service": "20",
	} {
		text, err := os.ReadFile(filepath.Join("..", "..", unit))
		if err != nil {
			t.Fatal(err)
		}
		// The programs are looked for where they were built.
		path := filepath.Join(t.TempDir(), filepath.Base(unit))
		if err := os.WriteFile(path, []byte(strings.ReplaceAll(string(text), "/usr/local/bin/", bin+"/")), 0o600); err != nil {
			t.Fatal(err)
		}
		for _, args := range [][]string{
			{"security", "--offline=true", "--no-pager", "--threshold=" + exposure, path},
			{"verify", "--man=no", "--recursive-errors=no", path},
		} {
			out, err := exec.CommandContext(t.Context(), "systemd-analyze", args...).CombinedOutput()
			if err != nil || args[0] == "verify" && len(out) > 0 {
				t.Errorf("systemd-analyze %s %s: %v\n%s", args[0], unit, err, out)
			}
		}
		if !strings.Contains(string(text), "# Exceptions, each with what it costs") || !strings.Contains(string(text), "RestartPreventExitStatus=2") {
			t.Errorf("%s: exceptions are not named, or a bad file is tried for ever", unit)
		}
	}
	for _, file := range []string{"cmd/meshd/systemd/meshd.sysusers", "cmd/mesh-proxy/systemd/mesh-proxy.sysusers"} {
		path, err := filepath.Abs(filepath.Join("..", "..", file))
		if err != nil {
			t.Fatal(err)
		}
		out, err := exec.CommandContext(t.Context(), "systemd-sysusers", "--dry-run", path).CombinedOutput()
		if err != nil {
			t.Errorf("%s: %v\n%s", file, err, out)
		}
	}
}
