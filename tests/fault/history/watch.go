package history

import (
	"fmt"
	"maps"
	"slices"
)

// Version is a value with its revision.
type Version struct {
	Value    string
	Revision uint64
}

// Batch is what a watch was sent up to and including a position.
type Batch struct {
	// Reset says that the batch begins the state anew: what was known is forgotten.
	Reset bool
	// Again says that the batch is the first of a connection; it must be a Reset.
	Again bool
	// Floor is the highest revision that was acknowledged to anyone before the
	// connection was asked for.
	Floor uint64
	// Position is that of the end of the batch.
	Position uint64
	Puts     map[string]Version
	Deletes  []string
}

// Trace is what one watcher was sent, in order, over all its connections. All is of
// one generation.
type Trace struct {
	Name    string
	Batches []Batch
}

// CheckWatch reports whether a watcher saw what the operations did: each batch
// leads to a state that was, with every change up to its position and none of a
// later one; positions only grow; and the last state is final. Keys of together
// were always written in one transaction with one value.
func CheckWatch(trace Trace, ops []Op, together []string, final map[string]Version) error {
	w := watched{trace: trace.Name, done: changesOf(ops), view: map[string]Version{}}
	for i, b := range trace.Batches {
		if err := w.apply(b); err != nil {
			return fmt.Errorf("%w: watch %s, batch %d up to %d: %w", ErrViolation, trace.Name, i, b.Position, err)
		}
		if err := w.complete(b.Position); err != nil {
			return fmt.Errorf("%w: watch %s, after batch %d up to %d: %w", ErrViolation, trace.Name, i, b.Position, err)
		}
		if err := whole(w.view, together); err != nil {
			return fmt.Errorf("%w: watch %s, after batch %d up to %d: %w", ErrViolation, trace.Name, i, b.Position, err)
		}
	}
	if !maps.Equal(w.view, final) {
		return fmt.Errorf("%w: watch %s ends with %v, and the state is %v", ErrViolation, trace.Name, w.view, final)
	}
	return nil
}

// whole wants keys that are written together to have one value.
func whole(state map[string]Version, together []string) error {
	for _, key := range together {
		if state[key].Value != state[together[0]].Value {
			return fmt.Errorf("half a transaction: %s is %q, %s is %q", together[0], state[together[0]].Value, key, state[key].Value)
		}
	}
	return nil
}

// CheckList reports whether a list holds whole transactions only.
func CheckList(state map[string]Version, together []string) error {
	if err := whole(state, together); err != nil {
		return fmt.Errorf("%w: list: %w", ErrViolation, err)
	}
	return nil
}

// changes of one key, of which it is known that they were done, by revision.
type changes struct {
	known []Op
	// maybeDeleted: somebody may have deleted the key without being told.
	maybeDeleted bool
}

func changesOf(ops []Op) map[string]*changes {
	out := map[string]*changes{}
	for _, o := range ops {
		c := out[o.Key]
		if c == nil {
			c = &changes{}
			out[o.Key] = c
		}
		switch {
		case o.changes() && o.Revision != 0:
			c.known = append(c.known, o)
		case o.Kind == Delete && o.Outcome == Unknown:
			c.maybeDeleted = true
		}
	}
	for _, c := range out {
		slices.SortFunc(c.known, func(a, b Op) int { return compare(a.Revision, b.Revision) })
	}
	return out
}

func compare(a, b uint64) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	default:
		return 0
	}
}

type watched struct {
	trace string
	done  map[string]*changes
	view  map[string]Version
	at    uint64
}

func (w *watched) apply(b Batch) error {
	switch {
	case b.Again && !b.Reset:
		return fmt.Errorf("the first of a connection is no reset")
	case b.Again && b.Position < b.Floor:
		return fmt.Errorf("%d was acknowledged before the watch began", b.Floor)
	case !b.Again && b.Position < w.at:
		return fmt.Errorf("the position was %d already", w.at)
	}
	before := w.at
	if b.Reset {
		w.view, before = map[string]Version{}, 0
	}
	for _, key := range b.Deletes {
		if _, ok := w.view[key]; !ok {
			return fmt.Errorf("%s is deleted, and was not there", key)
		}
		delete(w.view, key)
	}
	for key, v := range b.Puts {
		if v.Revision > b.Position || v.Revision <= before {
			return fmt.Errorf("%s has revision %d, which is no part of the batch from %d on", key, v.Revision, before)
		}
		w.view[key] = v
	}
	w.at = b.Position
	return nil
}

// complete wants the view to hold all that was done up to the position.
func (w *watched) complete(position uint64) error {
	for key, c := range w.done {
		after, found := slices.BinarySearchFunc(c.known, position, func(o Op, p uint64) int { return compare(o.Revision, p) })
		if found {
			after++
		}
		if after == 0 {
			continue // nothing is known of it
		}
		last := c.known[after-1]
		v, there := w.view[key]
		switch {
		case !there && last.Kind == Write && !c.maybeDeleted:
			return fmt.Errorf("%s is not there; %q was written at %d", key, last.Value, last.Revision)
		case there && last.Kind == Delete && v.Revision <= last.Revision:
			return fmt.Errorf("%s is %q of %d; it was deleted at %d", key, v.Value, v.Revision, last.Revision)
		case there && last.Kind == Write && v.Revision < last.Revision:
			return fmt.Errorf("%s is %q of %d; %q was written at %d", key, v.Value, v.Revision, last.Value, last.Revision)
		case there && v.Revision == last.Revision && v.Value != last.Value:
			return fmt.Errorf("%s is %q of %d; that is the revision of %q", key, v.Value, v.Revision, last.Value)
		}
	}
	return nil
}
