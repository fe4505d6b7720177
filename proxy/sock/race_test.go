//go:build race

package sock_test

// allocationsPerRecord bounds TestTLSAllocatesNothing. The race detector makes
// sync.Pool forget, on purpose.
const allocationsPerRecord = 100.0
