package agents_test

import (
	"flag"
	"runtime"
	"runtime/metrics"
	"slices"
	"testing"
	"time"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/intentions"
	"github.com/meshd/meshd/server/state"
	"github.com/meshd/meshd/tests/bench/agents"
)

// The size of the test, and whether its figures are judged: on a machine that does
// nothing else, with -agents 1000 -scale 1 -strict.
var (
	fleetSize = flag.Int("agents", 100, "how many agents")
	scale     = flag.Int("scale", 20, "the catalog has 5,000 services, 20,000 instances and 10,000 intentions, divided by this")
	strict    = flag.Bool("strict", false, "fail if a figure is not as good as docs/benchmarks.md promises")
)

// want judges a figure.
func want(t *testing.T, what string, got, most time.Duration) {
	t.Helper()
	t.Logf("%s: %s (at most %s)", what, got.Round(time.Millisecond), most)
	if *strict && got > most {
		t.Errorf("%s: %s, at most %s is promised", what, got, most)
	}
}

// A change that concerns every agent reaches the last one in time, also while one of them
// reads nothing; and all come back at once, without an election.
func TestFleet(t *testing.T) {
	w := newWorld(t, 3)
	nodes, services := *fleetSize, 5000 / *scale
	w.populate(nodes, services)
	heap := memory()
	f := w.fleet(nodes, services)
	term := w.term()
	w.waited()
	w.run(f)
	t.Logf("goroutines waited for a processor up to %s while all connected", w.waited())
	t.Logf("heap: %d MiB, with the agents of both sides %d MiB; %d goroutines", heap>>20, memory()>>20, runtime.NumGoroutine())

	status := func(int) catalog.Position { return w.touch(hub()) }
	p50, p99 := w.spread(f, nodes, 20, status)
	want(t, "the health of one instance, to the last agent, p50", p50, 200*time.Millisecond)
	want(t, "the same, p99", p99, time.Second)
	w.waited()
	w50, w99 := w.spread(f, nodes, 6, func(round int) catalog.Position {
		return w.update(func(tx *state.Tx) error {
			return w.intention(tx, "*", "*", []intentions.Action{intentions.Deny, intentions.Allow}[round%2])
		})
	})
	t.Logf("an intention from everybody to everybody, to the last agent: p50 %s, p99 %s", w50, w99)

	t.Logf("goroutines waited for a processor up to %s meanwhile; term %d, was %d", w.waited(), w.term(), term)
	w.stallOne(t, f, nodes, p99)
	w.waited()

	began := time.Now()
	f.Cut()
	took := w.synced(f, began, "cut at once")
	want(t, "all agents cut at once, synced again", took[len(took)-1], 10*time.Second)
	t.Logf("goroutines waited for a processor up to %s meanwhile", w.waited())
	if now := w.term(); now != term {
		t.Logf("%d elections", now-term)
		if *strict {
			t.Errorf("the term was %d, and is %d: there was an election", term, now)
		}
	}
	t.Logf("agents by server: %v", f.Connected())
	for _, s := range w.servers {
		if m := s.Metrics(); m.Streams == 0 || m.Lag != 0 || m.Waiting != 0 || m.Sent == 0 {
			t.Errorf("when all is quiet: %+v", m)
		}
	}
}

// stallOne has one agent read nothing during many changes.
func (w *world) stallOne(t *testing.T, f *agents.Fleet, nodes int, before time.Duration) {
	t.Helper()
	resume := f.Stall(0)
	defer resume()
	heap := memory()
	p50, p99 := w.spread(f, nodes-1, 20, func(int) catalog.Position { return w.touch(hub()) })
	t.Logf("while one agent does not read: p50 %s, p99 %s (before: p99 %s)", p50, p99, before)
	for range 500 {
		w.touch(hub())
	}
	w.awaitSome(f, nodes-1, w.touch(hub()), time.Now())
	if grown := int64(memory()) - int64(heap); grown > 32<<20 {
		t.Errorf("an agent that does not read costs %d MiB", grown>>20)
	}
	began := time.Now()
	resume()
	took := w.await(f, w.touch(hub()), began)
	t.Logf("it has everything %s after it reads again", took[len(took)-1])
}

// waited is how long at most goroutines that could run had to wait for a processor, but
// for one in 100,000, since the last call: what an election can come from.
func (w *world) waited() time.Duration {
	sample := []metrics.Sample{{Name: "/sched/latencies:seconds"}}
	metrics.Read(sample)
	h := sample[0].Value.Float64Histogram()
	counts := slices.Clone(h.Counts)
	var total, seen uint64
	for i := range counts {
		if w.latencies != nil {
			counts[i] -= w.latencies[i]
		}
		total += counts[i]
	}
	w.latencies = slices.Clone(h.Counts)
	for i, n := range counts {
		if seen += n; seen >= total-total/100_000 && total > 0 {
			return time.Duration(h.Buckets[i] * float64(time.Second))
		}
	}
	return 0
}

// memory is what the heap holds.
func memory() uint64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}
