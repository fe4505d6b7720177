package feed_test

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/meshd/meshd/proxy"
	"github.com/meshd/meshd/proxy/feed"
)

func TestListenOnAUnixSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "api.sock")
	l := proxy.Listener{Name: "upstream/x", Kind: proxy.ListenUpstream, Address: proxy.UnixAddress(path), SocketMode: "0620"}
	mode := func() fs.FileMode {
		t.Helper()
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		return info.Mode()
	}
	first, err := feed.Listen(t.Context(), l)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := mode(), fs.ModeSocket|0o620; got != want {
		t.Errorf("mode %v, want %v", got, want)
	}
	if !feed.BoundTo(first, l.Address) || feed.BoundTo(first, l.Address+"2") || feed.BoundTo(first, "127.0.0.1:80") {
		t.Error("BoundTo does not know where the socket is bound")
	}
	l.SocketMode = ""
	if err := feed.Allow(l); err != nil || mode().Perm() != 0o660 {
		t.Errorf("Allow: %v, mode %v, want the default", err, mode())
	}
	if _, err := feed.Listen(t.Context(), l); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("a second one listens: %v", err)
	}
	if err := first.Close(); err != nil { // as a process that ends does
		t.Fatal(err)
	}
	second, err := feed.Listen(t.Context(), l)
	if err != nil {
		t.Fatalf("the socket of a process that is gone is in the way: %v", err)
	}
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatalf("nobody can connect: %v", err)
	}
	_ = conn.Close()
	feed.Remove(second)
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Remove left the file: %v", err)
	}
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := feed.Listen(t.Context(), l); err == nil {
		t.Error("a file was taken for a dead socket")
	}
	if data, err := os.ReadFile(path); err != nil || string(data) != "precious" {
		t.Errorf("the file that is in the way is %q now, %v", data, err)
	}
}

func TestBoundToAddresses(t *testing.T) {
	for _, address := range []string{"127.0.0.1:0", "[::1]:0", ":0"} {
		f, err := feed.Listen(t.Context(), proxy.Listener{Address: address})
		if err != nil {
			t.Fatal(err)
		}
		ln, err := net.FileListener(f)
		if err != nil {
			t.Fatal(err)
		}
		if !feed.BoundTo(f, ln.Addr().String()) || feed.BoundTo(f, "127.0.0.9:1") || feed.BoundTo(f, "nowhere") {
			t.Errorf("%s: BoundTo does not know %s", address, ln.Addr())
		}
		_ = ln.Close()
		feed.Remove(f)
	}
}
