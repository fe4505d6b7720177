package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/meshd/meshd/tests/bench/load"
)

// run measures what the options say and writes the report.
func run(ctx context.Context, o options) (err error) {
	dir, err := os.MkdirTemp("", "mesh-b-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	r := newReport(ctx, o)
	began := time.Now()
	for i, s := range []setting{unpinned, pinned} {
		if !slices.Contains(o.settings, string(s)) {
			continue
		}
		if err = errors.Join(err, oneSetting(ctx, r, s, dir, i == 0 || len(o.settings) == 1)); ctx.Err() != nil {
			return err
		}
	}
	if len(r.Samples)+len(r.Plans) == 0 {
		return err
	}
	// What was measured is worth telling, even if something failed.
	if n := len(r.Failed); n > 0 {
		err = errors.Join(err, fmt.Errorf("%d measurements failed, see above", n))
	}
	r.Took = time.Since(began).Round(time.Second)
	return errors.Join(err, r.write(os.Stdout))
}

// oneSetting measures in one setting; once is true if what needs no second
// setting is to be measured, too.
func oneSetting(ctx context.Context, r *report, s setting, dir string, once bool) (err error) {
	f, err := newField(ctx, r.options, s, dir)
	defer func() { err = errors.Join(err, f.close()) }()
	if err != nil {
		return err
	}
	if len(r.Configs) == 0 {
		r.Configs = f.configs
	}
	if once {
		if err := f.private(ctx, r); err != nil {
			return err
		}
		if slices.Contains(r.options.only, idle) {
			if err := f.idle(ctx, r); err != nil {
				return err
			}
		}
		if slices.Contains(r.options.only, mallocs) {
			if err := f.mallocs(ctx, r); err != nil {
				return err
			}
		}
	}
	return f.rounds(ctx, r)
}

// settle is how long nothing is asked of anybody before memory is looked at: what
// the start left is given back by then, where it is.
const settle = 20 * time.Second

// private notes the memory of every process with its plan, after one scrape
// and before any load.
func (f *field) private(ctx context.Context, r *report) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(settle):
	}
	seen := map[int]bool{}
	for _, l := range f.lanes {
		for _, p := range l.parts {
			if seen[p.pids[0]] {
				continue
			}
			seen[p.pids[0]] = true
			m, err := load.MemoryOf(p.pids)
			if err != nil {
				return err
			}
			r.Plans = append(r.Plans, memory{
				Scenario: l.scenario, Name: l.name, Role: p.role, Bytes: float64(m.Private), File: float64(m.File),
			})
		}
	}
	return nil
}

// mallocRequests is over how many requests allocations are counted.
const mallocRequests = 100_000

// mallocs counts what the mesh's processes allocate per request once all
// connections are there.
func (f *field) mallocs(ctx context.Context, r *report) error {
	for _, l := range f.lanes {
		if l.scenario != mutual && !l.scenario.http2() || l.name != meshName && l.name != versusName {
			continue
		}
		t := trial{Setting: f.setting, Scenario: l.scenario, Load: saturation, Body: "100"}
		if l.scenario.http2() {
			t.Call = load.CallGet
		}
		job := f.options.job(t, l)
		job.Warmup, job.Window, job.Requests = 3*time.Second, 10*time.Minute, mallocRequests
		job.Counter = "go_memstats_mallocs_total"
		for _, p := range l.parts {
			job.Counters = append(job.Counters, p.metrics)
		}
		// What a scrape itself allocates, which the count includes once.
		var scrape []float64
		for _, url := range job.Counters {
			var seen [2]float64
			for i := range seen {
				var err error
				if seen[i], err = load.Scrape(ctx, url, job.Counter); err != nil {
					return err
				}
			}
			scrape = append(scrape, seen[1]-seen[0])
		}
		out, err := f.client(ctx, job)
		if err != nil {
			return fmt.Errorf("allocations of %s: %w", l.name, err)
		}
		for i, p := range l.parts {
			r.Mallocs = append(r.Mallocs, allocations{
				Name: l.name, Role: p.role, HTTP2: l.scenario.http2(), Requests: out.Requests, Count: out.Counted[i], Scrape: scrape[i],
			})
		}
	}
	return nil
}
