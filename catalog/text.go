package catalog

import (
	"unicode"
	"unicode/utf8"
)

// printable reports whether s is valid UTF-8 without control characters.
func printable(s string) bool {
	if !utf8.ValidString(s) {
		return false
	}
	for _, r := range s {
		if unicode.IsControl(r) {
			return false
		}
	}
	return true
}

// Closest returns the candidate that name is most likely a misspelling of, or
// "" when none is near: at most one edit per three characters, and at most
// three. An edit inserts, deletes or replaces a byte or swaps two neighbours
// (optimal string alignment distance). The first of equally near candidates
// wins.
func Closest(name string, candidates []string) string {
	limit := min(3, max(1, (len(name)+1)/3))
	if len(name) > 256 {
		return ""
	}
	best, bestDistance := "", limit+1
	for _, c := range candidates {
		if d := len(c) - len(name); d > limit || -d > limit {
			continue
		}
		if d := editDistance(name, c); d < bestDistance {
			best, bestDistance = c, d
		}
	}
	return best
}

// didYouMean returns ` (did you mean "x"?)`, or "" when nothing is near.
func didYouMean(name string, candidates []string) string {
	if c := Closest(name, candidates); c != "" {
		return " (did you mean \"" + c + "\"?)"
	}
	return ""
}

// editDistance is the optimal string alignment distance of a and b in bytes.
func editDistance(a, b string) int {
	two, one, row := make([]int, len(b)+1), make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range one {
		one[j] = j
	}
	for i := 1; i <= len(a); i++ {
		row[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			row[j] = min(one[j]+1, row[j-1]+1, one[j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				row[j] = min(row[j], two[j-2]+1)
			}
		}
		two, one, row = one, row, two
	}
	return one[len(b)]
}
