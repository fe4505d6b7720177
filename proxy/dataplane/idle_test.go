package dataplane_test

import (
	"runtime"
	"testing"

	"github.com/meshd/meshd/catalog"
)

// TestIdleConnectionsKeepNoRequest finds the memory of requests that outlives them: a view of a head would keep its buffer.
func TestIdleConnectionsKeepNoRequest(t *testing.T) {
	m := newMesh(t, options{protocol: catalog.ProtocolHTTP, apps: []string{benchApp(t)}, intention: allow()})
	heap := func() uint64 {
		for range 3 { // pools forget in two
			runtime.GC()
		}
		var stats runtime.MemStats
		runtime.ReadMemStats(&stats)
		return stats.HeapAlloc
	}
	const n = 16
	clients := make([]*benchClient, n)
	for i := range clients {
		clients[i] = newBenchClient(t, m.upstream)
	}
	for _, c := range clients { // all at a time, so that each has memory of its own
		c.send()
	}
	for _, c := range clients {
		c.receive()
	}
	together := heap()
	for _, c := range clients {
		c.do()
	}
	alone := heap()
	per := (int64(together) - int64(alone)) / n
	t.Logf("a request leaves %d bytes behind on an idle connection", per)
	if per > 4<<10 {
		t.Errorf("a request leaves %d bytes behind on an idle connection", per)
	}
	runtime.KeepAlive(clients)
}
