package raftstore

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
)

// newLogger returns a logger for Raft and its stores that writes to log.
func newLogger(log *slog.Logger) hclog.Logger {
	logger := hclog.NewInterceptLogger(&hclog.LoggerOptions{Name: "raft", Level: hclog.Off, Output: io.Discard})
	logger.RegisterSink(&slogSink{log: log, seen: map[string]repeated{}})
	return logger
}

// Raft logs every attempt to reach a member that is down, several times a second.
// Of a message about one member, the first few are passed on, and then one in each
// interval with the number of those that were not.
const (
	repeatFirst    = 3
	repeatInterval = 30 * time.Second
	repeatKeys     = 256 // messages that are counted
)

// slogSink passes what a library logs on to slog. Its messages are constants of
// the library.
type slogSink struct {
	log *slog.Logger

	mu   sync.Mutex
	seen map[string]repeated
}

// repeated counts a message since it was first seen in an interval.
type repeated struct {
	since   time.Time
	count   int
	skipped int
}

// pass reports whether a message is to be passed on, and how many were not since
// the last time.
func (s *slogSink) pass(key string, now time.Time) (skipped int, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.seen) >= repeatKeys {
		clear(s.seen)
	}
	r := s.seen[key]
	if now.Sub(r.since) >= repeatInterval {
		skipped, r = r.skipped, repeated{since: now}
	}
	r.count++
	if ok = r.count <= repeatFirst; !ok {
		r.skipped++
	}
	s.seen[key] = r
	return skipped, ok
}

// Accept implements hclog.SinkAdapter.
func (s *slogSink) Accept(name string, level hclog.Level, msg string, args ...any) {
	to := slogLevel(level)
	if !s.log.Enabled(context.Background(), to) {
		return
	}
	attrs := []slog.Attr{slog.String("component", name)}
	about := "" // a member
	for i := 0; i+1 < len(args); i += 2 {
		name := strings.NewReplacer("-", "_", " ", "_").Replace(fmt.Sprint(args[i]))
		value := plain(args[i+1])
		switch name {
		case "peer", "server_id", "target", "from":
			about = fmt.Sprint(value)
		}
		attrs = append(attrs, slog.Any(name, value))
	}
	if to >= slog.LevelWarn {
		skipped, ok := s.pass(msg+about, time.Now())
		if !ok {
			return
		}
		if skipped > 0 {
			attrs = append(attrs, slog.Int("skipped", skipped))
		}
	}
	s.log.LogAttrs(context.Background(), to, msg, attrs...) //nolint:sloglint // a library's message
}

// plain spells out the values that hclog formats late (hclog.Fmt).
func plain(v any) any {
	f, ok := v.(hclog.Format)
	if !ok || len(f) == 0 {
		return v
	}
	return fmt.Sprintf(fmt.Sprint(f[0]), f[1:]...)
}

func slogLevel(level hclog.Level) slog.Level {
	switch level {
	case hclog.Error:
		return slog.LevelError
	case hclog.Warn:
		return slog.LevelWarn
	case hclog.Info:
		return slog.LevelInfo
	default:
		return slog.LevelDebug
	}
}
