package main

import (
	"encoding/csv"
	"encoding/json"
	"fmt"
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
	widths []int
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

// line shows one change: a line of a table, of CSV or of JSON, or a document of
// YAML.
func (w *watched) line(change string, i client.Item) error {
	row := rowers[w.kind]
	cells, err := row.row(i)
	if err != nil {
		return fmt.Errorf("%s %s: this version cannot read it: %w", w.kind, i.Name, err)
	}
	value := struct {
		Change string      `json:"change"`
		Item   client.Item `json:"item"`
	}{change, i}
	switch w.format {
	case "json":
		enc := json.NewEncoder(w.out)
		enc.SetEscapeHTML(false)
		return enc.Encode(value)
	case "yaml":
		if _, err := fmt.Fprintln(w.out, "---"); err != nil {
			return err
		}
		return w.show(table{}, value)
	case "name":
		_, err := fmt.Fprintf(w.out, "%s/%s\n", w.kind, i.Name)
		return err
	}
	header := append([]string{"CHANGE"}, row.columns...)
	cells = append([]string{change}, cells...)
	if w.format == "csv" {
		out := csv.NewWriter(w.out)
		if w.widths == nil {
			w.widths = []int{0}
			if err := out.Write(lower(header)); err != nil {
				return err
			}
		}
		return out.WriteAll([][]string{cells})
	}
	if row.wide > 0 && w.format != "wide" {
		header, cells = header[:row.wide+1], cells[:row.wide+1]
	}
	if w.widths == nil {
		w.widths = make([]int, len(header))
		w.widths[0] = len("present")
		if err := w.padded(header); err != nil {
			return err
		}
	}
	return w.padded(cells)
}

// padded prints a row. Columns grow with what comes: nobody knows yet what the
// widest cell will be.
func (w *watched) padded(cells []string) error {
	var b strings.Builder
	for n, cell := range cells {
		width := utf8.RuneCountInString(cell)
		w.widths[n] = max(w.widths[n], width)
		b.WriteString(cell)
		if n < len(cells)-1 {
			b.WriteString(strings.Repeat(" ", w.widths[n]-width+2))
		}
	}
	_, err := fmt.Fprintln(w.out, b.String())
	return err
}
