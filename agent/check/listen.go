package check

import (
	"context"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/meshd/meshd/agent/procnet"
	"github.com/meshd/meshd/catalog"
)

// KindListen is the kind of the state that says that an application no longer
// listens. No definition has it.
const KindListen catalog.CheckKind = "listen"

// listenName is the name of that state.
const listenName = "listening"

// listenGap is how often it is looked who listens: often enough that the end of
// an application is known to all its callers within a second.
const listenGap = 200 * time.Millisecond

// ports are those of one instance. All belongs to Group.mu.
type ports struct {
	addresses []netip.AddrPort
	listens   string // what the state says in either case
	gone      string
	// state is passing while one of them listens, critical when none does any
	// more, and unknown before the first was seen.
	state State
}

func (p *ports) seen() bool { return p.state.Health != catalog.HealthUnknown }

func (p *ports) turn(health catalog.Health, output string, now time.Time) {
	p.state.Health, p.state.Since, p.state.Ran = health, now, now
	p.state.Reason, p.state.Output = output, output
}

// Watch replaces the ports of all instances. An instance whose ports are the same
// keeps what is known of them; new ones count from when they were seen to listen.
func (g *Group) Watch(instances map[string][]netip.AddrPort) {
	g.mu.Lock()
	defer g.mu.Unlock()
	now := time.Now()
	keep := make(map[string]*ports, len(instances))
	changed := false
	for instance, addresses := range instances {
		if len(addresses) == 0 {
			continue
		}
		if old := g.ports[instance]; old != nil && slices.Equal(old.addresses, addresses) {
			keep[instance] = old
			continue
		}
		keep[instance] = g.newPorts(instance, addresses, now)
		changed = true
	}
	for instance, old := range g.ports {
		// Something is gone that counted.
		if keep[instance] != old && old.state.Health == catalog.HealthCritical {
			changed = true
		}
	}
	g.ports = keep
	if !changed {
		return
	}
	g.announce()
	select {
	case g.watch <- struct{}{}:
	default:
	}
}

func (g *Group) newPorts(instance string, addresses []netip.AddrPort, now time.Time) *ports {
	texts := make([]string, 0, len(addresses))
	for _, a := range addresses {
		texts = append(texts, a.String())
	}
	text := strings.Join(texts, ", ")
	p := &ports{
		addresses: slices.Clone(addresses), listens: "listens at " + text, gone: "nobody listens at " + text + " any more",
		state: State{Name: listenName, Kind: KindListen, Health: catalog.HealthUnknown, Since: now},
	}
	for _, s := range g.earlier[instance] {
		if s.Kind == KindListen && (s.Output == p.listens || s.Output == p.gone) {
			p.state = s
		}
	}
	return p
}

// watchPorts looks who listens until ctx ends.
func (g *Group) watchPorts(ctx context.Context) {
	ticker := time.NewTicker(listenGap)
	defer ticker.Stop()
	blind := false
	for {
		if !g.watches() {
			select {
			case <-ctx.Done():
				return
			case <-g.watch:
				continue
			}
		}
		err := g.look()
		if err != nil && !blind {
			g.log.ErrorContext(ctx, "whether applications listen can't be seen: only checks tell how they are", slog.Any("error", err))
		}
		blind = err != nil
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

func (g *Group) watches() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.ports) > 0
}

// look compares what listens with what did. An end is believed only when a second
// look finds the same: a list that takes the kernel several steps may leave out one
// when another ends meanwhile.
func (g *Group) look() error {
	for _, again := range []bool{false, true} {
		sockets, err := g.sockets()
		if err != nil {
			return err
		}
		if !g.listen(sockets, again) {
			return nil
		}
	}
	return nil
}

// listen records who listens and, at the second look, who no longer does. It
// reports whether somebody is missing.
func (g *Group) listen(sockets []procnet.Socket, again bool) (missing bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	now, changed := time.Now(), false
	for instance, p := range g.ports {
		heard := slices.ContainsFunc(p.addresses, func(a netip.AddrPort) bool {
			return slices.ContainsFunc(sockets, func(s procnet.Socket) bool { return s.Covers(a) })
		})
		switch {
		case heard && p.state.Health != catalog.HealthPassing:
			if p.seen() {
				g.log.Info("the application listens again", slog.String("instance", instance))
			}
			p.turn(catalog.HealthPassing, p.listens, now)
			changed = true
		case !heard && p.state.Health == catalog.HealthPassing && again:
			g.log.Warn("the application no longer listens", slog.String("instance", instance), slog.Any("addresses", p.addresses))
			p.turn(catalog.HealthCritical, p.gone, now)
			changed = true
		case !heard && p.state.Health == catalog.HealthPassing:
			missing = true
		}
	}
	if changed {
		g.announce()
	}
	return missing
}
