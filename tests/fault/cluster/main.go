// Package cluster runs clusters of real servers that can be broken, each server a
// host of its own, and clients that write down what they did and saw.
//
// Tests call Main in their TestMain. Row runs a test once with each seed that
// failed before, which the package's file seeds keeps, and FAULTRUNS times (1) with
// a new one; Run.Rounds goes on breaking things for FAULTTIME.
package cluster

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/meshd/meshd/tests/machines"
)

// programs is the folder of the programs under test, built from this tree.
var programs string //nolint:gochecknoglobals // set once, by Main

// programsEnv hands the folder to the process that runs in the namespaces.
const programsEnv = "MESHD_FAULT_PROGRAMS"

// Main is the TestMain of a package that breaks clusters: it builds the programs,
// and runs the tests in a network namespace of their own. It returns the exit code.
func Main(m *testing.M) int {
	flag.Parse()
	return run(m, func(string) error { return nil })
}

// MainWithOlder is Main for a package that also takes programs of an older version,
// from OlderPrograms: those of the commit that a file names.
func MainWithOlder(m *testing.M, file string) int {
	flag.Parse()
	return run(m, func(dir string) error { return buildOlder(file, dir) })
}

// Program returns the path of a program that was built from this tree, with the
// build tag fault if faulty.
func Program(name string, faulty bool) string {
	if faulty {
		return filepath.Join(programs, folderFaulty, name)
	}
	return filepath.Join(programs, folderNormal, name)
}

// Folders of programs.
const (
	folderNormal = "normal"
	folderFaulty = "faulty" // with the build tag fault
	folderSkewed = "skewed" // with a clock that can be set
	folderOlder  = "older"  // of an older version
)

// say tells what no test can: there is none yet.
func say(format string, args ...any) {
	_, _ = fmt.Fprintf(os.Stderr, "tests/fault: "+format+"\n", args...)
}

func run(m *testing.M, more func(dir string) error) int {
	if os.Geteuid() != 0 {
		say("network namespaces need root; run `sudo make fault`. Nothing was tested here.")
		return 0
	}
	programs = os.Getenv(programsEnv)
	if programs == "" {
		if err := begin(more); err != nil {
			say("%v", err)
		}
		return 1
	}
	if err := machines.Isolate(); err != nil { // it does nothing: this is inside
		say("%v", err)
		return 1
	}
	defer os.RemoveAll(programs) //nolint:errcheck // a leftover in the temporary folder
	return m.Run()
}

// begin builds the programs and goes on in namespaces; it returns only if that
// fails.
func begin(more func(dir string) error) error {
	dir, err := os.MkdirTemp("", "meshd-fault-")
	if err != nil {
		return fmt.Errorf("make a folder for the programs: %w", err)
	}
	for _, build := range [][]string{
		{"build", "-o", filepath.Join(dir, folderNormal) + "/", "github.com/meshd/meshd/cmd/..."},
		{"build", "-tags", "fault", "-o", filepath.Join(dir, folderFaulty) + "/", "github.com/meshd/meshd/cmd/..."},
	} {
		if out, err := exec.Command("go", build...).CombinedOutput(); err != nil {
			_ = os.RemoveAll(dir)
			return fmt.Errorf("go %v: %w\n%s", build, err, out)
		}
	}
	if err := more(dir); err != nil {
		_ = os.RemoveAll(dir)
		return err
	}
	if err := os.Setenv(programsEnv, dir); err != nil {
		return fmt.Errorf("name the programs: %w", err)
	}
	return machines.Isolate() //nolint:wrapcheck // it says what it did
}
