package l7_test

import (
	"bufio"
	"bytes"
	"io"
	"net"
	"runtime"
	"testing"
)

// TestSlowPeersHoldLittle sends much to a client that reads nothing, and then
// all of it: what is on its way is bounded by sockets and two buffers.
func TestSlowPeersHoldLittle(t *testing.T) {
	const size = 256 << 20
	upstream := serveRaw(t, func(nc *net.TCPConn, r *bufio.Reader) {
		if _, err := readHead(r); err != nil {
			return
		}
		say(nc, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n", size)
		block := bytes.Repeat([]byte("x"), 1<<20)
		for range size / len(block) {
			if _, err := nc.Write(block); err != nil {
				return
			}
		}
	})
	p := start(t, options{upstream: upstream})
	c := connect(t, p.addr)
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	c.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n")
	if _, err := readHead(c.r); err != nil {
		t.Fatal(err)
	}
	n, err := io.CopyN(io.Discard, c.r, size)
	runtime.ReadMemStats(&after)
	if err != nil || n != size {
		t.Fatalf("got %d bytes, %v", n, err)
	}
	if grown := after.TotalAlloc - before.TotalAlloc; grown > 32<<20 {
		t.Errorf("%d MiB were allocated to carry %d MiB", grown>>20, size>>20)
	}
}

func TestIdleConnectionsHoldNoBuffers(t *testing.T) {
	const n = 300
	p := start(t, options{upstream: echoUpstream(t)})
	var clients []*client
	for range n {
		c := connect(t, p.addr)
		c.send(smallHead)
		c.response("GET")
		clients = append(clients, c)
	}
	runtime.GC()
	runtime.GC()
	var stats runtime.MemStats
	runtime.ReadMemStats(&stats)
	// The test's own two sides have 4 KiB buffers each.
	per := int(stats.HeapInuse) / len(clients)
	t.Logf("%d bytes of heap per connection, both peers in this process included", per)
	if per > 40<<10 {
		t.Errorf("%d bytes of heap per idle connection", per)
	}
}
