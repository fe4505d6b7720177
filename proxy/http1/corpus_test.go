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

func corpus(t testing.TB, name string) []row {
	t.Helper()
	f, err := os.Open(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var rows []row
	scanner := bufio.NewScanner(f)
	for n := 1; scanner.Scan(); n++ {
		text := scanner.Text()
		if text == "" || strings.HasPrefix(text, "#") {
			continue
		}
		cells := strings.Split(text, "\t")
		r := row{line: n, want: cells[0], in: unquote(t, n, cells[1])}
		if len(cells) > 2 {
			r.data = unquote(t, n, cells[2])
		}
		rows = append(rows, r)
	}
	if err := scanner.Err(); err != nil {
		t.Fatal(err)
	}
	return rows
}

func unquote(t testing.TB, line int, cell string) string {
	t.Helper()
	s, err := strconv.Unquote(cell)
	if err != nil {
		t.Fatalf("line %d: %v", line, err)
	}
	return repeat.ReplaceAllStringFunc(s, func(m string) string {
		parts := repeat.FindStringSubmatch(m)
		n, err := strconv.Atoi(parts[1])
		if err != nil {
			t.Fatalf("line %d: %v", line, err)
		}
		return strings.Repeat(parts[2], n)
	})
}
