//go:build !race

package dataplane_test

// mallocsPerRequest bounds TestAllocationsPerRequest. Two are crypto/tls's, which makes a reader for every record that it
// waits for: the request's on one side, the response's on the other.
const mallocsPerRequest = 2.2
