package catalog

import (
	"fmt"
	"strconv"
	"strings"
)

// A Position is a point in the history of the store. Revisions grow only within
// one generation: a restore or a migration starts a new generation, whose
// revisions may be lower. The zero value is before everything. It is
// comparable.
type Position struct {
	Generation string `json:"generation"`
	Revision   uint64 `json:"revision"`
}

// After reports whether p is later than o. Positions of different generations
// have no order: After is false both ways, and a reader resynchronizes.
func (p Position) After(o Position) bool {
	return p.Generation == o.Generation && p.Revision > o.Revision
}

// IsZero reports whether p is the zero Position.
func (p Position) IsZero() bool { return p == Position{} }

// String returns "generation:revision", which ParsePosition reads.
func (p Position) String() string { return p.Generation + ":" + strconv.FormatUint(p.Revision, 10) }

// ParsePosition reads what String wrote.
func ParsePosition(s string) (Position, error) {
	i := strings.LastIndexByte(s, ':')
	if i < 0 {
		return Position{}, fmt.Errorf("position %q: write GENERATION:REVISION", s)
	}
	rev, err := strconv.ParseUint(s[i+1:], 10, 64)
	if err != nil {
		return Position{}, fmt.Errorf("position %q: the revision after \":\" must be a number", s)
	}
	return Position{Generation: s[:i], Revision: rev}, nil
}
