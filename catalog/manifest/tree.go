package manifest

import (
	"strconv"
	"strings"

	"github.com/go-json-experiment/json/jsontext"
)

// A nodeKind is the JSON type of a node.
type nodeKind uint8

const (
	nodeNull nodeKind = iota
	nodeBool
	nodeNumber
	nodeString
	nodeArray
	nodeObject
)

// String names the type as a person would.
func (k nodeKind) String() string {
	switch k {
	case nodeNull:
		return "null"
	case nodeBool:
		return "true or false"
	case nodeNumber:
		return "a number"
	case nodeString:
		return "a text"
	case nodeArray:
		return "a list"
	case nodeObject:
		return "a block of fields"
	default:
		return "nothing"
	}
}

// A node is a JSON value that knows its line. All formats are read into it.
type node struct {
	kind nodeKind
	line int
	// text is the value of a string, and the JSON text of a number, true or
	// false.
	text string
	// items are the elements of an array, or the values of an object in the
	// order of names.
	items []*node
	names []string
}

// get returns the value of an object's field, nil when it has none.
func (n *node) get(name string) *node {
	for i, k := range n.names {
		if k == name {
			return n.items[i]
		}
	}
	return nil
}

// set adds a field.
func (n *node) set(name string, v *node) {
	n.names = append(n.names, name)
	n.items = append(n.items, v)
}

// without returns a copy of the object that lacks a field.
func (n *node) without(name string) *node {
	c := &node{kind: n.kind, line: n.line}
	for i, k := range n.names {
		if k != name {
			c.set(k, n.items[i])
		}
	}
	return c
}

// appendJSON appends the JSON text of the value.
func (n *node) appendJSON(b []byte) []byte {
	switch n.kind {
	case nodeBool, nodeNumber:
		return append(b, n.text...)
	case nodeString:
		return appendString(b, n.text)
	case nodeArray:
		b = append(b, '[')
		for i, item := range n.items {
			if i > 0 {
				b = append(b, ',')
			}
			b = item.appendJSON(b)
		}
		return append(b, ']')
	case nodeObject:
		b = append(b, '{')
		for i, item := range n.items {
			if i > 0 {
				b = append(b, ',')
			}
			b = append(appendString(b, n.names[i]), ':')
			b = item.appendJSON(b)
		}
		return append(b, '}')
	case nodeNull:
		return append(b, "null"...)
	default:
		return append(b, "null"...)
	}
}

// appendString appends s as a JSON string. The readers let only valid UTF-8
// through; should a byte slip past them it becomes U+FFFD.
func appendString(b []byte, s string) []byte {
	out, err := jsontext.AppendQuote(b, s)
	if err != nil {
		out, _ = jsontext.AppendQuote(b, strings.ToValidUTF8(s, "\uFFFD"))
	}
	return out
}

// positions adds the line of every value below the path.
func (n *node) positions(path string, lines map[string]int) {
	lines[path] = n.line
	for i, item := range n.items {
		item.positions(join(path, n, i), lines)
	}
}

// join returns the path of an item of n.
func join(path string, n *node, i int) string {
	if n.kind == nodeArray {
		return path + "[" + strconv.Itoa(i) + "]"
	}
	return field(path, n.names[i])
}

func field(path, name string) string {
	if path == "" {
		return name
	}
	return path + "." + name
}

// tooDeep returns the line of the first value nested deeper than limit, 0 for
// none.
func (n *node) tooDeep(limit int) int {
	if limit == 0 && len(n.items) > 0 {
		return n.line
	}
	for _, item := range n.items {
		if line := item.tooDeep(limit - 1); line > 0 {
			return line
		}
	}
	return 0
}

// duplicates records every name that an object gives twice. HCL has such checks
// of its own and may not come here with one.
func (n *node) duplicates(path string, p *problems) {
	if n.kind == nodeObject {
		seen := make(map[string]int, len(n.names))
		for i, name := range n.names {
			if line, ok := seen[name]; ok {
				p.add(n.items[i].line, field(path, name), "given twice, first in line %d: remove one", line)
				continue
			}
			seen[name] = n.items[i].line
		}
	}
	for i, item := range n.items {
		item.duplicates(join(path, n, i), p)
	}
}

// at follows a JSON pointer. It returns the path in the notation of fields, and
// the value, nil where there is none.
func (n *node) at(pointer jsontext.Pointer) (string, *node) {
	path := ""
	for token := range pointer.Tokens() {
		if n == nil {
			return field(path, token), nil
		}
		switch n.kind {
		case nodeArray:
			i, err := strconv.Atoi(token)
			if err != nil || i < 0 || i >= len(n.items) {
				return path, nil
			}
			path, n = join(path, n, i), n.items[i]
		default:
			path, n = field(path, token), n.get(token)
		}
	}
	return path, n
}
