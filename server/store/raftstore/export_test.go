package raftstore

import (
	"log/slog"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
)

// Recode decodes a log entry and encodes what was found.
func Recode(b []byte) ([]byte, error) {
	c, err := decodeCommand(b)
	if err != nil {
		return nil, err
	}
	return c.encode(), nil
}

// Encoded returns one log entry of each kind.
func Encoded(seed command) [][]byte {
	var all [][]byte
	for kind := commandBegin; kind <= commandMark; kind++ {
		seed.Kind = kind
		all = append(all, seed.encode())
	}
	return all
}

// Command lets tests fill a log entry.
type Command = command

// WithRoom returns c with a file system that says how many bytes it has left.
func WithRoom(c Config, left func() uint64) Config {
	c.left = func(string) (uint64, error) { return left(), nil }
	return c
}

// Stall makes the disk of e look as if a write were under way, until the function
// that it returns is called.
func Stall(e *Engine) func() { return e.writes.begin() }

// HoldApply stops e from making further log entries part of its state, after at most
// one, until the function that it returns is called.
func HoldApply(e *Engine) func() {
	e.reach.mu.Lock()
	return e.reach.mu.Unlock
}

// NewLogger is what Raft logs to.
func NewLogger(log *slog.Logger) hclog.Logger { return newLogger(log) }

// NewWire returns what Raft sees of a transport.
func NewWire(inner raft.Transport) (wire raft.Transport, stop func()) {
	w := newWire(inner, func() error { return nil })
	return w, func() { _ = w.close() }
}

// OpenLog opens the log of a state directory, which nobody else uses.
func OpenLog(c Config, log *slog.Logger) (entries raft.LogStore, closed func() error, err error) {
	d, err := openDisk(c.withDefaults(), newLogger(log), func(error) {}, &watchdog{})
	if err != nil {
		return nil, nil, err
	}
	return d.log, d.close, nil
}
