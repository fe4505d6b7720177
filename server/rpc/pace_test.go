package rpc_test

import (
	"net"
	"runtime"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/meshd/meshd/server/rpc"
)

// Of many who have read, as many go on as there are processors; who waits for its peer
// holds up nobody, and after the end nobody waits.
func TestPace(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const crowd = 50
		pace := rpc.NewPace()
		var mu sync.Mutex
		computing, served := 0, 0
		goOn := make(chan struct{})
		var peers []net.Conn
		var group sync.WaitGroup
		for range crowd {
			ours, theirs := net.Pipe()
			peers = append(peers, theirs)
			conn := pace.Begin(ours)
			group.Go(func() {
				b := make([]byte, 1)
				if _, err := conn.Read(b); err != nil {
					t.Error(err)
				}
				mu.Lock()
				computing++
				mu.Unlock()
				<-goOn
				mu.Lock()
				computing--
				served++
				mu.Unlock()
				conn.End()
				if n, err := conn.Read(b); n != 0 || err == nil {
					t.Errorf("of a closed connection: %d, %v", n, err)
				}
			})
		}
		look := func(what string, wantComputing, wantServed int) {
			t.Helper()
			synctest.Wait()
			mu.Lock()
			defer mu.Unlock()
			if computing != wantComputing || served != wantServed {
				t.Errorf("%s: %d compute, %d are done; want %d and %d", what, computing, served, wantComputing, wantServed)
			}
		}
		look("nobody has sent anything", 0, 0)
		for _, peer := range peers {
			group.Go(func() {
				if _, err := peer.Write([]byte{1}); err != nil {
					t.Error(err)
				}
			})
		}
		at := min(runtime.GOMAXPROCS(0), crowd)
		look("all have", at, 0)
		goOn <- struct{}{}
		look("one is done", at, 1)
		close(goOn)
		look("all are done", 0, crowd)
		for _, peer := range peers {
			_ = peer.Close() // what is read then is looked at
		}
		group.Wait()
	})
}
