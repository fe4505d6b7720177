package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
)

const (
	// minRestart is what keeps half a second between the death of a proxy and the
	// next served connection; connections wait that long in the agent's sockets.
	minRestart = 50 * time.Millisecond
	maxRestart = 10 * time.Second
	// healthyRun is from which life on a process counts as good, so that its
	// successor starts at once: one that can't run ends sooner.
	healthyRun = time.Second
	// superviseDrain is how long a supervised proxy may end its connections:
	// less than the ten seconds that containers are given to stop.
	superviseDrain = 8 * time.Second
)

// supervise keeps mesh-proxy running until ctx ends, and ends it then.
func supervise(ctx context.Context, cfg Proxy, log *slog.Logger) error {
	binary, err := proxyBinary(cfg.Binary)
	if err != nil {
		return err
	}
	restart := minRestart
	for {
		begun := time.Now()
		err := runProxy(ctx, binary, cfg, levelOf(ctx, log))
		if ctx.Err() != nil {
			return nil //nolint:nilerr // it was told to end
		}
		if time.Since(begun) > healthyRun {
			restart = minRestart
		}
		log.ErrorContext(ctx, "mesh-proxy ended; starting it again", slog.Any("error", err), slog.Duration("in", restart))
		timer := time.NewTimer(restart)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C:
		}
		restart = min(2*restart, maxRestart)
	}
}

// proxyBinary finds mesh-proxy: as configured, beside this program, or in the
// PATH.
func proxyBinary(configured string) (string, error) {
	if configured != "" {
		return configured, nil
	}
	if self, err := os.Executable(); err == nil {
		beside := filepath.Join(filepath.Dir(self), "mesh-proxy")
		if info, err := os.Stat(beside); err == nil && info.Mode().IsRegular() {
			return beside, nil
		}
	}
	found, err := exec.LookPath("mesh-proxy")
	if err != nil {
		return "", fmt.Errorf("supervise mesh-proxy: %w; set proxy.binary", err)
	}
	return found, nil
}

// levelOf is the level from which a logger passes messages on.
func levelOf(ctx context.Context, log *slog.Logger) slog.Level {
	for _, level := range []slog.Level{slog.LevelDebug, slog.LevelInfo, slog.LevelWarn} {
		if log.Enabled(ctx, level) {
			return level
		}
	}
	return slog.LevelError
}

// runProxy runs one process until it or ctx ends. It has a process group of its
// own, so that a terminal's Ctrl-C reaches the agent first, and is told to end
// should the agent die.
func runProxy(ctx context.Context, binary string, cfg Proxy, level slog.Level) error {
	// The kernel sends Pdeathsig when the thread ends that started the process.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	args := []string{"--feed", cfg.Socket, "--id", cfg.ID, "--state", cfg.StateDir, "--metrics", cfg.Metrics, "--drain-timeout", superviseDrain.String(), "--log-level", level.String()}
	cmd := exec.CommandContext(ctx, binary, args...) //nolint:gosec // the operator's own program
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	// The service manager watches the agent; what it is told of another process is not for it.
	cmd.Env = slices.DeleteFunc(os.Environ(), func(v string) bool {
		return strings.HasPrefix(v, "NOTIFY_SOCKET=") || strings.HasPrefix(v, "WATCHDOG_")
	})
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = superviseDrain + 2*time.Second
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: %w", binary, err)
	}
	return errors.New("it ended by itself")
}
