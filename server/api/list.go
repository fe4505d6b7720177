package api

import (
	"encoding/base64"
	"encoding/json"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/acl"
	"github.com/meshd/meshd/server/client"
	"github.com/meshd/meshd/server/state"
)

// maxPage is the longest page that may be asked for.
const maxPage = 1000

// A selection is what a list or a watch is limited to.
type selection struct {
	namespace, prefix string
	labels            []label
	// may tells what the caller may read; nil: everything.
	may func(acl.Request) bool
}

type label struct {
	name, value string
	any         bool // any value will do
}

// listQuery is what a collection's URL asks for.
type listQuery struct {
	selection
	after []string // nil: from the first on
	limit int
	watch bool
}

// listParameters are those of a collection. Others are refused: a filter that
// is mistyped must not show everything.
var listParameters = []string{"continue", "label", "limit", "max_stale", "namespace", "prefix", "stale", "watch"}

func parseListQuery(k collection, q url.Values) (listQuery, error) {
	out := listQuery{selection: selection{namespace: q.Get("namespace"), prefix: q.Get("prefix")}, limit: -1, watch: q.Get("watch") == "true"}
	var p catalog.Problems
	for _, name := range slices.Sorted(maps.Keys(q)) {
		if !slices.Contains(listParameters, name) {
			text := "there is no such parameter"
			if near := catalog.Closest(name, listParameters); near != "" {
				text += "; did you mean " + near + "?"
			}
			p.Add(name, "%s", text)
		}
	}
	if out.namespace != "" && !k.namespaced() {
		p.Add("namespace", "%s are in no namespace", k.kind().Collection())
	}
	for _, text := range q["label"] {
		name, value, hasValue := strings.Cut(text, "=")
		out.labels = append(out.labels, label{name: name, value: value, any: !hasValue})
		switch {
		case !k.labeled():
			p.Add("label", "%s have no labels", k.kind().Collection())
		case name == "":
			p.Add("label", "%q: write NAME=VALUE, or NAME for any value", text)
		}
	}
	if text := q.Get("limit"); text != "" {
		n, err := strconv.Atoi(text)
		if err != nil || n < 1 || n > maxPage {
			p.Add("limit", "%q: write a number from 1 to %d", text, maxPage)
		}
		out.limit = n
	}
	if text := q.Get("continue"); text != "" {
		var err error
		if out.after, err = parseContinue(text); err != nil {
			p.Add("continue", "it is not what the page before said")
		}
	}
	if out.watch && (out.limit >= 0 || out.after != nil) {
		p.Add("watch", "a watch has no pages")
	}
	if err := p.Err(); err != nil {
		return out, invalid("request", err)
	}
	return out, nil
}

// continueAfter is the text that asks for the page after an item. It holds the
// item's name and no position: pages go on over restarts and restores.
func continueAfter(r client.Ref) string {
	raw, _ := json.Marshal(r.Parts) // strings always can be
	return base64.RawURLEncoding.EncodeToString(raw)
}

func parseContinue(text string) ([]string, error) {
	raw, err := base64.RawURLEncoding.DecodeString(text)
	if err != nil {
		return nil, err
	}
	var parts []string
	return parts, json.Unmarshal(raw, &parts)
}

func (a *API) list(k collection) func(*call) (any, error) {
	return func(c *call) (any, error) {
		q, err := parseListQuery(k, c.URL.Query())
		if err != nil {
			return nil, err
		}
		s, err := a.fresh(c)
		if err != nil {
			return nil, err
		}
		if err := namespaceExists(s, q.namespace); err != nil {
			return nil, err
		}
		q.may = func(what acl.Request) bool { return c.may(acl.Read, k.resource(), what) }
		if q.watch && c.Method == http.MethodGet {
			return a.watch(c, s, k.follow(q.selection))
		}
		items, more, err := k.page(s, q.selection, q.after, q.limit)
		if err != nil {
			return nil, err
		}
		out := client.List{Position: s.Position(), Items: items}
		if more {
			out.Continue = continueAfter(items[len(items)-1].Ref)
		}
		return out, nil
	}
}

// namespaceExists refuses a namespace that nobody made; "" means all. A mistyped
// one must not look empty.
func namespaceExists(s *state.Snapshot, namespace string) error {
	if namespace == "" || namespace == catalog.DefaultNamespace || namespace == "*" {
		return nil
	}
	if _, ok := state.Namespaces.Get(s, namespace); ok {
		return nil
	}
	e := notFound(client.KindNamespace, namespace, namespaceNames(s))
	if e.Next == "" {
		e.Next = "meshctl get namespaces"
	}
	return e
}

func namespaceNames(r state.Reader) []string {
	names := []string{catalog.DefaultNamespace}
	for n := range state.Namespaces.All(r) {
		names = append(names, n)
	}
	return names
}

func (t *table[K, V]) namespaced() bool { return len(t.segments) > 1 }
func (t *table[K, V]) labeled() bool    { return t.labels != nil }

func (t *table[K, V]) page(s *state.Snapshot, sel selection, after []string, limit int) ([]client.Item, bool, error) {
	records, items := t.table.All(s), t.builtins(sel)
	if after != nil {
		k, err := t.key(after)
		if err != nil {
			return nil, false, badField("continue", "it is not what the page before said: %v", err)
		}
		if i := slices.IndexFunc(items, func(i client.Item) bool { return slices.Equal(i.Ref.Parts, after) }); i >= 0 {
			items = items[i+1:]
		} else {
			records, items = t.table.After(s, k), items[:0]
		}
	}
	if limit >= 0 && len(items) > limit {
		return items[:limit], true, nil
	}
	for k, rec := range records {
		if !t.selected(sel, k, rec.Value) {
			continue
		}
		if len(items) == limit {
			return items, true, nil
		}
		items = append(items, t.item(s, k, rec))
	}
	return items, false, nil
}

func (t *table[K, V]) selected(sel selection, k K, v V) bool {
	if sel.may != nil && !sel.may(t.scope(k)) {
		return false
	}
	parts := t.ref(k).Parts
	if sel.namespace != "" && parts[0] != sel.namespace {
		return false
	}
	if !strings.HasPrefix(parts[min(1, len(t.segments)-1)], sel.prefix) {
		return false
	}
	for _, l := range sel.labels {
		if value, ok := t.labels(v)[l.name]; !ok || !l.any && value != l.value {
			return false
		}
	}
	return true
}
