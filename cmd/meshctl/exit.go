package main

import (
	"errors"
	"fmt"

	"github.com/meshd/meshd/catalog/manifest"
	"github.com/meshd/meshd/server/backup"
	"github.com/meshd/meshd/server/client"
)

// Exit codes, the same for every output format.
const (
	exitOK          = 0
	exitError       = 1
	exitUsage       = 2 // usage, or an invalid file
	exitDenied      = 3 // denied, or a check failed
	exitNotFound    = 4
	exitPermission  = 5
	exitUnreachable = 6 // or no leader
	exitConflict    = 7
	exitUnknown     = 8 // a write timed out, or --wait did: repeating is safe
)

// codeError is an error with an exit code of its own. An empty text prints nothing.
type codeError struct {
	code int
	text string
}

func (e *codeError) Error() string { return e.text }

func fail(code int, format string, args ...any) error {
	return &codeError{code: code, text: fmt.Sprintf(format, args...)}
}

func usage(format string, args ...any) error { return fail(exitUsage, format, args...) }

// exitCode is the one mapping of errors to exit codes.
func exitCode(err error) int {
	if err == nil {
		return exitOK
	}
	if e, ok := errors.AsType[*codeError](err); ok {
		return e.code
	}
	switch {
	case errors.Is(err, manifest.ErrInvalid), errors.Is(err, backup.ErrFormat), errors.Is(err, backup.ErrDamaged):
		return exitUsage
	case errors.Is(err, backup.ErrForeign):
		return exitConflict
	}
	switch client.CodeOf(err) {
	case client.CodeInvalid, client.CodeTooLarge, client.CodeMethod:
		return exitUsage
	case client.CodeUnauthorized, client.CodePermission:
		return exitPermission
	case client.CodeNotFound:
		return exitNotFound
	case client.CodeConflict:
		return exitConflict
	case client.CodeUnavailable, client.CodeUnreachable:
		return exitUnreachable
	case client.CodeUnknown:
		return exitUnknown
	case client.CodeInternal:
		return exitError
	default:
		return exitError
	}
}
