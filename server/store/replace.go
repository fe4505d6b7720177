package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"time"
)

const dumpMagic = "meshd dump 1\n"

// Records of a dump.
const (
	dumpEnd = iota
	dumpPair
)

// discardTimeout bounds the clean-up of a stage whose caller has given up.
const discardTimeout = 5 * time.Second

// Replace makes pairs the whole content of the store in one step, however many
// there are: they are staged under a new generation, then that becomes the
// current one. Readers see all of the old or all of the new. The keys must be in
// ascending order without repetition (else ErrInvalid); ModRevisions are ignored.
// From is what the pairs were computed from, as in Stage.Activate; the zero
// Position replaces whatever there is.
//
// An error that pairs yields ends the attempt. After an error nothing has
// changed, unless it is ErrUnknownOutcome. Another Replace that begins meanwhile
// makes this one fail with ErrStageLost.
func Replace(ctx context.Context, e Engine, from Position, pairs iter.Seq2[Pair, error]) (Position, error) {
	stage, err := e.Stage(ctx)
	if err != nil {
		return Position{}, fmt.Errorf("open a new generation: %w", err)
	}
	to, err := fill(ctx, stage, from, pairs)
	if err != nil && !errors.Is(err, ErrUnknownOutcome) {
		clean, stop := context.WithTimeout(context.WithoutCancel(ctx), discardTimeout)
		defer stop()
		if undo := stage.Discard(clean); undo != nil && !errors.Is(undo, ErrClosed) {
			err = errors.Join(err, fmt.Errorf("discard the new generation: %w", undo))
		}
	}
	return to, err
}

func fill(ctx context.Context, stage Stage, from Position, pairs iter.Seq2[Pair, error]) (Position, error) {
	var (
		ops  []Op
		size int
		last string
	)
	for p, err := range pairs {
		if err != nil {
			return Position{}, err
		}
		if p.Key <= last {
			return Position{}, fmt.Errorf("%w: key %q follows key %q", ErrInvalid, p.Key, last)
		}
		last = p.Key
		add := len(p.Key) + len(p.Value)
		if len(ops) == MaxKeys || size+add > MaxBytes && len(ops) > 0 {
			if err := write(ctx, stage, ops); err != nil {
				return Position{}, err
			}
			ops, size = ops[:0], 0
		}
		ops, size = append(ops, Op{Key: p.Key, Value: p.Value}), size+add
	}
	if len(ops) > 0 {
		if err := write(ctx, stage, ops); err != nil {
			return Position{}, err
		}
	}
	to, err := stage.Activate(ctx, from)
	if err != nil {
		return Position{}, fmt.Errorf("activate generation %s: %w", stage.Generation(), err)
	}
	return to, nil
}

// write repeats a Write whose outcome is unknown: to write the same twice is the
// same as once. As long as the stage is not active, nothing is visible, so a
// failure is definite.
func write(ctx context.Context, stage Stage, ops []Op) error {
	var err error
	for range 3 {
		if err = stage.Write(ctx, ops); !errors.Is(err, ErrUnknownOutcome) || ctx.Err() != nil {
			break
		}
	}
	switch {
	case err == nil:
		return nil
	case errors.Is(err, ErrUnknownOutcome):
		return fmt.Errorf("stage %d keys under generation %s: %v: %w", len(ops), stage.Generation(), err, ErrNoLeader) //nolint:errorlint // must not be ErrUnknownOutcome: nothing became visible
	default:
		return fmt.Errorf("stage %d keys under generation %s: %w", len(ops), stage.Generation(), err)
	}
}

// Export writes all pairs of the current generation, read at one position after a
// Barrier, and returns that position. Import, ReadDump and nothing else read the
// format; it ends in a checksum. The bytes are not encrypted.
func Export(ctx context.Context, e Engine, w io.Writer) (Position, error) {
	if _, err := e.Barrier(ctx); err != nil {
		return Position{}, fmt.Errorf("export: %w", err)
	}
	snapshot, err := e.List(ctx, "")
	if err != nil {
		return Position{}, fmt.Errorf("export: %w", err)
	}
	f := newFrameWriter(w, dumpMagic)
	f.text(snapshot.Position.Generation)
	f.number(snapshot.Position.Revision)
	for _, p := range snapshot.Pairs {
		f.pair(dumpPair, p)
	}
	f.number(dumpEnd)
	if err := f.finish(); err != nil {
		return Position{}, fmt.Errorf("export: %w", err)
	}
	return snapshot.Position, nil
}

// ReadDump reads what Export wrote: the position that it was taken at and the
// pairs, in order. The pairs are read from r while they are iterated, which works
// once. The last thing that the iterator yields is ErrCorrupt when the dump is
// damaged; only an iteration that ends without an error was of an intact dump.
func ReadDump(r io.Reader) (Position, iter.Seq2[Pair, error], error) {
	f := newFrameReader(r, dumpMagic)
	at := Position{Generation: f.generation(), Revision: f.number()}
	if f.err != nil {
		return Position{}, nil, fmt.Errorf("read a dump: %w", f.err)
	}
	return at, func(yield func(Pair, error) bool) {
		last := ""
		for {
			kind := f.number()
			if kind == dumpEnd {
				break
			}
			p := Pair{Key: f.key(), Value: f.blob(MaxBytes), ModRevision: f.number()}
			if kind != dumpPair {
				f.fail(fmt.Errorf("unknown record %d", kind))
			}
			if p.Key <= last {
				f.fail(fmt.Errorf("key %q follows key %q", p.Key, last))
			}
			if f.err != nil {
				break
			}
			if last = p.Key; !yield(p, nil) {
				return
			}
		}
		if err := f.finish(); err != nil {
			yield(Pair{}, fmt.Errorf("read a dump: %w", err))
		}
	}, nil
}

// Import makes a dump the whole content of the store, under a new generation: see
// Replace. A damaged dump changes nothing and returns ErrCorrupt.
func Import(ctx context.Context, e Engine, r io.Reader) (Position, error) {
	_, pairs, err := ReadDump(r)
	if err != nil {
		return Position{}, fmt.Errorf("import: %w", err)
	}
	at, err := Replace(ctx, e, Position{}, pairs)
	if err != nil {
		return Position{}, fmt.Errorf("import: %w", err)
	}
	return at, nil
}
