package check

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"reflect"
	"slices"
	"sync"
	"time"

	"github.com/meshd/meshd/agent/procnet"
	"github.com/meshd/meshd/catalog"
)

// Errors of Group.Report.
var (
	ErrNoCheck = errors.New("no such check")
	ErrNotTTL  = errors.New("the agent runs this check itself, it takes no reports")
	ErrHealth  = errors.New("unknown health, write passing, warning or critical")
)

// Config is what a Group needs.
type Config struct {
	Log *slog.Logger
	// Resolver is net.DefaultResolver when nil.
	Resolver Resolver
	// Earlier are the states that a previous process left, per instance, as
	// States returned them. A check that has one starts with it; a ttl check
	// gets its whole TTL again, for nobody could report meanwhile.
	Earlier map[string][]State
	// Sockets returns the sockets that listen; procnet.Scan when nil.
	Sockets func() ([]procnet.Socket, error)
}

// Group runs the checks of all instances of a host. Instances are named by any
// text that the caller chooses. It is safe for concurrent use.
type Group struct {
	log     *slog.Logger
	prober  prober
	sockets func() ([]procnet.Socket, error)

	mu      sync.Mutex
	ports   map[string]*ports // per instance
	earlier map[string][]State
	entries map[entryKey]*entry
	order   map[string][]string // check names per instance, as defined
	changed chan struct{}
	wake    chan struct{} // the set changed: Run looks again
	watch   chan struct{} // the ports changed: Run looks again
}

type entryKey struct{ instance, check string }

// entry is one check. Its tracker belongs to Group.mu.
type entry struct {
	check    catalog.Check
	tracker  *tracker
	reported time.Time     // ttl: when the TTL began to count; zero: it does not
	poke     chan struct{} // ttl: reported moved
	cancel   context.CancelFunc
}

// New returns a Group without checks.
func New(cfg Config) *Group {
	g := &Group{
		log:     cfg.Log,
		prober:  prober{resolver: cfg.Resolver},
		sockets: cfg.Sockets,
		ports:   map[string]*ports{},
		watch:   make(chan struct{}, 1),
		earlier: cfg.Earlier,
		entries: map[entryKey]*entry{},
		order:   map[string][]string{},
		changed: make(chan struct{}),
		wake:    make(chan struct{}, 1),
	}
	if g.prober.resolver == nil {
		g.prober.resolver = net.DefaultResolver
	}
	if g.sockets == nil {
		g.sockets = procnet.Scan
	}
	return g
}

// Set replaces all checks of all instances. A check whose definition is the
// same keeps running and keeps its state; a changed one starts anew from its
// verdict, so that editing an interval does not take an instance out of use.
// An instance without checks should be listed too; the checks must be valid.
func (g *Group) Set(instances map[string][]catalog.Check) {
	g.mu.Lock()
	defer g.mu.Unlock()
	now := time.Now()
	keep := map[entryKey]*entry{}
	order := make(map[string][]string, len(instances))
	changed := len(instances) != len(g.order)
	for instance, checks := range instances {
		names := make([]string, 0, len(checks))
		for _, c := range checks {
			key := entryKey{instance: instance, check: c.Name}
			names = append(names, c.Name)
			old := g.entries[key]
			if old != nil && reflect.DeepEqual(old.check, c) {
				keep[key] = old
				continue
			}
			keep[key] = g.newEntry(instance, c, old, now)
			changed = true
		}
		order[instance] = names
		changed = changed || !slices.Equal(names, g.order[instance])
	}
	for key, e := range g.entries {
		if keep[key] != e && e.cancel != nil {
			e.cancel()
		}
	}
	g.entries, g.order = keep, order
	if !changed {
		return
	}
	g.announce()
	select {
	case g.wake <- struct{}{}:
	default:
	}
}

func (g *Group) newEntry(instance string, c catalog.Check, old *entry, now time.Time) *entry {
	var earlier *State
	if old != nil {
		s := old.tracker.state
		earlier = &s
	} else if i := slices.IndexFunc(g.earlier[instance], func(s State) bool { return s.Name == c.Name }); i >= 0 {
		earlier = &g.earlier[instance][i]
	}
	e := &entry{check: c, tracker: newTracker(c, earlier, now), poke: make(chan struct{}, 1)}
	if earlier != nil && c.Kind() == catalog.CheckTTL && e.tracker.state.Health.Usable() {
		e.reported = now
	}
	return e
}

// announce wakes those who wait for Changed. g.mu is held.
func (g *Group) announce() {
	close(g.changed)
	g.changed = make(chan struct{})
}

// Changed returns a channel that is closed at the next change of a verdict or
// of the set of checks. Get it before reading States.
func (g *Group) Changed() <-chan struct{} {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.changed
}

// States returns a copy of the states of an instance's checks, in the order of
// its definition, and at the end, while nobody listens on its ports any more,
// one of kind KindListen.
func (g *Group) States(instance string) []State {
	g.mu.Lock()
	defer g.mu.Unlock()
	states := g.checkStates(instance)
	if p := g.ports[instance]; p != nil && p.state.Health == catalog.HealthCritical {
		states = append(states, p.state)
	}
	return states
}

// checkStates returns the states of an instance's checks. g.mu is held.
func (g *Group) checkStates(instance string) []State {
	states := make([]State, 0, len(g.order[instance])+1)
	for _, name := range g.order[instance] {
		states = append(states, g.entries[entryKey{instance: instance, check: name}].tracker.state)
	}
	return states
}

// All returns what Config.Earlier of the next process wants: the states of every
// instance's checks and ports.
func (g *Group) All() map[string][]State {
	g.mu.Lock()
	defer g.mu.Unlock()
	all := make(map[string][]State, len(g.order))
	for instance, names := range g.order {
		if len(names) > 0 {
			all[instance] = g.checkStates(instance)
		}
	}
	for instance, p := range g.ports {
		if p.seen() {
			all[instance] = append(all[instance], p.state)
		}
	}
	return all
}

// Report gives a ttl check its newest result and starts its TTL again. Errors
// wrap ErrNoCheck, ErrNotTTL or ErrHealth.
func (g *Group) Report(instance, name string, health catalog.Health, output string) error {
	switch health {
	case catalog.HealthPassing, catalog.HealthWarning, catalog.HealthCritical:
	case catalog.HealthUnknown:
		return fmt.Errorf("report to check %q of %s: %q: %w", name, instance, health, ErrHealth)
	default:
		return fmt.Errorf("report to check %q of %s: %q: %w", name, instance, health, ErrHealth)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	e := g.entries[entryKey{instance: instance, check: name}]
	if e == nil {
		return fmt.Errorf("report to check %q of %s: %w", name, instance, ErrNoCheck)
	}
	if e.check.Kind() != catalog.CheckTTL {
		return fmt.Errorf("report to check %q of %s, kind %s: %w", name, instance, e.check.Kind(), ErrNotTTL)
	}
	e.reported = time.Now()
	g.observe(instance, e, result{health: health, output: output})
	select {
	case e.poke <- struct{}{}:
	default:
	}
	return nil
}

// observe records a result. g.mu is held.
func (g *Group) observe(instance string, e *entry, r result) {
	before := e.tracker.state.Health
	if !e.tracker.observe(r, time.Now()) {
		return
	}
	tell := g.log.Info
	if !e.tracker.state.Health.Usable() {
		tell = g.log.Warn
	}
	tell("check changed", slog.String("instance", instance), slog.String("check", e.check.Name),
		slog.String("from", string(before)), slog.String("to", string(e.tracker.state.Health)), slog.String("output", e.tracker.state.Output))
	g.announce()
}

// Run runs the checks, those of later calls of Set included, until ctx ends.
// It returns nil when every run has ended. Call it once.
func (g *Group) Run(ctx context.Context) error {
	var runs sync.WaitGroup
	defer runs.Wait()
	runs.Go(func() { g.watchPorts(ctx) })
	for {
		g.start(ctx, &runs)
		select {
		case <-ctx.Done():
			return nil
		case <-g.wake:
		}
	}
}

// start begins to run every check that does not run yet.
func (g *Group) start(ctx context.Context, runs *sync.WaitGroup) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for key, e := range g.entries {
		if e.cancel != nil {
			continue
		}
		ctx, cancel := context.WithCancel(ctx)
		e.cancel = cancel
		runs.Go(func() {
			defer cancel()
			if e.check.Kind() == catalog.CheckTTL {
				g.expire(ctx, key.instance, e)
			} else {
				g.repeat(ctx, key.instance, e)
			}
		})
	}
}

// repeat runs an http or tcp check: first at a random moment of its interval,
// then one interval after the end of the run before.
func (g *Group) repeat(ctx context.Context, instance string, e *entry) {
	c := e.check.WithDefaults()
	timer := time.NewTimer(rand.N(c.Interval.Std())) //nolint:gosec // spreads load, guards nothing
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		r := g.prober.probe(ctx, c)
		if ctx.Err() != nil {
			return // its failure says nothing of the application
		}
		g.mu.Lock()
		g.observe(instance, e, r)
		g.mu.Unlock()
		timer.Reset(c.Interval.Std())
	}
}

// expire turns a ttl check critical when reports stay out.
func (g *Group) expire(ctx context.Context, instance string, e *entry) {
	ttl := e.check.TTL.Std()
	timer := time.NewTimer(ttl)
	defer timer.Stop()
	for {
		g.mu.Lock()
		left := ttl - time.Since(e.reported)
		if !e.reported.IsZero() && left <= 0 {
			g.observe(instance, e, expired(ttl, e.tracker.state.Output))
			e.reported = time.Time{}
		}
		if e.reported.IsZero() {
			left = ttl // silent already: only a report wakes it in earnest
		}
		g.mu.Unlock()
		timer.Reset(left)
		select {
		case <-ctx.Done():
			return
		case <-e.poke:
		case <-timer.C:
		}
	}
}
