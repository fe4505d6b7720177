package machines

import (
	"context"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Process is a running daemon of a host. Its output is appended to a file.
type Process struct {
	Name string
	// Log is the path of its output.
	Log string

	cmd  *exec.Cmd
	done chan struct{}
	err  error
}

// tailLines is how much of its output a daemon of a failed test shows.
const tailLines = 40

// Start starts a daemon, which ends with the test at the latest. Its output is
// appended to LABEL.log in the host's folder.
func (h *Host) Start(label, name string, args ...string) *Process {
	h.T.Helper()
	p := &Process{cmd: h.Command(context.Background(), name, args...), Name: h.Name + " " + label, done: make(chan struct{})}
	p.Log = h.Path(label + ".log")
	out, err := os.OpenFile(p.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		h.T.Fatal(err)
	}
	p.cmd.Stdout, p.cmd.Stderr = out, out
	// ip netns exec replaces itself, so that the PID is the daemon's own.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	if err := spawn(p.cmd); err != nil {
		h.T.Fatal(err)
	}
	go func() {
		p.err = p.cmd.Wait()
		_ = out.Close()
		close(p.done)
	}()
	h.T.Cleanup(func() {
		p.Kill(syscall.SIGKILL)
		if h.T.Failed() {
			h.T.Logf("%s said:\n%s", p.Name, Tail(p.Log, tailLines))
		}
	})
	return p
}

// spawns starts commands on one thread that lives as long as the tests: Linux
// kills the children of a thread that ends (PR_SET_PDEATHSIG, prctl(2)), and
// threads of Host.Inside do end.
var spawns = sync.OnceValue(func() chan<- func() { //nolint:gochecknoglobals // there is one such thread
	work := make(chan func())
	go func() {
		runtime.LockOSThread()
		for f := range work {
			f()
		}
	}()
	return work
})

func spawn(cmd *exec.Cmd) error {
	done := make(chan error)
	spawns() <- func() { done <- cmd.Start() }
	return <-done
}

// PID is that of the daemon itself.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Done is closed when the process has ended; Err says how.
func (p *Process) Done() <-chan struct{} { return p.done }

// Err is how the process ended: nil after an exit with status 0. It is known once
// Done is closed.
func (p *Process) Err() error {
	<-p.done
	return p.err
}

// Running reports whether the process has not ended.
func (p *Process) Running() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// Kill sends a signal and, if it must end the process, waits for the end.
func (p *Process) Kill(sig syscall.Signal) {
	if !p.Running() {
		return
	}
	_ = p.cmd.Process.Signal(sig)
	if sig == syscall.SIGKILL {
		<-p.done
		_ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL) // its workers, such as nginx's
	}
}

// Stop asks the process to end and returns when it has.
func (p *Process) Stop(t *testing.T, within time.Duration) {
	t.Helper()
	p.Kill(syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(within):
		t.Fatalf("%s did not end within %s of SIGTERM:\n%s", p.Name, within, Tail(p.Log, tailLines))
	}
}

// Tail returns the last lines of a file, or what keeps it from being read.
func Tail(path string, lines int) string {
	data, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	all := strings.Split(strings.TrimRight(string(data), "\n"), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// Eventually asks f until it is satisfied (it returns "") and reports how long
// that took; after the limit it fails with f's last complaint.
func Eventually(t *testing.T, limit time.Duration, what string, f func() string) time.Duration {
	t.Helper()
	start := time.Now()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		complaint := f()
		took := time.Since(start)
		if complaint == "" {
			return took
		}
		if took > limit {
			t.Fatalf("%s: not within %s: %s", what, limit, complaint)
		}
		<-tick.C
	}
}
