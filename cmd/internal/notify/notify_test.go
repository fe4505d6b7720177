package notify_test

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/meshd/meshd/cmd/internal/notify"
)

// manager listens as a service manager does, and returns its environment.
func manager(t *testing.T, name string) (*net.UnixConn, func(string) string) {
	t.Helper()
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram", Name: strings.Replace(name, "@", "\x00", 1)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	env := map[string]string{"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "30000"}
	return conn, func(key string) string { return env[key] }
}

func receive(t *testing.T, conn *net.UnixConn) string {
	t.Helper()
	if err := conn.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	message := make([]byte, 4096)
	n, err := conn.Read(message)
	if err != nil {
		t.Fatal(err)
	}
	return string(message[:n])
}

func TestSend(t *testing.T) {
	t.Parallel()
	for _, name := range []string{filepath.Join(t.TempDir(), "notify"), "@meshd-notify-test"} {
		conn, env := manager(t, name)
		n := notify.New(env)
		if err := n.Send(notify.Ready, notify.Status("serving\nwell")); err != nil {
			t.Fatal(err)
		}
		if got := receive(t, conn); got != "READY=1\nSTATUS=serving well" {
			t.Errorf("%s: %q", name, got)
		}
		if err := n.Send(notify.Reloading()); err != nil {
			t.Fatal(err)
		}
		if got := receive(t, conn); !strings.HasPrefix(got, "RELOADING=1\nMONOTONIC_USEC=") || strings.HasSuffix(got, "=0") {
			t.Errorf("%s: %q", name, got)
		}
	}
	none := notify.New(func(string) string { return "" })
	if err := errors.Join(none.Send(notify.Ready), none.Watch(t.Context(), nil)); err != nil {
		t.Error(err)
	}
	gone := notify.New(func(string) string { return "/nowhere/notify" })
	if err := gone.Send(notify.Stopping); err == nil {
		t.Error("nobody listens, and there is no error")
	}
}

// The manager hears nothing while the process does not answer itself.
func TestWatch(t *testing.T) {
	t.Parallel()
	conn, env := manager(t, filepath.Join(t.TempDir(), "notify"))
	ctx, cancel := context.WithCancel(t.Context())
	healthy := make(chan error, 100)
	healthy <- nil
	healthy <- errors.New("stuck")
	done := make(chan error, 1)
	go func() {
		done <- notify.New(env).Watch(ctx, func(ctx context.Context) error {
			select {
			case err := <-healthy:
				return err
			case <-ctx.Done():
				return ctx.Err()
			}
		})
	}()
	for _, want := range []string{"WATCHDOG=1", "STATUS=not answering: stuck", "STATUS=not answering: context deadline exceeded"} {
		if got := receive(t, conn); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
