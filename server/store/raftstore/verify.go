package raftstore

import (
	"context"
	"crypto/sha256"
	"sync"

	"github.com/meshd/meshd/server/store"
)

// marks holds the newest hash of the state at a mark in the log.
type marks struct {
	mu   sync.Mutex
	at   uint64
	sum  [sha256.Size]byte
	ok   bool
	next *mark // to be hashed
	busy bool
}

type mark struct {
	at    uint64
	saved store.Saved
}

// take hashes the state at a mark in the background. Marks that come while one
// is hashed are coalesced to the newest.
func (m *marks) take(at uint64, saved store.Saved, spawn func(func()) bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.next = &mark{at: at, saved: saved}
	if !m.busy {
		m.busy = spawn(m.run)
	}
}

func (m *marks) run() {
	for {
		m.mu.Lock()
		now := m.next
		m.next = nil
		m.busy = now != nil
		m.mu.Unlock()
		if now == nil {
			return
		}
		sum := now.saved.Hash()
		m.mu.Lock()
		m.at, m.sum, m.ok = now.at, sum, true
		m.mu.Unlock()
	}
}

// Verify puts a mark into the log. Each member hashes its state as it is there;
// Hash tells the result, which is the same on all of them, or their states have
// come apart. Errors are those of Commit.
func (e *Engine) Verify(ctx context.Context) error {
	_, err := e.change(ctx, command{Kind: commandMark})
	return err
}

// Hash returns the newest mark that this member has hashed, by the index of its
// log entry, and the hash. OK is false while there is none.
func (e *Engine) Hash() (at uint64, sum [sha256.Size]byte, ok bool) {
	e.marks.mu.Lock()
	defer e.marks.mu.Unlock()
	return e.marks.at, e.marks.sum, e.marks.ok
}
