package state

import (
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"net/url"
	"strings"
)

// Kind is the name of a table, and the first segment of its keys in the store.
type Kind string

// Record is one stored value.
type Record[V any] struct {
	// Value is the decoded form of Raw, and the zero V when Err is set.
	Value V
	// Raw is what was written, byte for byte. It is shared: never modify it.
	Raw []byte
	// Revision is that of the commit that wrote the record, of the snapshot's
	// generation; 0 for a record that this transaction is about to write.
	Revision uint64
	// Err says why Raw could not be decoded. Such a record still exists: it keeps
	// its key from being created again, and whoever decides by it must deny.
	Err error
}

// Reader is what tables read from: a *Snapshot, or a *Tx, which reads its own
// writes by Get.
type Reader interface {
	snapshot() *Snapshot
	// lookup returns what is stored under a full key, as *entry of its table, or
	// nil.
	lookup(key string) any
}

// Table is one kind of record. The tables of this package are constants in all
// but name. Their methods are safe for concurrent use as far as the Reader is:
// a Snapshot is, a Tx belongs to one goroutine.
type Table[K comparable, V any] struct {
	kind   Kind
	index  int // position in kinds
	encode func(K) []string
	decode func([]string) (K, error)
	read   func(K, []byte) (V, error)
	// level is the feature level that a cluster must have before a record of
	// this value may be written; nil is level 1.
	level func(V) int
	// also gives keys of indexes that lead to the record; nil is none.
	also func(K, V) []string
}

// entry is what the tree of a snapshot holds.
type entry[K comparable, V any] struct {
	key K
	Record[V]
}

// Kind returns the name of the table.
func (t *Table[K, V]) Kind() Kind { return t.kind }

// Get returns the record under key. Within a transaction it makes the
// transaction depend on that record: if it is changed, created or deleted before
// the commit, the transaction is run again.
func (t *Table[K, V]) Get(r Reader, key K) (Record[V], bool) {
	e, ok := r.lookup(t.Path(key)).(*entry[K, V])
	if !ok {
		return Record[V]{}, false
	}
	return e.Record, true
}

// All yields all records in the order of their keys. Within a transaction it
// yields the state before it, and the transaction does not come to depend on it.
func (t *Table[K, V]) All(r Reader) iter.Seq2[K, Record[V]] { return t.under(r, t.prefix()) }

// After yields the records whose keys come after the given one, in the order of
// All, whether there is a record under that key or not.
func (t *Table[K, V]) After(r Reader, key K) iter.Seq2[K, Record[V]] {
	return func(yield func(K, Record[V]) bool) {
		after, prefix := t.Path(key), t.prefix()
		it := r.snapshot().tree.Root().Iterator()
		it.SeekLowerBound([]byte(after))
		for path, value, ok := it.Next(); ok && strings.HasPrefix(string(path), prefix); path, value, ok = it.Next() {
			if e, is := value.(*entry[K, V]); is && string(path) != after && !yield(e.key, e.Record) {
				return
			}
		}
	}
}

// Len returns how many records the table has, without reading them.
func (t *Table[K, V]) Len(r Reader) int { return r.snapshot().counts[t.index] }

// Put writes value, encoded as JSON. It is for what machines write; what a user
// wrote goes through PutRaw.
func (t *Table[K, V]) Put(tx *Tx, key K, value V) error {
	raw, err := json.Marshal(value)
	if err != nil {
		return fmt.Errorf("encode %s %s: %w", t.kind, t.name(key), err)
	}
	return t.PutRaw(tx, key, raw)
}

// PutRaw writes raw as it is. It returns an error when the table could not read
// it back, and one that wraps ErrFeatureLevel when members of the cluster might
// not know what it says. Validation of the value is the caller's.
func (t *Table[K, V]) PutRaw(tx *Tx, key K, raw []byte) error {
	value, err := t.read(key, raw)
	if err != nil {
		return fmt.Errorf("write %s %s: %w", t.kind, t.name(key), err)
	}
	if err := t.allowLevel(tx, key, value); err != nil {
		return err
	}
	tx.put(t.Path(key), raw, &entry[K, V]{key: key, Record: Record[V]{Value: value, Raw: raw}})
	return nil
}

// Delete removes the record under key, if there is one.
func (t *Table[K, V]) Delete(tx *Tx, key K) { tx.delete(t.Path(key)) }

// Expect makes the transaction hold only if the record under key still has the
// given revision; 0 says that there is none. It returns an error that wraps
// ErrRevision at once when that is not so, which is final: it is not retried.
func (t *Table[K, V]) Expect(tx *Tx, key K, revision uint64) error {
	have := uint64(0)
	if rec, ok := t.Get(tx, key); ok {
		have = rec.Revision
	}
	if have != revision {
		return fmt.Errorf("%w: %s %s is at revision %d, expected %d", ErrRevision, t.kind, t.name(key), have, revision)
	}
	return nil
}

// Key returns the key of a change of this table; ok is false for a change of
// another one.
func (t *Table[K, V]) Key(c Change) (key K, ok bool) {
	if c.Kind != t.kind {
		return key, false
	}
	key, ok = c.key.(K)
	return key, ok
}

// Path returns the key in the store of the record under key.
func (t *Table[K, V]) Path(key K) string { return joinPath(string(t.kind), t.encode(key)...) }

// Read decodes a value as the table does for the record under key.
func (t *Table[K, V]) Read(key K, raw []byte) (V, error) { return t.read(key, raw) }

func (t *Table[K, V]) prefix() string { return string(t.kind) + "/" }

func (t *Table[K, V]) name(key K) string { return strings.Join(t.encode(key), "/") }

func (t *Table[K, V]) under(r Reader, prefix string) iter.Seq2[K, Record[V]] {
	return func(yield func(K, Record[V]) bool) {
		it := r.snapshot().tree.Root().Iterator()
		it.SeekPrefix([]byte(prefix))
		for _, value, ok := it.Next(); ok; _, value, ok = it.Next() {
			if e, is := value.(*entry[K, V]); is && !yield(e.key, e.Record) {
				return
			}
		}
	}
}

func (t *Table[K, V]) allowLevel(tx *Tx, key K, value V) error {
	need := 1
	if t.level != nil {
		need = t.level(value)
	}
	if have := tx.base.FeatureLevel(); need > have {
		return fmt.Errorf("%w: %s %s needs feature level %d, the cluster is at %d: upgrade all servers and proxies first",
			ErrFeatureLevel, t.kind, t.name(key), need, have)
	}
	return nil
}

// row is a Table without its types: what loading needs.
type row interface {
	Kind() Kind
	load(path string, raw []byte, revision uint64) (value any, key any, also []string, err error)
	indexes(value any) []string
}

// load decodes one stored pair. A value that can't be decoded comes back with
// its error in the record as well as in err; a key that can't, gives no value.
func (t *Table[K, V]) load(path string, raw []byte, revision uint64) (any, any, []string, error) {
	segments, err := splitPath(strings.TrimPrefix(path, t.prefix()))
	if err != nil {
		return nil, nil, nil, err
	}
	key, err := t.decode(segments)
	if err != nil {
		return nil, nil, nil, err
	}
	e := &entry[K, V]{key: key, Record: Record[V]{Raw: raw, Revision: revision}}
	if e.Value, e.Err = t.read(key, raw); e.Err != nil {
		var zero V
		e.Value = zero
		return e, key, nil, e.Err
	}
	return e, key, t.indexes(e), nil
}

func (t *Table[K, V]) indexes(value any) []string {
	e, ok := value.(*entry[K, V])
	if !ok || t.also == nil || e.Err != nil {
		return nil
	}
	return t.also(e.key, e.Value)
}

// Segments of keys are percent-encoded, so that every key has one spelling and
// "/" separates; an empty segment is "_", which the encoding leaves to nothing
// else.

func joinPath(first string, rest ...string) string {
	var b strings.Builder
	b.WriteString(first)
	for _, s := range rest {
		b.WriteByte('/')
		b.WriteString(encodeSegment(s))
	}
	return b.String()
}

func encodeSegment(s string) string {
	if s == "" {
		return "_"
	}
	return strings.ReplaceAll(url.PathEscape(s), "_", "%5F")
}

var errKey = errors.New("malformed key")

func splitPath(path string) ([]string, error) {
	segments := strings.Split(path, "/")
	for i, s := range segments {
		plain, err := url.PathUnescape(s)
		if s == "_" {
			plain, err = "", nil
		}
		if err != nil || encodeSegment(plain) != s {
			return nil, fmt.Errorf("%w: segment %q", errKey, s)
		}
		segments[i] = plain
	}
	return segments, nil
}
