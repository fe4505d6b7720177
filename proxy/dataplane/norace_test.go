//go:build !race

package dataplane_test

// mallocsPerRequest bounds TestAllocationsPerRequest.
const mallocsPerRequest = 0.1
