package main

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// metricsRetry is the wait before a metrics address that is taken is tried again: during a hot restart the old process has it.
const metricsRetry = time.Second

// serveMetrics answers GET /metrics until ctx ends. It is the only use of net/http in the process. An address that is taken
// does not stop the data plane: it is tried again.
func serveMetrics(ctx context.Context, address string, from prometheus.Gatherer, log *slog.Logger) error {
	if address == "" {
		return nil
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(from, promhttp.HandlerOpts{MaxRequestsInFlight: 4}))
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, WriteTimeout: 30 * time.Second, MaxHeaderBytes: 8 << 10}
	stop := context.AfterFunc(ctx, func() { _ = srv.Close() })
	defer stop()
	ticker := time.NewTicker(metricsRetry)
	defer ticker.Stop()
	for warned := false; ; {
		var lc net.ListenConfig
		l, err := lc.Listen(ctx, "tcp", address)
		if err == nil {
			err = srv.Serve(l)
		}
		if ctx.Err() != nil || errors.Is(err, http.ErrServerClosed) {
			return nil
		}
		if !warned {
			log.LogAttrs(ctx, slog.LevelError, "metrics can't be served now; see --metrics", slog.Any("error", err))
			warned = true
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return nil
		}
	}
}
