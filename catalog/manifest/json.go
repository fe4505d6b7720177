package manifest

import (
	"bytes"
	"errors"
	"fmt"
	"io"

	"github.com/go-json-experiment/json/jsontext"
)

// A jsonReader turns one JSON file into nodes.
type jsonReader struct {
	dec  *jsontext.Decoder
	data []byte
	// line is that of offset.
	line, offset int
}

// errDepth is the error of jsonReader for nesting.
var errDepth = fmt.Errorf("nested deeper than %d", MaxDepth)

// readJSON reads the one value of a JSON file.
func readJSON(p *problems, data []byte) *node {
	// Names are compared later, for all formats alike.
	r := jsonReader{
		dec:  jsontext.NewDecoder(bytes.NewReader(data), jsontext.AllowDuplicateNames(true)),
		data: data, line: 1,
	}
	n, err := r.value(MaxDepth)
	if err == nil {
		if _, more := r.dec.ReadToken(); !errors.Is(more, io.EOF) {
			err = errors.New("there is more after the end of the value: write one value, a list for several")
		}
	}
	if err == nil {
		return n
	}
	var syntax *jsontext.SyntacticError
	switch {
	case errors.As(err, &syntax):
		p.add(r.lineOf(syntax.ByteOffset), "", "cannot be read as JSON: %v", syntax.Err)
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		p.add(r.lineOf(int64(len(data))), "", "cannot be read as JSON: it ends too early")
	default:
		p.add(r.lineOf(r.dec.InputOffset()), "", "%v", err)
	}
	return nil
}

// lineOf returns the line of an offset; offsets only grow.
func (r *jsonReader) lineOf(offset int64) int {
	to := min(int(offset), len(r.data))
	if to > r.offset {
		r.line += bytes.Count(r.data[r.offset:to], []byte("\n"))
		r.offset = to
	}
	return r.line
}

func (r *jsonReader) value(depth int) (*node, error) {
	t, err := r.dec.ReadToken()
	if err != nil {
		return nil, err
	}
	n := &node{line: r.lineOf(r.dec.InputOffset())}
	switch t.Kind() {
	case jsontext.KindNull:
		return n, nil
	case jsontext.KindTrue, jsontext.KindFalse:
		n.kind, n.text = nodeBool, t.String()
		return n, nil
	case jsontext.KindString:
		n.kind, n.text = nodeString, t.String()
		return n, nil
	case jsontext.KindNumber:
		n.kind, n.text = nodeNumber, t.String()
		return n, nil
	case jsontext.KindBeginObject:
		n.kind = nodeObject
		return n, r.items(n, jsontext.KindEndObject, depth)
	default:
		n.kind = nodeArray
		return n, r.items(n, jsontext.KindEndArray, depth)
	}
}

// items reads the values of an object or a list up to its end.
func (r *jsonReader) items(n *node, end jsontext.Kind, depth int) error {
	if depth < 0 {
		return errDepth
	}
	for r.dec.PeekKind() != end {
		name, line := "", 0
		if n.kind == nodeObject {
			key, err := r.dec.ReadToken()
			if err != nil {
				return err
			}
			name, line = key.String(), r.lineOf(r.dec.InputOffset())
		}
		v, err := r.value(depth - 1)
		if err != nil {
			return err
		}
		if n.kind == nodeObject {
			v.line = line
			n.set(name, v)
		} else {
			n.items = append(n.items, v)
		}
	}
	_, err := r.dec.ReadToken()
	return err
}
