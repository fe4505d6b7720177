package manifest

import (
	"path/filepath"
	"slices"
	"strings"
)

// A Document is one resource of a file before it is decoded.
type Document struct {
	// Kind is what the file says; it may be none that exists.
	Kind Kind
	// JSON is the resource without its kind. It is valid JSON without
	// duplicate names; it need not fit the kind.
	JSON []byte
	// File and Line are where the resource starts.
	File string
	Line int

	root  *node
	lines map[string]int
}

// LineOf returns the line of a field, such as "checks[0].interval", or of the
// nearest value around it.
func (d *Document) LineOf(path string) int {
	for {
		if line, ok := d.lines[path]; ok {
			return line
		}
		i := strings.LastIndexAny(path, ".[")
		if i < 0 {
			return d.Line
		}
		path = path[:i]
	}
}

// Parse reads a file of resources by its ending (.hcl, .yaml, .yml or .json)
// into documents, in the file's order. The error holds all problems that were
// found, see Errors; with an error there are no documents.
func Parse(filename string, data []byte) ([]Document, error) {
	return parse(filename, data, manifestBlocks(), "")
}

// parse reads documents. A document without a kind is of kind orElse; where
// that is empty, it is an error.
func parse(filename string, data []byte, table map[string]block, orElse Kind) ([]Document, error) {
	p := &problems{file: filename}
	var all []typed
	switch format := formatOf(p, data); format {
	case formatHCL:
		all = readHCL(p, data, table)
	case formatYAML, formatJSON:
		all = kinds(p, roots(p, format, data), orElse, tableNames(table))
	case formatNone:
	}
	docs := make([]Document, 0, len(all))
	for _, t := range all {
		docs = append(docs, newDocument(p, Kind(t.kind), t.node))
	}
	if err := p.err(); err != nil {
		return nil, err
	}
	return docs, nil
}

func newDocument(p *problems, kind Kind, root *node) Document {
	d := Document{Kind: kind, File: p.file, Line: root.line, root: root, lines: map[string]int{}}
	if line := root.tooDeep(MaxDepth); line > 0 {
		if len(p.errs) == 0 { // else the reader said so
			p.add(line, "", "nested deeper than %d", MaxDepth)
		}
		return d
	}
	root.duplicates("", p)
	root.positions("", d.lines)
	d.JSON = root.appendJSON(nil)
	return d
}

type format uint8

const (
	formatNone format = iota
	formatHCL
	formatYAML
	formatJSON
)

// formatOf returns the format of the file, formatNone with a problem recorded.
func formatOf(p *problems, data []byte) format {
	if len(data) > MaxSize {
		p.add(0, "", "%d bytes, at most %d are allowed: split the file", len(data), MaxSize)
		return formatNone
	}
	switch ext := strings.ToLower(filepath.Ext(p.file)); ext {
	case ".hcl":
		return formatHCL
	case ".yaml", ".yml":
		return formatYAML
	case ".json":
		return formatJSON
	default:
		p.add(0, "", "the format is told by the ending of the name: use .hcl, .yaml or .json, not %q", ext)
		return formatNone
	}
}

// roots returns the documents of a YAML or JSON file.
func roots(p *problems, f format, data []byte) []*node {
	if f == formatYAML {
		return readYAML(p, data)
	}
	n := readJSON(p, data)
	switch {
	case n == nil:
		return nil
	case n.kind == nodeArray:
		return n.items
	default:
		return []*node{n}
	}
}

// kinds takes the kind out of each document.
func kinds(p *problems, nodes []*node, orElse Kind, known []string) []typed {
	var all []typed
	for _, n := range nodes {
		if n.kind != nodeObject {
			p.add(n.line, "", "is %s: write a resource with a kind", n.kind)
			continue
		}
		kind := n.get("kind")
		switch {
		case kind == nil && orElse != "":
			all = append(all, typed{string(orElse), n})
		case kind == nil:
			p.add(n.line, "kind", "missing: write one of %s", strings.Join(known, ", "))
		case kind.kind != nodeString || !slices.Contains(known, kind.text):
			p.add(kind.line, "kind", "%q is no kind of resource%s: write one of %s", kind.text,
				suggest(kind.text, known), strings.Join(known, ", "))
		default:
			if slices.Index(n.names, "kind") != lastIndex(n.names, "kind") {
				p.add(n.line, "kind", "given twice: remove one")
			}
			all = append(all, typed{kind.text, n.without("kind")})
		}
	}
	return all
}

func lastIndex(names []string, name string) int {
	for i, k := range slices.Backward(names) {
		if k == name {
			return i
		}
	}
	return -1
}
