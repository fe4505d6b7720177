package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"os/signal"
	"reflect"
	"slices"
	"syscall"
	"time"

	"github.com/meshd/meshd/agent/check"
	"github.com/meshd/meshd/agent/plan"
	"github.com/meshd/meshd/agent/procnet"
	"github.com/meshd/meshd/agent/registry"
	"github.com/meshd/meshd/agent/view"
	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/proxy"
	"github.com/meshd/meshd/proxy/feed"
)

const (
	checksFile = "checks.json"
	// planGap is the least time between two plans: changes that come close
	// together make one.
	planGap = 20 * time.Millisecond
	// socketRetry is how often a socket that could not be opened is tried.
	socketRetry = time.Second
	// holderGap is how often it is looked who holds the ports that are taken. The
	// first look is that long after the start: a running proxy, which holds its
	// ports, needs a moment to attach.
	holderGap = 3 * time.Second
)

// defineChecks makes the checks, and the ports that are watched, those of the
// definitions in force.
func (h *host) defineChecks() {
	checks, ports := map[string][]catalog.Check{}, map[string][]netip.AddrPort{}
	for _, d := range h.registry.Definitions() {
		key := registry.Key(d)
		d = d.WithDefaults()
		checks[key] = d.Checks
		address, err := netip.ParseAddr(d.Address)
		if err != nil {
			continue // outside the mesh: it listens elsewhere
		}
		for _, p := range d.Ports {
			ports[key] = append(ports[key], netip.AddrPortFrom(address, p.Port))
		}
	}
	h.checks.Set(checks)
	h.checks.Watch(ports)
}

// topics returns what this host needs to be told.
func (h *host) topics() []view.Topic {
	return append(plan.Topics(h.registry.Definitions()), view.Servers())
}

// followDefinitions keeps checks, registration, certificates and topics those
// of the definitions in force, until ctx ends.
func (h *host) followDefinitions(ctx context.Context) error {
	for {
		defined, checked := h.registry.Changed(), h.checks.Changed()
		h.defineChecks()
		h.register()
		h.wantLeaves()
		h.view.Subscribe(h.topics())
		select {
		case <-ctx.Done():
			return nil
		case <-defined:
		case <-checked:
		}
	}
}

// wantLeaves asks for the certificates of the definitions in force.
func (h *host) wantLeaves() {
	ids := []spiffe.ID{h.nodeID()}
	for _, d := range h.registry.Definitions() {
		id := spiffe.Service(h.identity.Load().TrustDomain, d.Ref().Namespace, d.Name)
		if !slices.Contains(ids, id) {
			ids = append(ids, id)
		}
	}
	h.leaves.Want(ids)
}

// register hands what is defined, and how it fares, to the syncer.
func (h *host) register() {
	h.mu.Lock()
	address := h.address
	h.mu.Unlock()
	all, err := registry.Registrations(h.registry.Definitions(), h.cfg.NodeName, h.cfg.Zone, address, proxy.ServerName, h.health)
	if err != nil {
		h.log.Error("the services can't be registered", slog.Any("error", err))
		return
	}
	h.syncer.Set(all)
}

// health returns the status of an instance from its checks.
func (h *host) health(key string) catalog.InstanceStatus {
	var s catalog.InstanceStatus
	for _, state := range h.checks.States(key) {
		s.Checks = append(s.Checks, state.CheckState())
	}
	s.Health = catalog.WorstHealth(s.Checks)
	return s
}

// loadChecks returns the verdicts that the last process left.
func (h *host) loadChecks() map[string][]check.State {
	data, err := h.dir.Read(checksFile)
	var earlier map[string][]check.State
	if err == nil {
		err = json.Unmarshal(data, &earlier)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		h.log.Error("kept verdicts of checks are ignored: instances are critical until checked", slog.Any("error", err))
	}
	return earlier
}

// keepChecks writes verdicts to disk when they change, until ctx ends.
func (h *host) keepChecks(ctx context.Context) error {
	failed := false
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-h.checks.Changed():
		}
		data, err := json.Marshal(h.checks.All())
		if err == nil {
			err = h.dir.Write(checksFile, data)
		}
		if err != nil && !failed {
			h.log.ErrorContext(ctx, "verdicts of checks can't be kept for a restart", slog.Any("error", err))
		}
		failed = err != nil
	}
}

// followHangup reads the service definitions on SIGHUP, until ctx ends. They
// are followed anyway; a signal does not wait.
func (h *host) followHangup(ctx context.Context) error {
	hangups := make(chan os.Signal, 1)
	signal.Notify(hangups, syscall.SIGHUP)
	defer signal.Stop(hangups)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-hangups:
			h.log.InfoContext(ctx, "reading the service definitions again")
			h.registry.Reload()
		}
	}
}

// followServers reacts to what servers say: when a registration was taken, or
// the node's own record changed, what was refused is asked for again; when the
// node's certificate is new, it is shown.
func (h *host) followServers(ctx context.Context) error {
	node, current := h.leaves.Leaf(h.nodeID()), false
	record, _ := h.view.Snapshot().Get(view.Node(), "spec")
	for {
		told, renewed := h.view.Changed(), h.leaves.Changed()
		status, synced := h.syncer.Status()
		if status.Current && !current {
			h.leaves.Retry()
		}
		current = status.Current
		if now, _ := h.view.Snapshot().Get(view.Node(), "spec"); !bytes.Equal(now, record) {
			record = now
			h.syncer.Retry()
			h.leaves.Retry()
		}
		if l := h.leaves.Leaf(h.nodeID()); l != nil && l != node {
			node = l
			h.view.Reconnect()
		}
		h.followRoots()
		select {
		case <-ctx.Done():
			return nil
		case <-told:
		case <-renewed:
		case <-synced:
		}
	}
}

// followRoots takes the roots that the servers told, and keeps them: without
// them the next process could not tell a server from an impostor. What does not
// contain the mesh's own roots is no set of roots.
func (h *host) followRoots() {
	identity := h.identity.Load()
	var told ca.Bundle
	for domain, data := range h.view.Snapshot().Items(view.Roots()) {
		var root struct {
			PEM string `json:"pem"`
		}
		err := json.Unmarshal(data, &root)
		var b ca.Bundle
		if err == nil {
			b, err = ca.ParseRootsPEM([]byte(root.PEM))
		}
		if err != nil || !slices.Equal(b.TrustDomains(), []string{domain}) {
			h.log.Error("roots that a server told can't be used", slog.String("trust_domain", domain), slog.Any("error", err))
			return
		}
		told = told.Merge(b)
	}
	if told.Equal(h.roots()) || len(told.Roots(identity.TrustDomain)) == 0 {
		return
	}
	h.bundle.Store(&told)
	renewed := *identity
	renewed.Bundle = told
	if err := renewed.Save(h.dir); err != nil {
		h.log.Error("the newest roots can't be kept for a restart", slog.Any("error", err))
	}
	h.identity.Store(&renewed)
}

// followProxies reports to the servers what proxies run, until ctx ends.
func (h *host) followProxies(ctx context.Context) error {
	for {
		changed := h.feed.Changed()
		reports := map[string]view.Applied{}
		for _, s := range h.feed.Status() {
			if s.Applied.IsZero() && s.Refused == "" {
				continue
			}
			// Several processes of one proxy: the active one speaks, and the
			// newest of those; all have cut connections.
			a, seen := reports[s.Proxy]
			if !seen || s.State == feed.Active {
				closed := a.Closed
				a = view.Applied{Proxy: s.Proxy, Position: s.Applied, Refused: s.Refused, RefusedPosition: s.RefusedPosition, Closed: closed}
			}
			a.Closed += s.Closed
			reports[s.Proxy] = a
		}
		for _, a := range reports {
			h.view.Report(a)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		}
	}
}

// followHolders finds out who holds the ports that the plan needs, until ctx
// ends.
func (h *host) followHolders(ctx context.Context) error {
	ticker := time.NewTicker(holderGap)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		h.mu.Lock()
		listeners := slices.Clone(h.planned.listeners)
		before := h.holders
		h.mu.Unlock()
		holders := map[string]string{}
		for _, l := range listeners {
			if l.Open || l.Held {
				continue
			}
			cause := l.Waiting
			if address, err := parseListen(l.Address); err == nil && l.inUse {
				cause = fmt.Sprintf("%s is held by %s", l.Address, procnet.HolderOf(address, nil))
			}
			holders[l.Name] = cause
			if before[l.Name] != cause {
				h.log.ErrorContext(ctx, "a listener can't be opened; it is tried again", slog.String("listener", l.Name), slog.String("cause", cause))
			}
		}
		h.mu.Lock()
		h.holders = holders
		h.mu.Unlock()
	}
}

// listeners returns the state of the listening sockets, for people.
func (h *host) listeners() []ListenerStatus {
	h.mu.Lock()
	defer h.mu.Unlock()
	all := slices.Clone(h.planned.listeners)
	for i, l := range all {
		if cause, ok := h.holders[l.Name]; ok && l.Waiting != "" {
			all[i].Waiting = cause
		}
	}
	return all
}

// planner makes plans and passes them on. One goroutine uses it.
type planner struct {
	h       *host
	sockets *sockets

	definitions []catalog.Definition
	snapshot    *view.Snapshot
	bundle      ca.Bundle
	config      proxy.Config
	made        bool
	logged      []plan.Problem
	leaves      []*ca.Leaf
	passed      map[string]*os.File
}

// followPlan keeps the plan that of the newest inputs, until ctx ends.
func (h *host) followPlan(ctx context.Context) error {
	p := &planner{h: h, sockets: newSockets(h.log)}
	defer p.sockets.close()
	for {
		defined, told, renewed, attached := h.registry.Changed(), h.view.Changed(), h.leaves.Changed(), h.feed.Changed()
		p.build(ctx)
		p.passKeys()
		var again <-chan time.Time
		if p.passSockets(ctx) {
			again = time.After(socketRetry)
		}
		gap := time.NewTimer(planGap)
		select {
		case <-ctx.Done():
			gap.Stop()
			return nil
		case <-gap.C:
		}
		select {
		case <-ctx.Done():
			return nil
		case <-defined:
		case <-told:
		case <-renewed:
		case <-attached:
		case <-again:
		}
	}
}

// build makes a new plan if an input changed, and passes it on if it differs.
func (p *planner) build(ctx context.Context) {
	h := p.h
	definitions, snapshot, bundle := h.registry.Definitions(), h.view.Snapshot(), h.roots()
	if p.made && snapshot == p.snapshot && bundle.Equal(p.bundle) && reflect.DeepEqual(definitions, p.definitions) {
		return
	}
	p.definitions, p.snapshot, p.bundle = definitions, snapshot, bundle
	config, problems := plan.Build(plan.Inputs{
		TrustDomain: h.identity.Load().TrustDomain, Bundle: bundle, Zone: h.cfg.Zone, MeshListen: h.cfg.meshListen(),
		AccessLog: h.cfg.Proxy.AccessLog, Limits: h.cfg.Proxy.Limits, Definitions: definitions, View: snapshot,
	})
	refused := ""
	if err := config.Validate(); err != nil {
		refused = err.Error()
	} else if !p.made || !reflect.DeepEqual(config, p.config) {
		p.config, p.made = config, true
		if err := h.feed.SetPlan(h.cfg.Proxy.ID, config); err != nil {
			refused = err.Error()
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if refused != "" && refused != h.planned.refused {
		h.log.ErrorContext(ctx, "the newest plan is unusable; the one before stays in force", slog.String("cause", refused))
	}
	// Before a server spoke for the first time, all is missing: no news.
	if _, told := h.view.Age(); told {
		for _, one := range problems {
			if !slices.Contains(p.logged, one) {
				level := slog.LevelWarn
				if one.Waiting {
					level = slog.LevelInfo
				}
				h.log.Log(ctx, level, "left out of the plan", slog.String("where", one.Where), slog.String("what", one.What))
			}
		}
		p.logged = problems
	}
	h.planned.position, h.planned.problems, h.planned.refused = config.Position, problems, refused
	h.planned.config = p.config
}

// passKeys passes the certificates on if they changed.
func (p *planner) passKeys() {
	leaves := p.h.leaves.Services()
	if p.leaves != nil && slices.Equal(leaves, p.leaves) {
		return
	}
	p.leaves = leaves
	if err := p.h.feed.SetKeys(p.h.cfg.Proxy.ID, leaves); err != nil {
		p.h.log.Error("certificates can't be passed to the proxy", slog.Any("error", err))
	}
}

// passSockets opens what the plan names and passes it on; it reports whether a
// socket waits.
func (p *planner) passSockets(ctx context.Context) (waits bool) {
	h := p.h
	pids := []int{}
	for _, s := range h.feed.Status() {
		pids = append(pids, s.PID)
	}
	var offered map[string]*os.File
	for _, l := range p.config.Listeners {
		if p.sockets.held[l.Name] == nil {
			var err error
			if offered, err = h.feed.Sockets(h.cfg.Proxy.ID); err != nil {
				h.log.ErrorContext(ctx, "sockets of the proxy can't be taken over", slog.Any("error", err))
			}
			break
		}
	}
	waits = p.sockets.follow(ctx, p.config.Listeners, offered, pids)
	if !maps.Equal(p.passed, p.sockets.held) {
		if err := h.feed.SetSockets(h.cfg.Proxy.ID, p.sockets.held); err != nil {
			h.log.ErrorContext(ctx, "sockets can't be passed to the proxy", slog.Any("error", err))
		}
		p.passed = maps.Clone(p.sockets.held)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.planned.listeners = p.sockets.status()
	return waits
}
