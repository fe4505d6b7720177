package peer_test

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"strings"
	"testing"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/server/peer"
)

func TestCheckJoin(t *testing.T) {
	for entry, ok := range map[string]bool{
		"10.0.0.11":                 true,
		"10.0.0.11:7401":            true,
		"srv-1":                     true,
		"srv-1.example.com:8401":    true,
		"2001:db8::1":               true,
		"[2001:db8::1]":             true,
		"[2001:db8::1]:7401":        true,
		"_mesh._tcp.example.com":    true,
		"":                          false,
		"10.0.0.11:":                false,
		"10.0.0.11:0":               false,
		"10.0.0.11:70000":           false,
		"0.0.0.0":                   false,
		"::":                        false,
		"https://srv-1":             false,
		"srv 1":                     false,
		"_mesh._tcp.example.com:53": false,
		"srv-1,srv-2":               false,
		strings.Repeat("a", 300):    false,
	} {
		if err := peer.CheckJoin(entry); (err == nil) != ok {
			t.Errorf("%q: %v", entry, err)
		}
	}
}

func FuzzCheckJoin(f *testing.F) {
	f.Add("10.0.0.11:7401")
	f.Add("[::1]:7401")
	f.Add("_mesh._tcp.example.com")
	f.Fuzz(func(t *testing.T, entry string) {
		if peer.CheckJoin(entry) == nil && strings.ContainsAny(entry, " /,@\x00\n") {
			t.Errorf("%q was taken", entry)
		}
	})
}

// nameServer answers SRV questions for one name with the given ports at
// srv.mesh.test, and address questions for that with loopback. Without ports there
// is no such name.
func nameServer(t *testing.T, ports func() []int) *net.Resolver {
	t.Helper()
	var lc net.ListenConfig
	conn, err := lc.ListenPacket(t.Context(), "udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		buffer := make([]byte, 1500)
		for {
			n, from, err := conn.ReadFrom(buffer)
			if err != nil {
				return
			}
			if reply := answer(buffer[:n], ports()); reply != nil {
				_, _ = conn.WriteTo(reply, from) // the resolver asks again
			}
		}
	}()
	t.Cleanup(func() {
		_ = conn.Close()
		<-done
	})
	return &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "udp", conn.LocalAddr().String())
	}}
}

// answer makes the reply to a question (RFC 1035, section 4; RFC 2782).
func answer(question []byte, ports []int) []byte {
	const head, typeA, typeSRV = 12, 1, 33
	end := head
	var name []string
	for end < len(question) && question[end] != 0 {
		next := end + 1 + int(question[end])
		if next >= len(question) {
			return nil
		}
		name = append(name, string(question[end+1:next]))
		end = next
	}
	if end+5 > len(question) {
		return nil
	}
	kind := binary.BigEndian.Uint16(question[end+1:])
	asked := question[head : end+5]
	var records [][]byte
	record := func(data []byte) {
		r := []byte{0xc0, head, byte(kind >> 8), byte(kind), 0, 1, 0, 0, 0, 1} // the asked name, IN, 1 s
		r = binary.BigEndian.AppendUint16(r, uint16(len(data)))
		records = append(records, append(r, data...))
	}
	host := strings.ToLower(strings.Join(name, "."))
	switch {
	case kind == typeSRV && host == "_mesh._tcp.mesh.test":
		for _, port := range ports {
			data := binary.BigEndian.AppendUint16([]byte{0, 1, 0, 1}, uint16(port))
			record(append(data, "\x03srv\x04mesh\x04test\x00"...))
		}
	case kind == typeA && host == "srv.mesh.test":
		record([]byte{127, 0, 0, 1})
	}
	code := byte(0)
	if len(records) == 0 && host != "srv.mesh.test" {
		code = 3 // NXDOMAIN
	}
	reply := append([]byte{question[0], question[1], 0x84, code, 0, 1, 0, byte(len(records)), 0, 0, 0, 0}, asked...)
	for _, r := range records {
		reply = append(reply, r...)
	}
	return reply
}

// TestFoundingByDNS finds the servers by an SRV name, which appears while they
// already look for it.
func TestFoundingByDNS(t *testing.T) {
	w, key := newWorld(), ca.GenerateClusterKey()
	all, addresses := listeners(t, 3)
	ports := make(chan []int, 1)
	ports <- nil
	set := func(p []int) { <-ports; ports <- p }
	get := func() []int { p := <-ports; ports <- p; return p }
	resolver := nameServer(t, get)
	var hosts []*host
	for i, l := range all {
		hosts = append(hosts, start(t, w, setup{
			name: fmt.Sprintf("srv-%d", i+1), key: key, expect: 3, join: []string{"_mesh._tcp.mesh.test"}, listener: l, resolver: resolver,
		}))
	}
	until(t, "it says what it misses", func() bool {
		return hosts[0].Waiting() == "3 servers: have srv-1; _mesh._tcp.mesh.test: no such name"
	})
	var found []int
	for _, l := range all {
		tcp, ok := l.Addr().(*net.TCPAddr)
		if !ok {
			t.Fatalf("%v is no TCP address", l.Addr())
		}
		found = append(found, tcp.Port)
	}
	set(found)
	for _, h := range hosts {
		h.awaitMember(t)
	}
	if w.founded() != 1 || len(hosts[0].cluster.Servers()) != 3 {
		t.Errorf("%d clusters, of %v; addresses %v", w.founded(), hosts[0].cluster.Servers(), addresses)
	}
	if got := strings.Count(hosts[0].logs.String(), "have srv-1;"); got != 1 {
		t.Errorf("what it waits for is logged %d times:\n%s", got, hosts[0].logs)
	}
}
