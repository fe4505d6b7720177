package storetest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/meshd/meshd/server/store"
)

// model runs random histories on an engine and on a map and demands that they
// agree after every step, for lists and for watchers that lag at random. All
// histories of one run share one engine: each begins by replacing its content.
func (s suite) model(t *testing.T) {
	e := s.Open(t)
	engines := []store.Engine{e, e}
	if s.Peer != nil {
		engines[1] = s.Peer(t, e)
	}
	rapid.Check(t, func(rt *rapid.T) {
		ctx, stop := context.WithTimeout(t.Context(), patience)
		defer stop()
		m := &history{ctx: ctx, engines: engines, want: map[string]modelled{}}
		m.replace(rt, nil)
		for i, prefix := range []string{"", "", "a", "b/", "nothing"} {
			m.readers = append(m.readers, newReader(ctx, engines[i%2], prefix, store.Position{}, nil))
		}
		rt.Repeat(map[string]func(*rapid.T){
			"":        m.check,
			"commit":  m.commit,
			"again":   m.commit,
			"replace": func(rt *rapid.T) { m.replace(rt, m.draw(rt, 100)) },
			"read":    m.read,
			"resume":  m.resume,
		})
		for _, r := range m.readers {
			m.catchUp(rt, r)
		}
	})
}

type modelled struct {
	value    string
	revision uint64
}

type history struct {
	ctx     context.Context //nolint:containedctx // of one history
	engines []store.Engine
	want    map[string]modelled
	at      store.Position
	readers []*reader
}

// modelKeys is small, so that histories touch the same keys again and again.
func modelKeys() *rapid.Generator[string] {
	return rapid.SampledFrom([]string{"a", "a/1", "a/2", "ab", "b", "b/1", "b/2", "c"})
}

func (m *history) engine(rt *rapid.T) store.Engine {
	return m.engines[rapid.IntRange(0, len(m.engines)-1).Draw(rt, "member")]
}

func (m *history) draw(rt *rapid.T, n int) map[string]modelled {
	keys := rapid.SliceOfNDistinct(modelKeys(), 0, min(n, 8), rapid.ID[string]).Draw(rt, "keys")
	pairs := map[string]modelled{}
	for _, key := range keys {
		pairs[key] = modelled{value: rapid.StringN(0, 3, 8).Draw(rt, "value")}
	}
	return pairs
}

func (m *history) replace(rt *rapid.T, pairs map[string]modelled) {
	to, err := store.Replace(m.ctx, m.engine(rt), m.at, func(yield func(store.Pair, error) bool) {
		for _, key := range slices.Sorted(maps.Keys(pairs)) {
			if !yield(store.Pair{Key: key, Value: []byte(pairs[key].value)}, nil) {
				return
			}
		}
	})
	if err != nil {
		rt.Fatalf("replace: %v", err)
	}
	if to.Generation == m.at.Generation {
		rt.Fatalf("replace went from %v to %v", m.at, to)
	}
	m.at, m.want = to, map[string]modelled{}
	// The revisions of staged pairs are the engine's to choose.
	snapshot, err := m.list(rt, "")
	if err != nil {
		rt.Fatalf("list: %v", err)
	}
	for _, p := range snapshot.Pairs {
		m.want[p.Key] = modelled{value: string(p.Value), revision: p.ModRevision}
	}
	if len(m.want) != len(pairs) {
		rt.Fatalf("replaced by %v, found %v", pairs, m.want)
	}
	for key, want := range pairs {
		if m.want[key].value != want.value {
			rt.Fatalf("key %q replaced by %q, found %q", key, want.value, m.want[key].value)
		}
	}
}

// commit draws a transaction whose checks hold, mostly, and predicts its result.
func (m *history) commit(rt *rapid.T) {
	var (
		txn  store.Txn
		fail string
	)
	if rapid.Bool().Draw(rt, "generation") {
		txn.Generation = m.at.Generation
	}
	for _, key := range slices.Sorted(maps.Keys(m.draw(rt, 3))) {
		c := store.Check{Key: key, ModRevision: m.want[key].revision}
		if rapid.IntRange(0, 9).Draw(rt, "wrong") == 0 {
			c.ModRevision += rapid.SampledFrom([]uint64{1, 1 << 40}).Draw(rt, "by")
			if fail == "" {
				fail = key
			}
		}
		txn.Checks = append(txn.Checks, c)
	}
	ops := m.draw(rt, 4)
	for _, key := range slices.Sorted(maps.Keys(ops)) {
		op := ops[key]
		txn.Ops = append(txn.Ops, store.Op{Key: key, Value: []byte(op.value), Delete: rapid.IntRange(0, 2).Draw(rt, "delete") == 0})
	}
	p, err := m.engine(rt).Commit(m.ctx, txn)
	if fail != "" {
		var conflict *store.ConflictError
		if !errors.As(err, &conflict) || conflict.Key != fail || conflict.Have != m.want[fail].revision || conflict.Position != m.at {
			rt.Fatalf("commit with a failing check of %q at %v: %v, %v", fail, m.at, p, err)
		}
		return
	}
	if err != nil || p.Generation != m.at.Generation || (len(ops) > 0) != (p.Revision > m.at.Revision) {
		rt.Fatalf("commit of %v at %v: %v, %v", txn, m.at, p, err)
	}
	m.at = p
	for _, op := range txn.Ops {
		delete(m.want, op.Key)
		if !op.Delete {
			m.want[op.Key] = modelled{value: string(op.Value), revision: p.Revision}
		}
	}
}

func (m *history) list(rt *rapid.T, prefix string) (store.Snapshot, error) {
	e := m.engine(rt)
	if _, err := e.Barrier(m.ctx); err != nil {
		return store.Snapshot{}, err
	}
	return e.List(m.ctx, prefix)
}

func (m *history) check(rt *rapid.T) {
	prefix := rapid.SampledFrom([]string{"", "a", "a/", "b", "x"}).Draw(rt, "prefix")
	snapshot, err := m.list(rt, prefix)
	if err != nil || snapshot.Position != m.at {
		rt.Fatalf("list %q: at %v, want %v, %v", prefix, snapshot.Position, m.at, err)
	}
	var want []string
	for _, key := range slices.Sorted(maps.Keys(m.want)) {
		if strings.HasPrefix(key, prefix) {
			want = append(want, fmt.Sprintf("%s=%q@%d", key, m.want[key].value, m.want[key].revision))
		}
	}
	var got []string
	for _, p := range snapshot.Pairs {
		got = append(got, fmt.Sprintf("%s=%q@%d", p.Key, p.Value, p.ModRevision))
	}
	if !slices.Equal(got, want) {
		rt.Fatalf("list %q: %v, want %v", prefix, got, want)
	}
}

// read lets one watcher catch up. Only a watcher of everything is told every
// position, so the others are compared by their state.
func (m *history) read(rt *rapid.T) {
	m.catchUp(rt, rapid.SampledFrom(m.readers).Draw(rt, "reader"))
}

func (m *history) catchUp(rt *rapid.T, r *reader) {
	want := contents{}
	for key, p := range m.want {
		if strings.HasPrefix(key, r.prefix) {
			want[key] = p.value
		}
	}
	for r.prefix == "" && r.at != m.at || r.prefix != "" && (!maps.Equal(r.state, want) || r.at.Generation != m.at.Generation) {
		if err := r.next(m.ctx); err != nil {
			rt.Fatalf("watch %q at %v, the store is at %v: %v", r.prefix, r.at, m.at, err)
		}
	}
	if !maps.Equal(r.state, want) {
		rt.Fatalf("watch %q: %v, want %v", r.prefix, r.state, want)
	}
}

// resume replaces a watcher by a new one that continues where it stopped.
func (m *history) resume(rt *rapid.T) {
	i := rapid.IntRange(0, len(m.readers)-1).Draw(rt, "reader")
	old := m.readers[i]
	m.readers[i] = newReader(m.ctx, m.engine(rt), old.prefix, old.at, old.state)
}
