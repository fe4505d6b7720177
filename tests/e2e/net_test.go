package e2e_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// network is a bridge in a namespace of its own, with hosts around it. Nothing
// on it reaches the machine's own network.
type network struct {
	prefix string
	bridge string // the bridge's namespace
	next   int
}

var networks atomic.Int32 //nolint:gochecknoglobals // keeps the names of parallel networks apart

func newNetwork(t *testing.T) *network {
	t.Helper()
	n := &network{prefix: fmt.Sprintf("m%d-%d", os.Getpid(), networks.Add(1)), next: 10}
	n.bridge = n.prefix + "-br"
	n.addNamespace(t, n.bridge)
	ip(t, "-n", n.bridge, "link", "add", "br0", "type", "bridge")
	ip(t, "-n", n.bridge, "link", "set", "br0", "up")
	return n
}

func (n *network) addNamespace(t *testing.T, name string) {
	t.Helper()
	ip(t, "netns", "add", name)
	t.Cleanup(func() { ip(t, "netns", "del", name) })
	ip(t, "-n", name, "link", "set", "lo", "up")
}

func ip(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
		t.Fatalf("ip %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// host is one machine: a namespace, an address and a folder.
type host struct {
	t    *testing.T
	name string
	ns   string
	addr string
	dir  string

	servers map[int]*process // by port, of applications
}

func (n *network) host(t *testing.T, name string) *host {
	t.Helper()
	h := &host{t: t, name: name, ns: n.prefix + "-" + name, addr: fmt.Sprintf("10.77.0.%d", n.next), dir: filepath.Join(t.TempDir(), name)}
	n.next++
	if err := os.MkdirAll(h.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	n.addNamespace(t, h.ns)
	port := fmt.Sprintf("p%d", n.next)
	ip(t, "link", "add", "eth0", "netns", h.ns, "type", "veth", "peer", "name", port, "netns", n.bridge)
	ip(t, "-n", n.bridge, "link", "set", port, "master", "br0", "up")
	ip(t, "-n", h.ns, "addr", "add", h.addr+"/24", "dev", "eth0")
	ip(t, "-n", h.ns, "link", "set", "eth0", "up")
	return h
}

// path returns a path in the host's folder.
func (h *host) path(parts ...string) string {
	return filepath.Join(append([]string{h.dir}, parts...)...)
}

// write puts a file into the host's folder, whole or not at all, and returns
// its path.
func (h *host) write(content string, mode os.FileMode, parts ...string) string {
	h.t.Helper()
	p := h.path(parts...)
	if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
		h.t.Fatal(err)
	}
	tmp := filepath.Join(filepath.Dir(p), "."+filepath.Base(p)+".tmp")
	if err := os.WriteFile(tmp, []byte(content), mode); err != nil {
		h.t.Fatal(err)
	}
	if err := os.Rename(tmp, p); err != nil {
		h.t.Fatal(err)
	}
	return p
}

// command prepares a command inside the host's namespace.
func (h *host) command(ctx context.Context, name string, args ...string) *exec.Cmd {
	if !strings.Contains(name, "/") {
		if own := filepath.Join(bin, name); fileExists(own) {
			name = own
		}
	}
	cmd := exec.CommandContext(ctx, "ip", append([]string{"netns", "exec", h.ns, name}, args...)...)
	cmd.Dir = h.dir
	cmd.Env = append(os.Environ(), "HOME="+h.dir, "NO_COLOR=1")
	return cmd
}

func fileExists(p string) bool {
	_, err := os.Stat(p)
	return err == nil
}

// result is what a finished command left.
type result struct {
	stdout, stderr string
	code           int
}

// run runs a command to its end, 60 s at most.
func (h *host) run(name string, args ...string) result {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := h.command(ctx, name, args...)
	var out, errOut strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err := cmd.Run()
	r := result{stdout: out.String(), stderr: errOut.String()}
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		r.code = exit.ExitCode()
	} else if err != nil {
		h.t.Fatalf("%s %s: %v", name, strings.Join(args, " "), err)
	}
	return r
}

// process is a running daemon of a host. Its output goes to a file.
type process struct {
	cmd  *exec.Cmd
	name string
	log  string
	done chan struct{}
	err  error
}

// start starts a daemon, which ends with the test at the latest.
func (h *host) start(label, name string, args ...string) *process {
	h.t.Helper()
	p := &process{cmd: h.command(context.Background(), name, args...), name: h.name + " " + label, done: make(chan struct{})}
	p.log = h.path(label + ".log")
	out, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		h.t.Fatal(err)
	}
	p.cmd.Stdout, p.cmd.Stderr = out, out
	// ip netns exec replaces itself, so that the PID is the daemon's own.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	if err := spawn(p.cmd); err != nil {
		h.t.Fatal(err)
	}
	go func() {
		p.err = p.cmd.Wait()
		_ = out.Close()
		close(p.done)
	}()
	h.t.Cleanup(func() {
		p.kill(syscall.SIGKILL)
		if h.t.Failed() {
			h.t.Logf("%s said:\n%s", p.name, tail(p.log, 40))
		}
	})
	return p
}

// spawns starts commands on one thread that lives as long as the tests: Linux
// kills the children of a thread that ends (PR_SET_PDEATHSIG, prctl(2)), and
// threads of host.inside do end.
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

// kill sends a signal and, if it must end the process, waits for the end.
func (p *process) kill(sig syscall.Signal) {
	select {
	case <-p.done:
		return
	default:
	}
	_ = p.cmd.Process.Signal(sig)
	if sig == syscall.SIGKILL {
		<-p.done
		_ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL) // its workers, such as nginx's
	}
}

// stop asks the process to end and returns when it has.
func (p *process) stop(t *testing.T, within time.Duration) {
	t.Helper()
	p.kill(syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(within):
		t.Fatalf("%s did not end within %s of SIGTERM:\n%s", p.name, within, tail(p.log, 20))
	}
}

func tail(path string, lines int) string {
	data, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	all := strings.Split(strings.TrimRight(string(data), "\n"), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// inside runs f on a thread that is in the host's network namespace: sockets
// that f opens belong to it.
func (h *host) inside(f func()) {
	h.t.Helper()
	var err error
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		var fd int
		fd, err = unix.Open("/run/netns/"+h.ns, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return
		}
		defer unix.Close(fd) //nolint:errcheck // nothing to do about it
		if err = unix.Setns(fd, unix.CLONE_NEWNET); err == nil {
			f()
		}
	}()
	<-done
	if err != nil {
		h.t.Errorf("enter the namespace of %s: %v", h.name, err)
	}
}

// dial connects from inside the host.
func (h *host) dial(addr string) (net.Conn, error) {
	var c net.Conn
	var err error
	h.inside(func() { c, err = (&net.Dialer{Timeout: 5 * time.Second}).Dial("tcp", addr) })
	return c, err
}

// listen listens inside the host.
func (h *host) listen(addr string) net.Listener {
	h.t.Helper()
	var l net.Listener
	var err error
	h.inside(func() { l, err = net.Listen("tcp", addr) })
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { _ = l.Close() })
	return l
}

// eventually asks f until it is satisfied (it returns "") and reports how long
// that took; after the limit it fails with f's last complaint.
func eventually(t *testing.T, limit time.Duration, what string, f func() string) time.Duration {
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
