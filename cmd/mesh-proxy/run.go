package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"golang.org/x/sync/errgroup"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/cmd/internal/notify"
	"github.com/meshd/meshd/proxy/dataplane"
	"github.com/meshd/meshd/proxy/feed"
)

// stopGrace is how long a connection that waits for a request may go on doing so when the process stops: a request that is on
// its way then is answered. Nobody accepts in the meantime, so it is short.
const stopGrace = 200 * time.Millisecond

// run serves until ctx ends or the agent says so, then drains. giveUp is called when draining begins, so that a second signal
// ends the process at once.
func run(ctx context.Context, giveUp context.CancelFunc, cfg config) error {
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: cfg.level}))
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	plane, err := dataplane.New(dataplane.Config{Log: log, Registerer: registry}) //nolint:contextcheck // the record of a finished request has no context
	if err != nil {
		return err
	}
	client := feed.NewClient(feed.ClientConfig{
		Socket: cfg.feed, Proxy: cfg.id, Version: version, FeatureLevel: catalog.FeatureLevel, Log: log,
		Cache: feed.NewDiskCache(cfg.state), Watcher: plane,
	})
	// What serves outlives ctx by the drain.
	serving, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	drain := make(chan struct{})
	var once sync.Once
	h := handler{plane: plane, drain: func() { once.Do(func() { close(drain) }) }}

	g, serving := errgroup.WithContext(serving)
	g.Go(func() error { return plane.Run(serving) })
	g.Go(func() error { return client.Run(serving, h) })
	g.Go(func() error { return followHangup(serving, plane.ReopenAccessLog) })
	g.Go(func() error { return serveMetrics(serving, cfg.metrics, registry, log) })
	manager := notify.New(os.Getenv)
	tell := func(state string) {
		if err := manager.Send(state); err != nil {
			log.WarnContext(serving, "the service manager can't be told", slog.Any("error", err))
		}
	}
	tell(notify.Ready)
	// That this goroutine runs is all that is asked: a proxy without an agent serves.
	g.Go(func() error { return manager.Watch(serving, func(context.Context) error { return nil }) })
	g.Go(func() error {
		tidy(serving)
		return nil
	})
	g.Go(func() error {
		defer stop()
		select {
		case <-ctx.Done():
		case <-drain:
		case <-serving.Done(): // something failed
			return nil
		}
		giveUp()
		tell(notify.Stopping)
		log.LogAttrs(serving, slog.LevelInfo, "draining", slog.Duration("timeout", cfg.drain))
		client.ReportState(feed.Draining)
		until, cancel := context.WithTimeout(serving, cfg.drain)
		defer cancel()
		done := plane.Drain(until, min(stopGrace, cfg.drain))
		log.LogAttrs(serving, slog.LevelInfo, "drained", slog.Int("open", done.Begun), slog.Int("cut", done.Cut))
		return nil
	})
	if err := g.Wait(); err != nil && !errors.Is(err, context.Canceled) {
		return fmt.Errorf("stopped: %w", err)
	}
	return nil
}

// followHangup makes the access log open its file anew on SIGHUP, as whoever rotates logs expects, until ctx ends.
func followHangup(ctx context.Context, reopen func()) error {
	hangups := make(chan os.Signal, 1)
	signal.Notify(hangups, syscall.SIGHUP)
	defer signal.Stop(hangups)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-hangups:
			reopen()
		}
	}
}

// handler runs the plans of the feed on the data plane.
type handler struct {
	plane *dataplane.Plane
	drain func()
}

// Apply implements feed.Handler.
func (h handler) Apply(ctx context.Context, u feed.Update) (feed.Result, error) {
	applied, err := h.plane.Apply(ctx, u.Config, u.Keys, u.Sockets)
	if err != nil {
		return feed.Result{}, err
	}
	return feed.Result{Closed: uint64(applied.Closed), Open: applied.Open}, nil //nolint:gosec // a count
}

// SetState implements feed.Handler.
func (h handler) SetState(to feed.State) {
	if to == feed.Draining {
		h.drain()
	}
}
