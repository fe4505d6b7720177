//go:build fault

package fault

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Enabled reports whether this build can be broken on purpose.
const Enabled = true

// ErrInjected is what Err returns at a failpoint that is armed with error.
var ErrInjected = errors.New("injected failure")

// Actions of a failpoint.
const (
	actionPanic = "panic"
	actionExit  = "exit"
	actionHang  = "hang"
	actionError = "error"
)

// plan is what the environment asks for.
type plan struct {
	points map[string]*armed
	bugs   map[Name]bool
	look   time.Duration // 0: as usual
	err    error
}

type armed struct {
	action string
	at     int64 // which hit
	hits   atomic.Int64
}

// current is read from the environment once, when it is first needed: a process
// is broken in one way from its start to its end.
var current = sync.OnceValue(func() *plan { return parse(os.Getenv(EnvPoints), os.Getenv(EnvBugs), os.Getenv(EnvSnapshotInterval)) })

func parse(points, bugs, look string) *plan {
	p := &plan{points: map[string]*armed{}, bugs: map[Name]bool{}}
	for spec := range fields(points) {
		name, action, _ := strings.Cut(spec, "=")
		action, count, counted := strings.Cut(action, ":")
		at := int64(1)
		if counted {
			n, err := strconv.ParseInt(count, 10, 64)
			if err != nil || n < 1 {
				p.err = errors.Join(p.err, fmt.Errorf("%s: %q: the count after the colon is not a positive number", EnvPoints, spec))
			}
			at = n
		}
		if !slices.Contains(Points(), name) {
			p.err = errors.Join(p.err, fmt.Errorf("%s: %q: no failpoint is called %q; there are %s", EnvPoints, spec, name, strings.Join(Points(), ", ")))
		}
		if !slices.Contains([]string{actionPanic, actionExit, actionHang, actionError}, action) {
			p.err = errors.Join(p.err, fmt.Errorf("%s: %q: the action is panic, exit, hang or error, not %q", EnvPoints, spec, action))
		}
		p.points[name] = &armed{action: action, at: at}
	}
	for name := range fields(bugs) {
		if !slices.Contains(Bugs(), Name(name)) {
			p.err = errors.Join(p.err, fmt.Errorf("%s: no bug is called %q; there are %v", EnvBugs, name, Bugs()))
		}
		p.bugs[Name(name)] = true
	}
	if look != "" {
		var err error
		if p.look, err = time.ParseDuration(look); err != nil || p.look <= 0 {
			p.err = errors.Join(p.err, fmt.Errorf("%s: %q: write a duration such as 1s", EnvSnapshotInterval, look))
		}
	}
	return p
}

// SnapshotInterval returns how often the log is looked at: as the environment says, or
// else as usual.
func SnapshotInterval(usual time.Duration) time.Duration {
	if look := current().look; look > 0 {
		return look
	}
	return usual
}

// fields yields the parts of a list with commas.
func fields(list string) func(func(string) bool) {
	return func(yield func(string) bool) {
		for part := range strings.SplitSeq(list, ",") {
			if part = strings.TrimSpace(part); part != "" && !yield(part) {
				return
			}
		}
	}
}

// Check returns an error when the environment asks for a failpoint or a bug that
// does not exist.
func Check() error { return current().err }

// Point fails here if the failpoint of that name is armed.
func Point(name string) { _ = Err(name) }

// Err is a Point that returns an error if the failpoint is armed with error.
func Err(name string) error {
	a := current().points[name]
	if a == nil {
		return nil
	}
	hit := a.hits.Add(1)
	if hit < a.at || hit > a.at && a.action != actionError {
		return nil
	}
	said := fmt.Sprintf("failpoint %s, hit %d: %s", name, hit, a.action)
	if a.action == actionPanic {
		panic(said)
	}
	if hit == a.at {
		_, _ = os.Stderr.WriteString(said + "\n") // a suite counts the points that were reached
	}
	switch a.action {
	case actionExit:
		_ = syscall.Kill(syscall.Getpid(), syscall.SIGKILL) // nothing may run after it
		select {}
	case actionHang:
		select {}
	}
	return fmt.Errorf("%w: %s", ErrInjected, said)
}

// Bug reports whether the bug of that name is planted.
func Bug(name Name) bool { return current().bugs[name] }
