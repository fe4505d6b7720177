package raftstore_test

import (
	"context"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"github.com/meshd/meshd/server/store"
	"github.com/meshd/meshd/server/store/raftstore"
)

// BenchmarkCommitOfThree writes with fsync through three members that talk over
// TCP, from as many goroutines as it says, spread over all members or on the
// leader: one key, compare-and-set, 500 bytes.
func BenchmarkCommitOfThree(b *testing.B) {
	for _, row := range []struct {
		writers int
		spread  bool
	}{{1, false}, {1, true}, {16, false}, {16, true}, {64, true}} {
		b.Run(fmt.Sprintf("writers=%d,spread=%v", row.writers, row.spread), func(b *testing.B) {
			engines := slices.Clone(tcpCluster(b))
			if !row.spread {
				engines = slices.DeleteFunc(engines, func(e *raftstore.Engine) bool { return !e.Leading() })
			} else if row.writers == 1 {
				engines = slices.DeleteFunc(engines, (*raftstore.Engine).Leading)
			}
			value := make([]byte, 500)
			var (
				group sync.WaitGroup
				taken atomic.Int64
				mu    sync.Mutex
				took  []time.Duration
			)
			b.ReportAllocs()
			b.ResetTimer()
			for w := range row.writers {
				group.Go(func() {
					e, at := engines[w%len(engines)], uint64(0)
					var mine []time.Duration
					for taken.Add(1) <= int64(b.N) {
						key, begun := fmt.Sprintf("key/%05d", w), time.Now()
						p, err := e.Commit(b.Context(), store.Txn{
							Checks: []store.Check{{Key: key, ModRevision: at}},
							Ops:    []store.Op{{Key: key, Value: value}},
						})
						if err != nil {
							b.Errorf("commit: %v", err)
							return
						}
						at, mine = p.Revision, append(mine, time.Since(begun))
					}
					mu.Lock()
					took = append(took, mine...)
					mu.Unlock()
				})
			}
			group.Wait()
			b.StopTimer()
			slices.Sort(took)
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "commits/s")
			b.ReportMetric(float64(took[len(took)*99/100].Microseconds())/1000, "p99-ms")
		})
	}
}

func tcpCluster(b *testing.B) []*raftstore.Engine {
	b.Helper()
	var (
		engines []*raftstore.Engine
		members []raftstore.Member
	)
	forward := func(ctx context.Context, id, _ string, request []byte) ([]byte, error) {
		for i, m := range members {
			if m.ID == id {
				return engines[i].Serve(ctx, slices.Clone(request))
			}
		}
		return nil, store.ErrNoLeader
	}
	for i := range 3 {
		transport, err := raft.NewTCPTransport("127.0.0.1:0", nil, 3, 10*time.Second, io.Discard)
		if err != nil {
			b.Fatal(err)
		}
		m := raftstore.Member{ID: fmt.Sprintf("server-%d", i), Address: string(transport.LocalAddr())}
		e, err := raftstore.New(raftstore.Config{
			Dir: filepath.Join(b.TempDir(), "state"), ID: m.ID, Transport: transport, Forward: forward,
		}, discard())
		if err != nil {
			b.Fatal(err)
		}
		done := make(chan error, 1)
		go func() { done <- e.Run(context.Background()) }()
		b.Cleanup(func() {
			_ = e.Close()
			if err := <-done; err != nil {
				b.Error(err)
			}
		})
		engines, members = append(engines, e), append(members, m)
	}
	if err := engines[0].Found(b.Context(), members); err != nil {
		b.Fatal(err)
	}
	for _, e := range engines {
		if _, err := e.Barrier(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
	return engines
}
