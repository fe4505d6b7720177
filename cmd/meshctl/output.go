package main

import (
	"encoding/csv"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/catalog/manifest"
)

// table is what a list looks like to people.
type table struct {
	columns []string
	wide    int // columns from here on are shown by -o wide and csv only; 0: none
	rows    [][]string
	names   []string // one per row, for -o name
}

var formats = []string{"table", "wide", "json", "yaml", "csv", "name"}

func (a *app) checkFormat() error {
	if !slices.Contains(formats, a.format) {
		near := ""
		if n := catalog.Closest(a.format, formats); n != "" {
			near = " (did you mean " + n + "?)"
		}
		return usage("%v %q%s: use one of %s", errFormat, a.format, near, strings.Join(formats, ", "))
	}
	return nil
}

// show prints a table, or the value behind it as data.
func (a *app) show(t table, value any) error {
	switch a.format {
	case "json":
		enc := json.NewEncoder(a.out)
		enc.SetEscapeHTML(false)
		enc.SetIndent("", "  ")
		return enc.Encode(value)
	case "yaml":
		data, err := manifest.YAML(value)
		if err != nil {
			return err
		}
		_, err = a.out.Write(data)
		return err
	case "csv":
		w := csv.NewWriter(a.out)
		if err := w.Write(lower(t.columns)); err != nil {
			return err
		}
		return w.WriteAll(csvRows(t.rows))
	case "name":
		for _, n := range t.names {
			if _, err := fmt.Fprintln(a.out, n); err != nil {
				return err
			}
		}
		return nil
	default:
		return a.showTable(t)
	}
}

func (a *app) showTable(t table) error {
	if len(t.rows) == 0 {
		_, err := fmt.Fprintln(a.err, "none")
		return err
	}
	return a.writeTable(a.out, t)
}

func (a *app) writeTable(out io.Writer, t table) error {
	n := len(t.columns)
	if t.wide > 0 && a.format != "wide" {
		n = t.wide
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	for _, row := range append([][]string{t.columns}, t.rows...) {
		if _, err := fmt.Fprintln(w, strings.Join(row[:n], "\t")); err != nil {
			return err
		}
	}
	return w.Flush()
}

// csvRows are rows for programs: what is not there is empty, not a dash.
func csvRows(rows [][]string) [][]string {
	out := make([][]string, len(rows))
	for i, row := range rows {
		out[i] = slices.Clone(row)
		for n, cell := range row {
			if cell == "-" {
				out[i][n] = ""
			}
		}
	}
	return out
}

func lower(columns []string) []string {
	out := make([]string, len(columns))
	for i, c := range columns {
		out[i] = strings.ToLower(strings.ReplaceAll(c, " ", "_"))
	}
	return out
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
