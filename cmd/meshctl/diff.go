package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/meshd/meshd/catalog/manifest"
	"github.com/meshd/meshd/server/client"
)

func (a *app) diffCommand() *cobra.Command {
	var paths []string
	var detailed bool
	var set setFlags
	c := &cobra.Command{
		Use: "diff -f PATH", Short: "show what apply would change, field by field", Args: exactly(0, "no arguments but -f"),
		Long: `diff asks the servers what apply would do with the same files, and writes
nothing. With --detailed-exitcode it ends with 3 when something would change.`,
		Example: "  meshctl diff -f mesh.hcl\n  meshctl diff -f intentions/ --detailed-exitcode",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := a.checkFormat(); err != nil {
				return err
			}
			docs, err := a.load(paths)
			if err != nil {
				return err
			}
			api, err := a.client()
			if err != nil {
				return err
			}
			req := applyRequest(docs)
			req.DryRun, req.Set, req.Prune = true, set.name, set.prune
			result, err := api.Apply(cmd.Context(), req)
			if err != nil {
				return err
			}
			return a.showDiff(result, detailed)
		},
	}
	fileFlag(c, &paths)
	set.flags(c)
	c.Flags().BoolVar(&detailed, "detailed-exitcode", false, "exit 3 if something would change")
	return c
}

func applyRequest(docs []manifest.Document) client.ApplyRequest {
	var req client.ApplyRequest
	for _, d := range docs {
		req.Resources = append(req.Resources, client.Resource{Kind: client.Kind(d.Kind), Spec: d.JSON})
	}
	return req
}

// changeMarks is how a diff begins the line of a resource.
var changeMarks = map[string]string{client.ChangeCreated: "+", client.ChangeUpdated: "~", client.ChangeDeleted: "-"}

func (a *app) showDiff(r client.Result, detailed bool) error {
	for _, w := range r.Warnings {
		if _, err := fmt.Fprintln(a.err, "warning: "+w); err != nil {
			return err
		}
	}
	r.Changes = slices.DeleteFunc(r.Changes, func(c client.Change) bool { return c.Change == client.ChangeUnchanged })
	t := table{columns: []string{"KIND", "NAME", "CHANGE", "FIELD", "BEFORE", "AFTER"}}
	var text strings.Builder
	for _, c := range r.Changes {
		t.names = append(t.names, string(c.Kind)+"/"+c.Name)
		fmt.Fprintf(&text, "%s %s %s\n", changeMarks[c.Change], c.Kind, c.Name)
		fields, err := fieldChanges(c.Before, c.After)
		if err != nil {
			return fmt.Errorf("%s %s: this version cannot read it: %w", c.Kind, c.Name, err)
		}
		for _, f := range fields {
			t.rows = append(t.rows, []string{string(c.Kind), c.Name, c.Change, f.path, f.before, f.after})
			text.WriteString(f.String())
		}
	}
	var err error
	switch {
	case a.format != "table" && a.format != "wide":
		err = a.show(t, r)
	case len(r.Changes) == 0:
		_, err = fmt.Fprintln(a.err, "no differences")
	default:
		_, err = fmt.Fprint(a.out, text.String())
	}
	if err != nil || !detailed || len(r.Changes) == 0 {
		return err
	}
	return fail(exitDenied, "")
}

// A fieldChange is one field that differs; before or after is empty where there
// is no such field, and JSON otherwise.
type fieldChange struct{ path, before, after string }

func (f fieldChange) String() string {
	switch {
	case f.before == "":
		return fmt.Sprintf("    + %s: %s\n", f.path, f.after)
	case f.after == "":
		return fmt.Sprintf("    - %s: %s\n", f.path, f.before)
	default:
		return fmt.Sprintf("    ~ %s: %s → %s\n", f.path, f.before, f.after)
	}
}

// fieldChanges compares two specs. One that is absent has no fields.
func fieldChanges(before, after []byte) ([]fieldChange, error) {
	x, err := fieldsOf(before)
	if err != nil {
		return nil, err
	}
	y, err := fieldsOf(after)
	if err != nil {
		return nil, err
	}
	return compareFields(nil, "", x, y), nil
}

func fieldsOf(spec []byte) (map[string]any, error) {
	fields := map[string]any{}
	if len(spec) == 0 {
		return fields, nil
	}
	d := json.NewDecoder(bytes.NewReader(spec))
	d.UseNumber() // a port must not become 8.08e+03
	return fields, d.Decode(&fields)
}

// compareFields goes down where both sides have an object, and into lists whose
// elements have names; other lists are compared whole, as their order counts.
func compareFields(out []fieldChange, path string, x, y map[string]any) []fieldChange {
	all := maps.Clone(x)
	maps.Copy(all, y)
	for _, name := range slices.Sorted(maps.Keys(all)) {
		before, had := x[name]
		after, has := y[name]
		at := path + name
		if had && has {
			if reflect.DeepEqual(before, after) {
				continue
			}
			if b, a, ok := objects(before, after); ok {
				out = compareFields(out, at+".", b, a)
				continue
			}
			if b, a, ok := named(before, after); ok {
				out = compareFields(out, at+".", b, a)
				continue
			}
		}
		f := fieldChange{path: at}
		if had {
			f.before = compact(before)
		}
		if has {
			f.after = compact(after)
		}
		out = append(out, f)
	}
	return out
}

func objects(x, y any) (before, after map[string]any, ok bool) {
	before, isX := x.(map[string]any)
	after, isY := y.(map[string]any)
	return before, after, isX && isY
}

// named returns the elements of two lists by their names, if that says all there
// is to say: every element has a name of its own, and common ones keep their
// order.
func named(x, y any) (before, after map[string]any, ok bool) {
	before, first, isX := byName(x)
	after, second, isY := byName(y)
	if !isX || !isY {
		return nil, nil, false
	}
	first = slices.DeleteFunc(first, func(n string) bool { _, common := after[n]; return !common })
	second = slices.DeleteFunc(second, func(n string) bool { _, common := before[n]; return !common })
	return before, after, slices.Equal(first, second)
}

func byName(v any) (elements map[string]any, order []string, ok bool) {
	list, isList := v.([]any)
	elements = map[string]any{}
	for _, e := range list {
		object, _ := e.(map[string]any)
		name, has := object["name"].(string)
		if _, twice := elements[name]; !has || twice {
			return nil, nil, false
		}
		elements[name] = e
		order = append(order, name)
	}
	return elements, order, isList
}

func compact(v any) string {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return fmt.Sprint(v) // what came out of JSON goes into it
	}
	return strings.TrimSuffix(b.String(), "\n")
}
