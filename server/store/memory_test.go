package store_test

import (
	"testing"

	"github.com/meshd/meshd/server/store"
	"github.com/meshd/meshd/server/store/storetest"
)

func TestMemory(t *testing.T) {
	storetest.Run(t, storetest.Factory{
		Open: func(t *testing.T) store.Engine {
			t.Helper()
			e := store.NewMemory()
			t.Cleanup(func() { _ = e.Close() })
			return e
		},
		Peer: func(t *testing.T, e store.Engine) store.Engine {
			t.Helper()
			m, ok := e.(*store.Memory)
			if !ok {
				t.Fatalf("%T is not of this test", e)
			}
			peer := m.Peer()
			t.Cleanup(func() { _ = peer.Close() })
			return peer
		},
	})
}
