package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// family starts processes that take the place of this one.
//
// Whoever started mesh-proxy watches the process that it started. systemd can be told of another (MAINPID); every later process is
// made a child of systemd, as the first is, so that it learns of its end. Others can't be told: for them the first process stays
// until its successor ends, passes signals on, and ends as that one did. It is the parent of all later ones. How they learn that
// it is gone, and it which of them serves, is the lifeline, a socket that all of them inherit.
type family struct {
	systemd bool
	path    string
	args    []string
	// lifeline is the end that successors inherit; nil under systemd, and in a first process that has started none.
	lifeline *net.UnixConn
	child    bool // of a first process that is there

	// What follows is the first process's.
	own  *net.UnixConn // the other end
	mu   sync.Mutex
	pids map[int]bool // that live, as far as is known
	// serving is the process that serves, 0 while that is this one; codes are how those ended that are gone.
	serving int
	codes   map[int]int
	living  bool          // over is not closed
	started chan struct{} // has room for one
	over    chan struct{} // closed when the one that served is gone
	code    int           // its exit code
	// handed says that another process serves.
	handed bool
}

const (
	// linkFD and lifelineFD are the descriptors of a successor.
	linkFD     = 3
	lifelineFD = 4
	// heirFlag is the flag that makes a process a successor.
	heirFlag = "--heir"
	// signalExit and the signal are the exit code if the one that served was killed, as shells have it.
	signalExit = 128
)

// newFamily finds out how this process was started. The program is looked up again for each successor: an upgrade may have
// replaced it.
func newFamily(heir bool, args []string, env func(string) string) (*family, error) {
	f := &family{
		systemd: managed(heir, env), pids: map[int]bool{}, codes: map[int]int{}, living: true,
		started: make(chan struct{}, 1), over: make(chan struct{}),
	}
	path, err := exec.LookPath(args[0])
	if err == nil {
		path, err = filepath.Abs(path)
	}
	if err != nil {
		path, err = os.Executable()
	}
	if err != nil {
		return nil, fmt.Errorf("find out which program this is: %w", err)
	}
	f.path = path
	for _, arg := range args[1:] {
		if arg != heirFlag {
			f.args = append(f.args, arg)
		}
	}
	if heir && !f.systemd {
		f.child = true
		if f.lifeline, err = inherit(lifelineFD); err != nil {
			return nil, err
		}
	}
	return f, nil
}

// The environment of a process that systemd starts: where to notify it, how often, and who is meant (since version 248).
const (
	notifyVariable   = "NOTIFY_SOCKET"
	watchdogVariable = "WATCHDOG_"
	execPIDVariable  = "SYSTEMD_EXEC_PID"
)

// managed reports whether systemd watches this process, rather than one that started it. The first process in a container is
// nobody's sibling.
func managed(heir bool, env func(string) string) bool {
	self := strconv.Itoa(os.Getpid())
	meant := env(execPIDVariable)
	return env(notifyVariable) != "" && (heir || self != "1" && (meant == "" || meant == self))
}

// environment is that of successors.
func (f *family) environment() []string {
	if f.systemd {
		return os.Environ()
	}
	return slices.DeleteFunc(os.Environ(), func(v string) bool {
		return strings.HasPrefix(v, notifyVariable+"=") || strings.HasPrefix(v, watchdogVariable)
	})
}

// inherit returns a unix socket that this process was started with.
func inherit(fd uintptr) (*net.UnixConn, error) {
	file := os.NewFile(fd, "inherited")
	if file == nil {
		return nil, fmt.Errorf("descriptor %d is not there: this flag is for mesh-proxy itself", fd)
	}
	nc, err := net.FileConn(file)
	_ = file.Close()
	if err != nil {
		return nil, fmt.Errorf("descriptor %d: %w: this flag is for mesh-proxy itself", fd, err)
	}
	uc, ok := nc.(*net.UnixConn)
	if !ok {
		_ = nc.Close()
		return nil, fmt.Errorf("descriptor %d is no unix socket: this flag is for mesh-proxy itself", fd)
	}
	return uc, nil
}

// start starts the program anew, with one end of a link.
func (f *family) start(link *os.File) (heir *os.Process, err error) {
	var pid int
	attr := &syscall.ProcAttr{Env: f.environment(), Files: []uintptr{0, 1, 2}, Sys: &syscall.SysProcAttr{}}
	if f.systemd || f.child {
		attr.Sys.Cloneflags = unix.CLONE_PARENT
	}
	if !f.systemd && f.lifeline == nil {
		if err := f.becomeFirst(); err != nil {
			return nil, err
		}
	}
	begin := func() { pid, err = syscall.ForkExec(f.path, append([]string{f.path, heirFlag}, f.args...), attr) } //nolint:gosec // itself
	if f.lifeline != nil {
		last := begin
		begin = func() {
			if failed := withFD(f.lifeline, func(fd uintptr) {
				attr.Files = append(attr.Files, fd)
				last()
			}); failed != nil {
				err = failed
			}
		}
	}
	failed := withFD(link, func(fd uintptr) {
		attr.Files = append(attr.Files, fd)
		begin()
	})
	if err = errors.Join(failed, err); err != nil {
		return nil, fmt.Errorf("start %s: %w", f.path, err)
	}
	if f.own != nil {
		f.mu.Lock()
		f.pids[pid] = true
		f.mu.Unlock()
		select {
		case f.started <- struct{}{}:
		default:
		}
	}
	return os.FindProcess(pid)
}

// withFD calls use with the descriptor of a file, without making it block.
func withFD(file syscall.Conn, use func(fd uintptr)) error {
	raw, err := file.SyscallConn()
	if err != nil {
		return err
	}
	return raw.Control(use)
}

// becomeFirst makes this process the one whose end its successors follow.
func (f *family) becomeFirst() error {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("make a lifeline: %w", err)
	}
	own, err := inherit(uintptr(pair[0]))
	if err != nil {
		_ = unix.Close(pair[1])
		return err
	}
	if f.lifeline, err = inherit(uintptr(pair[1])); err != nil {
		_ = own.Close()
		return err
	}
	f.own = own
	go f.listen()
	go f.reap()
	return nil
}

// serve tells the first process that this one serves now.
func (f *family) serve() {
	if f.child {
		_, _ = f.lifeline.Write(binary.BigEndian.AppendUint32(nil, uint32(os.Getpid()))) //nolint:gosec // a PID; without a first process nobody asks
	}
}

// orphaned calls then when the first process is gone. It does nothing in others than its successors.
func (f *family) orphaned(then func()) {
	if !f.child {
		return
	}
	go func() {
		_, _ = io.Copy(io.Discard, f.lifeline) // nothing is ever sent
		then()
	}()
}

// listen notes which successor serves.
func (f *family) listen() {
	var pid [4]byte
	for {
		if _, err := io.ReadFull(f.own, pid[:]); err != nil {
			return
		}
		f.mu.Lock()
		f.serving = int(binary.BigEndian.Uint32(pid[:]))
		if _, gone := f.codes[f.serving]; !gone {
			f.pids[f.serving] = true
		}
		f.follow()
		f.mu.Unlock()
	}
}

// follow tells if the one that served is gone. f.mu is held.
func (f *family) follow() {
	code, gone := f.codes[f.serving]
	if !gone || !f.living {
		return
	}
	f.living, f.code = false, code
	close(f.over)
}

// leave notes that another process has taken over from this one.
func (f *family) leave() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.handed = true
}

// left reports whether leave was called.
func (f *family) left() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.handed
}

// wait waits for the end of the process that serves, if this is the first and another does, and returns the exit code.
func (f *family) wait() int {
	if f.own == nil || !f.left() {
		return 0
	}
	<-f.over
	return f.code
}

// reap waits for every process that is a child of this one.
func (f *family) reap() {
	for range f.started {
		for {
			var status syscall.WaitStatus
			pid, err := syscall.Wait4(-1, &status, 0, nil)
			if errors.Is(err, syscall.EINTR) {
				continue
			}
			if err != nil {
				break // there is none
			}
			f.gone(pid, status)
		}
	}
}

func (f *family) gone(pid int, status syscall.WaitStatus) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.pids, pid)
	f.codes[pid] = status.ExitStatus()
	if status.Signaled() {
		f.codes[pid] = signalExit + int(status.Signal())
	}
	f.follow()
}

// signal passes a signal on to all processes that came after the first.
func (f *family) signal(sig syscall.Signal) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for pid := range f.pids {
		_ = syscall.Kill(pid, sig) // it is gone otherwise, and is not reaped yet
	}
}

// mainPID is what tells systemd whom to watch.
func mainPID(pid int) string { return "MAINPID=" + strconv.Itoa(pid) }
