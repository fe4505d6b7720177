package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

const (
	// restartSocket is where a process that serves takes the wish to be replaced, in its state directory, to which only its own
	// user and root have access.
	restartSocket = "restart.sock"
	// restartPatience is more than a replacement takes at most.
	restartPatience = startTimeout + serveTimeout + 10*time.Second
	done            = "done "
)

// askRestart has the process that runs with a state directory replaced, and tells out of it.
func askRestart(state string, out io.Writer) error {
	path := filepath.Join(state, restartSocket)
	d := net.Dialer{Timeout: restartPatience}
	conn, err := d.DialContext(context.Background(), "unix", path)
	if err != nil {
		return fmt.Errorf("ask mesh-proxy to restart: %w; does it run with --state %s?", err, state)
	}
	defer func() { _ = conn.Close() }()
	if err := conn.SetDeadline(time.Now().Add(restartPatience)); err != nil {
		return fmt.Errorf("ask mesh-proxy to restart: %w", err)
	}
	answer, err := bufio.NewReader(conn).ReadString('\n')
	if err != nil {
		return fmt.Errorf("ask mesh-proxy to restart: it ended, or was being replaced already: %w", err)
	}
	answer = strings.TrimSuffix(answer, "\n")
	pid, ok := strings.CutPrefix(answer, done)
	if !ok {
		return errors.New(answer)
	}
	_, err = fmt.Fprintln(out, "process", pid, "serves now")
	return err
}

// listenControl opens the restart socket of a state directory, and takes its path from an earlier process. Without it mesh-proxy
// serves as well.
func listenControl(ctx context.Context, state string, log *slog.Logger) net.Listener {
	path := filepath.Join(state, restartSocket)
	_ = os.Remove(path)
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "unix", path)
	if err != nil {
		log.LogAttrs(ctx, slog.LevelWarn, "mesh-proxy --restart will not reach this process", slog.Any("error", err))
		return nil
	}
	if ul, ok := l.(*net.UnixListener); ok {
		ul.SetUnlinkOnClose(false) // the path may be a successor's by then
	}
	return l
}

// control answers at the restart socket, if there is one, until ctx ends.
func control(ctx context.Context, l net.Listener, replace func() (pid int, err error)) error {
	if l == nil {
		return nil
	}
	stop := context.AfterFunc(ctx, func() { _ = l.Close() })
	defer stop()
	for {
		conn, err := l.Accept()
		if err != nil {
			return nil // it was closed
		}
		pid, err := replace()
		answer := done + strconv.Itoa(pid)
		if err != nil {
			answer = strings.ReplaceAll(err.Error(), "\n", "; ")
		}
		_, _ = io.WriteString(conn, answer+"\n") // who asked is gone otherwise
		_ = conn.Close()
	}
}
