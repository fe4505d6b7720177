package state

import (
	"iter"
	"slices"
	"strings"

	iradix "github.com/hashicorp/go-immutable-radix/v2"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/acl"
	"github.com/meshd/meshd/server/store"
)

// Snapshot is the whole state at one position. It is immutable and safe for
// concurrent use; taking one costs nothing. Read it with the tables:
//
//	node, ok := state.Nodes.Get(snapshot, "vm-a")
//	for name, service := range state.Services.All(snapshot) { … }
type Snapshot struct {
	position   catalog.Position
	tree       *iradix.Tree[any] // full key, or index key, to *entry
	counts     []int             // records per table
	access     *acl.Book         // of Policies and Roles
	superseded chan struct{}     // closed when a newer snapshot was published
}

// Problem is a stored record that this server can't read. It is kept as it is.
type Problem struct {
	Key      string // in the store
	Revision uint64
	Err      error
}

// Index prefixes begin with a byte that no stored key can hold.
const (
	indexNode    = "\x00on"
	indexProblem = "\x00problem/"
)

func newSnapshot(position store.Position) *Snapshot {
	return &Snapshot{
		position:   catalog.Position(position),
		tree:       iradix.New[any](),
		counts:     make([]int, len(rows)),
		access:     acl.NewBook(nil, nil),
		superseded: make(chan struct{}),
	}
}

// Position tells how new the snapshot is; the zero Position is before the first.
func (s *Snapshot) Position() catalog.Position { return s.position }

// InstancesOf yields the instances of one service in the order of their IDs.
func (s *Snapshot) InstancesOf(service catalog.Name) iter.Seq2[catalog.InstanceKey, Record[catalog.Instance]] {
	return Instances.under(s, joinPath(string(Instances.kind), service.Namespace, service.Name)+"/")
}

// InstancesOn yields the instances that a node has registered, by service and ID.
// An instance whose record can't be read belongs to no node.
func (s *Snapshot) InstancesOn(node string) iter.Seq2[catalog.InstanceKey, Record[catalog.Instance]] {
	return Instances.under(s, joinPath(indexNode, node)+"/")
}

// Runs reports whether an instance of the service is registered on the node.
func (s *Snapshot) Runs(node string, service catalog.Name) bool {
	for range Instances.under(s, joinPath(indexNode, node, service.Namespace, service.Name)+"/") {
		return true
	}
	return false
}

// FeatureLevel is the newest level that every member of the cluster knows; a
// cluster without a record of it is at level 1.
func (s *Snapshot) FeatureLevel() int {
	if c, ok := Clusters.Get(s, Singleton{}); ok && c.Err == nil {
		return max(1, c.Value.FeatureLevel)
	}
	return 1
}

// Problems yields the records that can't be read, in the order of their keys.
func (s *Snapshot) Problems() iter.Seq[Problem] { return s.problems("") }

func (s *Snapshot) problems(prefix string) iter.Seq[Problem] {
	return func(yield func(Problem) bool) {
		it := s.tree.Root().Iterator()
		it.SeekPrefix([]byte(indexProblem + prefix))
		for _, value, ok := it.Next(); ok; _, value, ok = it.Next() {
			if p, is := value.(Problem); is && !yield(p) {
				return
			}
		}
	}
}

// apply returns the snapshot after batch, the keys that it touched, and what it
// could not read. Its cost grows with the batch, not with the state.
func (s *Snapshot) apply(batch store.Batch) (*Snapshot, []Change, []Problem) {
	base := s
	if batch.Reset {
		base = newSnapshot(batch.To)
	}
	next := &Snapshot{
		position:   catalog.Position(batch.To),
		counts:     append([]int(nil), base.counts...),
		access:     base.access,
		superseded: make(chan struct{}),
	}
	txn := base.tree.Txn()
	changes := make([]Change, 0, len(batch.Puts)+len(batch.Deletes))
	var problems []Problem
	for _, key := range batch.Deletes {
		changes = next.remove(txn, key, changes)
	}
	for _, pair := range batch.Puts {
		kind, _, _ := strings.Cut(pair.Key, "/")
		row, index := rowOf(Kind(kind))
		if row == nil {
			continue // of a newer version; the feature level keeps what matters from being written
		}
		value, key, also, err := row.load(pair.Key, pair.Value, pair.ModRevision)
		if err != nil {
			p := Problem{Key: pair.Key, Revision: pair.ModRevision, Err: err}
			problems = append(problems, p)
			txn.Insert([]byte(indexProblem+pair.Key), p)
		} else {
			txn.Delete([]byte(indexProblem + pair.Key))
		}
		if value == nil { // the key can't be read; nor could it before
			changes = append(changes, Change{Kind: row.Kind()})
			continue
		}
		if old, had := txn.Insert([]byte(pair.Key), value); had {
			for _, k := range row.indexes(old) {
				txn.Delete([]byte(k))
			}
		} else {
			next.counts[index]++
		}
		for _, k := range also {
			txn.Insert([]byte(k), value)
		}
		changes = append(changes, Change{Kind: row.Kind(), key: key})
	}
	next.tree = txn.Commit()
	if slices.ContainsFunc(changes, func(c Change) bool { return c.Kind == Policies.kind || c.Kind == Roles.kind }) {
		next.access = bookOf(next)
	}
	return next, changes, problems
}

// Access returns the policies and roles, compiled. Snapshots that do not differ in
// them share it. A record that can't be read allows nothing.
func (s *Snapshot) Access() *acl.Book { return s.access }

func bookOf(s *Snapshot) *acl.Book {
	var policies []catalog.Policy
	for _, rec := range Policies.All(s) {
		if rec.Err == nil {
			policies = append(policies, rec.Value)
		}
	}
	var roles []catalog.Role
	for _, rec := range Roles.All(s) {
		if rec.Err == nil {
			roles = append(roles, rec.Value)
		}
	}
	return acl.NewBook(policies, roles)
}

// remove takes a key out and adds the change to changes.
func (s *Snapshot) remove(txn *iradix.Txn[any], key string, changes []Change) []Change {
	s.drop(txn, key)
	kind, _, _ := strings.Cut(key, "/")
	row, _ := rowOf(Kind(kind))
	if row == nil {
		return changes
	}
	_, decoded, _, _ := row.load(key, nil, 0)
	return append(changes, Change{Kind: row.Kind(), key: decoded})
}

// drop takes a key, its problem and its index entries out of txn.
func (s *Snapshot) drop(txn *iradix.Txn[any], key string) {
	txn.Delete([]byte(indexProblem + key))
	old, had := txn.Delete([]byte(key))
	if !had {
		return
	}
	kind, _, _ := strings.Cut(key, "/")
	row, index := rowOf(Kind(kind))
	s.counts[index]--
	for _, k := range row.indexes(old) {
		txn.Delete([]byte(k))
	}
}

func (s *Snapshot) snapshot() *Snapshot { return s }

func (s *Snapshot) lookup(key string) any {
	value, _ := s.tree.Get([]byte(key))
	return value
}

// stored is what every entry can tell without its type.
type stored interface {
	pair() (raw []byte, revision uint64)
}

func (e *entry[K, V]) pair() (raw []byte, revision uint64) { return e.Raw, e.Revision }

// raw returns the stored bytes under a full key.
func (s *Snapshot) raw(key string) ([]byte, bool) {
	e, ok := s.lookup(key).(stored)
	if !ok {
		return nil, false
	}
	raw, _ := e.pair()
	return raw, true
}

// revision returns that of the record under a full key, 0 if there is none.
func (s *Snapshot) revision(key string) uint64 {
	e, ok := s.lookup(key).(stored)
	if !ok {
		return 0
	}
	_, revision := e.pair()
	return revision
}
