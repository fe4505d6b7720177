package store_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"strconv"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/meshd/meshd/server/store"
)

const (
	genA = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
	genB = "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
	genC = "cccccccccccccccccccccccccccccccc"
)

func put(key, value string) store.Op { return store.Op{Key: key, Value: []byte(value)} }

func write(t *testing.T, s *store.Space, ops ...store.Op) store.Position {
	t.Helper()
	p, err := s.Commit(store.Txn{Ops: ops}, 0)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func next(t *testing.T, w store.Watcher) store.Batch {
	t.Helper()
	b, err := w.Next(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestSpaceBeforeBegin(t *testing.T) {
	s := store.NewSpace()
	if _, err := s.Commit(store.Txn{}, 0); !errors.Is(err, store.ErrNoLeader) {
		t.Errorf("commit: %v", err)
	}
	if _, err := s.List(""); !errors.Is(err, store.ErrNoLeader) {
		t.Errorf("list: %v", err)
	}
	first := s.Begin(genA)
	if again := s.Begin(genB); again != first || first.Generation != genA {
		t.Errorf("the first generation is %v, then %v", first, again)
	}
}

// A Space forgets the oldest deletions, and only a watcher that has missed one
// is reset.
func TestSpaceForgetsDeletions(t *testing.T) {
	const deletions = 10_000 // more than any Space keeps
	s := store.NewSpace()
	s.Begin(genA)
	start := write(t, s, put("stays", "1"))
	var middle store.Position
	for i := range deletions {
		key := strconv.Itoa(i)
		write(t, s, put(key, ""))
		p := write(t, s, store.Op{Key: key, Delete: true})
		if i == deletions-100 {
			middle = p
		}
	}
	end := write(t, s, put("stays", "2"))
	for _, row := range []struct {
		name    string
		after   store.Position
		reset   bool
		deletes int
	}{
		{"far behind", start, true, 0},
		{"a little behind", middle, false, 99},
		{"in step", store.Position{Generation: genA, Revision: end.Revision - 1}, false, 0},
	} {
		b := next(t, s.Watch(t.Context(), nil, "", row.after))
		if b.Reset != row.reset || len(b.Deletes) != row.deletes || b.From != row.after || b.To != end {
			t.Errorf("%s: reset %v, %d deletions, %v to %v", row.name, b.Reset, len(b.Deletes), b.From, b.To)
		}
		if diff := cmp.Diff([]store.Pair{{Key: "stays", Value: []byte("2"), ModRevision: end.Revision}}, b.Puts); diff != "" {
			t.Errorf("%s: puts (-want +got):\n%s", row.name, diff)
		}
	}
}

func TestSpaceLeader(t *testing.T) {
	s := store.NewSpace()
	s.Begin(genA)
	led := store.Txn{Leader: true, Ops: []store.Op{put("k", "v")}}
	try := func(epoch uint64) bool {
		_, err := s.Commit(led, epoch)
		if err != nil && !errors.Is(err, store.ErrNotLeader) {
			t.Fatal(err)
		}
		return err == nil
	}
	if try(0) {
		t.Error("nobody leads, but epoch 0 wrote")
	}
	a := s.Claim("a")
	b := s.Claim("b")
	if try(a) || !try(b) || s.Leader() != (store.Leader{Holder: "b", Epoch: b}) {
		t.Errorf("claims %d and %d, leader %v", a, b, s.Leader())
	}
	s.Resign(a)
	if !try(b) {
		t.Error("the resignation of an earlier leader unseated the present one")
	}
	s.Resign(b)
	if try(b) || try(b+1) || try(0) || s.Leader().Holder != "" {
		t.Error("a leader-only write after the resignation")
	}
	if c := s.Claim("a"); c <= b+1 {
		t.Errorf("epoch %d follows %d", c, b+1)
	}
}

// drive applies a random change to all spaces and demands equal results.
func drive(rt *rapid.T, spaces ...*store.Space) {
	key := rapid.SampledFrom([]string{"a", "b", "c/d", "e"}).Draw(rt, "key")
	op := store.Op{Key: key, Value: rapid.SliceOfN(rapid.Byte(), 0, 3).Draw(rt, "value"), Delete: rapid.Bool().Draw(rt, "delete")}
	gen := rapid.SampledFrom([]string{genA, genB, genC}).Draw(rt, "generation")
	revision := rapid.Uint64Range(0, 6).Draw(rt, "revision")
	kind := rapid.IntRange(0, 9).Draw(rt, "kind")
	var first string
	for i, s := range spaces {
		var result []any
		switch kind {
		case 0:
			s.OpenStage(gen)
		case 1:
			result = []any{s.WriteStage(gen, []store.Op{op})}
		case 2:
			p, err := s.Activate(gen, store.Position{Revision: revision * 10})
			result = []any{p, err}
		case 3:
			s.DropStage(gen)
		case 4:
			result = []any{s.Claim(key)}
		case 5:
			s.Resign(revision)
		default:
			txn := store.Txn{Ops: []store.Op{op}, Leader: kind == 6}
			if kind == 7 {
				txn.Checks = []store.Check{{Key: key, ModRevision: revision}}
			}
			p, err := s.Commit(txn, revision)
			result = []any{p, err}
		}
		text := fmt.Sprint(result...)
		if i == 0 {
			first = text
		} else if text != first {
			rt.Fatalf("one space says %s, another %s", first, text)
		}
	}
}

// Two spaces that see the same changes stay equal, also when one is saved and
// loaded on the way, and what is written equals what is read back.
func TestSpaceIsDeterministic(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		a, b := store.NewSpace(), store.NewSpace()
		a.Begin(genA)
		b.Begin(genA)
		for range rapid.IntRange(0, 40).Draw(rt, "steps") {
			drive(rt, a, b)
			if rapid.IntRange(0, 4).Draw(rt, "load") == 0 {
				var saved bytes.Buffer
				n, err := b.Save().WriteTo(&saved)
				if err != nil || n != int64(saved.Len()) {
					rt.Fatalf("saved %d of %d bytes: %v", n, saved.Len(), err)
				}
				b = store.NewSpace()
				if err := b.Load(&saved); err != nil {
					rt.Fatal(err)
				}
			}
			if a.Save().Hash() != b.Save().Hash() {
				rt.Fatal("the hashes differ")
			}
		}
		for revision := range a.Position().Revision + 1 {
			after := store.Position{Generation: a.Position().Generation, Revision: revision}
			if after == a.Position() {
				break
			}
			left, err := a.Watch(context.Background(), nil, "", after).Next(context.Background())
			if err != nil {
				rt.Fatal(err)
			}
			right, err := b.Watch(context.Background(), nil, "", after).Next(context.Background())
			if err != nil {
				rt.Fatal(err)
			}
			if diff := cmp.Diff(left, right); diff != "" {
				rt.Fatalf("watchers after %v differ:\n%s", after, diff)
			}
		}
	})
}

// filled is a space with a bit of everything.
func filled(tb testing.TB) *store.Space {
	tb.Helper()
	s := store.NewSpace()
	s.Begin(genA)
	for _, ops := range [][]store.Op{
		{put("a", "1"), put("b", "2")},
		{{Key: "a", Delete: true}, put("c", "")},
	} {
		if _, err := s.Commit(store.Txn{Ops: ops}, 0); err != nil {
			tb.Fatal(err)
		}
	}
	s.Claim("server-1")
	s.OpenStage(genB)
	if err := s.WriteStage(genB, []store.Op{put("staged", "x")}); err != nil {
		tb.Fatal(err)
	}
	return s
}

// Every flipped bit and every cut of a saved state is found.
func TestLoadFindsDamage(t *testing.T) {
	var saved bytes.Buffer
	if _, err := filled(t).Save().WriteTo(&saved); err != nil {
		t.Fatal(err)
	}
	target := store.NewSpace()
	target.Begin(genC)
	before := target.Save().Hash()
	for i := range saved.Len() {
		for bit := range 8 {
			damaged := bytes.Clone(saved.Bytes())
			damaged[i] ^= 1 << bit
			if err := target.Load(bytes.NewReader(damaged)); !errors.Is(err, store.ErrCorrupt) {
				t.Fatalf("bit %d of byte %d flipped: %v", bit, i, err)
			}
		}
		if err := target.Load(bytes.NewReader(saved.Bytes()[:i])); !errors.Is(err, store.ErrCorrupt) {
			t.Fatalf("cut after %d bytes: %v", i, err)
		}
	}
	if target.Save().Hash() != before {
		t.Fatal("a refused state changed the space")
	}
}

// seal appends the right checksum, so that fuzzing gets behind it.
func seal(b []byte, sealed bool) []byte {
	if !sealed {
		return b
	}
	sum := sha256.Sum256(b)
	return append(bytes.Clone(b), sum[:]...)
}

func FuzzLoad(f *testing.F) {
	var saved bytes.Buffer
	if _, err := filled(f).Save().WriteTo(&saved); err != nil {
		f.Fatal(err)
	}
	f.Add(saved.Bytes()[:saved.Len()-sha256.Size], true)
	f.Add(saved.Bytes(), false)
	f.Fuzz(func(t *testing.T, b []byte, sealed bool) {
		s := store.NewSpace()
		if err := s.Load(bytes.NewReader(seal(b, sealed))); err != nil {
			if !errors.Is(err, store.ErrCorrupt) {
				t.Fatalf("an error that is not ErrCorrupt: %v", err)
			}
			return
		}
		var again bytes.Buffer
		if _, err := s.Save().WriteTo(&again); err != nil {
			t.Fatal(err)
		}
		twin := store.NewSpace()
		if err := twin.Load(&again); err != nil || twin.Save().Hash() != s.Save().Hash() {
			t.Fatalf("a loaded state does not survive saving: %v", err)
		}
	})
}

func FuzzReadDump(f *testing.F) {
	e := store.NewMemory()
	if _, err := e.Commit(f.Context(), store.Txn{Ops: []store.Op{put("a", "1"), put("b", "")}}); err != nil {
		f.Fatal(err)
	}
	var dump bytes.Buffer
	if _, err := store.Export(f.Context(), e, &dump); err != nil {
		f.Fatal(err)
	}
	f.Add(dump.Bytes()[:dump.Len()-sha256.Size], true)
	f.Add(dump.Bytes(), false)
	f.Fuzz(func(t *testing.T, b []byte, sealed bool) {
		_, pairs, err := store.ReadDump(bytes.NewReader(seal(b, sealed)))
		if err != nil {
			if !errors.Is(err, store.ErrCorrupt) {
				t.Fatalf("an error that is not ErrCorrupt: %v", err)
			}
			return
		}
		last := ""
		for p, err := range pairs {
			if err != nil {
				if !errors.Is(err, store.ErrCorrupt) {
					t.Fatalf("an error that is not ErrCorrupt: %v", err)
				}
				return
			}
			if p.Key <= last {
				t.Fatalf("key %q follows %q", p.Key, last)
			}
			last = p.Key
		}
	})
}

func TestPosition(t *testing.T) {
	p := store.Position{Generation: genA, Revision: 5}
	for _, row := range []struct {
		q    store.Position
		want bool
	}{
		{store.Position{}, true},
		{p, true},
		{store.Position{Generation: genA, Revision: 4}, true},
		{store.Position{Generation: genA, Revision: 6}, false},
		{store.Position{Generation: genB, Revision: 4}, false},
	} {
		if got := p.Covers(row.q); got != row.want {
			t.Errorf("%v covers %v: %v", p, row.q, got)
		}
	}
	if (store.Position{}).Covers(p) || p.IsZero() || !(store.Position{}).IsZero() {
		t.Error("the zero position covers nothing but itself")
	}
}

func BenchmarkSpaceCommit(b *testing.B) {
	s := store.NewSpace()
	s.Begin(genA)
	keys := make([]string, 50_000)
	for i := range keys {
		keys[i] = fmt.Sprintf("service/default/key-%06d", i)
		if _, err := s.Commit(store.Txn{Ops: []store.Op{put(keys[i], "0123456789")}}, 0); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		i++
		if _, err := s.Commit(store.Txn{Ops: []store.Op{put(keys[i*7919%len(keys)], "0123456789")}}, 0); err != nil {
			b.Fatal(err)
		}
	}
}
