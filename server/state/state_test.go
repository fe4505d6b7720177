package state_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/intentions"
	"github.com/meshd/meshd/server/state"
	"github.com/meshd/meshd/server/store"
)

// start returns a running state over a new in-memory store.
func start(tb testing.TB) (*state.State, *store.Memory) {
	tb.Helper()
	engine := store.NewMemory()
	s := state.New(engine, slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(tb.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	tb.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			tb.Errorf("Run: %v", err)
		}
		if err := engine.Close(); err != nil {
			tb.Errorf("Close: %v", err)
		}
	})
	<-s.Ready()
	return s, engine
}

func update(tb testing.TB, s *state.State, fn func(*state.Tx) error) catalog.Position {
	tb.Helper()
	position, err := s.Update(tb.Context(), fn)
	if err != nil {
		tb.Fatalf("Update: %v", err)
	}
	return position
}

func instance(node, service, id string) catalog.Instance {
	return catalog.Instance{Namespace: "default", Service: service, ID: id, Node: node, MeshAddress: "10.0.0.1:7443"}
}

func put(tx *state.Tx, instances ...catalog.Instance) error {
	for _, i := range instances {
		if err := state.Instances.Put(tx, i.Key(), i); err != nil {
			return err
		}
	}
	return nil
}

func TestUpdateIsSeenAtOnce(t *testing.T) {
	t.Parallel()
	s, _ := start(t)
	raw := []byte(`{ "name": "vm-a",   "services": ["web"] }`)
	position := update(t, s, func(tx *state.Tx) error { return state.Nodes.PutRaw(tx, "vm-a", raw) })
	snapshot := s.Snapshot()
	rec, ok := state.Nodes.Get(snapshot, "vm-a")
	if !ok {
		t.Fatal("the node is not there")
	}
	want := state.Record[catalog.Node]{
		Value: catalog.Node{Name: "vm-a", Services: []string{"web"}}, Raw: raw, Revision: position.Revision,
	}
	if diff := cmp.Diff(want, rec); diff != "" {
		t.Errorf("record (-want +got):\n%s", diff)
	}
	if got := snapshot.Position(); got != position {
		t.Errorf("position %v, want %v", got, position)
	}
	again := update(t, s, func(tx *state.Tx) error { return state.Nodes.PutRaw(tx, "vm-a", raw) })
	if again != position {
		t.Errorf("writing the same again moved the position from %v to %v", position, again)
	}
	fresh, err := s.Fresh(t.Context())
	if err != nil || state.Nodes.Len(fresh) != 1 {
		t.Errorf("Fresh: %d nodes, %v", state.Nodes.Len(fresh), err)
	}
}

func TestIndexes(t *testing.T) {
	t.Parallel()
	s, _ := start(t)
	update(t, s, func(tx *state.Tx) error {
		return put(tx, instance("vm-a", "web", "web"), instance("vm-b", "web", "web"), instance("vm-a", "api", "api-2"), instance("vm-ab", "api", "_"))
	})
	before := s.Snapshot()
	update(t, s, func(tx *state.Tx) error {
		state.Instances.Delete(tx, instance("vm-a", "api", "api-2").Key())
		return put(tx, instance("vm-a", "db", "db"))
	})
	after := s.Snapshot()
	on := func(s *state.Snapshot, node string) (out []string) {
		for key := range s.InstancesOn(node) {
			out = append(out, key.String())
		}
		return out
	}
	of := func(s *state.Snapshot, service string) (out []string) {
		for key := range s.InstancesOf(catalog.Name{Namespace: "default", Name: service}) {
			out = append(out, key.String())
		}
		return out
	}
	for _, row := range []struct {
		name string
		got  any
		want any
	}{
		{"on vm-a before", on(before, "vm-a"), []string{"default/api/vm-a/api-2", "default/web/vm-a/web"}},
		{"on vm-a after", on(after, "vm-a"), []string{"default/db/vm-a/db", "default/web/vm-a/web"}},
		{"on vm-ab", on(after, "vm-ab"), []string{"default/api/vm-ab/_"}},
		{"of web", of(after, "web"), []string{"default/web/vm-a/web", "default/web/vm-b/web"}},
		{"of api before", of(before, "api"), []string{"default/api/vm-a/api-2", "default/api/vm-ab/_"}},
		{"of we", of(after, "we"), []string(nil)},
		{"len", state.Instances.Len(after), 4},
		{"runs", after.Runs("vm-a", catalog.Name{Namespace: "default", Name: "db"}), true},
		{"ran", after.Runs("vm-a", catalog.Name{Namespace: "default", Name: "api"}), false},
	} {
		if diff := cmp.Diff(row.want, row.got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", row.name, diff)
		}
	}
	newest, changes, ok := s.Changes(before)
	if newest != after || !ok || len(changes) != 2 {
		t.Fatalf("Changes: %v, %d changes, %v", newest.Position(), len(changes), ok)
	}
	var changed []string
	for _, c := range changes {
		key, ok := state.Instances.Key(c)
		if !ok {
			t.Errorf("%v is no change of an instance", c)
		}
		changed = append(changed, key.String())
	}
	if diff := cmp.Diff([]string{"default/api/vm-a/api-2", "default/db/vm-a/db"}, changed); diff != "" {
		t.Errorf("changes (-want +got):\n%s", diff)
	}
}

// A counter that many increment at once loses nothing: transactions are serializable.
func TestConcurrentUpdates(t *testing.T) {
	t.Parallel()
	s, _ := start(t)
	const writers, rounds = 8, 20
	var group sync.WaitGroup
	for range writers {
		group.Go(func() {
			for range rounds {
				_, err := s.Update(t.Context(), func(tx *state.Tx) error {
					rec, _ := state.Leases.Get(tx, "vm-a")
					rec.Value.Epoch++
					return state.Leases.Put(tx, "vm-a", rec.Value)
				})
				if err != nil {
					t.Errorf("Update: %v", err)
				}
			}
		})
	}
	group.Wait()
	rec, _ := state.Leases.Get(s.Snapshot(), "vm-a")
	if rec.Value.Epoch != writers*rounds {
		t.Errorf("counted %d, want %d", rec.Value.Epoch, writers*rounds)
	}
}

// What a transaction read by Get is part of it, even if it is not written.
func TestReadsAreChecked(t *testing.T) {
	t.Parallel()
	s, _ := start(t)
	update(t, s, func(tx *state.Tx) error {
		return state.Nodes.Put(tx, "vm-a", catalog.Node{Name: "vm-a", Services: []string{"*"}})
	})
	runs := 0
	refused := errors.New("node is gone")
	_, err := s.Update(t.Context(), func(tx *state.Tx) error {
		runs++
		if _, ok := state.Nodes.Get(tx, "vm-a"); !ok {
			return refused
		}
		if runs == 1 {
			update(t, s, func(other *state.Tx) error { state.Nodes.Delete(other, "vm-a"); return nil })
		}
		return put(tx, instance("vm-a", "web", "web"))
	})
	if !errors.Is(err, refused) || runs != 2 {
		t.Errorf("after %d runs: %v, want the second to be refused", runs, err)
	}
	if n := state.Instances.Len(s.Snapshot()); n != 0 {
		t.Errorf("%d instances of a deleted node", n)
	}
}

func TestExpect(t *testing.T) {
	t.Parallel()
	s, _ := start(t)
	at := update(t, s, func(tx *state.Tx) error { return state.Namespaces.Put(tx, "a", catalog.Namespace{Name: "a"}) })
	for _, row := range []struct {
		key      string
		revision uint64
		want     error
	}{
		{"a", at.Revision, nil}, {"a", at.Revision + 1, state.ErrRevision}, {"a", 0, state.ErrRevision}, {"b", 0, nil}, {"b", 1, state.ErrRevision},
	} {
		_, err := s.Update(t.Context(), func(tx *state.Tx) error { return state.Namespaces.Expect(tx, row.key, row.revision) })
		if !errors.Is(err, row.want) {
			t.Errorf("Expect(%s, %d) = %v, want %v", row.key, row.revision, err, row.want)
		}
	}
}

func TestFeatureLevel(t *testing.T) {
	t.Parallel()
	s, _ := start(t)
	if got := s.Snapshot().FeatureLevel(); got != 1 {
		t.Errorf("a cluster without a record is at level %d, want 1", got)
	}
	update(t, s, func(tx *state.Tx) error {
		return state.Clusters.Put(tx, state.Singleton{}, state.Cluster{TrustDomain: "mesh.test", FeatureLevel: 3})
	})
	if got := s.Snapshot().FeatureLevel(); got != 3 {
		t.Errorf("level %d, want 3", got)
	}
	// A node with labels is of level 4 here.
	nodes := state.WithLevel(state.Nodes, func(n catalog.Node) int { return 3 + min(1, len(n.Labels)) })
	for _, row := range []struct {
		node catalog.Node
		want error
	}{{catalog.Node{Name: "a"}, nil}, {catalog.Node{Name: "b", Labels: map[string]string{"new": "field"}}, state.ErrFeatureLevel}} {
		_, err := s.Update(t.Context(), func(tx *state.Tx) error { return nodes.Put(tx, row.node.Name, row.node) })
		if !errors.Is(err, row.want) {
			t.Errorf("node %s: %v, want %v", row.node.Name, err, row.want)
		}
	}
}

// An intention that can't be read denies its destination, and only that.
func TestUnreadableIntentionDenies(t *testing.T) {
	t.Parallel()
	good := `{"source":"web","destination":"api","action":"allow"}`
	for _, row := range []struct{ name, key, value string }{
		{"no JSON", "intention/default/api/_/default/batch", `{"source`},
		{"unknown field", "intention/default/api/_/default/batch", `{"source":"batch","destination":"api","action":"deny","weather":"rain"}`},
		{"case variant", "intention/default/api/_/default/batch", `{"source":"batch","destination":"api","action":"deny","Action":"allow"}`},
		{"another one's key", "intention/default/api/_/default/batch", `{"source":"batch","destination":"db","action":"deny"}`},
		{"no key", "intention/default/api/batch", good},
		{"no action", "intention/default/api/_/default/batch", `{"source":"batch","destination":"api"}`},
		{"of the namespace", "intention/default/%2A/_/default/batch", `7`},
		{"of everything", "intention/%2A/%2A/_/default/batch", `7`},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			s, engine := start(t)
			position := update(t, s, func(tx *state.Tx) error {
				return state.Intentions.PutRaw(tx, key(t, "web", "api"), []byte(good))
			})
			api, web := catalog.Name{Namespace: "default", Name: "api"}, spiffe.Service("mesh.test", "default", "web")
			policy, err := s.Snapshot().Policy("mesh.test", api)
			if err != nil || !policy.MayAllow(web) {
				t.Fatalf("before: %v, allowed %v", err, policy.MayAllow(web))
			}
			p, err := engine.Commit(t.Context(), store.Txn{Ops: []store.Op{{Key: row.key, Value: []byte(row.value)}}})
			if err != nil {
				t.Fatal(err)
			}
			snapshot, err := s.Await(t.Context(), catalog.Position(p))
			if err != nil {
				t.Fatal(err)
			}
			policy, err = snapshot.Policy("mesh.test", api)
			if err == nil || policy.MayAllow(web) {
				t.Errorf("allowed beside an intention that can't be read: %v", err)
			}
			if _, err := snapshot.Policy("mesh.test", catalog.Name{Namespace: "other", Name: "api"}); err != nil && row.name != "of everything" {
				t.Errorf("another destination: %v", err)
			}
			if _, err := engine.Commit(t.Context(), store.Txn{Ops: []store.Op{{Key: row.key, Delete: true}}}); err != nil {
				t.Fatal(err)
			}
			snapshot, err = s.Fresh(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if policy, err = snapshot.Policy("mesh.test", api); err != nil || !policy.MayAllow(web) {
				t.Errorf("after its removal: %v", err)
			}
			for p := range snapshot.Problems() {
				t.Errorf("problem stays: %v", p)
			}
			if position.IsZero() {
				t.Error("no position")
			}
		})
	}
}

func key(tb testing.TB, source, destination string) intentions.Key {
	tb.Helper()
	k, err := intentions.ParseKey(source, destination)
	if err != nil {
		tb.Fatal(err)
	}
	return k
}

func TestIntentionsFor(t *testing.T) {
	t.Parallel()
	s, _ := start(t)
	pairs := [][2]string{
		{"web", "api"}, {"web", "default/*"}, {"*", "*"}, {"web", "db"}, {"spiffe://other.test/ns/x/svc/y", "api"}, {"a/*", "b/api"}, {"web", "apis"},
	}
	for _, p := range pairs {
		update(t, s, func(tx *state.Tx) error {
			return state.Intentions.Put(tx, key(t, p[0], p[1]), intentions.Intention{Source: p[0], Destination: p[1], Action: intentions.Allow})
		})
	}
	var got []string
	for k, rec := range s.Snapshot().IntentionsFor(catalog.Name{Namespace: "default", Name: "api"}) {
		if rec.Err != nil {
			t.Errorf("%v: %v", k, rec.Err)
		}
		got = append(got, state.KeyText(k))
		back, err := state.ParseKeyText(state.KeyText(k))
		if err != nil || back != k {
			t.Errorf("%v became %v: %v", k, back, err)
		}
	}
	want := []string{"default/api/_/default/web", "default/api/other.test/x/y", "default/%2A/_/default/web", "%2A/%2A/_/%2A/%2A"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// A restored older state replaces the newer one, and everybody who waits is woken.
func TestGenerationFlip(t *testing.T) {
	t.Parallel()
	s, engine := start(t)
	var last catalog.Position
	for i := range 5 {
		last = update(t, s, func(tx *state.Tx) error {
			return state.Namespaces.Put(tx, fmt.Sprintf("ns%d", i), catalog.Namespace{Name: fmt.Sprintf("ns%d", i)})
		})
	}
	before := s.Snapshot()
	node, err := json.Marshal(catalog.Node{Name: "vm-a"})
	if err != nil {
		t.Fatal(err)
	}
	pairs := func(yield func(store.Pair, error) bool) {
		yield(store.Pair{Key: "node/vm-a", Value: node}, nil)
	}
	to, err := store.Replace(t.Context(), engine, store.Position(last), pairs)
	if err != nil {
		t.Fatal(err)
	}
	<-s.Changed(before)
	after, err := s.Await(t.Context(), catalog.Position(to))
	if err != nil {
		t.Fatal(err)
	}
	if state.Namespaces.Len(after) != 0 || state.Nodes.Len(after) != 1 || after.Position().Generation == last.Generation {
		t.Errorf("at %v: %d namespaces, %d nodes", after.Position(), state.Namespaces.Len(after), state.Nodes.Len(after))
	}
	if _, _, ok := s.Changes(before); ok {
		t.Error("changes over a flip can't be told")
	}
	// A position of the past is behind us for ever.
	if _, err := s.Await(t.Context(), catalog.Position{Generation: last.Generation, Revision: last.Revision + 100}); err != nil {
		t.Error(err)
	}
}

// lossy is an engine that applies commits and loses the answers.
type lossy struct {
	store.Engine
	apply bool
}

func (l lossy) Commit(ctx context.Context, txn store.Txn) (store.Position, error) {
	if l.apply {
		if _, err := l.Engine.Commit(ctx, txn); err != nil {
			return store.Position{}, err
		}
	}
	return store.Position{}, fmt.Errorf("%w: connection lost", store.ErrUnknownOutcome)
}

func TestUnknownOutcome(t *testing.T) {
	t.Parallel()
	for _, apply := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			engine := lossy{Engine: store.NewMemory(), apply: apply}
			s := state.New(engine, slog.New(slog.DiscardHandler))
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error)
			go func() { done <- s.Run(ctx) }()
			_, err := s.Update(ctx, func(tx *state.Tx) error { return state.Namespaces.Put(tx, "a", catalog.Namespace{Name: "a"}) })
			if apply && err != nil {
				t.Errorf("applied, but reported as %v", err)
			}
			if !apply && !errors.Is(err, store.ErrUnknownOutcome) {
				t.Errorf("lost, but reported as %v", err)
			}
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
			if err := engine.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestUnknownDeletion: a deletion whose outcome is unknown stays so, as another may
// have deleted the same: two who delete one revision can't both have done it.
func TestUnknownDeletion(t *testing.T) {
	t.Parallel()
	ahead, engine := start(t)
	put := func(tx *state.Tx) error { return state.Namespaces.Put(tx, "a", catalog.Namespace{Name: "a"}) }
	remove := func(tx *state.Tx) error { state.Namespaces.Delete(tx, "a"); return nil }
	update(t, ahead, put)
	s := state.New(lossy{Engine: deletedMeanwhile{engine, ahead, remove}}, slog.New(slog.DiscardHandler))
	go func() { _ = s.Run(t.Context()) }()
	<-s.Ready()
	if _, err := s.Update(t.Context(), remove); !errors.Is(err, store.ErrUnknownOutcome) {
		t.Errorf("deleted by another one, while the answer was lost: %v, want an unknown outcome", err)
	}
}

// deletedMeanwhile is an engine by which another deletes before a barrier.
type deletedMeanwhile struct {
	store.Engine
	other  *state.State
	remove func(*state.Tx) error
}

func (d deletedMeanwhile) Barrier(ctx context.Context) (store.Position, error) {
	if _, err := d.other.Update(ctx, d.remove); err != nil {
		return store.Position{}, err
	}
	return d.Engine.Barrier(ctx)
}

// lagging is an engine whose watch brings nothing while it is held back, as that of
// a server which is behind the others.
type lagging struct {
	store.Engine
	hold *sync.Mutex
}

func (l lagging) Watch(ctx context.Context, prefix string, after store.Position) store.Watcher {
	return laggingWatcher{l.Engine.Watch(ctx, prefix, after), l.hold}
}

type laggingWatcher struct {
	store.Watcher
	hold *sync.Mutex
}

func (w laggingWatcher) Next(ctx context.Context) (store.Batch, error) {
	b, err := w.Watcher.Next(ctx)
	w.hold.Lock()
	defer w.hold.Unlock()
	return b, err
}

// TestDecidesOnFreshState: what is refused or found to be there already, by a server
// that lags, is decided anew on the state that others have acknowledged.
func TestDecidesOnFreshState(t *testing.T) {
	t.Parallel()
	service := func(owner string) func(*state.Tx) error {
		return func(tx *state.Tx) error {
			s := catalog.Service{Namespace: "default", Name: "api", Owner: owner}
			return state.Services.Put(tx, catalog.Name{Namespace: s.Namespace, Name: s.Name}, s)
		}
	}
	errOther := errors.New("it is not mine")
	for name, fn := range map[string]func(*state.Tx) error{
		"a write of what it sees": service("old"),
		"a refusal of what it sees": func(tx *state.Tx) error {
			if rec, ok := state.Services.Get(tx, catalog.Name{Namespace: "default", Name: "api"}); ok && rec.Value.Owner == "old" {
				return errOther
			}
			return service("old")(tx)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ahead, engine := start(t)
			update(t, ahead, service("old"))
			hold := &sync.Mutex{}
			behind := state.New(lagging{engine, hold}, slog.New(slog.DiscardHandler))
			go func() { _ = behind.Run(t.Context()) }()
			<-behind.Ready()
			hold.Lock()
			update(t, ahead, service("new"))
			time.AfterFunc(50*time.Millisecond, hold.Unlock)
			if _, err := behind.Update(t.Context(), fn); err != nil {
				t.Fatal(err)
			}
			s, err := ahead.Fresh(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if rec, _ := state.Services.Get(s, catalog.Name{Namespace: "default", Name: "api"}); rec.Value.Owner != "old" {
				t.Errorf("the write was acknowledged, and the owner is %q", rec.Value.Owner)
			}
		})
	}
}

func TestLateReaderSeesNewest(t *testing.T) {
	t.Parallel()
	s, _ := start(t)
	before := s.Snapshot()
	for i := range 300 {
		update(t, s, func(tx *state.Tx) error { return state.Leases.Put(tx, "vm-a", catalog.Lease{Epoch: uint64(i + 1)}) })
	}
	<-s.Changed(before)
	newest, _, ok := s.Changes(before)
	if rec, _ := state.Leases.Get(newest, "vm-a"); rec.Value.Epoch != 300 || ok {
		t.Errorf("epoch %d, want the newest; changes told: %v", rec.Value.Epoch, ok)
	}
}

func FuzzKeyText(f *testing.F) {
	f.Add("default/api/_/default/web")
	f.Add("%2A/%2A/a.b/x/y")
	f.Fuzz(func(t *testing.T, text string) {
		k, err := state.ParseKeyText(text)
		if err == nil && state.KeyText(k) != text {
			t.Errorf("%q has the second spelling %q", state.KeyText(k), text)
		}
	})
}

func TestAfter(t *testing.T) {
	t.Parallel()
	s, _ := start(t)
	// In the order of stored keys, which are escaped, and between other tables.
	names := []string{"a", "a-b", "a-bc", "ab", "b"}
	update(t, s, func(tx *state.Tx) error {
		if err := state.Namespaces.Put(tx, "zz", catalog.Namespace{Name: "zz"}); err != nil {
			return err
		}
		if err := state.NodeStatuses.Put(tx, "a", catalog.NodeStatus{}); err != nil {
			return err
		}
		for _, n := range names {
			if err := state.Nodes.Put(tx, n, catalog.Node{Name: n}); err != nil {
				return err
			}
		}
		return nil
	})
	var all []string
	for n := range state.Nodes.All(s.Snapshot()) {
		all = append(all, n)
	}
	if diff := cmp.Diff(names, all); diff != "" {
		t.Fatalf("All (-want +got):\n%s", diff)
	}
	for key, want := range map[string][]string{
		"": names, "a": names[1:], "a-a": names[1:], "a-b": names[2:], "aa": names[3:], "b": nil, "z": nil, "A": names,
	} {
		var got []string
		for n := range state.Nodes.After(s.Snapshot(), key) {
			got = append(got, n)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("after %q (-want +got):\n%s", key, diff)
		}
	}
}
