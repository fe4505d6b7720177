//go:build race

package record_test

// raced says that sync.Pool forgets on purpose.
const raced = true
