package manifest

import (
	"cmp"
	"maps"
	"math/big"
	"slices"
	"strings"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/zclconf/go-cty/cty"

	"github.com/meshd/meshd/catalog"
)

// An hclReader turns one HCL file into nodes.
type hclReader struct {
	*problems
	data []byte
}

// A typed is a block at the top of a file: its type and its value.
type typed struct {
	kind string
	node *node
}

// readHCL reads a file that holds the blocks of a table.
func readHCL(p *problems, data []byte, table map[string]block) []typed {
	r := hclReader{problems: p, data: data}
	body := r.parse()
	if body == nil {
		return nil
	}
	for _, a := range sortedAttributes(body) {
		r.add(a.NameRange.Start.Line, "", "%q stands outside of any block: write it inside one such as %s", a.Name, exampleBlock(table))
	}
	var all []typed
	for _, b := range body.Blocks {
		spec, ok := table[b.Type]
		if !ok {
			r.add(b.TypeRange.Start.Line, "", "%q is no kind of resource%s: write one of %s", b.Type,
				suggest(b.Type, tableNames(table)), strings.Join(tableNames(table), ", "))
			continue
		}
		all = append(all, typed{b.Type, r.block(b, spec)})
	}
	return all
}

// readHCLObject reads a file that is one object: configuration.
func readHCLObject(p *problems, data []byte) *node {
	r := hclReader{problems: p, data: data}
	body := r.parse()
	if body == nil {
		return nil
	}
	n := &node{kind: nodeObject, line: 1}
	r.fill(n, body, nil)
	return n
}

func (r *hclReader) parse() *hclsyntax.Body {
	if !r.scan() {
		return nil
	}
	f, diags := hclsyntax.ParseConfig(r.data, r.file, hcl.InitialPos)
	for _, d := range diags {
		r.diagnostic(d)
	}
	if diags.HasErrors() {
		return nil
	}
	body, ok := f.Body.(*hclsyntax.Body)
	if !ok {
		r.add(1, "", "cannot be read as HCL")
		return nil
	}
	return body
}

// scan looks at the tokens before the parser does, which is recursive: it
// refuses deep nesting, and what is HCL but no plain value.
func (r *hclReader) scan() bool {
	tokens, _ := hclsyntax.LexConfig(r.data, r.file, hcl.InitialPos)
	before := len(r.errs)
	depth := 0
	for i, t := range tokens {
		line := t.Range.Start.Line
		switch t.Type { //nolint:exhaustive // all other tokens are the parser's business
		case hclsyntax.TokenOBrace, hclsyntax.TokenOBrack, hclsyntax.TokenOParen:
			if depth++; depth > MaxDepth {
				r.add(line, "", "nested deeper than %d", MaxDepth)
				return false
			}
		case hclsyntax.TokenCBrace, hclsyntax.TokenCBrack, hclsyntax.TokenCParen:
			depth = max(0, depth-1)
		case hclsyntax.TokenTemplateInterp:
			r.add(line, "", "there are no variables: for a literal \"${\" write \"$${\"")
		case hclsyntax.TokenTemplateControl:
			r.add(line, "", "there are no templates: for a literal \"%%{\" write \"%%%%{\"")
		case hclsyntax.TokenBang, hclsyntax.TokenQuestion:
			r.add(line, "", "there are no expressions: write a plain value")
		case hclsyntax.TokenMinus:
			if i > 0 && tokens[i-1].Type == hclsyntax.TokenMinus {
				r.add(line, "", "there are no expressions: write a plain value")
			}
		}
		if len(r.errs)-before >= maxSyntaxErrors {
			return false
		}
	}
	return len(r.errs) == before
}

// maxSyntaxErrors is how many errors of syntax are worth reading.
const maxSyntaxErrors = 10

func (r *hclReader) diagnostic(d *hcl.Diagnostic) {
	if d.Severity != hcl.DiagError || len(r.errs) >= maxSyntaxErrors {
		return
	}
	line, text := 0, ""
	if d.Subject != nil {
		line = d.Subject.Start.Line
		if d.Subject.CanSliceBytes(r.data) {
			text = string(d.Subject.SliceBytes(r.data))
		}
	}
	switch {
	case d.Summary == "Invalid escape sequence" && strings.HasPrefix(text, `\`):
		r.add(line, "", "%s is no escape sequence: for a literal backslash write %s", text, `\`+text)
	case d.Summary == "Attribute redefined":
		r.add(line, text, "given twice: remove one")
	default:
		r.add(line, "", "%s: %s", d.Summary, strings.ReplaceAll(d.Detail, "\n", " "))
	}
}

// block returns the value of a block that the table knows.
func (r *hclReader) block(b *hclsyntax.Block, spec block) *node {
	n := &node{kind: nodeObject, line: b.TypeRange.Start.Line}
	if len(b.Labels) != len(spec.labels) {
		r.add(n.line, "", "write %s {", blockForm(b.Type, spec))
		return n
	}
	for i, name := range spec.labels {
		n.set(name, &node{kind: nodeString, line: b.LabelRanges[i].Start.Line, text: b.Labels[i]})
	}
	for _, a := range sortedAttributes(b.Body) {
		if slices.Contains(spec.labels, a.Name) {
			r.add(a.NameRange.Start.Line, a.Name, "is given by the label of the block: remove it")
		}
	}
	r.fill(n, b.Body, spec.inside)
	return n
}

// fill adds what a body holds to an object.
func (r *hclReader) fill(n *node, body *hclsyntax.Body, inside map[string]block) {
	given := len(n.names) // by labels
	for _, a := range sortedAttributes(body) {
		if slices.Contains(n.names[:given], a.Name) {
			continue // reported by block
		}
		v := r.value(a.Expr)
		v.line = a.NameRange.Start.Line
		n.set(a.Name, v)
	}
	lists := map[string]*node{}
	for _, b := range body.Blocks {
		line := b.TypeRange.Start.Line
		spec, ok := inside[b.Type]
		if !ok {
			r.object(n, b, inside)
			continue
		}
		list := lists[spec.list]
		if list == nil {
			if old := n.get(spec.list); old != nil {
				r.add(line, spec.list, "is given as a list in line %d and as blocks: use one form", old.line)
				continue
			}
			list = &node{kind: nodeArray, line: line}
			lists[spec.list] = list
			n.set(spec.list, list)
		}
		list.items = append(list.items, r.block(b, spec))
	}
}

// object adds a block without label as an object under its own name.
func (r *hclReader) object(n *node, b *hclsyntax.Block, inside map[string]block) {
	line := b.TypeRange.Start.Line
	if len(b.Labels) > 0 {
		r.add(line, b.Type, "no block of this name takes a label here%s", suggest(b.Type, tableNames(inside)))
		return
	}
	if old := n.get(b.Type); old != nil {
		r.add(line, b.Type, "given twice, first in line %d: remove one", old.line)
		return
	}
	v := &node{kind: nodeObject, line: line}
	r.fill(v, b.Body, nil)
	n.set(b.Type, v)
}

// value returns a plain value. Anything else is recorded as a problem.
func (r *hclReader) value(expr hclsyntax.Expression) *node {
	line := expr.Range().Start.Line
	switch e := expr.(type) {
	case *hclsyntax.LiteralValueExpr:
		return r.literal(e.Val, line)
	case *hclsyntax.ParenthesesExpr:
		return r.value(e.Expression)
	case *hclsyntax.TemplateExpr:
		return r.template(e, line)
	case *hclsyntax.TupleConsExpr:
		n := &node{kind: nodeArray, line: line}
		for _, item := range e.Exprs {
			n.items = append(n.items, r.value(item))
		}
		return n
	case *hclsyntax.ObjectConsExpr:
		return r.objectExpr(e, line)
	case *hclsyntax.UnaryOpExpr:
		if v := r.value(e.Val); e.Op == hclsyntax.OpNegate && v.kind == nodeNumber && !strings.HasPrefix(v.text, "-") {
			v.text = "-" + v.text
			return v
		}
	case *hclsyntax.ScopeTraversalExpr:
		r.add(line, "", "%s is no value: there are no variables, write a text in quotes: %q", e.Traversal.RootName(), e.Traversal.RootName())
		return &node{line: line}
	}
	r.add(line, "", "there are no expressions: write a plain value")
	return &node{line: line}
}

func (r *hclReader) template(e *hclsyntax.TemplateExpr, line int) *node {
	var text strings.Builder
	for _, part := range e.Parts {
		lit, ok := part.(*hclsyntax.LiteralValueExpr)
		if !ok || lit.Val.Type() != cty.String || lit.Val.IsNull() {
			r.add(line, "", "there are no expressions: write a plain value")
			return &node{line: line}
		}
		text.WriteString(lit.Val.AsString())
	}
	return &node{kind: nodeString, line: line, text: text.String()}
}

func (r *hclReader) objectExpr(e *hclsyntax.ObjectConsExpr, line int) *node {
	n := &node{kind: nodeObject, line: line}
	for _, item := range e.Items {
		at := item.KeyExpr.Range().Start.Line
		name := hcl.ExprAsKeyword(item.KeyExpr)
		if name == "" {
			wrapped, ok := item.KeyExpr.(*hclsyntax.ObjectConsKeyExpr)
			if !ok {
				r.add(at, "", "write the name of a field, in quotes where it is no plain word")
				continue
			}
			key := r.value(wrapped.Wrapped)
			if key.kind != nodeString {
				r.add(at, "", "write the name of a field, in quotes where it is no plain word")
				continue
			}
			name = key.text
		}
		v := r.value(item.ValueExpr)
		v.line = at
		n.set(name, v)
	}
	return n
}

func (r *hclReader) literal(v cty.Value, line int) *node {
	switch {
	case v.IsNull():
		return &node{kind: nodeNull, line: line}
	case v.Type() == cty.Bool && v.True():
		return &node{kind: nodeBool, line: line, text: "true"}
	case v.Type() == cty.Bool:
		return &node{kind: nodeBool, line: line, text: "false"}
	case v.Type() == cty.String:
		return &node{kind: nodeString, line: line, text: v.AsString()}
	case v.Type() == cty.Number:
		if text, ok := numberText(v.AsBigFloat()); ok {
			return &node{kind: nodeNumber, line: line, text: text}
		}
		r.add(line, "", "the number is out of range")
	default:
		r.add(line, "", "there are no expressions: write a plain value")
	}
	return &node{line: line}
}

// numberText returns the JSON text of a number. Numbers that no field can hold
// are refused, rather than written out with all their zeros.
func numberText(f *big.Float) (string, bool) {
	if f.IsInf() || f.MantExp(nil) > 64 || f.MantExp(nil) < -1024 {
		return "", false
	}
	if f.IsInt() {
		return f.Text('f', 0), true
	}
	return f.Text('g', -1), true
}

func sortedAttributes(body *hclsyntax.Body) []*hclsyntax.Attribute {
	return slices.SortedFunc(maps.Values(body.Attributes), func(a, b *hclsyntax.Attribute) int {
		return cmp.Compare(a.NameRange.Start.Byte, b.NameRange.Start.Byte)
	})
}

func tableNames(table map[string]block) []string { return slices.Sorted(maps.Keys(table)) }

// exampleBlock returns the first block of the table as one writes it.
func exampleBlock(table map[string]block) string {
	names := tableNames(table)
	return blockForm(names[len(names)-1], table[names[len(names)-1]])
}

// blockForm returns how a block starts, such as `intention "SOURCE" "DESTINATION"`.
func blockForm(name string, spec block) string {
	for _, l := range spec.labels {
		name += ` "` + strings.ToUpper(l) + `"`
	}
	return name
}

// suggest returns ` (did you mean "x"?)`, or "" when nothing is near.
func suggest(name string, candidates []string) string {
	if c := catalog.Closest(name, candidates); c != "" {
		return ` (did you mean "` + c + `"?)`
	}
	return ""
}
