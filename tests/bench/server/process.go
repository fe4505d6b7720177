package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

// stopTimeout is how long a process may take to end after SIGTERM.
const stopTimeout = 15 * time.Second

// process is a running child that writes its log into a file, as a daemon does.
type process struct {
	cmd  *exec.Cmd
	log  string
	done chan struct{}
	err  error
}

// launch starts a program. It ends with this one.
func launch(log, path string, args ...string) (*process, error) {
	out, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	p := &process{cmd: exec.Command(path, args...), log: log, done: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = out, out
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	err = p.cmd.Start()
	if err := errors.Join(err, out.Close()); err != nil {
		return nil, fmt.Errorf("start %s: %w", filepath.Base(path), err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

func (p *process) pid() int { return p.cmd.Process.Pid }

func (p *process) signal(s syscall.Signal) error { return p.cmd.Process.Signal(s) }

// alive returns how the process ended, if it did.
func (p *process) alive() error {
	select {
	case <-p.done:
		return fmt.Errorf("%s ended: %w\n%s", filepath.Base(p.cmd.Path), p.err, lastLines(p.log))
	default:
		return nil
	}
}

// kill ends the process as a crash does, and waits.
func (p *process) kill() error {
	err := p.signal(syscall.SIGKILL)
	<-p.done
	return err
}

// stop ends the process politely, or else with force.
func (p *process) stop() error {
	if err := p.signal(syscall.SIGTERM); errors.Is(err, os.ErrProcessDone) {
		return nil
	}
	timer := time.NewTimer(stopTimeout)
	defer timer.Stop()
	select {
	case <-p.done:
		return nil
	case <-timer.C:
		return errors.Join(fmt.Errorf("%s did not end within %s of SIGTERM", p.cmd.Path, stopTimeout), p.kill())
	}
}

// lastLines returns the end of a log.
func lastLines(path string) []byte {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil
	}
	const keep = 4096
	data = data[max(0, len(data)-keep):]
	_, rest, cut := bytes.Cut(data, []byte("\n"))
	if cut && len(data) == keep {
		return rest
	}
	return data
}
