package state

import "github.com/meshd/meshd/catalog"

// Change names a record that was written or deleted. Which one of a table, its
// Table.Key tells; the value is in the snapshots before and after.
type Change struct {
	Kind Kind
	key  any // K of the table; nil if the stored key can't be read
}

// historySteps bounds how far back Changes can answer. A reader that comes later
// looks at everything, which is what it would have to do about then anyway.
const historySteps = 256

// step is the way from one snapshot to the next.
type step struct {
	from, to catalog.Position
	changes  []Change
	reset    bool
}

// history is a ring of the newest steps.
type history struct {
	steps []step
	next  int
}

func (h *history) add(s step) {
	if len(h.steps) < historySteps {
		h.steps = append(h.steps, s)
		return
	}
	h.steps[h.next] = s
	h.next = (h.next + 1) % historySteps
}

// between returns the changes that lead from one snapshot to another one.
func (h *history) between(from, to catalog.Position) ([]Change, bool) {
	if from == to {
		return nil, true
	}
	start := -1
	for i := range len(h.steps) {
		i = len(h.steps) - 1 - i
		s := h.at(i)
		if s.reset {
			return nil, false
		}
		if s.from == from {
			start = i
			break
		}
	}
	if start < 0 {
		return nil, false
	}
	if start == len(h.steps)-1 {
		return h.at(start).changes, true
	}
	var changes []Change
	seen := make(map[Change]bool)
	for i := start; i < len(h.steps); i++ {
		for _, c := range h.at(i).changes {
			if !seen[c] {
				seen[c] = true
				changes = append(changes, c)
			}
		}
	}
	return changes, true
}

func (h *history) at(i int) step { return h.steps[(h.next+i)%len(h.steps)] }
