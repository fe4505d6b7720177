// Package e2e_test runs the real binaries against real peers, each host in a
// network namespace of its own on one bridge.
package e2e_test

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// bin is the folder of the binaries under test, built from this tree.
var bin string //nolint:gochecknoglobals // set once, by TestMain

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(run(m)) //nolint:forbidigo // TestMain is the main of a test
}

// say tells what no test can: there is none yet.
func say(format string, args ...any) {
	_, _ = fmt.Fprintf(os.Stderr, "tests/e2e: "+format+"\n", args...)
}

func run(m *testing.M) int {
	if os.Geteuid() != 0 {
		say("network namespaces need root; run `sudo make e2e`. Nothing was tested here.")
		return 0
	}
	dir, err := os.MkdirTemp("", "meshd-e2e-")
	if err != nil {
		say("%v", err)
		return 1
	}
	defer os.RemoveAll(dir) //nolint:errcheck // a leftover in the temporary folder
	bin = filepath.Join(dir, "bin")
	build := exec.Command("go", "build", "-o", bin+"/", "../../cmd/...")
	if out, err := build.CombinedOutput(); err != nil {
		say("go build: %v\n%s", err, out)
		return 1
	}
	return m.Run()
}
