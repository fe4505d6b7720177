package arch

import (
	"fmt"
	"io/fs"
	"slices"
	"strings"
)

// TablePath is the page that holds the table of packages.
const TablePath = "docs/ARCHITECTURE.md"

// A Row is one package of the table.
type Row struct {
	Package string
	Imports []string
	Line    int // in TablePath
}

// Table reads the one table of docs/ARCHITECTURE.md whose columns are
// package, purpose and imports:
//
//	| `intentions` | rules and who may call whom | `catalog` `ca/spiffe` |
//
// A package without imports from this module has "-" in the last column.
func Table(fsys fs.FS) ([]Row, error) {
	text, err := fs.ReadFile(fsys, TablePath)
	if err != nil {
		return nil, fmt.Errorf("read the table of packages: %w", err)
	}
	var rows []Row
	tables, inside := 0, false
	number := 0
	for line := range strings.Lines(string(text)) {
		number++
		cells, ok := cellsOf(line)
		switch {
		case !ok:
			inside = false
		case slices.Equal(cells, []string{"package", "purpose", "imports"}):
			tables++
			inside = true
		case inside && strings.Trim(strings.Join(cells, ""), ":-") == "":
			// The line under the heads.
		case inside:
			row, err := rowOf(cells)
			if err != nil {
				return nil, fmt.Errorf("%s:%d: %w", TablePath, number, err)
			}
			row.Line = number
			rows = append(rows, row)
		}
	}
	if tables != 1 {
		return nil, fmt.Errorf("%s has %d tables headed | package | purpose | imports |, want 1", TablePath, tables)
	}
	return rows, nil
}

// cellsOf splits a line of a table; false for any other line.
func cellsOf(line string) ([]string, bool) {
	line = strings.TrimSpace(line)
	if !strings.HasPrefix(line, "|") || !strings.HasSuffix(line, "|") || len(line) < 2 {
		return nil, false
	}
	cells := strings.Split(line[1:len(line)-1], "|")
	for i := range cells {
		cells[i] = strings.TrimSpace(cells[i])
	}
	return cells, true
}

func rowOf(cells []string) (Row, error) {
	if len(cells) != 3 {
		return Row{}, fmt.Errorf("row has %d cells, want 3", len(cells))
	}
	name, err := unquote(cells[0])
	if err != nil {
		return Row{}, err
	}
	row := Row{Package: name}
	if cells[1] == "" {
		return Row{}, fmt.Errorf("row of %s says no purpose", name)
	}
	if cells[2] == "-" {
		return row, nil
	}
	if cells[2] == "" {
		return Row{}, fmt.Errorf("row of %s lists no imports: write - for none", name)
	}
	for field := range strings.FieldsSeq(cells[2]) {
		dep, err := unquote(field)
		if err != nil {
			return Row{}, err
		}
		row.Imports = append(row.Imports, dep)
	}
	return row, nil
}

func unquote(s string) (string, error) {
	inner, opened := strings.CutPrefix(s, "`")
	inner, closed := strings.CutSuffix(inner, "`")
	if !opened || !closed || inner == "" || strings.ContainsAny(inner, "` ,{}*") {
		return "", fmt.Errorf("%q is not one package in backquotes", s)
	}
	return inner, nil
}
