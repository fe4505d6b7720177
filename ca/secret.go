package ca

import (
	"crypto/subtle"
	"fmt"
	"io"
	"log/slog"
)

// redacted is what every way of printing a Secret shows.
const redacted = "***"

// Secret holds bytes that must not be printed. Every verb of fmt, JSON, text and slog write "***" instead, inside other
// values too. The zero Secret is empty. Copies share their bytes.
type Secret struct {
	// A function, because fmt reads the unexported fields of a struct without asking their methods: it would print a slice,
	// and with some verbs what a pointer points to, but of a function only the address.
	reveal func() []byte
}

// NewSecret takes ownership of data.
func NewSecret(data []byte) Secret { return Secret{reveal: func() []byte { return data }} }

// Reveal returns the bytes themselves. The caller must not change them.
func (s Secret) Reveal() []byte {
	if s.reveal == nil {
		return nil
	}
	return s.reveal()
}

// IsZero reports whether the secret is empty.
func (s Secret) IsZero() bool { return len(s.Reveal()) == 0 }

// Equal compares two secrets in a time that depends on their lengths only.
func (s Secret) Equal(other Secret) bool {
	return subtle.ConstantTimeCompare(s.Reveal(), other.Reveal()) == 1
}

// Format writes "***" for every verb.
func (Secret) Format(w fmt.State, _ rune) { _, _ = io.WriteString(w, redacted) }

// String returns "***".
func (Secret) String() string { return redacted }

// GoString returns "***".
func (Secret) GoString() string { return redacted }

// MarshalText returns "***", for JSON and every other text encoding. There is deliberately no way back.
func (Secret) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// LogValue returns "***".
func (Secret) LogValue() slog.Value { return slog.StringValue(redacted) }
