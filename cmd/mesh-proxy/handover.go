package main

import (
	"bytes"
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/meshd/meshd/proxy/dataplane"
	"github.com/meshd/meshd/proxy/feed"
)

const (
	// idlePatience is how long connections that wait for a request may go on doing so after another process took over: a client
	// that has none for so long mostly has none for as long again.
	idlePatience = 30 * time.Second
	// tellEvery is how often a process that drains tells what is left, and what it counts.
	tellEvery = time.Second
	// announceShare is the last part of a drain, in which it is announced that connections will be cut.
	announceShare = 10
)

// deadline is when a drain ends. It may come nearer.
type deadline struct {
	cancel context.CancelFunc

	// near has room for one: what is left is to be announced.
	near chan struct{}

	mu        sync.Mutex
	at        time.Time // zero: there is none
	end, warn *time.Timer
}

// newDeadline returns one after d, none if that is 0, and the context that ends with it.
func newDeadline(ctx context.Context, d time.Duration) (context.Context, *deadline) {
	out := &deadline{near: make(chan struct{}, 1)}
	until, cancel := context.WithCancel(ctx)
	out.cancel = cancel
	if d > 0 {
		out.within(d)
	}
	return until, out
}

// within brings the deadline nearer.
func (d *deadline) within(t time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	now := time.Now()
	if !d.at.IsZero() && d.at.Before(now.Add(t)) {
		return
	}
	d.stopTimers()
	d.at = now.Add(t)
	d.end = time.AfterFunc(t, d.cancel)
	d.warn = time.AfterFunc(t-t/announceShare, func() {
		select {
		case d.near <- struct{}{}:
		default:
		}
	})
}

func (d *deadline) stopTimers() {
	if d.end != nil {
		d.end.Stop()
		d.warn.Stop()
	}
}

// until returns the deadline, zero if there is none.
func (d *deadline) until() time.Time {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.at
}

func (d *deadline) stop() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.stopTimers()
	d.cancel()
}

// patience is how much of a drain of that length idle connections are kept.
func patience(drain time.Duration) time.Duration {
	if drain == 0 {
		return idlePatience
	}
	return min(idlePatience, drain-drain/announceShare)
}

// draining is what the agent is told of a drain that begins.
func (p *process) draining(timeout time.Duration) feed.SetTo {
	out := feed.SetTo{To: feed.Draining, Open: p.plane.Left()}
	if timeout > 0 {
		out.Until = time.Now().Add(timeout)
	}
	return out
}

// handOver drains after another process took over, and tells it what is counted meanwhile. finish ends the data plane.
func (p *process) handOver(ctx context.Context, heir *feed.Link, finish func()) {
	defer heir.Close()
	last := p.passCounters(ctx, heir, nil)
	until, d := newDeadline(ctx, p.cfg.handover)
	defer d.stop()
	patient, cancel := context.WithTimeout(until, patience(p.cfg.handover))
	defer cancel()
	go p.hasten(until, d, heir, cancel)
	p.log.LogAttrs(ctx, slog.LevelInfo, "draining", slog.Duration("timeout", p.cfg.handover), slog.Int("open", p.plane.Left()))
	drained := make(chan dataplane.Drained, 1)
	go func() {
		result := p.plane.Drain(until, patient)
		if p.from != nil {
			p.from.wait(until)
		}
		drained <- result
	}()
	tick := time.NewTicker(tellEvery)
	defer tick.Stop()
	for {
		p.client.Report(feed.SetTo{To: feed.Draining, Until: d.until(), Open: p.plane.Left()})
		select {
		case result := <-drained:
			finish()
			p.passCounters(ctx, heir, last)
			p.log.LogAttrs(ctx, slog.LevelInfo, "drained", slog.Int("open", result.Begun), slog.Int("cut", result.Cut))
			return
		case <-d.near:
			if left := p.plane.Left(); left > 0 {
				p.log.LogAttrs(ctx, slog.LevelWarn, "connections from before the restart are left, and will be cut",
					slog.Int("open", left), slog.Time("at", d.until()))
			}
		case <-tick.C:
			last = p.passCounters(ctx, heir, last)
		}
	}
}

// hasten ends a drain sooner: this process, or the one that took over, is told to end, or nobody watches this one any more.
func (p *process) hasten(ctx context.Context, d *deadline, heir *feed.Link, impatient context.CancelFunc) {
	asked := make(chan time.Duration, 1)
	go func() {
		for {
			f, _, err := heir.Read(time.Time{})
			if err != nil {
				return // it is gone, or this process is done
			}
			if f.Step != nil && f.Step.To == feed.HeirEnd {
				asked <- f.Step.Within
				return
			}
		}
	}()
	select {
	case <-ctx.Done():
		return
	case within := <-asked:
		d.within(within)
	case <-p.stop:
		d.within(p.cfg.drain)
	case <-p.family.over:
		d.within(0) // whoever started this process waits for its end to start another
	}
	time.AfterFunc(stopGrace, impatient)
}

// passCounters tells a successor what was counted, unless that is what it was told last, and returns it.
func (p *process) passCounters(ctx context.Context, heir *feed.Link, last []byte) []byte {
	families, err := p.counters.encode()
	if err == nil && last != nil && bytes.Equal(families, last) {
		return last
	}
	if err == nil {
		err = heir.WriteCounters(families, p.counters.earlier()+1)
	}
	if err != nil {
		p.log.LogAttrs(ctx, slog.LevelDebug, "what was counted can't be passed on", slog.Any("error", err))
	}
	return families
}
