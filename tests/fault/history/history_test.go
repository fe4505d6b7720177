package history_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/meshd/meshd/tests/fault/history"
)

// at is an operation between two milliseconds; an end of 0 is never.
func at(client int, from, to int, o history.Op) history.Op {
	o.Client, o.Key = client, "k"
	o.Invoked, o.Returned = time.Duration(from)*time.Millisecond, time.Duration(to)*time.Millisecond
	if o.Outcome == 0 {
		o.Outcome = history.OK
	}
	return o
}

func read(value string) history.Op { return history.Op{Kind: history.Read, Value: value} }

func write(expect, value string) history.Op {
	return history.Op{Kind: history.Write, Expect: expect, Value: value}
}

func over(value string) history.Op {
	return history.Op{Kind: history.Write, Any: true, Value: value}
}

func remove(expect string) history.Op { return history.Op{Kind: history.Delete, Expect: expect} }

func with(o history.Op, outcome history.Outcome) history.Op {
	o.Outcome = outcome
	return o
}

func revised(o history.Op, revision uint64) history.Op {
	o.Revision = revision
	return o
}

func TestCheck(t *testing.T) {
	t.Parallel()
	const conflict, missing, unknown = history.Conflict, history.Missing, history.Unknown
	for _, c := range []struct {
		name  string
		ops   []history.Op
		wrong string // part of the error; "": there is none
	}{
		{"nothing", nil, ""},
		{"one after the other", []history.Op{at(0, 0, 1, write("", "a")), at(1, 2, 3, read("a")), at(0, 4, 5, remove("a")), at(1, 6, 7, read(""))}, ""},
		{"a stale read", []history.Op{at(0, 0, 1, write("", "a")), at(0, 2, 3, write("a", "b")), at(1, 4, 5, read("a"))}, "no order"},
		{"a read that goes back", []history.Op{at(0, 0, 1, write("", "a")), at(0, 2, 9, write("a", "b")), at(1, 3, 4, read("b")), at(1, 5, 6, read("a"))}, "no order"},
		{"a read during a write, old or new", []history.Op{at(0, 0, 1, write("", "a")), at(0, 2, 9, write("a", "b")), at(1, 3, 4, read("a")), at(1, 5, 6, read("b"))}, ""},
		{"a lost write", []history.Op{at(0, 0, 1, write("", "a")), at(1, 2, 3, read(""))}, "no order"},
		{"two winners", []history.Op{at(0, 0, 1, write("", "a")), at(0, 2, 5, write("a", "b")), at(1, 2, 5, write("a", "c"))}, "no order"},
		{"one winner", []history.Op{at(0, 0, 1, write("", "a")), at(0, 2, 5, write("a", "b")), at(1, 2, 5, with(write("a", "c"), conflict))}, ""},
		{"a conflict with nobody", []history.Op{at(0, 0, 1, write("", "a")), at(0, 2, 5, with(write("a", "b"), conflict))}, "no order"},
		{"a read of what nobody wrote", []history.Op{at(0, 0, 1, write("", "a")), at(1, 2, 3, read("x"))}, "no order"},
		{"unknown and never done", []history.Op{at(0, 0, 1, write("", "a")), at(0, 2, 0, with(write("a", "b"), unknown)), at(1, 9, 10, read("a"))}, ""},
		{"unknown and done late", []history.Op{at(0, 0, 1, write("", "a")), at(0, 2, 0, with(write("a", "b"), unknown)), at(1, 3, 4, read("a")), at(1, 9, 10, read("b"))}, ""},
		{"unknown and done twice", []history.Op{
			at(0, 0, 1, write("", "a")), at(0, 2, 0, with(write("a", "b"), unknown)),
			at(1, 3, 4, read("b")), at(1, 5, 6, write("b", "c")), at(1, 7, 8, read("b")),
		}, "no order"},
		{"unknown and seen by a conflict only", []history.Op{
			at(0, 0, 1, write("", "a")), at(0, 2, 0, with(write("a", "b"), unknown)), at(1, 3, 4, with(write("a", "c"), conflict)), at(1, 9, 10, read("b")),
		}, ""},
		{"unknown, seen, then gone", []history.Op{
			at(0, 0, 1, write("", "a")), at(0, 2, 0, with(write("a", "b"), unknown)), at(1, 3, 4, read("b")), at(1, 5, 6, read("a")),
		}, "no order"},
		{"unknown creation after all others", []history.Op{
			at(0, 0, 1, write("", "a")), at(0, 2, 0, with(write("", "b"), unknown)), at(0, 3, 4, remove("a")), at(1, 9, 10, read("b")),
		}, ""},
		{"unknown deletion", []history.Op{at(0, 0, 1, write("", "a")), at(0, 2, 0, with(remove("a"), unknown)), at(1, 3, 4, read("a")), at(1, 9, 10, read(""))}, ""},
		{"writes over anything, unknown and unseen", []history.Op{at(0, 0, 1, over("a")), at(0, 2, 0, with(over("b"), unknown)), at(1, 3, 4, read("a"))}, ""},
		{"writes over anything, unknown and seen", []history.Op{at(0, 0, 1, over("a")), at(0, 2, 0, with(over("b"), unknown)), at(1, 3, 4, read("b")), at(1, 5, 6, read("a"))}, "no order"},
		{"writes of the same over anything", []history.Op{
			at(0, 0, 1, over("a")), at(0, 2, 0, with(over("b"), unknown)), at(0, 3, 4, over("a")), at(1, 5, 6, read("b")),
		}, ""},
		{"a write of the same that was not done", []history.Op{at(0, 0, 1, over("a")), at(1, 2, 3, over("b")), at(0, 4, 5, over("a")), at(1, 6, 7, read("b"))}, "no order"},
		{"a deletion of nothing", []history.Op{at(0, 0, 1, with(remove("x"), missing)), at(0, 2, 3, write("", "a")), at(0, 4, 5, with(remove("x"), conflict))}, ""},
		{"a deletion that misses what is there", []history.Op{at(0, 2, 3, write("", "a")), at(0, 4, 5, with(remove("a"), missing))}, "no order"},
		{"a deletion that comes back", []history.Op{at(0, 0, 1, write("", "a")), at(0, 2, 3, remove("a")), at(1, 4, 5, read("a"))}, "no order"},
		{"one revision, two values", []history.Op{at(0, 0, 1, revised(write("", "a"), 7)), at(0, 2, 3, revised(write("a", "b"), 7))}, "revision 7"},
		{"one revision, one value", []history.Op{at(0, 0, 1, revised(write("", "a"), 7)), at(0, 2, 3, revised(read("a"), 7))}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			err := history.Check(c.ops, 5*time.Second)
			switch {
			case c.wrong == "" && err != nil:
				t.Errorf("%v; want no complaint", err)
			case c.wrong != "" && (!errors.Is(err, history.ErrViolation) || !strings.Contains(err.Error(), c.wrong)):
				t.Errorf("%v; want a violation with %q", err, c.wrong)
			}
		})
	}
}

// TestCheckAtLength: histories of a key that was real, with many unknown outcomes,
// are decided quickly; and so is that one acknowledged write was lost.
func TestCheckAtLength(t *testing.T) {
	t.Parallel()
	for seed := range uint64(5) {
		ops := simulate(seed, 1500, -1)
		if err := history.Check(ops, 20*time.Second); err != nil {
			t.Errorf("seed %d: %v", seed, err)
		}
		if err := history.Check(simulate(seed, 1500, 700), 20*time.Second); !errors.Is(err, history.ErrViolation) {
			t.Errorf("seed %d: a lost write is found to be %v", seed, err)
		}
	}
}

// TestCheckWithoutAnswers: that most clients got no answer makes no history hard to
// decide, as long as what was seen needs no more than what was acknowledged.
func TestCheckWithoutAnswers(t *testing.T) {
	t.Parallel()
	var ops []history.Op
	value := ""
	for i := range 40 {
		from := 10 * i
		ops = append(ops, at(1, from, 0, with(write("", fmt.Sprint("lost", i)), history.Unknown)))
		next := fmt.Sprint("v", i)
		ops = append(ops, at(0, from+1, from+4, write(value, next)), at(2, from+5, from+6, read(next)), at(0, from+7, from+8, remove(next)))
		value = ""
	}
	if err := history.Check(ops, 10*time.Second); err != nil {
		t.Error(err)
	}
	ops = append(ops, at(2, 500, 501, read("v3")))
	if err := history.Check(ops, time.Second); err == nil {
		t.Error("a value that was deleted long ago is no violation")
	}
}

// simulate returns what eight clients of a register may have recorded, of which one
// in ten got no answer. The register loses the write after lose operations.
func simulate(seed uint64, n, lose int) []history.Op {
	random := rand.New(rand.NewPCG(seed, 1))
	held, known := "", make([]string, 8)
	var ops []history.Op
	for i := range n {
		client := random.IntN(len(known))
		o := history.Op{Client: client, Key: "k", Kind: history.Read, Outcome: history.OK, Invoked: time.Duration(10*i - random.IntN(30)), Returned: time.Duration(10*i + random.IntN(30))}
		switch random.IntN(3) {
		case 0:
			o.Value, known[client] = held, held
		default:
			o.Kind, o.Expect, o.Value = history.Write, known[client], fmt.Sprint("v", i)
			done := held == o.Expect
			answered := random.IntN(10) > 0
			if !answered && random.IntN(2) == 0 {
				done = false // it never arrived
			}
			if done && (lose < 0 || i < lose || !answered) {
				held = o.Value
			} else if done {
				lose = n // this one only
			}
			switch {
			case !answered:
				o.Outcome = history.Unknown
			case done:
				known[client] = o.Value
			default:
				o.Outcome = history.Conflict
			}
		}
		ops = append(ops, o)
	}
	return ops
}
