package agent_test

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/meshd/meshd/agent"
	"github.com/meshd/meshd/proxy/feed"
)

// TestUpstreamOnAUnixSocket: the agent opens it, passes it on, gives it another mode, keeps it over its own restart, and
// removes it with the upstream.
func TestUpstreamOnAUnixSocket(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	path := filepath.Join(t.TempDir(), "api.sock")
	define := func(more string) {
		b.write("services.d/web.hcl", fmt.Sprintf("service \"web\" {\n  port = 9\n  %s\n}\n", more))
	}
	define(fmt.Sprintf("upstream \"api\" {\n    local_socket = %q\n    local_socket_mode = \"0600\"\n  }", path))
	b.upstreamAPI()
	stop := b.start()
	r, stopProxy := b.proxy()
	name := "upstream/default/web/default/api/unix:" + path
	has := func(mode fs.FileMode) func(feed.Update) bool {
		return func(u feed.Update) bool {
			info, err := os.Stat(path)
			return u.Sockets[name] != nil && err == nil && info.Mode() == fs.ModeSocket|mode
		}
	}
	u := r.until(b, "the unix socket", has(0o600))
	if !feed.BoundTo(u.Sockets[name], "unix:"+path) {
		t.Error("the socket that was passed on is bound elsewhere")
	}
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatalf("nobody can connect: %v", err)
	}
	_ = conn.Close()

	define(fmt.Sprintf("upstream \"api\" { local_socket = %q }", path))
	r.until(b, "the other mode", has(0o660))

	stop() // the proxy serves on
	if _, err := os.Stat(path); err != nil {
		t.Errorf("the agent took the path away when it ended: %v", err)
	}
	stop = b.start()
	define("")
	r.until(b, "the plan without the upstream", func(u feed.Update) bool { return len(u.Config.Listeners) == 1 && !u.Alone })
	b.status("one listener", func(s agent.Status) bool { return len(s.Listeners) == 1 })
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the socket's file is still there: %v", err)
	}
	stopProxy()
	stop()
}
