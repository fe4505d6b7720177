package catalog

import (
	"errors"
	"fmt"
)

// A FieldError is one problem of one field of a value.
type FieldError struct {
	// Field is the path of the field in the JSON form, such as
	// "checks[0].interval"; empty means the value as a whole.
	Field string
	// Problem says what is wrong and what to do.
	Problem string
}

// Error returns "field: problem", or the problem alone when it concerns the
// whole value.
func (e *FieldError) Error() string {
	if e.Field == "" {
		return e.Problem
	}
	return e.Field + ": " + e.Problem
}

// Problems collects the field errors of one value. The zero value is ready to
// use and holds none.
type Problems struct{ errs []error }

// Add records a problem of the field at path. The message is formatted as by
// fmt.Sprintf and must say what to do.
func (p *Problems) Add(path, format string, args ...any) {
	p.errs = append(p.errs, &FieldError{Field: path, Problem: fmt.Sprintf(format, args...)})
}

// Under records every problem in err, as Validate of a nested value returned
// it, below the field at path. A nil err records nothing.
func (p *Problems) Under(path string, err error) {
	if err == nil {
		return
	}
	for _, f := range FieldErrors(err) {
		at := path
		switch {
		case f.Field == "":
		case f.Field[0] == '[':
			at += f.Field
		default:
			at += "." + f.Field
		}
		p.errs = append(p.errs, &FieldError{Field: at, Problem: f.Problem})
	}
}

// Err returns all recorded problems joined, one per line, or nil when there
// are none. FieldErrors takes the result apart again.
func (p *Problems) Err() error { return errors.Join(p.errs...) }

// FieldErrors returns the field errors in err, in the order in which they were
// recorded. An error in the tree that is not a FieldError is returned as one
// without a field, so nothing is lost. It returns nil for a nil err.
func FieldErrors(err error) []*FieldError {
	switch e := err.(type) { //nolint:errorlint // the tree is walked by hand, in order
	case nil:
		return nil
	case *FieldError:
		return []*FieldError{e}
	case interface{ Unwrap() []error }:
		var all []*FieldError
		for _, one := range e.Unwrap() {
			all = append(all, FieldErrors(one)...)
		}
		return all
	default:
		return []*FieldError{{Problem: err.Error()}}
	}
}
