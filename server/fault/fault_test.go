package fault_test

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/meshd/meshd/server/fault"
)

// childEnv makes TestChild do one thing and end.
const childEnv = "MESHD_FAULT_TEST_CHILD"

// TestChild is run by the tests below in a process of its own, because a process
// reads its environment once.
func TestChild(t *testing.T) {
	switch os.Getenv(childEnv) {
	case "check":
		if err := fault.Check(); err != nil {
			t.Fatal(err)
		}
	case "point":
		for range 3 {
			fault.Point(fault.ApplyBefore)
			fmt.Fprintln(os.Stderr, "passed")
		}
	case "err":
		for range 3 {
			if err := fault.Err(fault.ApplyBefore); err != nil {
				fmt.Fprintln(os.Stderr, err)
			}
		}
	case "bug":
		if fault.Bug(fault.SkipFsync) {
			fmt.Fprintln(os.Stderr, "planted")
		}
	case "look":
		fmt.Fprintln(os.Stderr, fault.SnapshotInterval(time.Minute))
	}
}

// The log is looked at as often as the environment says, in a build that can be broken.
func TestSnapshotInterval(t *testing.T) {
	t.Setenv(fault.EnvSnapshotInterval, "3s")
	want := time.Minute
	if fault.Enabled {
		want = 3 * time.Second
	}
	if out, err := child(t, "look", "", ""); err != nil || !strings.Contains(out, want.String()) {
		t.Errorf("%v\n%s", err, out)
	}
	t.Setenv(fault.EnvSnapshotInterval, "-3s")
	if out, err := child(t, "check", "", ""); fault.Enabled != (err != nil && strings.Contains(out, `"-3s": write a duration`)) {
		t.Errorf("%v\n%s", err, out)
	}
}

func child(t *testing.T, what, points, bugs string) (string, error) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), self, "-test.run=^TestChild$")
	cmd.Env = append(os.Environ(), childEnv+"="+what, fault.EnvPoints+"="+points, fault.EnvBugs+"="+bugs)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func TestEnvironment(t *testing.T) {
	for _, row := range []struct {
		name, what, points, bugs string
		want                     string // in the output of a build that can be broken
		fails                    bool
		not                      string
	}{
		{name: "nothing", what: "check", want: "PASS"},
		{name: "known", what: "check", points: "apply-before=panic:2, vote-after=hang", bugs: "skip-fsync,apply-twice", want: "PASS"},
		{name: "unknown point", what: "check", points: "aply-before=panic", want: `no failpoint is called "aply-before"`, fails: true},
		{name: "unknown action", what: "check", points: "apply-before=explode", want: `not "explode"`, fails: true},
		{name: "no count", what: "check", points: "apply-before=panic:0", want: "not a positive number", fails: true},
		{name: "unknown bug", what: "check", bugs: "skip-fsynk", want: `no bug is called "skip-fsynk"`, fails: true},
		{name: "panic at the second", what: "point", points: "apply-before=panic:2", want: "failpoint apply-before, hit 2: panic", fails: true},
		{name: "exit", what: "point", points: "apply-before=exit", want: "failpoint apply-before, hit 1: exit", fails: true, not: "passed"},
		{name: "another point", what: "point", points: "apply-after=exit", want: "passed\npassed\npassed"},
		{name: "error from the second on", what: "err", points: "apply-before=error:2", want: "injected failure: failpoint apply-before, hit 3"},
		{name: "a point passes over an error", what: "point", points: "apply-before=error", want: "passed\npassed\npassed"},
		{name: "bug", what: "bug", bugs: "skip-fsync", want: "planted"},
		{name: "another bug", what: "bug", bugs: "apply-twice", want: "PASS", not: "planted"},
	} {
		t.Run(row.name, func(t *testing.T) {
			out, err := child(t, row.what, row.points, row.bugs)
			if !fault.Enabled {
				if err != nil || strings.Contains(out, "planted") || strings.Contains(out, "failpoint") {
					t.Fatalf("a normal build obeys the environment: %v\n%s", err, out)
				}
				return
			}
			if row.fails != (err != nil) || !strings.Contains(out, row.want) || row.not != "" && strings.Contains(out, row.not) {
				t.Fatalf("%v\n%s", err, out)
			}
		})
	}
}

func TestNamesAreDistinct(t *testing.T) {
	seen := map[string]bool{}
	names := fault.Points()
	for _, bug := range fault.Bugs() {
		names = append(names, string(bug))
	}
	for _, name := range names {
		if seen[name] || name == "" || strings.ContainsAny(name, "=:, ") {
			t.Errorf("%q can't be used", name)
		}
		seen[name] = true
	}
}
