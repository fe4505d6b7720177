package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/meshd/meshd/tests/bench/agents"
	"github.com/meshd/meshd/tests/bench/load"
	"github.com/meshd/meshd/tests/bench/server/drive"
)

// loaded is what a large mesh costs.
type loaded struct {
	Config agents.Size `json:"config"`
	// Fill is how long it took to join, to register, and to write intentions.
	Fill time.Duration `json:"fill"`
	// Memory is what each server had written when it was at rest, in bytes.
	Memory []uint64 `json:"memory"`
	// Restarts are from the start of a killed server to its first linearizable
	// answer; All is that of the slowest when all were killed.
	Restarts []time.Duration `json:"restarts"`
	All      time.Duration   `json:"all"`
	// Acked, First and Last are from the request for a change to when it was
	// acknowledged, and when the first and the last agent had it.
	Acked []time.Duration `json:"acked"`
	First []time.Duration `json:"first"`
	Last  []time.Duration `json:"last"`
	// Agents is how many agents lost their server at once, Reconnected how long it
	// took until all were in step again, Elections by how much the term grew.
	Agents      int           `json:"agents"`
	Reconnected time.Duration `json:"reconnected"`
	Elections   uint64        `json:"elections"`
}

// Patience with a large mesh.
const (
	fillTimeout   = 5 * time.Minute
	markTimeout   = 30 * time.Second
	settleTime    = 15 * time.Second
	settlePause   = time.Second
	markPause     = 20 * time.Millisecond
	restartRounds = 1
)

// load fills the servers as agents and operators do, and measures what they cost
// then.
func (o options) load(ctx context.Context, r *report, clusters []*cluster) error {
	c := clusters[0]
	mesh, ok := c.store.(*meshStore)
	if !ok {
		return fmt.Errorf("a large mesh needs %s", meshName)
	}
	admin, err := mesh.admin(0)
	if err != nil {
		return err
	}
	out := &loaded{Config: o.fleet, Agents: o.fleet.Agents}
	l := &largeMesh{cluster: c, store: mesh, out: out, mesh: agents.NewMesh(o.fleet, admin, c.to.Addresses)}
	for _, step := range []struct {
		what string
		do   func(context.Context) error
	}{
		{"fill", l.fill},
		{"changes", func(ctx context.Context) error { return l.changes(ctx, o.changes) }},
		{"reconnect", l.reconnect},
		{"restart", l.restarts},
	} {
		began := time.Now()
		if err := step.do(ctx); err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			r.fail(fmt.Sprintf("large mesh, %s: %v", step.what, err))
			if step.what == "fill" {
				return nil
			}
		}
		fmt.Fprintf(os.Stderr, "bench-server: large mesh: %s took %.1f s\n", step.what, time.Since(began).Seconds())
	}
	r.Load = out
	return nil
}

// largeMesh is a mesh with its servers.
type largeMesh struct {
	cluster *cluster
	store   *meshStore
	mesh    *agents.Mesh
	out     *loaded
}

// connect runs all agents, which know nothing at first, while do runs.
func (l *largeMesh) connect(ctx context.Context, do func(context.Context, *agents.Fleet) error) error {
	f := l.mesh.Fleet()
	running, stop := context.WithCancel(ctx)
	var work sync.WaitGroup
	work.Go(func() { _ = f.Run(running) }) // nil
	defer work.Wait()
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, fillTimeout)
	defer cancel()
	if err := f.AwaitConnected(ctx); err != nil {
		return err
	}
	return do(ctx, f)
}

// fill lets agents join and register, and writes intentions.
func (l *largeMesh) fill(ctx context.Context) error {
	began := time.Now()
	ctx, cancel := context.WithTimeout(ctx, fillTimeout)
	defer cancel()
	if err := l.mesh.Join(ctx); err != nil {
		return err
	}
	joined := time.Since(began)
	if err := l.connect(ctx, l.mesh.Register); err != nil {
		return err
	}
	registered := time.Since(began)
	if err := l.mesh.Allow(ctx); err != nil {
		return err
	}
	l.out.Fill = time.Since(began)
	fmt.Fprintf(os.Stderr, "bench-server: large mesh: joined after %.1f s, registered after %.1f s, intentions after %.1f s\n",
		joined.Seconds(), registered.Seconds(), l.out.Fill.Seconds())
	return nil
}

// changes measures how long changes take to all agents, and then what the servers
// hold while these are connected.
func (l *largeMesh) changes(ctx context.Context, n int) error {
	return l.connect(ctx, func(ctx context.Context, f *agents.Fleet) error {
		if _, _, err := l.mark(ctx, f, "in-step"); err != nil {
			return err
		}
		for i := range n {
			acked, took, err := l.mark(ctx, f, fmt.Sprintf("change-%d", i))
			if err != nil {
				return err
			}
			l.out.Acked = append(l.out.Acked, acked)
			l.out.First = append(l.out.First, took[0])
			l.out.Last = append(l.out.Last, took[len(took)-1])
			if err := rest(ctx, markPause); err != nil {
				return err
			}
		}
		fmt.Fprintf(os.Stderr, "bench-server: large mesh: agents at %v\n", f.Connected())
		return l.settle(ctx)
	})
}

// mark changes what all agents follow. It tells how long it took until that was
// acknowledged, and until each agent had it.
func (l *largeMesh) mark(ctx context.Context, f *agents.Fleet, mark string) (acked time.Duration, took []time.Duration, err error) {
	ctx, cancel := context.WithTimeout(ctx, markTimeout)
	defer cancel()
	began := time.Now()
	at, err := l.mesh.Mark(ctx, mark)
	if err != nil {
		return 0, nil, err
	}
	acked = time.Since(began)
	took, err = l.mesh.Marked(ctx, f, mark, at, began)
	return acked, took, err
}

func rest(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// settle waits until the servers have been at rest for a while, and notes what
// they hold.
func (l *largeMesh) settle(ctx context.Context) error {
	for began := time.Now(); time.Since(began) < settleTime; {
		if err := rest(ctx, settlePause); err != nil {
			return err
		}
	}
	l.out.Memory = nil
	for _, pid := range l.cluster.pids() {
		m, err := load.MemoryOf([]int{pid})
		if err != nil {
			return err
		}
		l.out.Memory = append(l.out.Memory, m.Private)
	}
	return nil
}

// reconnect has all agents at one server that does not lead, and kills it.
func (l *largeMesh) reconnect(ctx context.Context) error {
	if err := l.cluster.heal(ctx); err != nil {
		return err
	}
	leader, err := l.cluster.leader(ctx)
	if err != nil {
		return err
	}
	victim := (leader + 1) % len(l.cluster.servers)
	// Who writes must not lose its server, too.
	admin, err := l.store.admin(leader)
	if err != nil {
		return err
	}
	l.mesh.Use(admin)
	l.mesh.Aim([]string{l.cluster.address(victim)})
	err = l.connect(ctx, func(ctx context.Context, f *agents.Fleet) error {
		if _, _, err := l.mark(ctx, f, "before"); err != nil {
			return err
		}
		before, err := terms(ctx, []*cluster{l.cluster})
		if err != nil {
			return err
		}
		l.mesh.Aim(l.cluster.to.Addresses)
		began := time.Now()
		if err := l.cluster.servers[victim].kill(); err != nil {
			return err
		}
		if _, _, err := l.mark(ctx, f, "after"); err != nil {
			return err
		}
		l.out.Reconnected = time.Since(began)
		fmt.Fprintf(os.Stderr, "bench-server: large mesh: agents at %v\n", f.Connected())
		if err := errors.Join(l.cluster.restart(victim), l.cluster.heal(ctx)); err != nil {
			return err
		}
		after, err := terms(ctx, []*cluster{l.cluster})
		if err == nil {
			l.out.Elections = after[0] - before[0]
		}
		return err
	})
	l.mesh.Aim(l.cluster.to.Addresses)
	return err
}

// restarts kills each server once and then all, and measures how long they take.
func (l *largeMesh) restarts(ctx context.Context) error {
	for i := range l.cluster.servers {
		if err := l.cluster.heal(ctx); err != nil {
			return err
		}
		took, err := l.restart(ctx, i)
		if err != nil {
			return err
		}
		l.out.Restarts = append(l.out.Restarts, took[0])
	}
	var all []int
	for i := range l.cluster.servers {
		all = append(all, i)
	}
	took, err := l.restart(ctx, all...)
	if err == nil {
		l.out.All = slices.Max(took)
	}
	return err
}

// restart kills servers, starts them at once, and tells when each served.
func (l *largeMesh) restart(ctx context.Context, numbers ...int) ([]time.Duration, error) {
	for _, i := range numbers {
		if err := l.cluster.servers[i].kill(); err != nil {
			return nil, err
		}
	}
	began := time.Now()
	for _, i := range numbers {
		if err := l.cluster.restart(i); err != nil {
			return nil, err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	took := make([]time.Duration, len(numbers))
	errs := make([]error, len(numbers))
	var waiting sync.WaitGroup
	for n, i := range numbers {
		waiting.Go(func() {
			errs[n] = l.cluster.serves(ctx, i)
			took[n] = time.Since(began)
		})
	}
	waiting.Wait()
	return took, errors.Join(errs...)
}

// loadBars are those of a large mesh.
func (r *report) loadBars() []bar {
	const mib = 1 << 20
	memory := bar{what: "large mesh: memory of a server", format: "%.0f MiB", limit: 512}
	restart := bar{what: "large mesh: restart to serving", format: "%.1f s", limit: 3}
	half := bar{what: "large mesh: change to the last agent, p50", format: "%.0f ms", limit: 200}
	slow := bar{what: "large mesh: change to the last agent, p99", format: "%.0f ms", limit: 1000}
	again := bar{what: "large mesh: agents in step after their server died", format: "%.1f s", limit: 10}
	elections := bar{what: "large mesh: elections meanwhile", format: "%.0f"}
	if l := r.Load; l != nil {
		if len(l.Memory) > 0 {
			memory.known, memory.value = true, float64(slices.Max(l.Memory))/mib
		}
		if len(l.Restarts) > 0 {
			restart.known, restart.value = true, max(slices.Max(l.Restarts), l.All).Seconds()
			restart.note = fmt.Sprintf("one at a time %.1f s, all at once %.1f s", slices.Max(l.Restarts).Seconds(), l.All.Seconds())
		}
		if last := slices.Sorted(slices.Values(l.Last)); len(last) > 0 {
			half.known, half.value = true, millis(drive.Quantile(last, 0.5))
			slow.known, slow.value = true, millis(drive.Quantile(last, 0.99))
			slow.note = fmt.Sprintf("%d changes, %d agents", len(last), l.Agents)
		}
		if l.Reconnected > 0 {
			again.known, again.value, again.note = true, l.Reconnected.Seconds(), fmt.Sprintf("%d agents at once", l.Agents)
			elections.known, elections.value = true, float64(l.Elections)
		}
	}
	return []bar{memory, restart, half, slow, again, elections}
}
