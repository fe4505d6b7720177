package raftstore

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"strings"

	"github.com/hashicorp/go-hclog"
)

// newLogger returns a logger for Raft and its stores that writes to log.
func newLogger(log *slog.Logger) hclog.Logger {
	logger := hclog.NewInterceptLogger(&hclog.LoggerOptions{Name: "raft", Level: hclog.Off, Output: io.Discard})
	logger.RegisterSink(slogSink{log})
	return logger
}

// slogSink passes what a library logs on to slog. Its messages are constants of
// the library.
type slogSink struct{ log *slog.Logger }

// Accept implements hclog.SinkAdapter.
func (s slogSink) Accept(name string, level hclog.Level, msg string, args ...any) {
	to := slogLevel(level)
	if !s.log.Enabled(context.Background(), to) {
		return
	}
	attrs := []slog.Attr{slog.String("component", name)}
	for i := 0; i+1 < len(args); i += 2 {
		key := strings.NewReplacer("-", "_", " ", "_").Replace(fmt.Sprint(args[i]))
		attrs = append(attrs, slog.Any(key, plain(args[i+1])))
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
