package raftstore_test

import (
	"context"
	"fmt"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/meshd/meshd/server/store"
	"github.com/meshd/meshd/server/store/raftstore"
)

// BenchmarkCommit writes with fsync, from as many goroutines as it says.
func BenchmarkCommit(b *testing.B) {
	for _, writers := range []int{1, 16, 256} {
		b.Run(fmt.Sprintf("writers=%d", writers), func(b *testing.B) {
			e, err := raftstore.New(raftstore.Config{Dir: filepath.Join(b.TempDir(), "state"), ID: "server-1"}, discard())
			if err != nil {
				b.Fatal(err)
			}
			done := make(chan error, 1)
			go func() { done <- e.Run(context.Background()) }()
			if _, err := e.Barrier(b.Context()); err != nil {
				b.Fatal(err)
			}
			value := make([]byte, 256)
			b.ReportAllocs()
			b.ResetTimer()
			var (
				group sync.WaitGroup
				taken atomic.Int64
			)
			for range writers {
				group.Go(func() {
					for n := taken.Add(1); n <= int64(b.N); n = taken.Add(1) {
						op := store.Op{Key: fmt.Sprintf("key/%05d", n%10_000), Value: value}
						if _, err := e.Commit(b.Context(), store.Txn{Ops: []store.Op{op}}); err != nil {
							b.Errorf("commit: %v", err)
							return
						}
					}
				})
			}
			group.Wait()
			b.StopTimer()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "commits/s")
			if err := e.Close(); err != nil {
				b.Fatal(err)
			}
			if err := <-done; err != nil {
				b.Fatal(err)
			}
		})
	}
}
