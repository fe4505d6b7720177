package rpc

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/intentions"
	"github.com/meshd/meshd/server/meshpb"
	"github.com/meshd/meshd/server/state"
)

// bundleInterval is how often the trust bundle is compared with what was sent.
const bundleInterval = time.Second

// feeds turns the state into topics. Each slice of the catalog is kept once, in
// an itemset that all its subscribers share; a commit touches the sets of the
// keys that it wrote and wakes the streams that are subscribed to them, and no
// others.
type feeds struct {
	trustDomain string
	advertise   []string // while no server has announced itself
	state       *state.State
	authority   Authority
	log         *slog.Logger
	delays      *delays

	// mu orders the sets and the snapshot that they show: whoever holds it for
	// reading sees one position everywhere.
	mu         sync.RWMutex
	snapshot   *state.Snapshot
	bundle     ca.Bundle
	roots      *itemset
	servers    *itemset
	specs      map[string]*itemset       // topic node, by node
	intentions map[catalog.Name]*itemset // by destination
	endpoints  map[catalog.Name]*itemset // topic upstream, by destination
	streams    map[string]map[*stream]struct{}

	policyMu sync.Mutex
	policies map[catalog.Name]*intentions.Policy // of snapshot; nil denies
}

func newFeeds(config Config, st *state.State, authority Authority, log *slog.Logger) *feeds {
	return &feeds{
		trustDomain: config.TrustDomain, advertise: config.Advertise,
		state: st, authority: authority, log: log, delays: &delays{},
		snapshot:   st.Snapshot(),
		roots:      newItemset(),
		servers:    newItemset(),
		specs:      make(map[string]*itemset),
		intentions: make(map[catalog.Name]*itemset),
		endpoints:  make(map[catalog.Name]*itemset),
		streams:    make(map[string]map[*stream]struct{}),
		policies:   make(map[catalog.Name]*intentions.Policy),
	}
}

// position tells how far the sets have come, and with them what is dirty.
func (f *feeds) position() catalog.Position {
	f.mu.RLock()
	defer f.mu.RUnlock()
	return f.snapshot.Position()
}

// run follows the state until ctx ends, and calls moved after each change.
func (f *feeds) run(ctx context.Context, moved func()) error {
	tick := time.NewTicker(bundleInterval)
	defer tick.Stop()
	f.mu.Lock()
	at := f.snapshot
	f.mu.Unlock()
	for {
		if next := f.advance(at); next != at {
			at = next
			moved()
		}
		select {
		case <-ctx.Done():
			return nil
		case <-f.state.Changed(at):
		case <-tick.C:
		}
	}
}

// advance brings all sets to the newest snapshot.
func (f *feeds) advance(from *state.Snapshot) *state.Snapshot {
	newest, changes, ok := f.state.Changes(from)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.snapshot = newest
	f.refillRoots()
	if !ok {
		f.rebuild(from.Position().Generation != newest.Position().Generation)
		return newest
	}
	for _, c := range changes {
		f.touch(c)
	}
	return newest
}

// rebuild compares everything with the snapshot; after a flip of the generation
// every subscriber starts anew. mu is held.
func (f *feeds) rebuild(flip bool) {
	clear(f.policies)
	f.fillServers()
	for destination := range f.intentions {
		f.fillIntentions(destination)
	}
	for destination := range f.endpoints {
		f.fillEndpoints(destination)
	}
	for node := range f.specs {
		f.fillSpec(node)
	}
	for _, streams := range f.streams {
		for st := range streams {
			if flip {
				for _, sub := range st.subs {
					sub.gate = gateUnset
				}
			}
			st.markAll()
		}
	}
}

// touch applies one change. mu is held.
func (f *feeds) touch(c state.Change) {
	switch c.Kind {
	case state.Services.Kind():
		if name, ok := state.Services.Key(c); ok {
			f.syncService(name)
		}
	case state.Instances.Kind():
		if key, ok := state.Instances.Key(c); ok {
			f.syncInstance(key)
			f.markNode(key.Node) // what runs there decides which intentions it may see
		}
	case state.InstanceStatuses.Kind():
		if key, ok := state.InstanceStatuses.Key(c); ok {
			f.syncInstance(key)
		}
	case state.InstanceDrains.Kind():
		if key, ok := state.InstanceDrains.Key(c); ok {
			f.syncInstance(key)
		}
	case state.NodeDrains.Kind():
		if node, ok := state.NodeDrains.Key(c); ok {
			for key := range f.snapshot.InstancesOn(node) {
				f.syncInstance(key)
			}
		}
	case state.Leases.Kind():
		if node, ok := state.Leases.Key(c); ok {
			for key := range f.snapshot.InstancesOn(node) {
				f.syncLease(key.Service, node)
			}
		}
	case state.Intentions.Kind():
		key, ok := state.Intentions.Key(c)
		f.touchIntention(key, ok)
	case state.Nodes.Kind():
		if node, ok := state.Nodes.Key(c); ok {
			if f.specs[node] != nil {
				f.fillSpec(node)
			}
			f.markNode(node)
		}
	case state.Servers.Kind():
		f.fillServers()
	case state.NodeIdentities.Kind():
		if node, ok := state.NodeIdentities.Key(c); ok {
			f.markNode(node)
		}
	}
}

// touchIntention applies a change of an intention. One whose key can't be read may
// concern any destination; one without a wildcard concerns one. mu is held.
func (f *feeds) touchIntention(key intentions.Key, readable bool) {
	touch := func(destination catalog.Name) {
		if f.intentions[destination] != nil {
			f.fillIntentions(destination)
		}
		if set := f.endpoints[destination]; set != nil {
			set.mark()
		}
		delete(f.policies, destination)
	}
	if only := (catalog.Name{Namespace: key.DestinationNamespace, Name: key.Destination}); readable && only.Name != "*" && only.Namespace != "*" {
		touch(only)
		return
	}
	known := make(map[catalog.Name]bool, len(f.intentions)+len(f.endpoints))
	for destination := range f.intentions {
		known[destination] = true
	}
	for destination := range f.endpoints {
		known[destination] = true
	}
	for destination := range f.policies {
		known[destination] = true
	}
	for destination := range known {
		if !readable || key.CoversDestination(destination) {
			touch(destination)
		}
	}
}

// markNode has the node's streams looked at again, permissions included.
func (f *feeds) markNode(node string) {
	for st := range f.streams[node] {
		st.markAll()
	}
}

// mark has every subscriber of the set looked at.
func (s *itemset) mark() {
	for sub := range s.subs {
		sub.stream.mark(sub)
	}
}

// Keys of items within topics; meshpb.Topic lists them.
const (
	itemService = "service"
	itemDenied  = "denied"
	itemSpec    = "spec"
)

func instanceItem(k catalog.InstanceKey) string { return "instance/" + k.Node + "/" + k.ID }
func statusItem(k catalog.InstanceKey) string   { return "status/" + k.Node + "/" + k.ID }
func leaseItem(node string) string              { return "lease/" + node }

func (f *feeds) revision() uint64 { return f.snapshot.Position().Revision }

func (f *feeds) fillSpec(node string) {
	set := f.specs[node]
	changed := set.refill(f.revision(), func(put func(string, []byte, uint64)) {
		if rec, ok := state.Nodes.Get(f.snapshot, node); ok {
			put(itemSpec, rec.Raw, rec.Revision)
		}
	})
	if changed {
		set.mark()
	}
}

// fillIntentions includes what this server can't read: the agent can't either,
// and then denies as this server does.
func (f *feeds) fillIntentions(destination catalog.Name) {
	set := f.intentions[destination]
	changed := set.refill(f.revision(), func(put func(string, []byte, uint64)) {
		for key, rec := range f.snapshot.IntentionsFor(destination) {
			put(state.KeyText(key), rec.Raw, rec.Revision)
		}
		for p := range f.snapshot.UnreadableIntentions(destination) {
			put("unreadable/"+p.Key, unreadable, p.Revision)
		}
	})
	if changed {
		set.mark()
	}
}

// unreadable stands for an intention that nobody can read: no JSON of one.
var unreadable = []byte(`"unreadable"`)

func (f *feeds) fillEndpoints(destination catalog.Name) {
	set := f.endpoints[destination]
	changed := set.refill(f.revision(), func(put func(string, []byte, uint64)) {
		if rec, ok := state.Services.Get(f.snapshot, destination); ok {
			put(itemService, rec.Raw, rec.Revision)
		}
		for key, rec := range f.snapshot.InstancesOf(destination) {
			put(instanceItem(key), rec.Raw, rec.Revision)
			if status, revision, ok := f.status(set, key); ok {
				put(statusItem(key), status, revision)
			}
			if lease, ok := state.Leases.Get(f.snapshot, key.Node); ok {
				put(leaseItem(key.Node), lease.Raw, lease.Revision)
			}
		}
	})
	if changed {
		set.mark()
	}
}

func (f *feeds) syncService(name catalog.Name) {
	set, ok := f.endpoints[name]
	if !ok {
		return
	}
	rec, exists := state.Services.Get(f.snapshot, name)
	if set.sync(itemService, rec.Raw, rec.Revision, exists, f.revision()) {
		set.mark()
	}
}

func (f *feeds) syncInstance(key catalog.InstanceKey) {
	set, ok := f.endpoints[key.Service]
	if !ok {
		return
	}
	rec, exists := state.Instances.Get(f.snapshot, key)
	status, revision, has := f.status(set, key)
	changed := set.sync(instanceItem(key), rec.Raw, rec.Revision, exists, f.revision())
	changed = set.sync(statusItem(key), status, revision, exists && has, f.revision()) || changed
	if changed {
		set.mark()
	}
	f.syncLease(key.Service, key.Node)
}

// status is what callers are shown of an instance's state: what its agent observed,
// and the drain of an operator in it. Its revision never falls while it is shown,
// not even when a drain, which is newer than the rest, is taken back; one of another
// generation may be above all of this one's.
func (f *feeds) status(set *itemset, key catalog.InstanceKey) (raw []byte, revision uint64, ok bool) {
	rec, ok := state.InstanceStatuses.Get(f.snapshot, key)
	raw, revision = rec.Raw, rec.Revision
	if _, at, drained := f.snapshot.Drained(key); drained {
		shown := rec.Value
		if !ok || rec.Err != nil {
			shown = catalog.InstanceStatus{Health: catalog.HealthUnknown}
		}
		shown.Drain = true
		merged, err := json.Marshal(shown)
		if err != nil {
			f.log.Error("status can't be encoded", slog.String("instance", instanceItem(key)), slog.Any("error", err))
			return nil, 0, false
		}
		raw, revision, ok = merged, max(revision, at), true
	}
	if shown := set.get(statusItem(key)); ok && shown != nil && shown.revision > revision && shown.revision <= f.revision() {
		revision = shown.revision
		if !bytes.Equal(shown.json, raw) {
			revision = f.revision()
		}
	}
	return raw, revision, ok
}

// syncLease shows the lease of a node beside the instances on it. A lease that
// only moved to another stream is not shown again: a fleet that reconnects would
// have everybody told of everybody.
func (f *feeds) syncLease(service catalog.Name, node string) {
	set, ok := f.endpoints[service]
	if !ok {
		return
	}
	lease, exists := state.Leases.Get(f.snapshot, node)
	exists = exists && f.snapshot.Runs(node, service)
	if shown := set.get(leaseItem(node)); shown != nil && exists && lease.Err == nil {
		var before catalog.Lease
		if json.Unmarshal(shown.json, &before) == nil && before.Lost == lease.Value.Lost {
			return
		}
	}
	if set.sync(leaseItem(node), lease.Raw, lease.Revision, exists, f.revision()) {
		set.mark()
	}
}

// sync puts or drops one item.
func (s *itemset) sync(key string, json []byte, revision uint64, exists bool, now uint64) bool {
	if exists {
		return s.put(key, json, revision)
	}
	return s.drop(key, now)
}

// refillRoots compares the trust bundle with the one that is shown.
func (f *feeds) refillRoots() {
	bundle := f.authority.Bundle()
	if bundle.Equal(f.bundle) {
		return
	}
	f.bundle = bundle
	f.roots.refill(f.revision(), func(put func(string, []byte, uint64)) {
		for _, td := range bundle.TrustDomains() {
			pem, err := json.Marshal(map[string]string{"pem": string(bundle.PEM(td))})
			if err != nil {
				f.log.Error("roots can't be encoded", slog.String("trust_domain", td), slog.Any("error", err))
				continue
			}
			put(td, pem, f.revision())
		}
	})
	f.roots.mark()
}

// policy returns the compiled intentions of a destination at the snapshot. mu is
// held for reading at least.
func (f *feeds) policy(destination catalog.Name) *intentions.Policy {
	f.policyMu.Lock()
	defer f.policyMu.Unlock()
	if p, ok := f.policies[destination]; ok {
		return p
	}
	p, err := f.snapshot.Policy(f.trustDomain, destination)
	if err != nil {
		f.log.Error("destination is denied", slog.String("destination", destination.String()), slog.Any("error", err))
	}
	f.policies[destination] = p
	return p
}

func (f *feeds) open(st *stream) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.streams[st.caller.node] == nil {
		f.streams[st.caller.node] = make(map[*stream]struct{})
	}
	f.streams[st.caller.node][st] = struct{}{}
}

func (f *feeds) close(st *stream) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for key, sub := range st.subs {
		f.release(sub)
		delete(st.subs, key)
	}
	delete(f.streams[st.caller.node], st)
	if len(f.streams[st.caller.node]) == 0 {
		delete(f.streams, st.caller.node)
	}
}

// callers returns the sources of the upstream topics of a destination.
func (f *feeds) callers(destination catalog.Name) map[catalog.Name]bool {
	f.mu.RLock()
	defer f.mu.RUnlock()
	out := make(map[catalog.Name]bool)
	if set := f.endpoints[destination]; set != nil {
		for sub := range set.subs {
			out[sub.source] = true
		}
	}
	return out
}

// subscribe replaces the topics of a stream.
func (f *feeds) subscribe(st *stream, topics []*meshpb.Topic) error {
	wanted := make(map[topicKey]*subscription, len(topics))
	for _, topic := range topics {
		sub, err := newSubscription(st, topic)
		if err != nil {
			return fmt.Errorf("topic %s %q of %q: %w", topic.GetKind(), topic.GetName(), topic.GetSource(), err)
		}
		wanted[sub.key()] = sub
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for key, sub := range st.subs {
		if wanted[key] == nil {
			f.release(sub)
			delete(st.subs, key)
		}
	}
	for key, sub := range wanted {
		if st.subs[key] == nil {
			f.acquire(sub)
			st.subs[key] = sub
			st.mark(sub)
		}
	}
	return nil
}

// acquire attaches the subscription to its set, which is made if it is the first.
func (f *feeds) acquire(sub *subscription) {
	switch sub.topic.GetKind() {
	case topicRoots:
		sub.set = f.roots
	case topicServers:
		sub.set = f.servers
		f.fillServers() // the first snapshot brings no changes
	case topicNode:
		sub.set = obtain(f.specs, sub.stream.caller.node, f.fillSpec)
	case topicIntentions:
		sub.set = obtain(f.intentions, sub.destination, f.fillIntentions)
	case topicUpstream:
		sub.set = obtain(f.endpoints, sub.destination, f.fillEndpoints)
	default:
		sub.set = newItemset() // of a newer agent: stays empty
	}
	sub.set.subs[sub] = struct{}{}
}

func obtain[K comparable](sets map[K]*itemset, key K, fill func(K)) *itemset {
	if set, ok := sets[key]; ok {
		return set
	}
	set := newItemset()
	sets[key] = set
	fill(key)
	return set
}

// release detaches the subscription, and drops a set that nobody reads.
func (f *feeds) release(sub *subscription) {
	delete(sub.set.subs, sub)
	if len(sub.set.subs) > 0 {
		return
	}
	switch sub.topic.GetKind() {
	case topicNode:
		delete(f.specs, sub.stream.caller.node)
	case topicIntentions:
		delete(f.intentions, sub.destination)
	case topicUpstream:
		delete(f.endpoints, sub.destination)
		delete(f.policies, sub.destination)
	}
}
