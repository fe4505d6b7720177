package backup

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"slices"
	"strings"
	"time"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/server/store"
)

// Cluster is whose state is saved or restored.
type Cluster struct {
	TrustDomain string
	Key         ca.ClusterKey
	// Server and Version are told in the header of what is saved.
	Server, Version string
}

// Save writes a snapshot of the current state, which covers every write that was
// acknowledged before the call. After an error what was written is no snapshot.
func Save(ctx context.Context, w io.Writer, e store.Engine, c Cluster, now time.Time) (Header, error) {
	if _, err := e.Barrier(ctx); err != nil {
		return Header{}, fmt.Errorf("save a snapshot: %w", err)
	}
	all, err := e.List(ctx, "")
	if err != nil {
		return Header{}, fmt.Errorf("save a snapshot: %w", err)
	}
	id, err := c.Key.ID()
	if err != nil {
		return Header{}, fmt.Errorf("save a snapshot: %w", err)
	}
	h := Header{
		TrustDomain: c.TrustDomain, ClusterKey: id, Server: c.Server, Version: c.Version,
		Created: now.UTC().Truncate(time.Second), Position: all.Position,
	}
	out, err := newWriter(w, h, c.Key)
	if err != nil {
		return h, err
	}
	if _, err := store.Export(ctx, taken{Engine: e, snapshot: all}, out); err != nil {
		return h, fmt.Errorf("save a snapshot: %w", err)
	}
	if err := out.Close(); err != nil {
		return h, fmt.Errorf("save a snapshot: %w", err)
	}
	return h, nil
}

// taken lists what was listed before, so that the position is known before the
// first byte is written.
type taken struct {
	store.Engine
	snapshot store.Snapshot
}

// Barrier implements store.Engine.
func (t taken) Barrier(context.Context) (store.Position, error) { return t.snapshot.Position, nil }

// List implements store.Engine.
func (t taken) List(context.Context, string) (store.Snapshot, error) { return t.snapshot, nil }

// Policy says what may be restored, and how. Nil functions do nothing.
type Policy struct {
	// Check is given each pair of the snapshot in order, and then, with a zero Pair,
	// the end. An error refuses the snapshot.
	Check func(store.Pair) error
	// Keep reports for which keys the records that are there now stay, whatever the
	// snapshot says.
	Keep func(key string) bool
	// Rewrite adapts the pairs to the new generation, in order.
	Rewrite func(iter.Seq2[store.Pair, error]) iter.Seq2[store.Pair, error]
}

// Restored tells what a restore did.
type Restored struct {
	Header        Header
	Before, After store.Position
	// Changes says how the state differs from the one before, by kind of record.
	Changes []Change
}

// Change counts records of one kind.
type Change struct {
	Kind                    string
	Added, Changed, Removed int
}

// Restore replaces the whole state by a snapshot that Save wrote under the same
// cluster key and trust domain, in one step: readers see all of the old state or
// all of the new one, after a crash too. After an error nothing has changed,
// unless it is store.ErrUnknownOutcome. ErrFormat, ErrDamaged and ErrForeign say
// that the snapshot is to blame.
func Restore(ctx context.Context, r io.Reader, e store.Engine, c Cluster, p Policy) (Restored, error) {
	in, err := newReader(r, c.Key)
	if err != nil {
		return Restored{}, fmt.Errorf("restore: %w", err)
	}
	if in.header.TrustDomain != c.TrustDomain {
		return Restored{}, fmt.Errorf("restore: %w: it is of trust domain %q, this cluster is %q", ErrForeign, in.header.TrustDomain, c.TrustDomain)
	}
	_, pairs, err := store.ReadDump(in)
	if err != nil {
		return Restored{}, fmt.Errorf("restore: %w", in.blame(err))
	}
	if _, err := e.Barrier(ctx); err != nil { // this member may lag behind
		return Restored{}, fmt.Errorf("restore: %w", err)
	}
	before, err := e.List(ctx, "")
	if err != nil {
		return Restored{}, fmt.Errorf("restore: %w", err)
	}
	diff := newDiff(before.Pairs, p.Keep)
	seq := diff.merge(check(pairs, p.Check))
	if p.Rewrite != nil {
		seq = p.Rewrite(seq)
	}
	after, err := store.Replace(ctx, e, store.Position{}, seq)
	if err != nil {
		return Restored{}, fmt.Errorf("restore: %w", in.blame(err))
	}
	return Restored{Header: in.header, Before: before.Position, After: after, Changes: diff.changes()}, nil
}

// blame says what was wrong with the file, where the dump inside only knows that
// something was.
func (r *reader) blame(err error) error {
	switch {
	case !errors.Is(err, store.ErrCorrupt):
		return err
	case r.err != nil && !errors.Is(r.err, io.EOF):
		return r.err
	default:
		return fmt.Errorf("%w: %w", ErrDamaged, err)
	}
}

func check(pairs iter.Seq2[store.Pair, error], f func(store.Pair) error) iter.Seq2[store.Pair, error] {
	if f == nil {
		return pairs
	}
	return func(yield func(store.Pair, error) bool) {
		for pair, err := range pairs {
			if err == nil {
				err = f(pair)
			}
			if !yield(pair, err) || err != nil {
				return
			}
		}
		if err := f(store.Pair{}); err != nil {
			yield(store.Pair{}, err)
		}
	}
}

// diff compares what is there, in order, with what comes, in order.
type diff struct {
	old  []store.Pair
	keep func(string) bool
	by   map[string]*Change
}

func newDiff(old []store.Pair, keep func(string) bool) *diff {
	if keep == nil {
		keep = func(string) bool { return false }
	}
	return &diff{old: old, keep: keep, by: map[string]*Change{}}
}

// merge counts, drops the pairs whose keys are kept, and puts the old ones in
// their place.
func (d *diff) merge(pairs iter.Seq2[store.Pair, error]) iter.Seq2[store.Pair, error] {
	return func(yield func(store.Pair, error) bool) {
		rest := d.old
		until := func(key string, all bool) bool { // old pairs before key
			for len(rest) > 0 && (all || rest[0].Key < key) {
				pair := rest[0]
				rest = rest[1:]
				if !d.keep(pair.Key) {
					d.of(pair.Key).Removed++
				} else if !yield(pair, nil) {
					return false
				}
			}
			return true
		}
		for pair, err := range pairs {
			if err != nil {
				yield(store.Pair{}, err)
				return
			}
			if !until(pair.Key, false) {
				return
			}
			if d.keep(pair.Key) {
				continue
			}
			switch {
			case len(rest) == 0 || rest[0].Key != pair.Key:
				d.of(pair.Key).Added++
			case !bytes.Equal(rest[0].Value, pair.Value):
				d.of(pair.Key).Changed++
				rest = rest[1:]
			default:
				rest = rest[1:]
			}
			if !yield(pair, nil) {
				return
			}
		}
		until("", true)
	}
}

func (d *diff) of(key string) *Change {
	kind := kindOf(key)
	if d.by[kind] == nil {
		d.by[kind] = &Change{Kind: kind}
	}
	return d.by[kind]
}

func (d *diff) changes() []Change {
	out := []Change{}
	for _, c := range d.by {
		out = append(out, *c)
	}
	slices.SortFunc(out, func(a, b Change) int { return cmp.Compare(a.Kind, b.Kind) })
	return out
}

// kindOf is the table that a key belongs to.
func kindOf(key string) string {
	kind, _, _ := strings.Cut(key, "/")
	return kind
}
