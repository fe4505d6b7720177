package intentions

import (
	"regexp"
	"regexp/syntax"
)

// A pattern is an expression that must match a whole text.
//
// Expressions over paths are mostly rows of literals and classes of which each
// ends where the next begins, such as "/v1/[a-z]+/[0-9]+". Those are matched
// without package regexp, at a sixth of its cost; it has the last word on every
// other expression, and on every text that is not ASCII.
type pattern struct {
	re   *regexp.Regexp
	row  []run
	runs bool // row says all that re does about ASCII
}

// A run is some bytes of one set.
type run struct {
	set      [2]uint64 // of ASCII
	optional bool      // may be empty
	many     bool      // may be longer than one byte
}

func (r *run) has(c byte) bool { return c < 0x80 && r.set[c>>6]>>(c&63)&1 == 1 }

func (r *run) add(lo, hi rune) {
	for c := lo; c <= min(hi, 0x7f); c++ {
		r.set[c>>6] |= 1 << (c & 63)
	}
}

// newPattern returns the pattern of an expression, which re matches as a whole.
func newPattern(parsed *syntax.Regexp, re *regexp.Regexp) *pattern {
	p := &pattern{re: re}
	if row, ok := appendRuns(nil, parsed); ok && decided(row) {
		p.row, p.runs = row, true
	}
	return p
}

// match reports whether text matches as a whole.
func (p *pattern) match(text string) bool {
	if !p.runs {
		return p.re.MatchString(text)
	}
	i := 0
	for k := range p.row {
		r, from := &p.row[k], i
		for i < len(text) && r.has(text[i]) && (r.many || i == from) {
			i++
		}
		if i == from && !r.optional {
			return i < len(text) && text[i] >= 0x80 && p.re.MatchString(text)
		}
	}
	return i == len(text) || text[i] >= 0x80 && p.re.MatchString(text)
}

// appendRuns appends the runs of an expression, or reports false if it is no
// row of them.
func appendRuns(row []run, e *syntax.Regexp) ([]run, bool) {
	switch e.Op {
	case syntax.OpEmptyMatch:
		return row, true
	case syntax.OpCapture:
		return appendRuns(row, e.Sub[0])
	case syntax.OpConcat:
		ok := true
		for i := 0; ok && i < len(e.Sub); i++ {
			row, ok = appendRuns(row, e.Sub[i])
		}
		return row, ok
	case syntax.OpLiteral:
		return appendLiteral(row, e)
	case syntax.OpCharClass, syntax.OpAnyChar, syntax.OpAnyCharNotNL:
		return append(row, classOf(e)), true
	case syntax.OpStar, syntax.OpPlus, syntax.OpQuest:
		sub, ok := appendRuns(nil, e.Sub[0])
		if !ok || len(sub) != 1 || sub[0].optional || sub[0].many {
			return nil, false
		}
		r := sub[0]
		r.optional, r.many = e.Op != syntax.OpPlus, e.Op != syntax.OpQuest
		return append(row, r), true
	default: // alternatives, and assertions, which are rare at the ends of what is matched as a whole
		return nil, false
	}
}

func appendLiteral(row []run, e *syntax.Regexp) ([]run, bool) {
	for _, c := range e.Rune {
		if c >= 0x80 || e.Flags&syntax.FoldCase != 0 {
			return nil, false
		}
		var r run
		r.add(c, c)
		row = append(row, r)
	}
	return row, true
}

func classOf(e *syntax.Regexp) run {
	var r run
	switch e.Op {
	case syntax.OpCharClass:
		for i := 0; i+1 < len(e.Rune); i += 2 {
			r.add(e.Rune[i], e.Rune[i+1])
		}
	case syntax.OpAnyCharNotNL:
		r.add(0, '\n'-1)
		r.add('\n'+1, 0x7f)
	default:
		r.add(0, 0x7f)
	}
	return r
}

// decided reports whether every run ends in one place only: no byte that may
// follow it could be its own.
func decided(row []run) bool {
	for i, r := range row {
		if !r.optional && !r.many {
			continue
		}
		for _, next := range row[i+1:] {
			if r.set[0]&next.set[0] != 0 || r.set[1]&next.set[1] != 0 {
				return false
			}
			if !next.optional {
				break
			}
		}
	}
	return true
}
