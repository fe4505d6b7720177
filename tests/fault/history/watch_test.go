package history_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/meshd/meshd/tests/fault/history"
)

func TestCheckWatch(t *testing.T) {
	t.Parallel()
	type view = map[string]history.Version
	put := func(value string, revision uint64) view { return view{"k": {Value: value, Revision: revision}} }
	first := func(position uint64, puts view) history.Batch {
		return history.Batch{Reset: true, Again: true, Position: position, Puts: puts}
	}
	then := func(position uint64, puts view, deletes ...string) history.Batch {
		return history.Batch{Position: position, Puts: puts, Deletes: deletes}
	}
	ops := []history.Op{
		at(0, 0, 1, revised(write("", "a"), 5)), at(0, 2, 3, revised(write("a", "b"), 6)),
		at(0, 4, 5, revised(remove("b"), 8)), at(0, 6, 7, revised(write("", "c"), 9)),
	}
	floor := func(b history.Batch, floor uint64) history.Batch {
		b.Floor = floor
		return b
	}
	for _, c := range []struct {
		name    string
		batches []history.Batch
		final   view
		wrong   string
	}{
		{"each change", []history.Batch{first(4, nil), then(5, put("a", 5)), then(6, put("b", 6)), then(8, nil, "k"), then(9, put("c", 9))}, put("c", 9), ""},
		{"only the newest", []history.Batch{first(4, nil), then(9, put("c", 9))}, put("c", 9), ""},
		{"resumed", []history.Batch{first(4, nil), then(6, put("b", 6)), floor(first(9, put("c", 9)), 9)}, put("c", 9), ""},
		{"resumed at a server that is behind the last one, and all acknowledgements", []history.Batch{first(6, put("b", 6)), floor(first(5, put("a", 5)), 5), then(9, put("c", 9))}, put("c", 9), ""},
		{"a lost deletion", []history.Batch{first(6, put("b", 6)), then(8, nil)}, put("b", 6), "deleted at 8"},
		{"a lost change", []history.Batch{first(4, nil), then(6, put("a", 5))}, put("a", 5), `"b" was written at 6`},
		{"a lost key", []history.Batch{first(4, nil), then(6, nil)}, nil, "not there"},
		{"a deletion of nothing", []history.Batch{first(4, nil), then(8, nil, "k")}, nil, "was not there"},
		{"a position that goes back", []history.Batch{first(6, put("b", 6)), then(5, nil)}, put("b", 6), "was 6 already"},
		{"a value from the future", []history.Batch{first(5, put("b", 6))}, put("b", 6), "no part of the batch"},
		{"a value from the past", []history.Batch{first(8, nil), then(9, put("b", 6))}, put("b", 6), "no part of the batch"},
		{"another value of a revision", []history.Batch{first(5, put("x", 5))}, put("x", 5), "revision of"},
		{"resumed before what was acknowledged", []history.Batch{floor(first(5, put("a", 5)), 6)}, put("a", 5), "before the watch began"},
		{"resumed without a reset", []history.Batch{{Again: true, Position: 5, Puts: put("a", 5)}}, put("a", 5), "no reset"},
		{"not up to the end", []history.Batch{first(6, put("b", 6))}, put("c", 9), "ends with"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			expect(t, history.CheckWatch(history.Trace{Name: "w", Batches: c.batches}, ops, nil, c.final), c.wrong)
		})
	}
}

func expect(t *testing.T, err error, wrong string) {
	t.Helper()
	switch {
	case wrong == "" && err != nil:
		t.Errorf("%v; want no complaint", err)
	case wrong != "" && (!errors.Is(err, history.ErrViolation) || !strings.Contains(err.Error(), wrong)):
		t.Errorf("%v; want a violation with %q", err, wrong)
	}
}

// TestHalfTransactions: keys that are written together are seen together, by a
// watch at the end of each batch, and in each list.
func TestHalfTransactions(t *testing.T) {
	t.Parallel()
	both := []string{"a", "b"}
	one := map[string]history.Version{"a": {Value: "x", Revision: 3}, "b": {Value: "x", Revision: 3}}
	half := map[string]history.Version{"a": {Value: "y", Revision: 4}, "b": {Value: "x", Revision: 3}}
	batches := []history.Batch{{Reset: true, Again: true, Position: 3, Puts: one}}
	expect(t, history.CheckWatch(history.Trace{Batches: batches}, nil, both, one), "")
	batches = append(batches, history.Batch{Position: 4, Puts: map[string]history.Version{"a": half["a"]}})
	expect(t, history.CheckWatch(history.Trace{Batches: batches}, nil, both, half), "half a transaction")
	expect(t, history.CheckList(one, both), "")
	expect(t, history.CheckList(half, both), "half a transaction")
}

// TestMaybeDeleted: a deletion whose outcome nobody was told explains why a key is
// gone.
func TestMaybeDeleted(t *testing.T) {
	t.Parallel()
	ops := []history.Op{at(0, 0, 1, revised(write("", "a"), 5)), at(0, 2, 0, with(remove("a"), history.Unknown))}
	batches := []history.Batch{
		{Reset: true, Again: true, Position: 5, Puts: map[string]history.Version{"k": {Value: "a", Revision: 5}}},
		{Position: 7, Deletes: []string{"k"}},
	}
	expect(t, history.CheckWatch(history.Trace{Batches: batches}, ops, nil, nil), "")
	expect(t, history.CheckWatch(history.Trace{Batches: batches}, ops[:1], nil, nil), "not there")
}
