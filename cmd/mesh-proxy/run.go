package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
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

// process is one mesh-proxy.
type process struct {
	cfg      config
	log      *slog.Logger
	manager  notify.Notifier
	family   *family
	plane    *dataplane.Plane
	client   *feed.Client
	counters *counters
	scrapes  *scrapes
	from     *predecessor // whose place this process takes; nil if it is the first

	// applied is closed once a plan is in force, stop once the process is to end.
	applied, stop       chan struct{}
	appliedOnce, ending sync.Once
	replacing           sync.Mutex
	wishes              sync.WaitGroup // that are told of their end
	// replaced has room for one: the successor that serves.
	replaced chan *feed.Link
}

// run serves until it is told to end, or another process took over, then drains. It returns the exit code.
func run(cfg config) (code int, err error) {
	p := &process{
		cfg: cfg, log: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: cfg.level})), manager: notify.New(os.Getenv),
		applied: make(chan struct{}), stop: make(chan struct{}), replaced: make(chan *feed.Link, 1),
	}
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	p.counters = &counters{own: registry}
	p.scrapes = &scrapes{address: cfg.metrics, from: p.counters, log: p.log}
	if p.family, err = newFamily(cfg.heir, os.Args, os.Getenv); err != nil {
		return 0, err
	}
	if p.plane, err = dataplane.New(dataplane.Config{Log: p.log, Registerer: registry}); err != nil {
		return 0, err
	}
	cache := feed.NewDiskCache(cfg.state)
	if err := cache.CheckMode(); err != nil {
		return 0, err
	}
	client := feed.ClientConfig{
		Socket: cfg.feed, Proxy: cfg.id, Version: version, FeatureLevel: catalog.FeatureLevel, Log: p.log,
		Cache: cache, Watcher: p.plane, Restart: p.replaceLater,
	}
	if cfg.heir {
		if p.from, err = meetPredecessor(); err != nil {
			return 0, err
		}
		client.Sockets, client.State = p.from.sockets, feed.Starting
	}
	p.client = feed.NewClient(client)
	p.family.orphaned(p.end)
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGUSR2)
	go p.follow(signals)
	if err := p.serve(); err != nil && !errors.Is(err, context.Canceled) {
		return 0, fmt.Errorf("stopped: %w", err)
	}
	debug.FreeOSMemory()
	return p.family.wait(), nil
}

// follow acts on signals. The first process of several passes them on.
func (p *process) follow(signals <-chan os.Signal) {
	told := false
	for s := range signals {
		sig, _ := s.(syscall.Signal)
		p.family.signal(sig)
		switch sig {
		case syscall.SIGHUP:
			p.plane.ReopenAccessLog()
		case syscall.SIGUSR2:
			p.replaceLater(func(int, error) {})
		default:
			if told { // now means now
				signal.Reset(sig)
				_ = syscall.Kill(os.Getpid(), sig)
			}
			told = true
			p.end()
		}
	}
}

// end has the process drain and end; it may be called again.
func (p *process) end() { p.ending.Do(func() { close(p.stop) }) }

// tell tells the service manager.
func (p *process) tell(state string) {
	if err := p.manager.Send(state); err != nil {
		p.log.Warn("the service manager can't be told", slog.Any("error", err))
	}
}

// serve runs everything until the process has drained.
func (p *process) serve() error {
	// It outlives the wish to end by the drain.
	g, ctx := errgroup.WithContext(context.Background())
	ctx, finish := context.WithCancel(ctx)
	defer finish()
	g.Go(func() error { return p.client.Run(ctx, (*handler)(p)) })
	g.Go(func() error {
		defer finish()
		if p.from != nil {
			if err := p.from.takeOver(ctx, p); err != nil {
				return err
			}
		}
		return p.live(ctx, g)
	})
	return g.Wait()
}

// live serves, and drains.
func (p *process) live(ctx context.Context, g *errgroup.Group) error {
	carrying, drop := context.WithCancel(ctx)
	carried := make(chan struct{})
	g.Go(func() error {
		defer close(carried)
		return p.plane.Run(carrying)
	})
	defer drop()
	// What only the one that serves does.
	serving, retire := context.WithCancel(ctx)
	defer retire()
	var metrics *os.File
	wishes := listenControl(ctx, p.cfg.state, p.log)
	if p.from == nil {
		p.tell(notify.Ready)
	} else {
		p.client.Report(feed.SetTo{To: feed.Active})
		p.family.serve()
		if err := p.from.serving(p.counters); err != nil {
			p.log.WarnContext(ctx, "the earlier process is gone, with what it counted", slog.Any("error", err))
		}
		metrics = p.from.metrics
		g.Go(func() error { return p.from.follow(p.counters) })
	}
	scraped := make(chan struct{})
	g.Go(func() error {
		defer close(scraped)
		return p.scrapes.serve(serving, metrics)
	})
	g.Go(func() error { return control(serving, wishes, p.replaceNow) })
	// That this goroutine runs is all that is asked: a proxy without an agent serves.
	g.Go(func() error { return p.manager.Watch(serving, func(context.Context) error { return nil }) })
	g.Go(func() error {
		tidy(ctx)
		return nil
	})
	finished := func() {
		p.wishes.Wait()
		drop()
		<-carried
	}
	select {
	case <-ctx.Done(): // something failed
	case heir := <-p.replaced:
		retire()
		<-scraped
		p.handOver(ctx, heir, finished)
	case <-p.stop:
		if len(p.replaced) > 0 { // a moment ago
			p.handOver(ctx, <-p.replaced, finished)
			return nil
		}
		p.tell(notify.Stopping)
		p.drainAndStop(ctx)
	}
	return nil
}

// stopGrace is how long a connection that waits for a request may go on doing so when the process stops: a request that is on
// its way then is answered. Nobody accepts in the meantime, so it is short.
const stopGrace = 200 * time.Millisecond

// drainAndStop drains because the process is told to end; processes before it that still drain end no later.
func (p *process) drainAndStop(ctx context.Context) {
	until, cancel := context.WithTimeout(ctx, p.cfg.drain)
	defer cancel()
	patient, cancel := context.WithTimeout(ctx, min(stopGrace, p.cfg.drain))
	defer cancel()
	deadline, _ := until.Deadline()
	p.log.LogAttrs(ctx, slog.LevelInfo, "draining", slog.Duration("timeout", p.cfg.drain), slog.Int("open", p.plane.Left()))
	p.client.Report(feed.SetTo{To: feed.Draining, Until: deadline, Open: p.plane.Left()})
	if p.from != nil {
		p.from.hurry(p.cfg.drain)
	}
	d := p.plane.Drain(until, patient)
	if p.from != nil {
		p.from.wait(until)
	}
	p.log.LogAttrs(ctx, slog.LevelInfo, "drained", slog.Int("open", d.Begun), slog.Int("cut", d.Cut))
}

// handler runs the plans of the feed on the data plane.
type handler process

// Apply implements feed.Handler.
func (h *handler) Apply(ctx context.Context, u feed.Update) (feed.Result, error) {
	applied, err := h.plane.Apply(ctx, u.Config, u.Keys, u.Sockets)
	if err != nil {
		return feed.Result{}, err
	}
	h.appliedOnce.Do(func() { close(h.applied) })
	return feed.Result{Closed: uint64(applied.Closed), Open: applied.Open}, nil //nolint:gosec // a count
}

// SetState implements feed.Handler.
func (h *handler) SetState(to feed.State) {
	if to == feed.Draining {
		(*process)(h).end()
	}
}
