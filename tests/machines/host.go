package machines

import (
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Host is one machine: a namespace, an address and a folder.
type Host struct {
	T         *testing.T
	Name      string
	Namespace string
	Address   string
	// Dir is the host's folder.
	Dir string
	// Port is its link, as the bridge sees it.
	Port string
	// Env is added to the environment of what Command, Run and Start prepare.
	Env []string

	network *Network
}

// Path returns a path in the host's folder.
func (h *Host) Path(parts ...string) string {
	return filepath.Join(append([]string{h.Dir}, parts...)...)
}

// Write puts a file into the host's folder, whole or not at all, and returns
// its path.
func (h *Host) Write(content string, mode os.FileMode, parts ...string) string {
	h.T.Helper()
	p := h.Path(parts...)
	if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
		h.T.Fatal(err)
	}
	tmp := filepath.Join(filepath.Dir(p), "."+filepath.Base(p)+".tmp")
	if err := os.WriteFile(tmp, []byte(content), mode); err != nil {
		h.T.Fatal(err)
	}
	if err := os.Rename(tmp, p); err != nil {
		h.T.Fatal(err)
	}
	return p
}

// Command prepares a command inside the host's namespace.
func (h *Host) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	if !strings.Contains(name, "/") {
		own := filepath.Join(h.network.bin, name)
		if _, err := os.Stat(own); err == nil {
			name = own
		}
	}
	cmd := exec.CommandContext(ctx, "ip", append([]string{"netns", "exec", h.Namespace, name}, args...)...)
	cmd.Dir = h.Dir
	cmd.Env = append(append(os.Environ(), "HOME="+h.Dir, "NO_COLOR=1"), h.Env...)
	return cmd
}

// Result is what a finished command left.
type Result struct {
	Stdout, Stderr string
	Code           int
}

// Run runs a command to its end, 60 s at most.
func (h *Host) Run(name string, args ...string) Result {
	h.T.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := h.Command(ctx, name, args...)
	var out, errOut strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err := cmd.Run()
	r := Result{Stdout: out.String(), Stderr: errOut.String()}
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		r.Code = exit.ExitCode()
	} else if err != nil {
		h.T.Fatalf("%s %s: %v", name, strings.Join(args, " "), err)
	}
	return r
}

// Inside runs f on a thread that is in the host's network namespace: sockets
// that f opens belong to it.
func (h *Host) Inside(f func()) {
	h.T.Helper()
	var err error
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		var fd int
		fd, err = unix.Open("/run/netns/"+h.Namespace, unix.O_RDONLY|unix.O_CLOEXEC, 0)
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
		h.T.Errorf("enter the namespace of %s: %v", h.Name, err)
	}
}

// Dial connects from inside the host.
func (h *Host) Dial(addr string) (net.Conn, error) {
	var c net.Conn
	var err error
	h.Inside(func() { c, err = (&net.Dialer{Timeout: 5 * time.Second}).Dial("tcp", addr) })
	return c, err
}

// Listen listens inside the host, until the test ends.
func (h *Host) Listen(addr string) net.Listener {
	h.T.Helper()
	var l net.Listener
	var err error
	h.Inside(func() { l, err = net.Listen("tcp", addr) })
	if err != nil {
		h.T.Fatal(err)
	}
	h.T.Cleanup(func() { _ = l.Close() })
	return l
}
