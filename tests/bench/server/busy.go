package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/meshd/meshd/tests/bench/server/drive"
)

// overload is what became of a store while others took the CPUs.
type overload struct {
	Name string `json:"name"`
	// Elections is by how much the term grew.
	Elections uint64        `json:"elections"`
	Acked     int           `json:"acked"`
	Slowest   time.Duration `json:"slowest"`
}

// writeEvery is how often something is written meanwhile.
const writeEvery = 20 * time.Millisecond

// busy runs loops that do nothing beside all stores at once, and counts their
// elections.
func (o options) busy(ctx context.Context, r *report, dir string, clusters []*cluster) (err error) {
	for _, c := range clusters {
		if c.to, err = c.target(ctx); err != nil {
			return err
		}
	}
	before, err := terms(ctx, clusters)
	if err != nil {
		return err
	}
	var loops []*process
	defer func() {
		for _, p := range loops {
			err = errors.Join(err, p.stop())
		}
	}()
	for range o.busyLoops {
		p, err := launch(filepath.Join(dir, "busy.log"), o.self, busyCommand)
		if err != nil {
			return err
		}
		loops = append(loops, p)
	}
	results := make(chan overload, len(clusters))
	for _, c := range clusters {
		go func() { results <- c.trickle(ctx, o.busyFor) }()
	}
	seen := map[string]overload{}
	for range clusters {
		one := <-results
		seen[one.Name] = one
	}
	after, err := terms(ctx, clusters)
	if err != nil {
		return err
	}
	for i, c := range clusters {
		one := seen[c.name]
		one.Elections = after[i] - before[i]
		r.Busy = append(r.Busy, one)
		fmt.Fprintf(os.Stderr, "bench-server: %d busy loops for %s: %s: %d elections, %d writes\n", o.busyLoops, o.busyFor, c.name, one.Elections, one.Acked)
	}
	return nil
}

// terms are the highest that any server knows.
func terms(ctx context.Context, clusters []*cluster) ([]uint64, error) {
	out := make([]uint64, len(clusters))
	for i, c := range clusters {
		if err := c.heal(ctx); err != nil {
			return nil, err
		}
		for n := range c.servers {
			v, err := c.look(ctx, n)
			if err != nil {
				return nil, err
			}
			out[i] = max(out[i], v.term)
		}
		if out[i] == 0 {
			return nil, fmt.Errorf("%s does not tell its term", c.name)
		}
	}
	return out, nil
}

// trickle writes slowly for a while.
func (c *cluster) trickle(ctx context.Context, length time.Duration) overload {
	out := overload{Name: c.name}
	ctx, cancel := context.WithTimeout(ctx, length)
	defer cancel()
	ticker := time.NewTicker(writeEvery)
	defer ticker.Stop()
	var w drive.Writer
	for {
		select {
		case <-ticker.C:
		case <-ctx.Done():
			if w != nil {
				w.Close()
			}
			return out
		}
		if w == nil {
			opened, err := c.to.Open(0)
			if err != nil {
				continue
			}
			w = opened
		}
		began := time.Now()
		if _, err := c.write(ctx, w); err == nil {
			out.Acked++
			out.Slowest = max(out.Slowest, time.Since(began))
		}
	}
}
