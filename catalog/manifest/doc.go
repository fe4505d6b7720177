// Package manifest reads the files that people write: resources to apply,
// definitions of services for an agent, and configuration.
//
// A file is HCL, YAML or JSON by its ending. All three become the same tree
// with a line for every value, then JSON, then one strict decode (unknown,
// duplicate and case-variant names are refused) into the structs of packages
// catalog and intentions, then their Validate. An error names file, line and
// field: "services.d/web.hcl:4: checks[0].interval: …".
//
// HCL blocks become JSON by the tables in blocks.go, and by nothing else: a
// block at the top of a file is a resource whose labels are its identity, a
// labelled block inside is an element of a list, a block without label is an
// object. There are no variables, functions or references.
//
// The package is pure: it is given bytes, opens no file and does not log.
package manifest

import (
	"cmp"
	"errors"
	"fmt"
	"slices"

	"github.com/meshd/meshd/catalog"
)

// Limits of one file.
const (
	// MaxSize is the longest file, in bytes.
	MaxSize = 512 << 10
	// MaxDepth is how deep lists and objects may nest.
	MaxDepth = 32
)

// ErrInvalid is matched by every error about the content of a file.
var ErrInvalid = errors.New("invalid file")

// An Error is one problem of a file. errors.Is(e, ErrInvalid) is true.
type Error struct {
	File string
	// Line counts from 1; 0 where the problem has no place.
	Line int
	// Field is the path of the field, such as "checks[0].interval"; empty
	// where the problem is not about one.
	Field string
	// Problem says what is wrong and what to do.
	Problem string
}

// Error returns "file:line: field: problem", without the parts that are empty.
func (e *Error) Error() string {
	s := e.File
	if e.Line > 0 {
		s += fmt.Sprintf(":%d", e.Line)
	}
	if e.Field != "" {
		s += ": " + e.Field
	}
	return s + ": " + e.Problem
}

// Is reports whether target is ErrInvalid.
func (e *Error) Is(target error) bool { return target == ErrInvalid }

// Errors returns every *Error in err, in order of the file's lines as far as
// they were joined by this package; nil for none.
func Errors(err error) []*Error {
	switch e := err.(type) { //nolint:errorlint // the tree is walked by hand, in order
	case *Error:
		return []*Error{e}
	case interface{ Unwrap() []error }:
		var all []*Error
		for _, one := range e.Unwrap() {
			all = append(all, Errors(one)...)
		}
		return all
	case interface{ Unwrap() error }:
		return Errors(e.Unwrap())
	default:
		return nil
	}
}

// problems collects the errors of one file.
type problems struct {
	file string
	errs []*Error
}

func (p *problems) add(line int, field, format string, args ...any) {
	p.errs = append(p.errs, &Error{File: p.file, Line: line, Field: field, Problem: fmt.Sprintf(format, args...)})
}

// addFields records what Validate returned for a value that has positions.
func (p *problems) addFields(err error, line func(field string) int) {
	for _, f := range catalog.FieldErrors(err) {
		p.add(line(f.Field), f.Field, "%s", f.Problem)
	}
}

// err returns the problems joined in order of lines, each once; nil for none.
func (p *problems) err() error {
	slices.SortStableFunc(p.errs, func(a, b *Error) int { return cmp.Compare(a.Line, b.Line) })
	p.errs = slices.CompactFunc(p.errs, func(a, b *Error) bool { return *a == *b })
	all := make([]error, len(p.errs))
	for i, e := range p.errs {
		all[i] = e
	}
	return errors.Join(all...)
}
