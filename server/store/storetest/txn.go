package storetest

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/meshd/meshd/server/store"
)

func (s suite) transactions(t *testing.T) {
	e := s.Open(t)
	start, at0 := list(t, e, "")
	expect(t, "a new store", start, contents{})
	if at0.Generation == "" {
		t.Fatalf("a new store is at %v, without a generation", at0)
	}

	p1 := commit(t, e, put("a", "1"), put("b", ""), store.Op{Key: "c"})
	got, at := list(t, e, "")
	expect(t, "after a write", got, contents{"a": "1", "b": "", "c": ""})
	if at != p1 || !p1.Covers(at0) || p1 == at0 {
		t.Fatalf("from %v a commit went to %v, list is at %v", at0, p1, at)
	}

	p2 := commitTxn(t, e, store.Txn{
		Generation: p1.Generation,
		Checks:     []store.Check{{Key: "a", ModRevision: p1.Revision}, {Key: "z"}},
		Ops:        []store.Op{put("a", "2"), del("b"), put("z", "9")},
	})
	got, _ = list(t, e, "")
	expect(t, "after a checked write", got, contents{"a": "2", "c": "", "z": "9"})

	p3 := commit(t, e, del("never"))
	if p3.Revision <= p2.Revision {
		t.Fatalf("the deletion of a missing key went from %v to %v, not to a new revision", p2, p3)
	}
	if p := commitTxn(t, e, store.Txn{Checks: []store.Check{{Key: "z", ModRevision: p2.Revision}}}); p != p3 {
		t.Fatalf("a transaction without operations is at %v, the store at %v", p, p3)
	}
}

func (s suite) conflicts(t *testing.T) {
	e := s.Open(t)
	old := commit(t, e, put("a", "1"), put("gone", "1"))
	at := commit(t, e, put("a", "2"), del("gone"))
	for _, row := range []struct {
		name string
		txn  store.Txn
		want store.ConflictError
	}{
		{
			"older revision",
			store.Txn{Checks: []store.Check{{Key: "a", ModRevision: old.Revision}}},
			store.ConflictError{Key: "a", Want: old.Revision, Have: at.Revision, Position: at},
		},
		{
			"exists",
			store.Txn{Checks: []store.Check{{Key: "a"}}},
			store.ConflictError{Key: "a", Want: 0, Have: at.Revision, Position: at},
		},
		{
			"deleted",
			store.Txn{Checks: []store.Check{{Key: "gone", ModRevision: old.Revision}}},
			store.ConflictError{Key: "gone", Want: old.Revision, Have: 0, Position: at},
		},
		{
			"second check",
			store.Txn{Checks: []store.Check{{Key: "a", ModRevision: at.Revision}, {Key: "b", ModRevision: 7}}},
			store.ConflictError{Key: "b", Want: 7, Have: 0, Position: at},
		},
		{
			"generation",
			store.Txn{Generation: store.NewGeneration()},
			store.ConflictError{Position: at},
		},
	} {
		t.Run(row.name, func(t *testing.T) {
			for _, ops := range [][]store.Op{nil, {put("a", "3"), put("new", "3"), del("b")}} {
				row.txn.Ops = ops
				_, err := e.Commit(short(t), row.txn)
				var got *store.ConflictError
				if !errors.Is(err, store.ErrConflict) || !errors.As(err, &got) || *got != row.want {
					t.Fatalf("with %d operations: %v, want %v", len(ops), err, &row.want)
				}
				state, _ := list(t, e, "")
				expect(t, "after the conflict", state, contents{"a": "2"})
			}
		})
	}
}

func (s suite) limits(t *testing.T) {
	e := s.Open(t)
	ops := make([]store.Op, store.MaxKeys+1)
	checks := make([]store.Check, store.MaxKeys+1)
	for i := range ops {
		key := fmt.Sprintf("limit/%03d", i)
		ops[i], checks[i] = put(key, "x"), store.Check{Key: key}
	}
	value := bytes.Repeat([]byte{0xff}, store.MaxBytes)
	for _, row := range []struct {
		name string
		txn  store.Txn
		want error
	}{
		{"64 operations", store.Txn{Ops: ops[:64]}, nil},
		{"65 operations", store.Txn{Ops: ops}, store.ErrTooLarge},
		{"65 checks", store.Txn{Checks: checks}, store.ErrTooLarge},
		{"64 keys, checked and written", store.Txn{Checks: checks[:64], Ops: ops[:64]}, store.ErrConflict}, // they are there
		{"32 and 33 others", store.Txn{Checks: checks[:32], Ops: ops[32:]}, store.ErrTooLarge},
		{"33 and 33, one of them both", store.Txn{Checks: checks[:33], Ops: ops[32:64]}, store.ErrConflict},
		{"256 KiB", store.Txn{Ops: []store.Op{{Key: "big", Value: value[3:]}}}, nil},
		{"256 KiB and a byte", store.Txn{Ops: []store.Op{{Key: "big", Value: value[2:]}}}, store.ErrTooLarge},
		{"a deletion's value does not count", store.Txn{Ops: []store.Op{{Key: "big", Value: value, Delete: true}}}, nil},
		{"nothing", store.Txn{}, nil},
		{"no key", store.Txn{Ops: []store.Op{put("", "x")}}, store.ErrInvalid},
		{"key of 512 bytes", store.Txn{Ops: []store.Op{put(strings.Repeat("k", 512), "x")}}, nil},
		{"key of 513 bytes", store.Txn{Ops: []store.Op{put(strings.Repeat("k", 513), "x")}}, store.ErrInvalid},
		{"key with a control character", store.Txn{Ops: []store.Op{put("a\x00b", "x")}}, store.ErrInvalid},
		{"key that is not UTF-8", store.Txn{Checks: []store.Check{{Key: "\xff"}}}, store.ErrInvalid},
		{"key written twice", store.Txn{Ops: []store.Op{put("a", "x"), del("a")}}, store.ErrInvalid},
		{"key checked twice", store.Txn{Checks: []store.Check{{Key: "a"}, {Key: "a"}}}, store.ErrInvalid},
	} {
		t.Run(row.name, func(t *testing.T) {
			before, _ := list(t, e, "")
			if _, err := e.Commit(short(t), row.txn); !errors.Is(err, row.want) {
				t.Fatalf("commit: %v, want %v", err, row.want)
			}
			if row.want != nil {
				after, _ := list(t, e, "")
				expect(t, "after a refusal", after, before)
			}
		})
	}
}

// keys holds that an engine gives back exactly the bytes that it was given.
func (s suite) keys(t *testing.T) {
	e := s.Open(t)
	want := contents{}
	for i, key := range []string{
		"a", "a/", "a/b", "a//b", "/a", "/", "a b", "ü/€", "%2f", "a%2fb", "..", "a/../b", `"\`, "~", "\U0010ffff", "!",
		"g/x", "gen", "current", "leader",
	} {
		want[key] = "value\x00\xff" + strconv.Itoa(i)
	}
	for key, value := range want {
		commit(t, e, put(key, value))
	}
	got, at := list(t, e, "")
	expect(t, "list", got, want)
	r := newReader(t.Context(), e, "", store.Position{}, nil)
	r.until(t, at)
	expect(t, "watch", r.state, want)
	for key := range want {
		commit(t, e, del(key))
	}
	got, at = list(t, e, "")
	expect(t, "list after the deletions", got, contents{})
	r.until(t, at)
	expect(t, "watch after the deletions", r.state, contents{})
}

func (s suite) ownership(t *testing.T) {
	e := s.Open(t)
	value := []byte("before")
	txn := store.Txn{Ops: []store.Op{{Key: "k", Value: value}}}
	if _, err := e.Commit(short(t), txn); err != nil {
		t.Fatal(err)
	}
	copy(value, "after!")
	txn.Ops[0].Key = "other"
	got, _ := list(t, e, "")
	expect(t, "after the caller changed its slices", got, contents{"k": "before"})
}

func (s suite) prefixes(t *testing.T) {
	e := s.Open(t)
	all := contents{"a": "1", "a/": "2", "a/b": "3", "a/c": "4", "a0": "5", "b/a": "6"}
	watched := map[string]*reader{}
	for _, prefix := range []string{"", "a", "a/", "a/b", "b", "c", "a/b/", "\U0010ffff"} {
		watched[prefix] = newReader(t.Context(), e, prefix, store.Position{}, nil)
		if err := watched[prefix].next(short(t)); err != nil {
			t.Fatalf("watch %q: first batch: %v", prefix, err)
		}
	}
	var at store.Position
	for key, value := range all {
		at = commit(t, e, put(key, value))
	}
	for prefix, r := range watched {
		want := contents{}
		for key, value := range all {
			if strings.HasPrefix(key, prefix) {
				want[key] = value
			}
		}
		got, where := list(t, e, prefix)
		expect(t, "list "+prefix, got, want)
		if where != at {
			t.Errorf("list %q is at %v, the store at %v", prefix, where, at)
		}
		for len(r.state) < len(want) {
			if err := r.next(short(t)); err != nil {
				t.Fatalf("watch %q: %v", prefix, err)
			}
		}
		expect(t, "watch "+prefix, r.state, want)
	}
}

// counter increments one key from many goroutines: each success is one step, a
// linearizable read never shows less than was acknowledged before it began, and
// no two commits have one position.
func (s suite) counter(t *testing.T) {
	const writers, steps = 4, 25
	e := s.Open(t)
	engines := []store.Engine{e, e}
	if s.Peer != nil {
		engines[1] = s.Peer(t, e)
	}
	commit(t, e, put("n", "0"))
	var (
		group sync.WaitGroup
		acked atomic.Int64
		seen  sync.Map
	)
	read := func(e store.Engine) (int64, uint64, error) {
		if _, err := e.Barrier(short(t)); err != nil {
			return 0, 0, err
		}
		snapshot, err := e.List(short(t), "n")
		if err != nil {
			return 0, 0, err
		}
		n, err := strconv.ParseInt(string(snapshot.Pairs[0].Value), 10, 64)
		return n, snapshot.Pairs[0].ModRevision, err
	}
	for w := range writers {
		e := engines[w%2]
		group.Go(func() {
			for done := 0; done < steps; {
				floor := acked.Load()
				n, revision, err := read(e)
				if err != nil || n < floor {
					t.Errorf("read %d, %v after %d increments were acknowledged", n, err, floor)
					return
				}
				p, err := e.Commit(short(t), store.Txn{
					Checks: []store.Check{{Key: "n", ModRevision: revision}},
					Ops:    []store.Op{put("n", strconv.FormatInt(n+1, 10))},
				})
				switch {
				case errors.Is(err, store.ErrConflict):
				case err != nil:
					t.Errorf("commit: %v", err)
					return
				default:
					if _, twice := seen.LoadOrStore(p, true); twice {
						t.Errorf("two commits at %v", p)
					}
					acked.Add(1)
					done++
				}
			}
		})
	}
	group.Wait()
	if n, _, err := read(e); err != nil || n != writers*steps {
		t.Fatalf("%d increments gave %d, %v", writers*steps, n, err)
	}
}
