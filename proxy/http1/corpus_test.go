package http1_test

import (
	"bufio"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// row is one line of a corpus: what must come out, and what goes in.
type row struct {
	line int
	want string
	in   string
	data string
}

var repeat = regexp.MustCompile(`\{(\d+):(.)\}`)

func corpus(tb testing.TB, name string) []row {
	tb.Helper()
	f, err := os.Open(filepath.Join("testdata", name))
	if err != nil {
		tb.Fatal(err)
	}
	defer func() { _ = f.Close() }() // only read
	var rows []row
	scanner := bufio.NewScanner(f)
	for n := 1; scanner.Scan(); n++ {
		text := scanner.Text()
		if text == "" || strings.HasPrefix(text, "#") {
			continue
		}
		cells := strings.Split(text, "\t")
		r := row{line: n, want: cells[0], in: unquote(tb, n, cells[1])}
		if len(cells) > 2 {
			r.data = unquote(tb, n, cells[2])
		}
		rows = append(rows, r)
	}
	if err := scanner.Err(); err != nil {
		tb.Fatal(err)
	}
	return rows
}

func unquote(tb testing.TB, line int, cell string) string {
	tb.Helper()
	s, err := strconv.Unquote(cell)
	if err != nil {
		tb.Fatalf("line %d: %v", line, err)
	}
	return repeat.ReplaceAllStringFunc(s, func(m string) string {
		parts := repeat.FindStringSubmatch(m)
		n, err := strconv.Atoi(parts[1])
		if err != nil {
			tb.Fatalf("line %d: %v", line, err)
		}
		return strings.Repeat(parts[2], n)
	})
}
