package procnet_test

import (
	"bytes"
	"encoding/binary"
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
		found, err := procnet.Scan()
		if err != nil || !slices.ContainsFunc(found, func(s procnet.Socket) bool { return s.Covers(at) }) {
			t.Errorf("scan: %s is not among %v, %v", at, found, err)
		}
		for _, s := range procnet.Listening() {
			if s.Address == at && !slices.Contains(found, s) {
				t.Errorf("scan: %v is not among %v", s, found)
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

// BenchmarkScan looks for a listening socket among thousands of connections.
func BenchmarkScan(b *testing.B) {
	var lc net.ListenConfig
	l, err := lc.Listen(b.Context(), "tcp4", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = l.Close() })
	for range 2000 {
		c, err := (&net.Dialer{}).DialContext(b.Context(), "tcp4", l.Addr().String())
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { _ = c.Close() })
	}
	for b.Loop() {
		if found, err := procnet.Scan(); err != nil || len(found) == 0 {
			b.Fatal(found, err)
		}
	}
}

// datagram is what the kernel of a little-endian machine sends: one socket, and the
// end.
func datagram(edit func(message []byte)) []byte {
	message := make([]byte, 16+72)
	copy(message, []byte{88, 0, 0, 0, 20, 0, 2, 0})
	copy(message[16:], []byte{2, 10, 0, 0, 0x1f, 0x90, 0, 0, 127, 0, 0, 1})
	message[16+68] = 42
	edit(message)
	return append(message, 20, 0, 0, 0, 3, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
}

func TestParseDiag(t *testing.T) {
	t.Parallel()
	if binary.NativeEndian.Uint16([]byte{1, 0}) != 1 {
		t.Log("the bytes are those of a little-endian machine; TestListening asks the kernel of this one")
		return
	}
	one := func(address string) []procnet.Socket {
		return []procnet.Socket{{Address: netip.MustParseAddrPort(address), Inode: "42"}}
	}
	rows := map[string]struct {
		edit func([]byte)
		want []procnet.Socket
		fail string
	}{
		"IPv4":      {func([]byte) {}, one("127.0.0.1:8080"), ""},
		"IPv6":      {func(m []byte) { m[16], m[24+15] = 10, 9; clear(m[24:28]) }, one("[::9]:8080"), ""},
		"connected": {func(m []byte) { m[17] = 1 }, nil, ""},
		"refused":   {func(m []byte) { m[4] = 2; copy(m[16:], []byte{0xfe, 0xff, 0xff, 0xff}) }, nil, "no such file"},
		"another":   {func(m []byte) { m[4] = 77 }, nil, "type 77"},
		"cut":       {func(m []byte) { m[0] = 200 }, nil, "unexpected answer"},
	}
	for name, row := range rows {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got, done, err := procnet.ParseDiag(datagram(row.edit))
			if row.fail != "" {
				if err == nil || !strings.Contains(err.Error(), row.fail) {
					t.Errorf("got %v, %v, want an error with %q", got, err, row.fail)
				}
				return
			}
			if diff := cmp.Diff(row.want, got, cmpopts.EquateComparable(netip.AddrPort{})); diff != "" || !done || err != nil {
				t.Errorf("done %t, %v (-want +got):\n%s", done, err, diff)
			}
		})
	}
}

func FuzzParseDiag(f *testing.F) {
	f.Add(datagram(func([]byte) {}))
	f.Fuzz(func(t *testing.T, data []byte) {
		all, done, err := procnet.ParseDiag(data)
		if err != nil && (len(all) > 0 || done) {
			t.Fatalf("%v, %t beside %v", all, done, err)
		}
	})
}
