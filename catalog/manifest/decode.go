package manifest

import (
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// strict decodes JSON and refuses unknown, duplicate and case-variant names.
func strict(data []byte, into any) error {
	return json.Unmarshal(data, into, json.RejectUnknownMembers(true))
}

// explain records the error of strict in words that say what to do.
func (d *Document) explain(p *problems, into any, err error) {
	var s *json.SemanticError
	if !errors.As(err, &s) {
		p.add(d.Line, "", "%v", err)
		return
	}
	path, n := d.root.at(s.JSONPointer)
	line := d.LineOf(path)
	if errors.Is(s.Err, json.ErrUnknownName) {
		name := s.JSONPointer.LastToken()
		p.add(line, path, "no such field%s", suggest(name, fieldNames(typeAt(reflect.TypeOf(into), s.JSONPointer.Parent()))))
		return
	}
	p.add(line, path, "%s", mismatch(s, n))
}

// mismatch says why a value does not fit its field.
func mismatch(s *json.SemanticError, n *node) string {
	kind := nodeNull
	text := ""
	if n != nil {
		kind, text = n.kind, n.text
	}
	t := s.GoType
	if t == nil {
		return "cannot be read: " + errText(s)
	}
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	switch {
	case t == reflect.TypeFor[time.Time]() && kind == nodeString:
		return fmt.Sprintf("%q is no time: write one such as \"2030-01-31T18:00:00Z\"", text)
	case t == reflect.TypeFor[time.Time]():
		return "want a time such as \"2030-01-31T18:00:00Z\", not " + kind.String()
	case isText(t) && kind == nodeString:
		return errText(s)
	case t.Name() == "Duration" && isText(t):
		return "want a duration such as \"10s\", not " + kind.String()
	case isInt(t) && kind == nodeNumber:
		return fmt.Sprintf("%s does not fit: write a whole number, %s", text, rangeOf(t))
	}
	return "want " + want(t) + ", not " + kind.String()
}

// errText returns the inmost error, which is of the type that refused.
func errText(s *json.SemanticError) string {
	if s.Err != nil {
		return s.Err.Error()
	}
	return s.Error()
}

// want names what a Go type is written as.
func want(t reflect.Type) string {
	switch {
	case isText(t) || t.Kind() == reflect.String:
		return "a text in quotes"
	case isInt(t):
		return "a whole number, " + rangeOf(t)
	}
	switch t.Kind() {
	case reflect.Bool:
		return "true or false"
	case reflect.Float32, reflect.Float64:
		return "a number"
	case reflect.Slice, reflect.Array:
		return "a list"
	case reflect.Struct, reflect.Map:
		return "a block of fields"
	default:
		return "another value"
	}
}

func isInt(t reflect.Type) bool {
	return t.Kind() >= reflect.Int && t.Kind() <= reflect.Uint64
}

// rangeOf returns the range of an integer type in words.
func rangeOf(t reflect.Type) string {
	switch t.Kind() {
	case reflect.Uint8, reflect.Uint16, reflect.Uint32:
		return "0 to " + strconv.FormatUint(1<<t.Bits()-1, 10)
	case reflect.Uint, reflect.Uint64:
		return "0 or more"
	default:
		return "of at most " + strconv.Itoa(t.Bits()) + " bits"
	}
}

type textUnmarshaler interface{ UnmarshalText([]byte) error }

func isText(t reflect.Type) bool {
	return reflect.PointerTo(t).Implements(reflect.TypeFor[textUnmarshaler]())
}

// typeAt follows a JSON pointer through a type. It returns nil where the
// pointer leads nowhere.
func typeAt(t reflect.Type, pointer jsontext.Pointer) reflect.Type {
	for token := range pointer.Tokens() {
		for t != nil && t.Kind() == reflect.Pointer {
			t = t.Elem()
		}
		if t == nil {
			return nil
		}
		switch t.Kind() {
		case reflect.Struct:
			t = fieldType(t, token)
		case reflect.Slice, reflect.Array, reflect.Map:
			t = t.Elem()
		default:
			return nil
		}
	}
	return t
}

func fieldType(t reflect.Type, name string) reflect.Type {
	for _, f := range reflect.VisibleFields(t) {
		if fieldName(f) == name {
			return f.Type
		}
	}
	return nil
}

// fieldNames returns the names that a struct type has in JSON.
func fieldNames(t reflect.Type) []string {
	for t != nil && t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if t == nil || t.Kind() != reflect.Struct {
		return nil
	}
	var names []string
	for _, f := range reflect.VisibleFields(t) {
		if name := fieldName(f); name != "" {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

func fieldName(f reflect.StructField) string {
	name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
	if name == "-" || !f.IsExported() {
		return ""
	}
	return name
}
