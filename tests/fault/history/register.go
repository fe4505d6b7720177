package history

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/anishathalye/porcupine"
)

// ErrViolation is wrapped by what the checks find.
var ErrViolation = errors.New("a correct cluster can't have answered so")

// ErrUndecided says that the search for an order took too long.
var ErrUndecided = errors.New("undecided")

// Check reports whether there is an order of the operations on each key that
// explains all answers and respects real time (Herlihy and Wing, 1990), and whether
// a revision names one value. It gives up after limit, with ErrUndecided.
func Check(ops []Op, limit time.Duration) error {
	if err := checkRevisions(ops); err != nil {
		return err
	}
	deadline := time.Now().Add(limit)
	keys := map[string][]Op{}
	for _, o := range ops {
		keys[o.Key] = append(keys[o.Key], o)
	}
	for key, ops := range keys {
		switch order(ops, deadline) {
		case porcupine.Ok:
		case porcupine.Illegal:
			return fmt.Errorf("%w: no order explains the %d operations on %s, near: %s", ErrViolation, len(ops), key, culprit(ops))
		default:
			return fmt.Errorf("%w: the order of %d operations on %s, within %s", ErrUndecided, len(ops), key, limit)
		}
	}
	return nil
}

// doubts are which operations with unknown outcomes are looked at: each one doubles
// the orders to be tried.
type doubts uint8

const (
	// settled are those that somebody saw: they were done.
	settled doubts = iota
	// bounded are also those that were done before some time, or never.
	bounded
	// unbounded are all.
	unbounded
)

// order looks for an order. That an operation of unknown outcome was never done is an
// explanation as good as any, so an order without those that nobody saw is enough;
// only that there is none takes all of them.
func order(ops []Op, deadline time.Time) porcupine.CheckResult {
	result := porcupine.Unknown
	for _, d := range []doubts{settled, bounded, unbounded} {
		result = porcupine.CheckOperationsTimeout(register(), operations(ops, d), max(time.Until(deadline)/2, time.Second))
		if result == porcupine.Ok {
			break
		}
	}
	return result
}

// checkRevisions wants a revision of a key to be that of one value.
func checkRevisions(ops []Op) error {
	type version struct {
		key      string
		revision uint64
	}
	seen := map[version]Op{}
	for _, o := range ops {
		if o.Revision == 0 || o.Outcome != OK {
			continue
		}
		at := version{o.Key, o.Revision}
		if first, ok := seen[at]; ok && held(first) != held(o) {
			return fmt.Errorf("%w: revision %d of %s is both %q (client %d) and %q (client %d)",
				ErrViolation, o.Revision, o.Key, held(first), first.Client, held(o), o.Client)
		}
		seen[at] = o
	}
	return nil
}

// held is what the key holds after a successful operation.
func held(o Op) string {
	if o.Kind == Delete {
		return Absent
	}
	return o.Value
}

// forever is the return of an operation that may be done at any later time.
const forever = time.Duration(math.MaxInt64)

// register is a key as the model sees it: its value.
func register() porcupine.Model {
	return porcupine.Model{
		Init:  func() any { return Absent },
		Equal: func(a, b any) bool { return a == b },
		Step: func(state, input, _ any) (bool, any) {
			held, _ := state.(string) // Init and step return nothing else
			op, _ := input.(Op)       // operations makes nothing else
			ok, next := step(held, op)
			return ok, next
		},
		DescribeOperation: func(input, _ any) string { return fmt.Sprint(input) },
	}
}

// step tells whether a key that holds a value can answer the operation as it was
// answered, and what it holds then.
func step(held string, o Op) (possible bool, next string) {
	met := o.Any || held == o.Expect
	if o.Kind == Delete && held == Absent {
		met = false
	}
	switch o.Outcome {
	case OK:
		if o.Kind == Read {
			return held == o.Value, held
		}
		if o.Kind == Delete {
			return met, Absent
		}
		return met, o.Value
	case Conflict:
		return !met && (o.Kind == Write || held != Absent), held
	case Missing:
		return held == Absent, held
	case Unknown: // that it was not done is an order in which it comes when its demand is not met, or last
		if !met {
			return true, held
		}
		if o.Kind == Delete {
			return true, Absent
		}
		return true, o.Value
	default:
		return false, held
	}
}

func operations(ops []Op, d doubts) []porcupine.Operation {
	k := knownOf(ops)
	out := make([]porcupine.Operation, 0, len(ops))
	for _, o := range ops {
		if o.Outcome == Unknown {
			var matters bool
			if o, matters = k.settle(o); !matters {
				continue
			}
			if o.Outcome == Unknown && (d == settled || d == bounded && o.Returned == forever) {
				continue
			}
		}
		out = append(out, porcupine.Operation{ClientId: o.Client, Input: o, Call: int64(o.Invoked), Return: int64(o.Returned)})
	}
	return out
}

// known is what the operations on a key tell about those with unknown outcomes.
type known struct {
	ops     []Op
	writers map[string]int // how many writes there are of a value
	// demanding: there are operations that demand something of the key.
	demanding bool
}

func knownOf(ops []Op) known {
	k := known{ops: ops, writers: map[string]int{}}
	for _, o := range ops {
		if o.Kind == Write {
			k.writers[o.Value]++
		}
		k.demanding = k.demanding || o.Kind == Delete || o.Kind == Write && !o.Any
	}
	return k
}

// settle finds out what can be known of an operation with an unknown outcome, as
// each of those multiplies the orders to be tried.
//
// A write whose value nobody else writes was done if somebody saw it, before he
// returned; if nobody saw it, and nothing demands anything of the key, then it does
// not matter. And a write that demanded a value, which its client had seen, can only
// be done while the key holds that, which it never does again: so once another value
// was seen, by somebody who began later, it was done before or never will be.
func (k known) settle(u Op) (settled Op, matters bool) {
	u.Returned = forever
	unique := u.Kind == Write && k.writers[u.Value] == 1
	for _, o := range k.ops {
		if o.Outcome != OK {
			continue
		}
		saw := held(o)
		if unique && (o.Kind == Read && saw == u.Value || o.Kind != Read && !o.Any && o.Expect == u.Value) {
			u.Outcome = OK
			u.Returned = min(u.Returned, max(o.Returned, u.Invoked))
		} else if !u.Any && u.Expect != Absent && saw != u.Expect && o.Invoked >= u.Invoked {
			u.Returned = min(u.Returned, o.Returned)
		}
	}
	return u, u.Outcome == OK || !unique || k.demanding
}

// culprit names the operations around the first moment up to which no order is
// found, for people.
func culprit(ops []Op) string {
	ends := make([]time.Duration, 0, len(ops))
	for _, o := range ops {
		if o.Outcome != Unknown {
			ends = append(ends, o.Returned)
		}
	}
	slices.Sort(ends)
	upTo := func(end time.Duration) []Op {
		var some []Op
		for _, o := range ops {
			if o.Invoked <= end && o.Outcome != Unknown && o.Returned > end {
				o.Outcome = Unknown // its answer is not looked at yet
				if o.Kind == Read {
					continue
				}
			}
			if o.Invoked <= end {
				some = append(some, o)
			}
		}
		return some
	}
	bad, _ := slices.BinarySearchFunc(ends, true, func(end time.Duration, _ bool) int {
		if porcupine.CheckOperationsTimeout(register(), operations(upTo(end), unbounded), time.Second) == porcupine.Illegal {
			return 0
		}
		return -1
	})
	if bad == len(ends) {
		return "?"
	}
	last := slices.IndexFunc(ops, func(o Op) bool { return o.Returned == ends[bad] && o.Outcome != Unknown })
	var near []string
	for _, o := range ops {
		if o.Invoked <= ends[bad] && (o.Outcome == Unknown || o.Returned >= ops[last].Invoked-margin) {
			near = append(near, o.String())
		}
	}
	return "\n" + strings.Join(near[max(0, len(near)-30):], "\n") + "\nand at last\n" + ops[last].String()
}

// margin is how long before an operation others may matter to whoever looks for
// the cause.
const margin = 100 * time.Millisecond

// String is the operation as a line.
func (o Op) String() string {
	names := map[Kind]string{Read: "read", Write: "write", Delete: "delete"}
	results := map[Outcome]string{OK: "ok", Conflict: "conflict", Missing: "missing", Unknown: "unknown"}
	text := fmt.Sprintf("%10s %10s client %d %s %s", o.Invoked.Round(time.Microsecond), o.Returned.Round(time.Microsecond), o.Client, names[o.Kind], o.Key)
	if o.Kind == Write {
		text += fmt.Sprintf(" %q", o.Value)
	}
	if o.Kind != Read {
		if o.Any {
			text += " over anything"
		} else {
			text += fmt.Sprintf(" over %q", o.Expect)
		}
	}
	text += ": " + results[o.Outcome]
	if o.Kind == Read {
		text += fmt.Sprintf(" %q", o.Value)
	}
	return text + fmt.Sprintf(" @%d", o.Revision)
}
