//go:build !race

package sock_test

// allocationsPerRecord bounds TestTLSAllocatesNothing.
const allocationsPerRecord = 0.5
