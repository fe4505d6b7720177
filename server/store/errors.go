package store

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"unicode/utf8"
)

// Errors of engines. They are wrapped: test with errors.Is.
var (
	// ErrConflict says that a check did not hold; the error is a *ConflictError.
	ErrConflict = errors.New("conflict")
	// ErrTooLarge says that a transaction is over MaxKeys or MaxBytes.
	ErrTooLarge = errors.New("transaction too large")
	// ErrInvalid says that a transaction can't be applied by any engine.
	ErrInvalid = errors.New("invalid transaction")
	// ErrUnknownOutcome says that a write may have been applied or may still be.
	ErrUnknownOutcome = errors.New("outcome unknown")
	// ErrNoLeader says that the cluster has no reachable leader or majority now.
	ErrNoLeader = errors.New("no leader")
	// ErrNotLeader says that a leader-only transaction came from a process that
	// does not lead (any more).
	ErrNotLeader = errors.New("this server does not lead")
	// ErrLeading says that Lead was called while another call is at work.
	ErrLeading = errors.New("already campaigning")
	// ErrStageLost says that a stage was discarded, activated, or displaced by a
	// newer one.
	ErrStageLost = errors.New("stage lost")
	// ErrClosed says that the engine is closed.
	ErrClosed = errors.New("store closed")
	// ErrDiskFull says that the server that leads has no room for a write, which
	// was not applied. Reads go on, and writes when there is room again.
	ErrDiskFull = errors.New("disk full")
	// ErrCorrupt says that stored or dumped bytes are damaged.
	ErrCorrupt = errors.New("corrupt data")
)

// Limits of a transaction. They are below the smallest of the stores that the
// contract is meant for, with room for the keys that an engine adds: etcd and
// Consul allow 128 operations in a transaction, and Consul half a megabyte of
// base64 in a request. Both check a key and write it in one operation (etcd
// counts comparisons apart, Consul has cas and delete-cas), so that such a key
// counts once.
const (
	MaxKeys  = 64        // keys that a Txn checks, writes, or both
	MaxBytes = 256 << 10 // keys and values of a Txn together
	MaxKey   = 512       // bytes of a key
)

// ConflictError tells which check failed.
type ConflictError struct {
	// Key is the key of the first check that did not hold. It is empty when the
	// generation is another one than the transaction asked for, or, in
	// Stage.Activate, when the position is.
	Key string
	// Want is the checked revision, Have the one found (0: does not exist).
	Want, Have uint64
	// Position is where the check failed. A reader that has reached it sees the
	// reason; a retry before is in vain.
	Position Position
}

// Error tells which key or position the transaction found changed.
func (e *ConflictError) Error() string {
	if e.Key == "" {
		return fmt.Sprintf("conflict: the store is at generation %s revision %d", e.Position.Generation, e.Position.Revision)
	}
	return fmt.Sprintf("conflict: key %q is at revision %d, expected %d (0: does not exist)", e.Key, e.Have, e.Want)
}

// Is makes a ConflictError an ErrConflict.
func (e *ConflictError) Is(target error) bool { return target == ErrConflict }

// Validate returns nil when every engine can take t: at most MaxKeys keys that
// are checked, written or both, with at most MaxBytes of keys and values, where a
// key that is checked and written counts twice (else ErrTooLarge); keys that are
// valid, no key checked twice, none written twice (else ErrInvalid). Engines call
// it; a caller needs to only to learn the answer early.
func (t Txn) Validate() error {
	if max(len(t.Checks), len(t.Ops)) > MaxKeys {
		return fmt.Errorf("%w: %d checks and %d operations, at most %d keys", ErrTooLarge, len(t.Checks), len(t.Ops), MaxKeys)
	}
	size := 0
	checked := make(map[string]struct{}, len(t.Checks))
	for _, c := range t.Checks {
		if err := claimKey(checked, c.Key); err != nil {
			return err
		}
		size += len(c.Key)
	}
	written := make(map[string]struct{}, len(t.Ops))
	keys := len(t.Checks)
	for _, op := range t.Ops {
		if err := claimKey(written, op.Key); err != nil {
			return err
		}
		if _, both := checked[op.Key]; !both {
			keys++
		}
		size += len(op.Key)
		if !op.Delete {
			size += len(op.Value)
		}
	}
	if keys > MaxKeys {
		return fmt.Errorf("%w: %d keys, at most %d", ErrTooLarge, keys, MaxKeys)
	}
	if size > MaxBytes {
		return fmt.Errorf("%w: %d bytes of keys and values, at most %d", ErrTooLarge, size, MaxBytes)
	}
	return nil
}

func claimKey(seen map[string]struct{}, key string) error {
	if err := ValidateKey(key); err != nil {
		return err
	}
	if _, twice := seen[key]; twice {
		return fmt.Errorf("%w: key %q appears twice", ErrInvalid, key)
	}
	seen[key] = struct{}{}
	return nil
}

// ValidateKey returns nil for a key that every engine can store: 1 to MaxKey
// bytes of UTF-8 without control characters. Else it returns ErrInvalid.
func ValidateKey(key string) error {
	if key == "" || len(key) > MaxKey {
		return fmt.Errorf("%w: a key has 1 to %d bytes, this one has %d", ErrInvalid, MaxKey, len(key))
	}
	if !utf8.ValidString(key) {
		return fmt.Errorf("%w: key %q is not UTF-8", ErrInvalid, key)
	}
	for i := range len(key) {
		if key[i] < 0x20 || key[i] == 0x7f {
			return fmt.Errorf("%w: key %q has a control character", ErrInvalid, key)
		}
	}
	return nil
}

// NewGeneration returns a name for a generation that was never used before: 128
// random bits as 32 hexadecimal digits. A fresh store begins with one too, so
// that a wiped and re-created store is not mistaken for the old one.
func NewGeneration() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails: crypto/rand.Read ends the process instead
	return hex.EncodeToString(b[:])
}

// ValidateGeneration returns nil for a name that NewGeneration can have made.
func ValidateGeneration(name string) error {
	if b, err := hex.DecodeString(name); err != nil || len(b) != 16 {
		return fmt.Errorf("%w: %q is not the name of a generation", ErrInvalid, name)
	}
	return nil
}
