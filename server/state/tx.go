package state

import (
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/meshd/meshd/server/store"
)

// Tx is a transaction on one snapshot. It is used within one call of the
// function given to State.Update, by one goroutine.
//
// What Table.Get returned is checked when the transaction is committed; what was
// read by Table.All or through Snapshot is not, so rules that span records need
// a record that all their writers Get or write.
type Tx struct {
	base   *Snapshot
	checks map[string]uint64
	writes map[string]write
	order  []string // of the first write of each key

	by   Author // see Sign
	at   time.Time
	note string
}

type write struct {
	raw    []byte
	entry  any
	delete bool
}

func newTx(base *Snapshot) *Tx {
	return &Tx{base: base, checks: make(map[string]uint64), writes: make(map[string]write)}
}

// Snapshot returns the state that the transaction reads. The transaction does
// not come to depend on what is read from it directly.
func (tx *Tx) Snapshot() *Snapshot { return tx.base }

// Size returns how many keys the transaction reads or writes so far; at most
// store.MaxKeys can be committed.
func (tx *Tx) Size() int { return len(tx.checks) } // every write is checked too

// run lets fn fill the transaction, and returns what is to be committed.
func (tx *Tx) run(fn func(*Tx) error) (store.Txn, error) {
	if err := fn(tx); err != nil {
		return store.Txn{}, err
	}
	if err := tx.recordEdits(maxForget); err != nil {
		return store.Txn{}, err
	}
	return tx.txn(), nil
}

func (tx *Tx) snapshot() *Snapshot { return tx.base }

func (tx *Tx) lookup(key string) any {
	if w, ok := tx.writes[key]; ok {
		return w.entry // nil after a delete
	}
	tx.depend(key)
	return tx.base.lookup(key)
}

// depend makes the commit check that key is as it was in the snapshot.
func (tx *Tx) depend(key string) {
	if _, done := tx.checks[key]; done {
		return
	}
	tx.checks[key] = tx.base.revision(key)
}

func (tx *Tx) put(key string, raw []byte, entry any) {
	tx.write(key, write{raw: slices.Clone(raw), entry: entry})
}

func (tx *Tx) delete(key string) { tx.write(key, write{delete: true}) }

func (tx *Tx) write(key string, w write) {
	tx.depend(key)
	if _, again := tx.writes[key]; !again {
		tx.order = append(tx.order, key)
	}
	tx.writes[key] = w
}

// txn returns the store's form; checks and operations are in a fixed order.
func (tx *Tx) txn() store.Txn {
	t := store.Txn{Generation: tx.base.position.Generation}
	for _, key := range slices.Sorted(maps.Keys(tx.checks)) {
		t.Checks = append(t.Checks, store.Check{Key: key, ModRevision: tx.checks[key]})
	}
	for _, key := range tx.order {
		w := tx.writes[key]
		if tx.holdsAlready(key, w) {
			continue // the check stays
		}
		t.Ops = append(t.Ops, store.Op{Key: key, Value: w.raw, Delete: w.delete})
	}
	return t
}

// holdsAlready reports whether a write changes nothing.
func (tx *Tx) holdsAlready(key string, w write) bool {
	raw, exists := tx.base.raw(key)
	return exists != w.delete && (w.delete || string(raw) == string(w.raw))
}

// holds reports whether s is what the transaction wanted to write, by content. That
// something is gone proves nothing by itself: others may have deleted it.
func (tx *Tx) holds(s *Snapshot) bool {
	wrote := false
	for key, w := range tx.writes {
		raw, exists := s.raw(key)
		if exists == w.delete || !w.delete && string(raw) != string(w.raw) {
			return false
		}
		wrote = wrote || !w.delete
	}
	return wrote
}

func (tx *Tx) describe() string {
	if len(tx.order) == 0 {
		return "nothing"
	}
	if len(tx.order) == 1 {
		return tx.order[0]
	}
	return fmt.Sprintf("%s and %d more", tx.order[0], len(tx.order)-1)
}
