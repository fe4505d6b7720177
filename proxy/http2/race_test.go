//go:build race

package http2_test

// raceEnabled: sync.Pool throws away what it is given, by design.
const raceEnabled = true
