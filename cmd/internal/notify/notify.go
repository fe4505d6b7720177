// Package notify tells the service manager how a process is, over the socket that
// NOTIFY_SOCKET names (sd_notify(3)). Without one it does nothing.
package notify

import (
	"context"
	"fmt"
	"net"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// The states that a manager knows.
const (
	Ready    = "READY=1"
	Stopping = "STOPPING=1"
	watchdog = "WATCHDOG=1"
)

// Status is a line about the process for people.
func Status(text string) string { return "STATUS=" + strings.ReplaceAll(text, "\n", " ") }

// Reloading says that the configuration is being read again; Ready ends it.
func Reloading() string {
	var now unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &now) // it is always there
	return fmt.Sprintf("RELOADING=1\nMONOTONIC_USEC=%d", now.Nano()/int64(time.Microsecond))
}

// Notifier sends to one manager. The zero Notifier sends nothing.
type Notifier struct {
	socket string
	every  time.Duration
}

// New reads where the manager is from the environment, and what it expects.
func New(env func(string) string) Notifier {
	n := Notifier{socket: env("NOTIFY_SOCKET")}
	if usec, err := strconv.ParseInt(env("WATCHDOG_USEC"), 10, 64); err == nil && usec > 0 {
		n.every = time.Duration(usec) * time.Microsecond / 3
	}
	return n
}

// Send tells states in one message. It is for a manager that is there: an error
// says that the message could not be handed over.
func (n Notifier) Send(states ...string) error {
	if n.socket == "" {
		return nil
	}
	address := n.socket
	if name, abstract := strings.CutPrefix(address, "@"); abstract {
		address = "\x00" + name
	}
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Net: "unixgram", Name: address})
	if err != nil {
		return fmt.Errorf("notify the service manager: %w", err)
	}
	defer func() { _ = conn.Close() }() // a datagram is sent at once
	if _, err := conn.Write([]byte(strings.Join(states, "\n"))); err != nil {
		return fmt.Errorf("notify the service manager: %w", err)
	}
	return nil
}

// Watch tells the manager that the process lives, as often as it wants to know and
// while alive returns nil within that time, until ctx ends.
func (n Notifier) Watch(ctx context.Context, alive func(context.Context) error) error {
	if n.every <= 0 || n.socket == "" {
		return nil
	}
	tick := time.NewTicker(n.every)
	defer tick.Stop()
	for {
		check, cancel := context.WithTimeout(ctx, n.every)
		err := alive(check)
		cancel()
		if err == nil {
			err = n.Send(watchdog)
		}
		if err != nil && ctx.Err() == nil {
			_ = n.Send(Status("not answering: " + err.Error())) // the manager will see by itself
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}
