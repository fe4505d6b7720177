package view

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	"github.com/meshd/meshd/agent/statedir"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/server/meshpb"
)

// Timings of the stream. The server's Welcome overrides the first two.
const (
	defaultHeartbeat = 2 * time.Second
	defaultLease     = 10 * time.Second
	// welcomeTimeout bounds everything up to the server's first message.
	welcomeTimeout = 10 * time.Second
	// connectTimeout bounds the connection to a server, handshake included. It is long,
	// for one to which a whole fleet connects is busy, and to begin anew would make it
	// busier. Config.Dial sees to a host that does not answer at all.
	connectTimeout = 15 * time.Second
	// step bounds the pause, which is random, before another server is tried.
	step       = 250 * time.Millisecond
	minBackoff = 250 * time.Millisecond
	maxBackoff = 5 * time.Second
	// saveRetry is how long a failed write of the cache rests.
	saveRetry = 5 * time.Second
	// saveAge is how much older the Alive on disk may be than the newest one.
	saveAge = time.Minute
)

// Config is what a View needs.
type Config struct {
	Log *slog.Logger
	// Dir is where the view is kept; nowhere if it is zero.
	Dir statedir.Dir
	// Dial returns a connection to the gRPC side of a server, lazily: it does
	// not block. The View closes it. It should give up on TCP within seconds.
	Dial func(server string) (*grpc.ClientConn, error)
	// Servers returns the addresses at which to begin, host:port. It is called
	// before every attempt. What the topic Servers tells is tried before.
	Servers func() []string
	// Hello returns the first message of a stream.
	Hello func() Hello
}

// Hello is what an agent says of itself.
type Hello struct {
	Session      string
	Version      string
	FeatureLevel int
	// Address is host:port of this node's mesh port.
	Address string
}

// Link is the connection to the server that holds this node's lease. Other
// calls go over it too, so that there is one server to look at.
type Link struct {
	Client meshpb.MeshClient
	Server string // the address
	ID     string // the server's name for itself
	Since  time.Time
}

// Applied is what one proxy of this host runs.
type Applied struct {
	Proxy           string
	Position        catalog.Position
	Refused         string
	RefusedPosition catalog.Position
	Closed          uint64
}

// Status is the state of the connection, for people.
type Status struct {
	// Server and ServerID are empty while disconnected.
	Server   string `json:"server,omitempty"`
	ServerID string `json:"server_id,omitempty"`
	// Since is when the connection was made, or lost.
	Since time.Time `json:"since"`
	// Error is why the last attempt failed; kept until one succeeds.
	Error    string           `json:"error,omitempty"`
	Attempts int              `json:"attempts,omitempty"`
	Position catalog.Position `json:"position"`
	// Alive is when a server last said that we hold all there is; zero: never.
	Alive time.Time `json:"alive,omitzero"`
	// Refused is the servers' reason if they refuse this node, rather than being
	// out of reach.
	Refused meshpb.Reason `json:"refused,omitempty"`
	// SaveError is why the newest view is not on disk.
	SaveError string `json:"save_error,omitempty"`
}

// View holds the newest values of the subscribed topics. It is safe for
// concurrent use.
type View struct {
	cfg Config

	mu        sync.Mutex
	snapshot  *Snapshot
	changed   chan struct{}
	dirty     bool // the snapshot has content that is not on disk
	alive     time.Time
	kept      time.Time // the Alive that is on disk
	wanted    []Topic
	wantedNew chan struct{} // closed when wanted changes
	applied   map[string]Applied
	unsent    map[string]bool
	link      *Link
	linkNew   chan struct{}
	hangUp    context.CancelCauseFunc // ends the present stream
	since     time.Time
	failure   string
	failures  map[string]string // by server, since the last connection
	refused   meshpb.Reason
	attempts  int
	saveError string
}

// New returns a View that holds nothing and is not connected.
func New(cfg Config) *View {
	return &View{
		cfg:       cfg,
		snapshot:  &Snapshot{},
		changed:   make(chan struct{}),
		wantedNew: make(chan struct{}),
		applied:   map[string]Applied{},
		unsent:    map[string]bool{},
		failures:  map[string]string{},
		linkNew:   make(chan struct{}),
		since:     time.Now(),
	}
}

// Snapshot returns what is held now; never nil.
func (v *View) Snapshot() *Snapshot {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.snapshot
}

// Changed returns a channel that is closed when a newer Snapshot is there. Get
// it before the Snapshot.
func (v *View) Changed() <-chan struct{} {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.changed
}

// announce wakes those who wait for Changed. v.mu is held.
func (v *View) announce() {
	close(v.changed)
	v.changed = make(chan struct{})
}

// Link returns the present connection, nil while there is none, and a channel
// that is closed when it changes.
func (v *View) Link() (*Link, <-chan struct{}) {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.link, v.linkNew
}

// Subscribe replaces the set of topics. What is held of a topic that is no
// longer in it goes when a server confirms the new set, so that a slip in a
// file costs nothing while no server can be reached.
func (v *View) Subscribe(topics []Topic) {
	topics = slices.Clone(topics)
	v.mu.Lock()
	defer v.mu.Unlock()
	if slices.Equal(topics, v.wanted) {
		return
	}
	v.wanted = topics
	close(v.wantedNew)
	v.wantedNew = make(chan struct{})
}

// Report tells the servers what a proxy runs now. The newest report of each
// proxy is sent, and sent again on every new stream.
func (v *View) Report(a Applied) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.applied[a.Proxy] == a {
		return
	}
	v.applied[a.Proxy] = a
	v.unsent[a.Proxy] = true
	close(v.wantedNew)
	v.wantedNew = make(chan struct{})
}

// Reconnect ends the present stream, if there is one, so that the next shows
// the node's newest certificate.
func (v *View) Reconnect() {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.hangUp != nil {
		v.hangUp(errRenewed)
	}
}

// Status describes the connection and how old the policy may be.
func (v *View) Status() Status {
	v.mu.Lock()
	defer v.mu.Unlock()
	s := Status{
		Since: v.since, Error: v.failure, Refused: v.refused, Attempts: v.attempts, Position: v.snapshot.Position(),
		Alive: v.alive, SaveError: v.saveError,
	}
	if v.link != nil {
		s.Server, s.ServerID, s.Since = v.link.Server, v.link.ID, v.link.Since
	}
	return s
}

// Age is how long ago a server last confirmed that what is held is all there
// is; the second result is false when none ever did.
func (v *View) Age() (time.Duration, bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	return max(0, time.Since(v.alive)), !v.alive.IsZero()
}

// Run holds one stream to one server until ctx ends: a random one of those that it
// knows. When that is lost, or refuses, it is another's turn, after a short and random
// pause; when all were tried, the pauses grow. Run returns nil. Call it once.
func (v *View) Run(ctx context.Context) error {
	var saver sync.WaitGroup
	saver.Go(func() { v.keep(ctx) })
	defer saver.Wait()
	var c course
	backoff, first := minBackoff, true
	for ctx.Err() == nil {
		server, again := c.next(told(v.Snapshot()), v.cfg.Servers(), time.Now())
		switch {
		case server == "":
			v.failed("", errors.New("no server is known"))
			fallthrough
		case again && !first:
			pause(ctx, backoff/2+rand.N(backoff/2)) //nolint:gosec // spreads load, guards nothing
			backoff = min(2*backoff, maxBackoff)
		case !first:
			pause(ctx, rand.N(step)) //nolint:gosec // spreads load, guards nothing
		}
		if server == "" || ctx.Err() != nil {
			continue
		}
		first = false
		welcomed, err := v.stream(ctx, server)
		if ctx.Err() != nil {
			break
		}
		if welcomed && errors.Is(err, errRenewed) {
			c.begin() // nothing is wrong with it, and agents spread anew
			backoff = minBackoff
			continue
		}
		v.failed(server, err)
		if welcomed {
			backoff = minBackoff
		}
		c.end(server, welcomed, time.Now())
	}
	v.setLink(nil)
	return nil
}

// failed records why there is no stream, and logs the first failure of each server
// and every change of its cause.
func (v *View) failed(server string, err error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.refused, _ = meshpb.ReasonOf(err)
	if s, ok := status.FromError(err); ok {
		err = fmt.Errorf("%s: %s", s.Code(), s.Message())
	}
	message := err.Error()
	if server != "" {
		message = server + ": " + message
	}
	if v.attempts == 0 {
		v.since = time.Now()
	}
	v.attempts++
	if v.failures[server] != message {
		v.cfg.Log.Warn("not connected to a server; what is held stays in force", slog.String("server", server), slog.Any("error", err),
			slog.Int("attempts", v.attempts))
	}
	v.failure, v.failures[server] = message, message
}

func (v *View) setLink(l *Link) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.link == l {
		return
	}
	if v.link != nil && l == nil {
		v.since = time.Now()
	}
	v.link = l
	if l != nil {
		v.failure, v.refused, v.attempts = "", "", 0
		clear(v.failures)
	}
	close(v.linkNew)
	v.linkNew = make(chan struct{})
}

// set puts a new snapshot in place. Only content is worth a write to disk.
func (v *View) set(s *Snapshot, content bool, alive time.Time) {
	v.mu.Lock()
	defer v.mu.Unlock()
	// The first word of a server is worth a write: until it is on disk, a
	// restart would not know how old the policy is.
	first := v.alive.IsZero() && !alive.IsZero()
	moved := content || first || s.Position() != v.snapshot.Position()
	v.snapshot = s
	v.dirty = v.dirty || content
	if !alive.IsZero() {
		v.alive = alive
	}
	if moved {
		v.announce()
	}
}

// keep writes the newest content to disk whenever it changed, the newest Alive
// now and then, and both once more at the end.
func (v *View) keep(ctx context.Context) {
	defer v.save(0)
	ticker := time.NewTicker(saveAge)
	defer ticker.Stop()
	for {
		changed := v.Changed()
		var again <-chan time.Time
		if !v.save(saveAge) {
			again, changed = time.After(saveRetry), nil
		}
		select {
		case <-ctx.Done():
			return
		case <-changed:
		case <-again:
		case <-ticker.C:
		}
	}
}

func pause(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
}
