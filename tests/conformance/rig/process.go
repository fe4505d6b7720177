package rig

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	// stopTimeout is how long a process may take to end after SIGTERM.
	stopTimeout = 5 * time.Second
	// maxLine is the longest line of output that is passed on whole.
	maxLine = 1 << 20
	// tailLines is how many of the last lines an error shows.
	tailLines = 20
)

// Options are what a process gets besides its arguments.
type Options struct {
	Env []string
	// Files become the descriptors 3, 4 and so on.
	Files []*os.File
	// Stdout and Stderr get each line, from a goroutine of their own.
	Stdout, Stderr func(line string)
}

// Process is a running child. It ends with its parent.
type Process struct {
	cmd  *exec.Cmd
	name string
	done chan struct{}
	err  error

	mu   sync.Mutex
	tail []string
}

// Find returns the path of a program. Many distributions leave sbin, where
// nginx and HAProxy are, out of a user's PATH.
func Find(name string) (string, error) {
	if path, err := exec.LookPath(name); err == nil {
		return path, nil
	}
	for _, dir := range []string{"/usr/local/sbin", "/usr/sbin", "/sbin"} {
		if path, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("%s is not installed; run: sudo make setup", name)
}

// Start starts a program. The caller must Stop it.
func Start(path string, args []string, o Options) (*Process, error) {
	p := &Process{name: filepath.Base(path), done: make(chan struct{}), cmd: exec.Command(path, args...)}
	p.cmd.Env = append(os.Environ(), o.Env...)
	p.cmd.ExtraFiles = o.Files
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	stdout, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", p.name, err)
	}
	stderr, err := p.cmd.StderrPipe()
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", p.name, err)
	}
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", p.name, err)
	}
	if err := unblock(o.Files); err != nil {
		return nil, errors.Join(fmt.Errorf("start %s: %w", p.name, err), p.cmd.Process.Kill())
	}
	var reading sync.WaitGroup
	reading.Go(func() { p.read(stdout, o.Stdout) })
	reading.Go(func() { p.read(stderr, o.Stderr) })
	go func() {
		reading.Wait()
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

// unblock undoes what passing a file does: it makes it blocking, for the child
// too, and nginx trusts what it is given: a worker that loses the race for a
// connection would wait in accept.
func unblock(files []*os.File) error {
	for _, f := range files {
		raw, err := f.SyscallConn()
		if err != nil {
			return err
		}
		var failed error
		err = raw.Control(func(fd uintptr) { failed = syscall.SetNonblock(int(fd), true) })
		if err := errors.Join(err, failed); err != nil {
			return err
		}
	}
	return nil
}

func (p *Process) read(from io.Reader, to func(string)) {
	lines := bufio.NewScanner(from)
	lines.Buffer(make([]byte, 0, 64<<10), maxLine)
	for lines.Scan() {
		if to != nil {
			to(lines.Text())
			continue
		}
		p.mu.Lock()
		if p.tail = append(p.tail, lines.Text()); len(p.tail) > tailLines {
			p.tail = p.tail[1:]
		}
		p.mu.Unlock()
	}
	_, _ = io.Copy(io.Discard, from) // a line was too long: the process must not block
}

// PID is the process's.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// failure tells how a process ended that should run.
func (p *Process) failure() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return fmt.Errorf("%s ended: %w\n%s", p.name, p.err, strings.Join(p.tail, "\n"))
}

// Stop ends the process: politely first. An error means that it had ended by
// itself, or had to be killed.
func (p *Process) Stop() error {
	select {
	case <-p.done:
		return p.failure()
	default:
	}
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("stop %s: %w", p.name, err)
	}
	timeout := time.NewTimer(stopTimeout)
	defer timeout.Stop()
	select {
	case <-p.done:
		return nil
	case <-timeout.C:
	}
	err := p.cmd.Process.Kill()
	<-p.done
	return errors.Join(fmt.Errorf("%s did not end within %s of SIGTERM", p.name, stopTimeout), err)
}
