package procnet_test

import (
	"bytes"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/meshd/meshd/agent/procnet"
)

// table is what a little-endian kernel writes.
const table = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000:232A 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 18213 1 0000000000000000 100 0 0 10 0
   1: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 18214 1 0000000000000000 100 0 0 10 0
   2: 0100007F:1F90 0100007F:D2F0 01 00000000:00000000 00:00000000 00000000     0        0 18215 1 0000000000000000 100 0 0 10 0
   3: 000080FE00000000FF005450FEA30302:0016 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 18216 1
   4: 0100007F:1F9Z 00000000:0000 0A 0 0 0 0 0 18217
   5: 01:1F90 00000000:0000 0A 0 0 0 0 0 0 18218
   6: short 0A
`

func TestParse(t *testing.T) {
	t.Parallel()
	want := []procnet.Socket{
		{Address: netip.MustParseAddrPort("0.0.0.0:9002"), Inode: "18213"},
		{Address: netip.MustParseAddrPort("127.0.0.1:8080"), Inode: "18214"},
		{Address: netip.MustParseAddrPort("[fe80::5054:ff:203:a3fe]:22"), Inode: "18216"},
	}
	if diff := cmp.Diff(want, procnet.Parse(strings.NewReader(table)), cmpopts.EquateComparable(netip.AddrPort{})); diff != "" {
		t.Error(diff)
	}
}

// TestListening finds sockets of this process, and names another that holds
// one.
func TestListening(t *testing.T) {
	t.Parallel()
	for _, network := range []struct{ name, address string }{{"tcp4", "127.0.0.1:0"}, {"tcp6", "[::1]:0"}} {
		var lc net.ListenConfig
		l, err := lc.Listen(t.Context(), network.name, network.address)
		if err != nil {
			t.Fatal(err)
		}
		at := netip.MustParseAddrPort(l.Addr().String())
		if !slices.ContainsFunc(procnet.Listening(), func(s procnet.Socket) bool { return s.Address == at }) {
			t.Errorf("%s is not among %v", at, procnet.Listening())
		}
		for _, whole := range []bool{true, false} {
			found, err := procnet.Scan(whole)
			if err != nil || !slices.ContainsFunc(found, func(s procnet.Socket) bool { return s.Covers(at) }) {
				t.Errorf("scan, whole %t: %s is not among %v, %v", whole, at, found, err)
			}
		}
		if h := procnet.HolderOf(at, nil); h.String() != "another process" {
			t.Errorf("this process itself is named: %s", h)
		}
		file, err := l.(*net.TCPListener).File() //nolint:errcheck // a TCP listener by its making
		if err != nil {
			t.Fatal(err)
		}
		// cat waits for its standard input, and holds the socket meanwhile.
		cmd := exec.CommandContext(t.Context(), "cat")
		cmd.ExtraFiles = []*os.File{file}
		stdin, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if h := procnet.HolderOf(at, []int{1}); h.PID != 0 {
			t.Errorf("held by %s, which was not asked for", h)
		}
		if h := procnet.HolderOf(at, []int{cmd.Process.Pid}); h.PID != cmd.Process.Pid {
			t.Errorf("held by %s, want pid %d", h, cmd.Process.Pid)
		}
		h := procnet.HolderOf(at, nil)
		if h.PID != cmd.Process.Pid || h.Name != "cat" {
			t.Errorf("held by %s, want cat (pid %d)", h, cmd.Process.Pid)
		}
		if err := stdin.Close(); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Wait(); err != nil {
			t.Fatal(err)
		}
		if err := file.Close(); err != nil {
			t.Fatal(err)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(table))
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, s := range procnet.Parse(bytes.NewReader(data)) {
			if !s.Address.IsValid() || s.Inode == "" {
				t.Fatalf("%+v of %q", s, data)
			}
		}
	})
}
