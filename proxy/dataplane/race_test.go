//go:build race

package dataplane_test

// mallocsPerRequest is far above the real bound: the race detector makes sync.Pool forget, on purpose.
const mallocsPerRequest = 100.0
