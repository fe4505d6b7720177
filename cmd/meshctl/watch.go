package main

import (
	"context"
	"encoding/csv"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"github.com/meshd/meshd/server/client"
)

// rewatch is how long a watch that broke waits before it goes on.
const rewatch = 2 * time.Second

// watch shows what there is and then every change, until the command is
// interrupted. A connection that breaks is made again.
func (a *app) watch(cmd *cobra.Command, api *client.Client, kind client.Kind, sel client.Selection, keep func(client.Item) bool) error {
	w := &watched{app: a, kind: kind, keep: keep}
	ctx := cmd.Context()
	for {
		for event, err := range api.Watch(ctx, kind, sel) {
			if ctx.Err() != nil {
				return nil // being interrupted is how a watch ends
			}
			if err == nil {
				err = w.take(event)
			}
			if err == nil {
				continue
			}
			if code := client.CodeOf(err); !w.began || code != client.CodeUnreachable && code != client.CodeUnavailable {
				return err
			}
			if !w.broken {
				w.broken = true
				text, _, _ := strings.Cut(err.Error(), "\n")
				if _, err := fmt.Fprintln(a.err, text+"; trying again"); err != nil {
					return err
				}
			}
		}
		timer := time.NewTimer(rewatch)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return nil
		}
	}
}

// watched is what a watch has shown.
type watched struct {
	*app
	kind   client.Kind
	keep   func(client.Item) bool
	shown  map[string]client.Item
	fresh  map[string]client.Item // what came since a reset; nil after its end
	began  bool                   // the first state is there
	broken bool                   // and it was said
	lines  lines
}

// take shows one event. After a reset it shows what differs from what was shown
// before, so that a connection made again repeats nothing.
func (w *watched) take(e client.Event) error {
	switch e.Type {
	case client.EventReset:
		w.fresh = map[string]client.Item{}
	case client.EventPut:
		if !w.keep(e.Item) {
			return nil
		}
		if w.fresh != nil {
			w.fresh[e.Item.Ref.Path()] = e.Item
		}
		return w.put(e.Item)
	case client.EventDelete:
		return w.gone(e.Item)
	case client.EventPosition:
		if w.fresh == nil {
			return nil
		}
		for path, item := range w.shown {
			if _, still := w.fresh[path]; !still {
				if err := w.gone(item); err != nil {
					return err
				}
			}
		}
		w.fresh, w.began, w.broken = nil, true, false
	}
	return nil
}

func (w *watched) put(i client.Item) error {
	path := i.Ref.Path()
	old, was := w.shown[path]
	if was && old.Revision == i.Revision && string(old.Spec) == string(i.Spec) && string(old.Status) == string(i.Status) {
		return nil
	}
	change := "updated"
	switch {
	case !w.began:
		change = "present"
	case !was:
		change = "created"
	}
	if w.shown == nil {
		w.shown = map[string]client.Item{}
	}
	w.shown[path] = i
	return w.line(change, i)
}

func (w *watched) gone(i client.Item) error {
	old, was := w.shown[i.Ref.Path()]
	if !was {
		return nil
	}
	delete(w.shown, i.Ref.Path())
	return w.line("deleted", old)
}

// line shows one change of a resource.
func (w *watched) line(change string, i client.Item) error {
	row := rowers[w.kind]
	cells, err := row.row(w.app, i)
	if err != nil {
		return fmt.Errorf("%s %s: this version cannot read it: %w", w.kind, i.Name, err)
	}
	return w.lines.line(w.app, change, table{columns: row.columns, wide: row.wide, rows: [][]string{cells}, names: []string{string(w.kind) + "/" + i.Name}}, i)
}

// lines shows changes, one after the other.
type lines struct{ widths []int }

// line shows one change, of which t has the one row: a line of a table, of CSV or
// of JSON, or a document of YAML.
func (l *lines) line(a *app, change string, t table, item any) error {
	value := struct {
		Change string `json:"change"`
		Item   any    `json:"item"`
	}{change, item}
	switch a.format {
	case "json":
		enc := json.NewEncoder(a.out)
		enc.SetEscapeHTML(false)
		return enc.Encode(value)
	case "yaml":
		if _, err := fmt.Fprintln(a.out, "---"); err != nil {
			return err
		}
		return a.show(table{}, value)
	case "name":
		_, err := fmt.Fprintln(a.out, t.names[0])
		return err
	}
	header := append([]string{"CHANGE"}, t.columns...)
	cells := append([]string{change}, t.rows[0]...)
	if a.format == "csv" {
		out := csv.NewWriter(a.out)
		if l.widths == nil {
			l.widths = []int{0}
			if err := out.Write(lower(header)); err != nil {
				return err
			}
		}
		return out.WriteAll(csvRows([][]string{cells}))
	}
	if t.wide > 0 && a.format != "wide" {
		header, cells = header[:t.wide+1], cells[:t.wide+1]
	}
	if l.widths == nil {
		l.widths = make([]int, len(header))
		l.widths[0] = len("present")
		if err := l.padded(a.out, header); err != nil {
			return err
		}
	}
	return l.padded(a.out, cells)
}

// padded prints a row. Columns grow with what comes: nobody knows yet what the
// widest cell will be.
func (l *lines) padded(out io.Writer, cells []string) error {
	var b strings.Builder
	for n, cell := range cells {
		width := utf8.RuneCountInString(cell)
		l.widths[n] = max(l.widths[n], width)
		b.WriteString(cell)
		if n < len(cells)-1 {
			b.WriteString(strings.Repeat(" ", l.widths[n]-width+2))
		}
	}
	_, err := fmt.Fprintln(out, b.String())
	return err
}

// pollInterval is how often a list is asked for that the servers can't watch.
const pollInterval = time.Second

// poll shows the rows of a list, and then every row that is new, another or gone,
// until the command is interrupted. The names tell rows apart, and the items
// whether one has changed.
func (a *app) poll(ctx context.Context, read func() (t table, items []any, err error)) error {
	type shown struct {
		text string
		row  table
		item any
	}
	var out lines
	var before map[string]shown
	broken := false
	for {
		t, items, err := read()
		switch {
		case ctx.Err() != nil:
			return nil //nolint:nilerr // being interrupted is how it ends
		case err != nil && before == nil, err != nil && client.CodeOf(err) != client.CodeUnreachable && client.CodeOf(err) != client.CodeUnavailable:
			return err
		case err != nil:
			if !broken {
				text, _, _ := strings.Cut(err.Error(), "\n")
				_, _ = fmt.Fprintln(a.err, text+"; trying again") // who does not read it will read the end
			}
			broken = true
		default:
			broken = false
			now := make(map[string]shown, len(items))
			for n, name := range t.names {
				one := shown{text: compact(items[n]), row: table{columns: t.columns, wide: t.wide, rows: t.rows[n : n+1], names: t.names[n : n+1]}, item: items[n]}
				old, was := before[name]
				now[name] = one
				change := "created"
				switch {
				case was && old.text == one.text:
					continue
				case was:
					change = "updated"
				case before == nil:
					change = "present"
				}
				if err := out.line(a, change, one.row, one.item); err != nil {
					return err
				}
			}
			for _, name := range slices.Sorted(maps.Keys(before)) {
				if _, still := now[name]; !still {
					if err := out.line(a, "deleted", before[name].row, before[name].item); err != nil {
						return err
					}
				}
			}
			before = now
		}
		timer := time.NewTimer(pollInterval)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return nil
		}
	}
}
