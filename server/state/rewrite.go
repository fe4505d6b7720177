package state

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"math/rand/v2"
	"slices"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/store"
)

// maxRewrites bounds the attempts of a rewrite, each of which copies the whole
// state and is lost when anything at all is written meanwhile.
const maxRewrites = 8

// UpdateAtAnySize is Update for what may not fit one transaction. If it does
// not, the whole state is staged as a new generation, with fn's writes in it, and
// takes the place of the old one in one step: as atomic, but every reader then
// starts anew, and it succeeds only if nothing else is written meanwhile
// (ErrContention after several attempts). fn is run several times.
func (s *State) UpdateAtAnySize(ctx context.Context, fn func(*Tx) error) (catalog.Position, error) {
	position, err := s.Update(ctx, fn)
	if !errors.Is(err, store.ErrTooLarge) {
		return position, err
	}
	backoff := firstBackoff
	for range maxRewrites {
		position, err = s.rewrite(ctx, fn)
		if !errors.Is(err, store.ErrConflict) && !errors.Is(err, store.ErrStageLost) {
			return position, err
		}
		if err := pause(ctx, rand.N(backoff)); err != nil { //nolint:gosec // jitter needs no secrecy
			return catalog.Position{}, err
		}
		backoff = min(4*backoff, maxBackoff)
	}
	return catalog.Position{}, fmt.Errorf("rewrite the state after %d attempts: %w", maxRewrites, ErrContention)
}

// rewrite makes one attempt. Its error wraps store.ErrConflict when something was
// written meanwhile.
func (s *State) rewrite(ctx context.Context, fn func(*Tx) error) (catalog.Position, error) {
	// What is stored, not what the snapshot knows of it: records of a newer
	// version have to survive.
	all, err := s.engine.List(ctx, "")
	if err != nil {
		return catalog.Position{}, fmt.Errorf("read the state: %w", err)
	}
	snapshot, err := s.Await(ctx, catalog.Position(all.Position))
	if err != nil {
		return catalog.Position{}, err
	}
	if store.Position(snapshot.position) != all.Position {
		return catalog.Position{}, fmt.Errorf("read the state at %s, it is at %s already: %w",
			catalog.Position(all.Position), snapshot.position, store.ErrConflict)
	}
	tx := newTx(snapshot)
	if err := fn(tx); err != nil {
		return catalog.Position{}, err
	}
	if err := tx.recordEdits(unlimited); err != nil {
		return catalog.Position{}, err
	}
	position, err := store.Replace(ctx, s.engine, all.Position, tx.over(all.Pairs))
	if err != nil {
		return catalog.Position{}, fmt.Errorf("rewrite %s: %w", tx.describe(), err)
	}
	if _, err := s.Await(ctx, catalog.Position(position)); err != nil {
		return catalog.Position{}, fmt.Errorf("rewrite %s: it is stored, but not seen here yet: %w", tx.describe(), err)
	}
	return catalog.Position(position), nil
}

// over yields pairs, which are in the order of their keys, carried into another
// generation with the writes of the transaction in them.
func (tx *Tx) over(pairs []store.Pair) iter.Seq2[store.Pair, error] {
	carried := Carry(func(yield func(store.Pair, error) bool) {
		for _, p := range pairs {
			if !yield(p, nil) {
				return
			}
		}
	})
	return func(yield func(store.Pair, error) bool) {
		written := slices.Sorted(maps.Keys(tx.writes))
		write := func() bool {
			key := written[0]
			written = written[1:]
			w := tx.writes[key]
			return w.delete || yield(store.Pair{Key: key, Value: w.raw}, nil)
		}
		for p, err := range carried {
			if err != nil {
				yield(p, err)
				return
			}
			for len(written) > 0 && written[0] < p.Key {
				if !write() {
					return
				}
			}
			if len(written) > 0 && written[0] == p.Key {
				if !write() {
					return
				}
				continue
			}
			if !yield(p, nil) {
				return
			}
		}
		for len(written) > 0 {
			if !write() {
				return
			}
		}
	}
}
