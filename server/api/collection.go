package api

import (
	"bytes"
	"fmt"
	"net/http"
	"slices"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/acl"
	"github.com/meshd/meshd/server/client"
	"github.com/meshd/meshd/server/state"
)

// A collection is one kind of resource as routes and apply see it, without its
// types.
type collection interface {
	kind() client.Kind
	resource() acl.Resource
	// pattern is the part of the URL that names one resource.
	pattern() string
	// object returns what a URL of pattern names, for authorization.
	object(*http.Request) acl.Request
	// parts returns what a URL of pattern names, for ref.
	parts(*http.Request) []string
	list(*state.Snapshot) []client.Item
	// namespaced reports whether resources of the kind are in namespaces, labeled
	// whether they have labels.
	namespaced() bool
	labeled() bool
	// page returns at most limit items after the one that the parts name (nil:
	// from the first on), and whether there are more.
	page(s *state.Snapshot, sel selection, after []string, limit int) (items []client.Item, more bool, err error)
	// follow returns what a watch has to send.
	follow(selection) follower
	// get returns nil if there is none.
	get(*state.Snapshot, client.Ref) (*client.Item, error)
	// decode reads and validates a spec.
	decode(raw []byte) (resource, error)
	// scopeOf returns what authorization sees of a resource.
	scopeOf(client.Ref) (acl.Request, error)
	// remove deletes the resource if its revision is the given one.
	remove(tx *state.Tx, ref client.Ref, revision uint64) (client.Change, error)
}

// A resource is one decoded spec that is about to be written.
type resource interface {
	ref() client.Ref
	object() acl.Request
	// same returns what a write would answer that changes nothing, if s holds this
	// very spec.
	same(s *state.Snapshot) (client.Change, bool)
	// revision returns that of the stored resource; 0 if there is none.
	revision(s *state.Snapshot) uint64
	// write puts the spec for somebody, if the stored one has the given revision,
	// and returns what changed and what looks unintended.
	write(tx *state.Tx, who acl.Identity, revision uint64) (client.Change, []string, error)
}

// A table is a collection over a table of the state.
type table[K comparable, V interface{ Validate() error }] struct {
	name     client.Kind
	res      acl.Resource
	segments []string // names of the URL's parts
	table    *state.Table[K, V]
	// key reads the parts of a Ref, keyOf those in the spec.
	key   func(parts []string) (K, error)
	keyOf func(V) (K, error)
	ref   func(K) client.Ref
	show  func(K) string
	// scope is what authorization sees of a key.
	scope func(K) acl.Request
	// status is what the mesh knows of a resource; nil: nothing.
	status func(*state.Snapshot, K) any
	// touched returns the resources whose status a change of another table may
	// have changed; nil: none.
	touched func(*state.Snapshot, state.Change) []K
	// labels are those of a spec; nil: the kind has none.
	labels func(V) map[string]string
	// before checks a write against the rest of the state, and the rights of its
	// writer, in its transaction.
	before func(*state.Tx, acl.Identity, K, V) ([]string, error)
	// beforeRemove does so for a delete.
	beforeRemove func(*state.Tx, K) error
	// builtin are specs that always are, and are not stored; nil: none.
	builtin func() []V
	// readOnly says who writes such resources, if not users.
	readOnly string
}

func (t *table[K, V]) kind() client.Kind      { return t.name }
func (t *table[K, V]) resource() acl.Resource { return t.res }

func (t *table[K, V]) pattern() string {
	return "/{" + strings.Join(t.segments, "}/{") + "}"
}

func (t *table[K, V]) parts(r *http.Request) []string {
	parts := make([]string, 0, len(t.segments)+1)
	for _, s := range t.segments {
		parts = append(parts, r.PathValue(s))
	}
	if td := r.URL.Query().Get("trust_domain"); td != "" && t.name == client.KindIntention {
		parts = append(parts, td)
	}
	return parts
}

func (t *table[K, V]) object(r *http.Request) acl.Request {
	k, err := t.key(t.parts(r))
	if err != nil {
		return acl.Request{} // all of the kind is asked for; the handler reports the error
	}
	return t.scope(k)
}

func (t *table[K, V]) scopeOf(r client.Ref) (acl.Request, error) {
	k, err := t.parse(r)
	if err != nil {
		return acl.Request{}, err
	}
	return t.scope(k), nil
}

func (t *table[K, V]) item(s *state.Snapshot, k K, rec state.Record[V]) client.Item {
	i := client.Item{Kind: t.name, Name: t.show(k), Ref: t.ref(k), Revision: rec.Revision, Spec: rec.Raw}
	if rec.Err != nil && !jsontext.Value(rec.Raw).IsValid() {
		i.Spec = []byte("null") // damaged; the log has said so
	}
	if t.status != nil {
		if st := t.status(s, k); st != nil {
			i.Status, _ = json.Marshal(st) // a struct of our own: it always can be
		}
	}
	return i
}

func (t *table[K, V]) list(s *state.Snapshot) []client.Item {
	items := t.builtins(selection{})
	for k, rec := range t.table.All(s) {
		items = append(items, t.item(s, k, rec))
	}
	return items
}

func (t *table[K, V]) get(s *state.Snapshot, ref client.Ref) (*client.Item, error) {
	k, err := t.parse(ref)
	if err != nil {
		return nil, err
	}
	rec, ok := t.table.Get(s, k)
	if !ok {
		for _, i := range t.builtins(selection{}) {
			if slices.Equal(i.Ref.Parts, t.ref(k).Parts) {
				return &i, nil
			}
		}
		return nil, nil //nolint:nilnil // the contract of get: nil is none
	}
	i := t.item(s, k, rec)
	return &i, nil
}

// builtins are the built-in resources that are selected. They come before what is
// stored, in their own order, and have the revision 0.
func (t *table[K, V]) builtins(sel selection) []client.Item {
	items := []client.Item{}
	if t.builtin == nil {
		return items
	}
	for _, v := range t.builtin() {
		k, err := t.keyOf(v)
		if err != nil || !t.selected(sel, k, v) {
			continue
		}
		raw, _ := json.Marshal(v) // a struct of our own: it always can be
		items = append(items, client.Item{Kind: t.name, Name: t.show(k), Ref: t.ref(k), Spec: raw})
	}
	return items
}

func (t *table[K, V]) isBuiltin(k K) bool {
	return slices.ContainsFunc(t.builtins(selection{}), func(i client.Item) bool { return slices.Equal(i.Ref.Parts, t.ref(k).Parts) })
}

// builtin refuses to change what is always there.
func builtin(kind client.Kind, name string) error {
	return &client.Error{Code: client.CodeConflict, Message: fmt.Sprintf("%s %s is built in, and always as it is", kind, name), Next: "write another one under another name"}
}

func (t *table[K, V]) parse(ref client.Ref) (K, error) {
	k, err := t.key(ref.Parts)
	if err != nil {
		return k, badField("path", "%v", err)
	}
	return k, nil
}

func (t *table[K, V]) decode(raw []byte) (resource, error) {
	if t.readOnly != "" {
		return nil, &client.Error{Code: client.CodeInvalid, Message: fmt.Sprintf("%s cannot be written: %s", t.name.Collection(), t.readOnly)}
	}
	var v V
	if err := decodeBody(string(t.name), raw, &v); err != nil { // Validate included
		return nil, err
	}
	k, err := t.keyOf(v)
	if err != nil {
		return nil, invalid(string(t.name), err)
	}
	return &spec[K, V]{table: t, key: k, value: v, raw: bytes.Clone(raw)}, nil
}

func (t *table[K, V]) remove(tx *state.Tx, ref client.Ref, revision uint64) (client.Change, error) {
	k, err := t.parse(ref)
	if err != nil {
		return client.Change{}, err
	}
	if t.readOnly != "" {
		return client.Change{}, &client.Error{Code: client.CodeInvalid, Message: fmt.Sprintf("%s %s cannot be deleted: %s", t.name, t.show(k), t.readOnly)}
	}
	if t.isBuiltin(k) {
		return client.Change{}, builtin(t.name, t.show(k))
	}
	old, ok := t.table.Get(tx, k)
	if !ok {
		return client.Change{}, notFound(t.name, t.show(k), t.names(tx.Snapshot()))
	}
	if revision != client.AnyRevision {
		if err := t.table.Expect(tx, k, revision); err != nil {
			return client.Change{}, err
		}
	}
	if t.beforeRemove != nil {
		if err := t.beforeRemove(tx, k); err != nil {
			return client.Change{}, err
		}
	}
	t.table.Delete(tx, k)
	leaveSet(tx, t.ref(k))
	return client.Change{Kind: t.name, Name: t.show(k), Change: client.ChangeDeleted, Before: old.Raw}, nil
}

func (t *table[K, V]) names(s *state.Snapshot) []string {
	var names []string
	for k := range t.table.All(s) {
		names = append(names, t.show(k))
	}
	return names
}

// A spec is a resource of one table.
type spec[K comparable, V interface{ Validate() error }] struct {
	table *table[K, V]
	key   K
	value V
	raw   []byte
}

func (s *spec[K, V]) ref() client.Ref     { return s.table.ref(s.key) }
func (s *spec[K, V]) object() acl.Request { return s.table.scope(s.key) }

func (s *spec[K, V]) same(at *state.Snapshot) (client.Change, bool) {
	old, exists := s.table.table.Get(at, s.key)
	if !exists || !sameJSON(old.Raw, s.raw) {
		return client.Change{}, false
	}
	return client.Change{
		Kind: s.table.name, Name: s.table.show(s.key), Change: client.ChangeUnchanged, Before: old.Raw, After: s.raw, Revision: old.Revision,
	}, true
}

func (s *spec[K, V]) revision(at *state.Snapshot) uint64 {
	rec, _ := s.table.table.Get(at, s.key)
	return rec.Revision
}

func (s *spec[K, V]) write(tx *state.Tx, who acl.Identity, revision uint64) (client.Change, []string, error) {
	change := client.Change{Kind: s.table.name, Name: s.table.show(s.key), After: s.raw, Change: client.ChangeCreated}
	if revision != client.AnyRevision {
		if err := s.table.table.Expect(tx, s.key, revision); err != nil {
			return change, nil, err
		}
	}
	old, exists := s.table.table.Get(tx, s.key)
	if exists {
		change.Before, change.Revision, change.Change = old.Raw, old.Revision, client.ChangeUpdated
		if sameJSON(old.Raw, s.raw) {
			change.Change = client.ChangeUnchanged
			return change, nil, nil
		}
	}
	if s.table.isBuiltin(s.key) {
		return change, nil, builtin(s.table.name, s.table.show(s.key))
	}
	var warnings []string
	if s.table.before != nil {
		var err error
		if warnings, err = s.table.before(tx, who, s.key, s.value); err != nil {
			return change, nil, err
		}
	}
	return change, warnings, s.table.table.PutRaw(tx, s.key, s.raw)
}

// sameJSON reports whether two texts are the same JSON value.
func sameJSON(a, b []byte) bool {
	x, y := jsontext.Value(bytes.Clone(a)), jsontext.Value(bytes.Clone(b))
	return x.Canonicalize() == nil && y.Canonicalize() == nil && bytes.Equal(x, y)
}

// exists makes the transaction depend on a namespace, which must be there.
func exists(tx *state.Tx, field, namespace string) error {
	if namespace == catalog.DefaultNamespace || namespace == "*" {
		return nil
	}
	if _, ok := state.Namespaces.Get(tx, namespace); ok {
		return nil
	}
	e := notFound(client.KindNamespace, namespace, namespaceNames(tx))
	e.Fields = []client.Field{{Field: field, Problem: "names a namespace that does not exist"}}
	if e.Next == "" {
		e.Next = fmt.Sprintf("create it: meshctl apply -f a file with: namespace %q {}", namespace)
	}
	return e
}
