// Package leaf keeps the certificates of a host fresh: that of the node, and
// one for each service that runs here.
//
// Keys are made here and never leave but to the host's own proxy. A leaf is
// renewed at half of its life; while that fails, the old one stays in use to
// its end, and at a quarter of its life left there is an alarm. Leaves are on
// disk before they are used, so that a restart needs no server.
package leaf

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/status"

	"github.com/meshd/meshd/agent/statedir"
	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/server/meshpb"
)

const (
	signTimeout = 10 * time.Second
	minBackoff  = time.Second
	maxBackoff  = time.Minute
	// alarmShare is the part of a leaf's life that is left when the alarm is
	// raised: renewal has failed for a quarter of it by then.
	alarmShare = 4
	// suffix of the files; each holds a sealed PEM of chain and key.
	suffix   = ".pem"
	nodeFile = "node" + suffix
)

// ErrIssued is wrapped when a server issued something else than was asked for.
var ErrIssued = errors.New("the server issued an unusable certificate")

// Config is what a Manager needs.
type Config struct {
	Log *slog.Logger
	// Dir is where leaves are kept; nothing else may be in it.
	Dir statedir.Dir
	// Link returns a client of the server to ask, nil while there is none, and
	// a channel that is closed when that changes.
	Link func() (meshpb.MeshClient, <-chan struct{})
	// Bundle returns the roots that a new leaf must chain to.
	Bundle func() ca.Bundle
}

// Status is the state of one identity's leaf.
type Status struct {
	ID spiffe.ID `json:"id"`
	// NotAfter is the end of the leaf in use; zero: there is none.
	NotAfter time.Time `json:"not_after,omitzero"`
	RenewAt  time.Time `json:"renew_at,omitzero"`
	// Alarm says that renewal failed until three quarters of the leaf's life
	// were over, or that there is no leaf.
	Alarm bool `json:"alarm,omitzero"`
	// Refused says that the server does not allow this host the identity. A
	// leaf that is there stays in use to its end.
	Refused bool   `json:"refused,omitzero"`
	Error   string `json:"error,omitempty"`
}

// Manager holds the leaves of a host. It is safe for concurrent use.
type Manager struct {
	cfg Config

	mu      sync.Mutex
	entries map[spiffe.ID]*entry
	wanted  map[spiffe.ID]bool
	retries uint64 // calls of Retry
	changed chan struct{}
	wake    chan struct{}
}

// entry is one identity.
type entry struct {
	leaf    *ca.Leaf // nil: none that is valid
	renewAt time.Time
	alarmed bool
	// After a failure:
	err     string
	refused bool
	backoff time.Duration
	retryAt time.Time
}

// New returns a Manager without leaves.
func New(cfg Config) *Manager {
	return &Manager{
		cfg: cfg, entries: map[spiffe.ID]*entry{}, wanted: map[spiffe.ID]bool{},
		changed: make(chan struct{}), wake: make(chan struct{}, 1),
	}
}

// Load reads the leaves on disk. One that is damaged or over is ignored: a new
// one will be asked for. An error means that the directory can't be read.
func (m *Manager) Load() error {
	names, err := m.cfg.Dir.Names(suffix)
	if err != nil {
		return fmt.Errorf("load leaves: %w", err)
	}
	for _, name := range names {
		data, err := m.cfg.Dir.Read(name)
		if errors.Is(err, statedir.ErrTooOpen) {
			return fmt.Errorf("load leaves: %w", err)
		}
		var l *ca.Leaf
		if err == nil {
			l, err = ca.ParseLeafPEM(ca.NewSecret(data))
		}
		if err == nil && fileOf(l.ID()) != name {
			err = fmt.Errorf("it belongs to %s", l.ID())
		}
		if err != nil {
			m.cfg.Log.Error("a kept certificate is ignored, a new one will be asked for", slog.String("file", m.cfg.Dir.Path(name)), slog.Any("error", err))
			continue
		}
		m.adopt(l)
	}
	return nil
}

// Adopt takes a leaf that was got elsewhere, by joining, if it lasts longer
// than the one that is held, and keeps it on disk.
func (m *Manager) Adopt(l *ca.Leaf) error {
	if held := m.Leaf(l.ID()); held != nil && !l.NotAfter().After(held.NotAfter()) {
		return nil
	}
	if err := m.store(l); err != nil {
		return err
	}
	m.adopt(l)
	return nil
}

func (m *Manager) store(l *ca.Leaf) error {
	pem, err := l.PEM()
	if err != nil {
		return fmt.Errorf("keep the certificate of %s: %w", l.ID(), err)
	}
	if err := m.cfg.Dir.Write(fileOf(l.ID()), pem.Reveal()); err != nil {
		return fmt.Errorf("keep the certificate of %s: %w", l.ID(), err)
	}
	return nil
}

// adopt puts a leaf in use unless its time is over.
func (m *Manager) adopt(l *ca.Leaf) {
	if !time.Now().Before(l.NotAfter()) {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.entries[l.ID()] = &entry{leaf: l, renewAt: l.RenewAt(rand.Float64())} //nolint:gosec // spreads load, guards nothing
	m.announce()
	m.poke()
}

func (m *Manager) announce() {
	close(m.changed)
	m.changed = make(chan struct{})
}

func (m *Manager) poke() {
	select {
	case m.wake <- struct{}{}:
	default:
	}
}

// fileOf names the file of an identity. Names are DNS labels, so a dot parts
// them without doubt.
func fileOf(id spiffe.ID) string {
	if id.Kind == spiffe.KindNode {
		return nodeFile
	}
	return "service." + id.Namespace + "." + id.Name + suffix
}

// Want replaces the set of identities to hold leaves of. Those that are not in
// it are dropped, from disk too.
func (m *Manager) Want(ids []spiffe.ID) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.wanted = make(map[spiffe.ID]bool, len(ids))
	for _, id := range ids {
		m.wanted[id] = true
		if m.entries[id] == nil {
			m.entries[id] = &entry{}
		}
	}
	for id := range m.entries {
		if m.wanted[id] {
			continue
		}
		delete(m.entries, id)
		if err := m.cfg.Dir.Remove(fileOf(id)); err != nil {
			m.cfg.Log.Error("the certificate of a service that is gone stays on disk", slog.Any("error", err))
		}
	}
	m.announce()
	m.poke()
}

// Retry asks again at once for what failed: something changed on the servers.
func (m *Manager) Retry() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.retries++
	for _, e := range m.entries {
		e.retryAt = time.Time{}
	}
	m.poke()
}

// Leaf returns the valid leaf of an identity, nil if there is none.
func (m *Manager) Leaf(id spiffe.ID) *ca.Leaf {
	m.mu.Lock()
	defer m.mu.Unlock()
	if e := m.entries[id]; e != nil && e.leaf != nil && time.Now().Before(e.leaf.NotAfter()) {
		return e.leaf
	}
	return nil
}

// Services returns the valid leaves of services, sorted by identity: what the
// host's proxy presents.
func (m *Manager) Services() []*ca.Leaf {
	m.mu.Lock()
	defer m.mu.Unlock()
	var all []*ca.Leaf
	for _, id := range m.sorted() {
		if l := m.entries[id].leaf; l != nil && id.Kind == spiffe.KindService && m.wanted[id] && time.Now().Before(l.NotAfter()) {
			all = append(all, l)
		}
	}
	return all
}

// sorted returns the identities in order. m.mu is held.
func (m *Manager) sorted() []spiffe.ID {
	return slices.SortedFunc(maps.Keys(m.entries), func(a, b spiffe.ID) int {
		return cmp.Or(cmp.Compare(a.Kind, b.Kind), strings.Compare(a.String(), b.String()))
	})
}

// Changed returns a channel that is closed when a leaf comes or goes, or a
// Status changes. Get it before them.
func (m *Manager) Changed() <-chan struct{} {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.changed
}

// Status returns the state of every wanted identity, services first.
func (m *Manager) Status() []Status {
	m.mu.Lock()
	defer m.mu.Unlock()
	var all []Status
	for _, id := range m.sorted() {
		e := m.entries[id]
		if !m.wanted[id] {
			continue
		}
		s := Status{ID: id, Refused: e.refused, Error: e.err, Alarm: e.leaf == nil || e.alarmed}
		if e.leaf != nil {
			s.NotAfter, s.RenewAt = e.leaf.NotAfter(), e.renewAt
		}
		all = append(all, s)
	}
	return all
}

// Run renews leaves and gets missing ones until ctx ends. It returns nil. Call
// it once.
func (m *Manager) Run(ctx context.Context) error {
	for {
		client, relinked := m.cfg.Link()
		due, next := m.due(time.Now())
		if client != nil {
			for _, id := range due {
				m.renew(ctx, client, id)
			}
			if len(due) > 0 && ctx.Err() == nil {
				continue
			}
		}
		timer := time.NewTimer(next)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-relinked:
			m.Retry()
		case <-m.wake:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// due returns the identities to ask for now, node first, and when to look
// again. On the way it drops what is over and raises alarms.
func (m *Manager) due(now time.Time) ([]spiffe.ID, time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	next := now.Add(time.Hour)
	sooner := func(t time.Time) {
		if t.After(now) && t.Before(next) {
			next = t
		}
	}
	var due []spiffe.ID
	for _, id := range m.sorted() {
		e := m.entries[id]
		if !m.wanted[id] {
			continue
		}
		m.age(id, e, now)
		if e.leaf != nil {
			sooner(e.leaf.NotAfter())
			sooner(alarmAt(e.leaf))
		}
		if at := later(e.renewAt, e.retryAt); now.Before(at) {
			sooner(at)
			continue
		}
		due = append(due, id)
	}
	slices.Reverse(due)
	return due, next.Sub(now)
}

// age drops a leaf whose time is over and raises the alarm before. m.mu is
// held.
func (m *Manager) age(id spiffe.ID, e *entry, now time.Time) {
	switch {
	case e.leaf == nil:
	case !now.Before(e.leaf.NotAfter()):
		m.cfg.Log.Error("a certificate is over and could not be renewed: this identity can't be used", slog.String("id", id.String()),
			slog.Time("not_after", e.leaf.NotAfter()), slog.String("error", e.err))
		e.leaf, e.renewAt = nil, time.Time{}
		m.announce()
	case !e.alarmed && !now.Before(alarmAt(e.leaf)):
		m.cfg.Log.Error("a certificate could not be renewed for a quarter of its life", slog.String("id", id.String()),
			slog.Time("not_after", e.leaf.NotAfter()), slog.String("error", e.err))
		e.alarmed = true
		m.announce()
	}
}

// alarmAt is when a quarter of the leaf's life is left.
func alarmAt(l *ca.Leaf) time.Time {
	life := l.NotAfter().Sub(l.NotBefore().Add(ca.Backdate))
	return l.NotAfter().Add(-max(0, life) / alarmShare)
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// renew asks for one leaf, and records what became of it.
func (m *Manager) renew(ctx context.Context, client meshpb.MeshClient, id spiffe.ID) {
	m.mu.Lock()
	retries := m.retries
	m.mu.Unlock()
	l, err := m.sign(ctx, client, id)
	if ctx.Err() != nil {
		return
	}
	if err == nil {
		err = m.store(l)
	}
	if err == nil {
		m.cfg.Log.InfoContext(ctx, "new certificate", slog.String("id", id.String()), slog.Time("not_after", l.NotAfter()))
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	e := m.entries[id]
	if e == nil {
		return // not wanted any more
	}
	defer m.announce()
	if err != nil && l != nil && (e.leaf == nil || e.alarmed) {
		// The disk fails, and time runs out: better a leaf that a restart would
		// lose than none. Until it is kept, asking goes on.
		e.leaf, e.alarmed = l, false
	}
	if err == nil {
		m.entries[id] = &entry{leaf: l, renewAt: l.RenewAt(rand.Float64())} //nolint:gosec // spreads load, guards nothing
		return
	}
	reason, _ := meshpb.ReasonOf(err)
	switch {
	case e.err == status.Convert(err).Message():
	case reason == meshpb.ReasonNotRegistered && e.leaf == nil:
		// Registration is under way: it is asked for again when it is done.
		m.cfg.Log.DebugContext(ctx, "no certificate before the service is registered", slog.String("id", id.String()))
	default:
		m.cfg.Log.WarnContext(ctx, "no new certificate; one that is there stays in use to its end", slog.String("id", id.String()),
			slog.Any("error", err), slog.Bool("have_old", e.leaf != nil))
	}
	e.err, e.refused = status.Convert(err).Message(), reason == meshpb.ReasonNotPermitted
	if m.retries != retries { // what it failed for may have changed since it was asked
		m.poke()
		return
	}
	e.backoff = min(max(2*e.backoff, minBackoff), maxBackoff)
	e.retryAt = time.Now().Add(e.backoff/2 + rand.N(e.backoff)) //nolint:gosec // spreads load, guards nothing
}

// sign makes a key and gets a leaf for it. What the server sends must be what
// was asked for, and good for peers.
func (m *Manager) sign(ctx context.Context, client meshpb.MeshClient, id spiffe.ID) (*ca.Leaf, error) {
	ctx, cancel := context.WithTimeout(ctx, signTimeout)
	defer cancel()
	key, err := ca.GenerateKey()
	if err != nil {
		return nil, err
	}
	csr, err := ca.NewCSR(key)
	if err != nil {
		return nil, err
	}
	resp, err := client.Sign(ctx, &meshpb.SignRequest{Id: id.String(), Csr: csr})
	if err != nil {
		return nil, err
	}
	_, _, err = ca.VerifyPeer(m.cfg.Bundle(), resp.GetChain(), time.Now(), x509.ExtKeyUsageClientAuth, ca.Expect(id))
	if err != nil {
		return nil, fmt.Errorf("%w for %s: %w", ErrIssued, id, err)
	}
	chain, err := ca.ParseChain(resp.GetChain())
	if err != nil {
		return nil, fmt.Errorf("%w for %s: %w", ErrIssued, id, err)
	}
	l, err := ca.NewLeaf(chain, key)
	if err != nil {
		return nil, fmt.Errorf("%w for %s: %w", ErrIssued, id, err)
	}
	return l, nil
}
