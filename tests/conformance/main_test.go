// Package conformance_test sends what no honest client sends through real
// mesh-proxy processes to real servers, and holds what the servers saw against
// what policy allows. It needs no privilege: everything is on loopback.
package conformance_test

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// meshProxy is the path of the program under test, built from this tree.
var meshProxy string //nolint:gochecknoglobals // set once, by TestMain

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(run(m)) //nolint:forbidigo // this is main
}

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "mesh-conf-")
	if err != nil {
		fmt.Fprintln(os.Stderr, "tests/conformance:", err)
		return 1
	}
	defer os.RemoveAll(dir) //nolint:errcheck // a leftover in the temporary folder
	meshProxy = filepath.Join(dir, "mesh-proxy")
	if out, err := exec.Command("go", "build", "-o", meshProxy, "../../cmd/mesh-proxy").CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "tests/conformance: go build: %v\n%s", err, out)
		return 1
	}
	return m.Run()
}
