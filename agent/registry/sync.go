package registry

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/meshpb"
)

const (
	registerTimeout = 10 * time.Second
	minBackoff      = 250 * time.Millisecond
	maxBackoff      = 15 * time.Second
	// repeat is how often the set is sent though nothing changed: repeating is
	// free, and makes good whatever happened to the servers' records.
	repeat = 5 * time.Minute
)

// Registrations turns definitions into what a server registers. zone is the
// node's, empty if it is not known. serverName is the grammar of the mesh's server names; health tells the status of an
// instance by Key.
func Registrations(definitions []catalog.Definition, node, zone, meshAddress string,
	serverName func(port, instance, service, namespace string) string, health func(key string) catalog.InstanceStatus,
) ([]*meshpb.Registration, error) {
	all := make([]*meshpb.Registration, 0, len(definitions))
	for _, d := range definitions {
		instance := d.Instance(node, meshAddress)
		instance.Zone = zone
		ref := instance.Ref()
		for i := range instance.Ports {
			instance.Ports[i].ServerName = serverName(instance.Ports[i].Name, instance.ID, ref.Name, ref.Namespace)
		}
		r := &meshpb.Registration{}
		for _, part := range []struct {
			to    *[]byte
			value any
		}{{&r.Service, d.Service()}, {&r.Instance, instance}, {&r.Status, health(Key(d))}} {
			data, err := json.Marshal(part.value)
			if err != nil {
				return nil, fmt.Errorf("register %s: %w", Key(d), err)
			}
			*part.to = data
		}
		all = append(all, r)
	}
	return all, nil
}

// SyncConfig is what a Syncer needs.
type SyncConfig struct {
	Log *slog.Logger
	// Session is that of the stream's Hello: a server registers nothing for one that
	// has left.
	Session string
	// Link returns a client of the server to register with, nil while there is
	// none, and a channel that is closed when that changes.
	Link func() (meshpb.MeshClient, <-chan struct{})
}

// Refusal says why a server did not register an instance.
type Refusal struct {
	Service  string `json:"service"`
	Instance string `json:"instance"`
	Reason   string `json:"reason"`
}

// SyncStatus is how far the servers' records follow this host.
type SyncStatus struct {
	// Current says that a server has what this host registered last.
	Current  bool             `json:"current"`
	Position catalog.Position `json:"position,omitzero"`
	At       time.Time        `json:"at,omitzero"`
	Error    string           `json:"error,omitempty"`
	Refusals []Refusal        `json:"refusals,omitempty"`
}

// Syncer keeps the servers' records of this host equal to a set. It is safe
// for concurrent use.
type Syncer struct {
	cfg SyncConfig

	mu      sync.Mutex
	set     *meshpb.RegisterRequest // nil until Set: nothing is sent before
	status  SyncStatus
	paused  bool
	sending bool
	changed chan struct{} // closed when there is something to send
	done    chan struct{} // closed when status changes
}

// NewSyncer returns a Syncer that has nothing to send.
func NewSyncer(cfg SyncConfig) *Syncer {
	return &Syncer{cfg: cfg, changed: make(chan struct{}), done: make(chan struct{})}
}

// Set replaces the set. The same set again is not sent.
func (s *Syncer) Set(all []*meshpb.Registration) {
	next := &meshpb.RegisterRequest{Registrations: all, Session: s.cfg.Session}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.set != nil && proto.Equal(s.set, next) {
		return
	}
	s.set, s.status.Current = next, false
	s.wake()
}

// Retry sends the set again, because something changed that a server refused
// it for.
func (s *Syncer) Retry() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.wake()
}

// Pause keeps everything from being sent until Resume, and returns once nothing is
// under way: what is asked of a server then comes after it has answered. If ctx ends
// before, nothing is paused.
func (s *Syncer) Pause(ctx context.Context) error {
	s.mu.Lock()
	s.paused = true
	for s.sending {
		done := s.done
		s.mu.Unlock()
		select {
		case <-done:
		case <-ctx.Done():
			s.Resume()
			return fmt.Errorf("wait for a registration that is under way: %w", context.Cause(ctx))
		}
		s.mu.Lock()
	}
	s.mu.Unlock()
	return nil
}

// Resume undoes Pause.
func (s *Syncer) Resume() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.paused = false
	s.wake()
}

func (s *Syncer) wake() {
	close(s.changed)
	s.changed = make(chan struct{})
}

// Status returns the state, and a channel that is closed when it changes.
func (s *Syncer) Status() (SyncStatus, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.status, s.done
}

// Run sends the set whenever it changes, on every new connection, and after a
// failure or a refusal with growing and jittered pauses, until ctx ends. It
// returns nil. Call it once.
func (s *Syncer) Run(ctx context.Context) error {
	backoff := minBackoff
	for {
		client, relinked := s.cfg.Link()
		s.mu.Lock()
		set, changed := s.set, s.changed
		s.sending = set != nil && client != nil && !s.paused
		send := s.sending
		s.mu.Unlock()
		var again <-chan time.Time
		if send {
			if s.send(ctx, client, set) {
				backoff = minBackoff
				again = time.After(jitter(repeat))
			} else {
				again = time.After(jitter(backoff))
				backoff = min(2*backoff, maxBackoff)
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-relinked:
		case <-again:
		}
	}
}

// jitter returns half of d to one and a half, so that hosts spread.
func jitter(d time.Duration) time.Duration {
	return d/2 + rand.N(d) //nolint:gosec // spreads load, guards nothing
}

// send registers once; it reports whether everything was accepted.
func (s *Syncer) send(ctx context.Context, client meshpb.MeshClient, set *meshpb.RegisterRequest) bool {
	ctx, cancel := context.WithTimeout(ctx, registerTimeout)
	defer cancel()
	resp, err := client.Register(ctx, set)
	s.mu.Lock()
	defer s.mu.Unlock()
	defer func() {
		s.sending = false
		close(s.done)
		s.done = make(chan struct{})
	}()
	if err != nil {
		if s.status.Error != err.Error() && ctx.Err() == nil {
			s.cfg.Log.WarnContext(ctx, "not registered; trying again", slog.Any("error", err))
		}
		s.status.Error, s.status.Current = err.Error(), false
		return false
	}
	refusals := make([]Refusal, 0, len(resp.GetRefusals()))
	for _, wire := range resp.GetRefusals() {
		r := Refusal{Service: wire.GetService(), Instance: wire.GetInstance(), Reason: wire.GetReason()}
		refusals = append(refusals, r)
		if !slices.Contains(s.status.Refusals, r) {
			s.cfg.Log.ErrorContext(ctx, "a server refuses to register an instance", slog.String("service", r.Service),
				slog.String("instance", r.Instance), slog.String("reason", r.Reason))
		}
	}
	s.status = SyncStatus{
		Current: s.set == set, At: time.Now(), Refusals: refusals,
		Position: catalog.Position{Generation: resp.GetPosition().GetGeneration(), Revision: resp.GetPosition().GetRevision()},
	}
	return len(refusals) == 0
}
