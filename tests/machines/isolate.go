package machines

import (
	"fmt"
	"os"
	"os/exec"
	"syscall"
)

// isolated marks the environment of a process that Isolate has begun anew.
const isolated = "MESHD_TEST_ISOLATED"

// Isolate moves this process into a network and a mount namespace of its own, by
// running its program again in them: call it first thing in main or TestMain, as
// root. There, names of namespaces are the process's own too, and whatever it
// mounts or makes is gone with it, even if it is killed. It returns nil once
// inside.
func Isolate() error {
	if os.Getenv(isolated) != "" {
		return nil
	}
	if err := os.MkdirAll("/run/netns", 0o755); err != nil {
		return fmt.Errorf("make the folder of network namespaces: %w", err)
	}
	unshare, err := exec.LookPath("unshare")
	if err != nil {
		return fmt.Errorf("look for unshare (package util-linux): %w", err)
	}
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("look for this program: %w", err)
	}
	const enter = `mount -t tmpfs -o mode=0755 tmpfs /run/netns && ip link set lo up && exec "$0" "$@"`
	args := append([]string{"unshare", "--net", "--mount", "sh", "-c", enter, self}, os.Args[1:]...)
	if err := syscall.Exec(unshare, args, append(os.Environ(), isolated+"=1")); err != nil {
		return fmt.Errorf("run this program in namespaces of its own: %w", err)
	}
	return nil
}
