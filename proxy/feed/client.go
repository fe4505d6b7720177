package feed

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	mathrand "math/rand/v2"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/proxy"
)

const (
	// minRetry and maxRetry bound the wait before the agent's socket is tried again. It is a local socket: trying is cheap,
	// and a restarted agent should not wait for its proxy.
	minRetry = 50 * time.Millisecond
	maxRetry = time.Second
	// defaultAloneAfter leaves an agent that is there the time to send its plan, and serves within 500 ms of a crash if not.
	defaultAloneAfter = 250 * time.Millisecond
)

// A Handler runs the plans. Its methods are called from one goroutine.
type Handler interface {
	// Apply takes an update whole, or refuses it with an error and goes on as before.
	Apply(ctx context.Context, u Update) (Result, error)
	// SetState is called when the agent wants the process active or draining. It must not block.
	SetState(to State)
}

// Update is all that a proxy is to run, not a difference.
type Update struct {
	Config proxy.Config
	Keys   []*ca.Leaf
	// Sockets are the listening sockets at hand, by listener name. They stay the Client's, and may be closed once Apply
	// returned: a handler duplicates what it uses (as net.FileListener does). A listener that has none can't be opened now.
	Sockets map[string]*os.File
	// Alone says that there was no agent, and that the plan is from the disk.
	Alone bool
}

// Result tells what an update did.
type Result struct {
	// Closed is how many live connections and streams the update cut.
	Closed uint64
	// Open is how many connections are open.
	Open int
}

// ClientConfig configures a Client.
type ClientConfig struct {
	// Socket is the path of the agent's feed. Required.
	Socket string
	// Proxy is the ID of this proxy. Required.
	Proxy string
	// Version and FeatureLevel are reported to the agent.
	Version      string
	FeatureLevel int
	// Log is required.
	Log *slog.Logger
	// Watcher answers the agent's queries; nil answers none.
	Watcher Watcher
	// Cache keeps plan and keys; nil keeps nothing.
	Cache *DiskCache
	// Sockets are listening sockets that another process left, by listener name; the Client takes them.
	Sockets map[string]*os.File
	// State is that in which the process begins; Active unless set.
	State State
	// Restart, if not nil, is called when the agent wants another process in the place of this one. It must not block; done is to be
	// called once, from any goroutine, with the PID of the process that serves now, or why there is none.
	Restart func(done func(pid int, err error))
	// AloneAfter is how long to wait for an agent's plan before the one on disk is used; 250 ms.
	AloneAfter time.Duration
}

// Client is mesh-proxy's side.
type Client struct {
	cfg     ClientConfig
	session string
	told    chan struct{} // has room for one: there is something to tell

	mu        sync.Mutex
	state     SetTo // as of Report
	restarted []Restarted

	// What follows is touched by the goroutine of Run only.
	parts   map[string]proxy.Part // of the plan in force
	config  proxy.Config
	keys    map[spiffe.ID]clientKey
	sockets map[string]*clientSocket
	running bool // a plan was taken
	alone   bool
	// cached is the plan on disk, until one is in force.
	cached  []proxy.Part
	pending *pendingPlan
	conn    *conn
	failed  map[string]string // by listener: why it could not be opened
	// answering are the queries that are being answered, each with what ends it; pieces are what is to be sent.
	answering map[uint64]context.CancelFunc
	pieces    chan Answer
	answers   sync.WaitGroup
}

type clientKey struct {
	key  Key
	leaf *ca.Leaf
}

// clientSocket is a listening socket; own says that no agent that is there passed it.
type clientSocket struct {
	file *os.File
	own  bool
}

// pendingPlan collects the frames of one plan.
type pendingPlan struct {
	parts map[string]proxy.Part
	seq   uint64
}

// NewClient returns a client that does nothing until Run.
func NewClient(cfg ClientConfig) *Client {
	if cfg.AloneAfter == 0 {
		cfg.AloneAfter = defaultAloneAfter
	}
	c := &Client{
		cfg: cfg, session: rand.Text(), told: make(chan struct{}, 1), parts: map[string]proxy.Part{},
		keys: map[spiffe.ID]clientKey{}, sockets: map[string]*clientSocket{},
		failed: map[string]string{}, answering: map[uint64]context.CancelFunc{}, pieces: make(chan Answer),
	}
	c.state.To = cmp.Or(cfg.State, Active)
	for name, file := range cfg.Sockets {
		c.sockets[name] = &clientSocket{file: file, own: true}
	}
	return c
}

// Session returns the name of this process in the agent's status.
func (c *Client) Session() string { return c.session }

// event is what the goroutine that holds the link tells the one that holds the state.
type event struct {
	conn  *conn // a new session, or nil
	frame Frame
	files []*os.File
	err   error // the session ended, or could not start
}

// Run attaches to the agent, again and again for as long as it takes, and hands h every plan. Without an agent it boots from
// the cache and opens the sockets itself. It blocks, returns nil after ctx ends, and an error only if the cache may be read by
// others. It does not end what h runs. Call it once.
func (c *Client) Run(ctx context.Context, h Handler) error {
	if c.cfg.Cache != nil {
		if err := c.cfg.Cache.CheckMode(); err != nil {
			return err
		}
		c.loadCache(ctx)
	}
	defer c.closeSockets()
	events := make(chan event)
	// The link outlives the loop, which says goodbye over it.
	linkCtx, unlink := context.WithCancel(context.WithoutCancel(ctx))
	var g errgroup.Group
	g.Go(func() error { return c.link(linkCtx, events) })
	g.Go(func() error {
		defer unlink()
		return c.loop(ctx, h, events)
	})
	return g.Wait()
}

// Report tells the agent what this process does with new connections, at once or as soon as one attaches. A process that drains
// gives its sockets away for good. It does not block, and may be called from any goroutine.
func (c *Client) Report(state SetTo) {
	c.mu.Lock()
	c.state = state
	c.mu.Unlock()
	c.wake()
}

func (c *Client) wake() {
	select {
	case c.told <- struct{}{}:
	default:
	}
}

// tell writes what the agent is to know.
func (c *Client) tell(ctx context.Context) {
	c.mu.Lock()
	state, restarted := c.state, c.restarted
	c.restarted = nil
	c.mu.Unlock()
	if state.To == Draining {
		// Others accept from these, or nobody: then who connects shall be refused, not wait for an answer that never comes.
		c.closeSockets()
	}
	c.write(ctx, Frame{State: &state}, nil)
	for _, r := range restarted {
		c.write(ctx, Frame{Restarted: &r}, nil)
	}
}

// restart asks for another process.
func (c *Client) restart(id uint64) {
	done := func(pid int, err error) {
		r := Restarted{ID: id, PID: pid}
		if err != nil {
			r.Error = err.Error()
		}
		c.mu.Lock()
		c.restarted = append(c.restarted, r)
		c.mu.Unlock()
		c.wake()
	}
	if c.cfg.Restart == nil {
		done(0, errors.New("this process can't start another one"))
		return
	}
	c.cfg.Restart(done)
}

// loop owns the state: it turns events into updates.
func (c *Client) loop(ctx context.Context, h Handler, events <-chan event) error {
	defer c.answers.Wait()
	defer c.forgetQueries()
	alone := time.NewTimer(c.cfg.AloneAfter)
	defer alone.Stop()
	// A plan from disk may have sockets that could not be opened; another process may have let go of them since.
	retry := time.NewTicker(maxRetry)
	defer retry.Stop()
	for {
		select {
		case <-ctx.Done():
			c.tell(ctx)
			c.bye()
			return nil
		case <-c.told:
			c.tell(ctx)
		case <-alone.C:
			c.bootAlone(ctx, h)
		case <-retry.C:
			if c.alone && c.conn == nil && c.now() != Draining && c.openMissing(ctx) {
				c.apply(ctx, h, c.config)
			}
		case a := <-c.pieces:
			c.piece(ctx, a)
		case ev := <-events:
			switch {
			case ev.conn != nil:
				c.attached(ctx, ev.conn)
			case ev.err != nil:
				c.detached(ctx, ev.err)
				c.bootAlone(ctx, h)
			default:
				c.frame(ctx, h, ev)
			}
		}
	}
}

// link dials, reads frames and passes them on, for ever. Every session is closed here.
func (c *Client) link(ctx context.Context, events chan<- event) error {
	wait := minRetry
	for ctx.Err() == nil {
		started := time.Now()
		err := c.readSession(ctx, events)
		if time.Since(started) > maxRetry {
			wait = minRetry
		}
		select {
		case events <- event{err: err}:
		case <-ctx.Done():
			return nil
		}
		select {
		case <-time.After(wait/2 + mathrand.N(wait)): //nolint:gosec // jitter
		case <-ctx.Done():
		}
		wait = min(2*wait, maxRetry)
	}
	return nil
}

func (c *Client) readSession(ctx context.Context, events chan<- event) error {
	var d net.Dialer
	nc, err := d.DialContext(ctx, "unix", c.cfg.Socket)
	if err != nil {
		return fmt.Errorf("attach to the agent: %w", err)
	}
	uc, ok := nc.(*net.UnixConn)
	if !ok {
		_ = nc.Close()
		return fmt.Errorf("attach to the agent: %s is no unix socket", c.cfg.Socket)
	}
	conn := newConn(uc)
	defer conn.close()
	stop := context.AfterFunc(ctx, func() { _ = uc.SetReadDeadline(time.Now()) })
	defer stop()
	ev := event{conn: conn}
	for {
		select {
		case events <- ev:
		case <-ctx.Done():
			closeFiles(ev.files)
			return nil
		}
		f, files, err := conn.read()
		if err != nil {
			return fmt.Errorf("read from the agent: %w", err)
		}
		ev = event{frame: f, files: files}
	}
}

// attached greets the agent.
func (c *Client) attached(ctx context.Context, conn *conn) {
	c.conn, c.pending = conn, nil
	hello := Hello{
		Proxy: c.cfg.Proxy, Session: c.session, PID: os.Getpid(), Version: c.cfg.Version, FeatureLevel: c.cfg.FeatureLevel,
		State: c.now(), Parts: map[string]string{}, Keys: map[string]string{}, Applied: c.config.Position,
		Watches: c.cfg.Watcher != nil, Restarts: c.cfg.Restart != nil,
	}
	for key, p := range c.parts {
		hello.Parts[key] = p.Hash
	}
	for id, k := range c.keys {
		hello.Keys[id.String()] = k.key.hash()
	}
	c.write(ctx, Frame{Hello: &hello}, nil)
	if hello.State == Draining {
		c.tell(ctx) // until when, too
	}
	// An agent that was started anew has none of the sockets that the one before passed: they are as good as our own until it
	// passes them again.
	for _, s := range c.sockets {
		s.own = true
	}
	c.offer(ctx)
	c.cfg.Log.LogAttrs(ctx, slog.LevelInfo, "attached to the agent")
}

// now returns what Report was told last.
func (c *Client) now() State {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.state.To
}

func (c *Client) detached(ctx context.Context, err error) {
	if c.conn != nil {
		c.cfg.Log.LogAttrs(ctx, slog.LevelWarn, "agent is gone, the last plan stays in force", slog.Any("error", err))
	}
	c.conn, c.pending = nil, nil
	c.forgetQueries()
}

// write sends a frame, and gives the session up if it can't: the reader notices and reports it.
func (c *Client) write(ctx context.Context, f Frame, files []*os.File) {
	if c.conn == nil {
		return
	}
	if err := c.conn.write(f, files); err != nil {
		c.cfg.Log.LogAttrs(ctx, slog.LevelWarn, "agent could not be written to", slog.Any("error", err))
		_ = c.conn.uc.Close()
	}
}

func (c *Client) bye() {
	if c.conn != nil {
		_ = c.conn.write(Frame{Bye: &Bye{}}, nil)
		_ = c.conn.uc.Close()
	}
}

// frame acts on one message of the agent.
func (c *Client) frame(ctx context.Context, h Handler, ev event) {
	f := ev.frame
	switch {
	case f.Plan != nil:
		c.plan(ctx, h, f.Plan)
	case f.Keys != nil:
		err := c.takeKeys(f.Keys)
		if c.running {
			c.apply(ctx, h, c.config)
		}
		if err != nil {
			c.answer(ctx, Applied{Refused: err.Error()})
		}
		c.saveKeys(ctx)
	case f.Sockets != nil:
		c.takeSockets(f.Sockets, ev.files)
		if c.running {
			c.apply(ctx, h, c.config)
		}
	case f.State != nil:
		h.SetState(f.State.To)
	case f.Query != nil:
		c.query(ctx, f.Query)
	case f.Restart != nil:
		c.restart(f.Restart.ID)
	default:
		closeFiles(ev.files)
		c.cfg.Log.LogAttrs(ctx, slog.LevelWarn, "agent sent what only a proxy sends")
	}
}

func (c *Client) plan(ctx context.Context, h Handler, p *Plan) {
	if c.pending == nil || c.pending.seq != p.Seq {
		c.pending = &pendingPlan{parts: maps.Clone(c.parts), seq: p.Seq}
	}
	for _, key := range p.Drop {
		delete(c.pending.parts, key)
	}
	for _, part := range p.Put {
		c.pending.parts[part.Key()] = part
	}
	if p.More {
		return
	}
	parts := c.pending.parts
	c.pending = nil
	alone := c.alone
	c.alone = false
	res, err := c.take(ctx, h, parts)
	if err != nil {
		c.alone = alone
		c.cfg.Log.LogAttrs(ctx, slog.LevelError, "plan refused, the last good one stays in force",
			slog.String("position", p.Position.String()), slog.Any("error", err))
		c.answer(ctx, Applied{Seq: p.Seq, Refused: err.Error(), RefusedPosition: p.Position})
		return
	}
	c.answer(ctx, Applied{Seq: p.Seq, Closed: res.Closed, Open: res.Open})
	if c.cfg.Cache != nil && c.now() != Draining { // the directory is another process's then
		if err := c.cfg.Cache.SavePlan(slices.Collect(maps.Values(parts))); err != nil {
			c.cfg.Log.LogAttrs(ctx, slog.LevelError, "plan is in force but not on disk", slog.Any("error", err))
		}
	}
}

// take puts a plan in force, or leaves everything as it is.
func (c *Client) take(ctx context.Context, h Handler, parts map[string]proxy.Part) (Result, error) {
	cfg, err := proxy.Assemble(slices.Collect(maps.Values(parts)))
	if err != nil {
		return Result{}, err
	}
	if err := cfg.Validate(); err != nil {
		return Result{}, fmt.Errorf("plan %s: %w", cfg.Position, err)
	}
	res, err := h.Apply(ctx, c.update(cfg))
	if err != nil {
		return Result{}, err
	}
	c.parts, c.config, c.running, c.cached = parts, cfg, true, nil
	c.dropOwnSockets(cfg)
	return res, nil
}

// apply runs the plan in force again, with other keys or sockets.
func (c *Client) apply(ctx context.Context, h Handler, cfg proxy.Config) {
	res, err := h.Apply(ctx, c.update(cfg))
	a := Applied{Closed: res.Closed, Open: res.Open}
	if err != nil {
		a.Refused, a.RefusedPosition = err.Error(), cfg.Position
		c.cfg.Log.LogAttrs(ctx, slog.LevelError, "new keys or sockets were refused", slog.Any("error", err))
	}
	c.answer(ctx, a)
}

func (c *Client) answer(ctx context.Context, a Applied) {
	a.Position = c.config.Position
	c.write(ctx, Frame{Applied: &a}, nil)
}

func (c *Client) update(cfg proxy.Config) Update {
	u := Update{Config: cfg, Sockets: make(map[string]*os.File, len(c.sockets)), Alone: c.alone}
	for _, k := range c.keys {
		u.Keys = append(u.Keys, k.leaf)
	}
	slices.SortFunc(u.Keys, func(a, b *ca.Leaf) int { return strings.Compare(a.ID().String(), b.ID().String()) })
	for name, s := range c.sockets {
		u.Sockets[name] = s.file
	}
	return u
}

// takeKeys takes what can be read; an error tells what could not.
func (c *Client) takeKeys(k *Keys) error {
	var errs []error
	for _, one := range k.Put {
		leaf, err := one.leaf()
		if err != nil {
			errs = append(errs, err)
			continue
		}
		c.keys[one.ID] = clientKey{key: one, leaf: leaf}
	}
	for _, id := range k.Drop {
		delete(c.keys, id)
	}
	return errors.Join(errs...)
}

// loadCache reads what the last run left. A damaged file is reported and not used.
func (c *Client) loadCache(ctx context.Context) {
	report := func(err error) {
		if !errors.Is(err, fs.ErrNotExist) {
			c.cfg.Log.LogAttrs(ctx, slog.LevelError, "state on disk is not used", slog.Any("error", err))
		}
	}
	parts, err := c.cfg.Cache.Plan()
	if err != nil {
		report(err)
	}
	c.cached = parts
	keys, err := c.cfg.Cache.Keys()
	if err != nil {
		report(err)
	}
	if err := c.takeKeys(&Keys{Put: keys}); err != nil {
		report(err)
	}
}

func (c *Client) saveKeys(ctx context.Context) {
	if c.cfg.Cache == nil || c.now() == Draining {
		return
	}
	keys := make([]Key, 0, len(c.keys))
	for _, k := range c.keys {
		keys = append(keys, k.key)
	}
	slices.SortFunc(keys, func(a, b Key) int { return strings.Compare(a.ID.String(), b.ID.String()) })
	if err := c.cfg.Cache.SaveKeys(keys); err != nil {
		c.cfg.Log.LogAttrs(ctx, slog.LevelError, "keys are in use but not on disk", slog.Any("error", err))
	}
}

// bootAlone puts the plan on disk in force, if there is one and no plan runs.
func (c *Client) bootAlone(ctx context.Context, h Handler) {
	if c.running || c.cached == nil || c.now() == Draining {
		return
	}
	parts := make(map[string]proxy.Part, len(c.cached))
	for _, p := range c.cached {
		parts[p.Key()] = p
	}
	cfg, err := proxy.Assemble(c.cached)
	c.cached = nil
	if err != nil {
		c.cfg.Log.LogAttrs(ctx, slog.LevelError, "plan on disk is not used", slog.Any("error", err))
		return
	}
	c.alone, c.config = true, cfg
	c.openMissing(ctx)
	if _, err := c.take(ctx, h, parts); err != nil {
		c.alone, c.config = false, proxy.Config{}
		c.cfg.Log.LogAttrs(ctx, slog.LevelError, "plan on disk is not used", slog.Any("error", err))
		return
	}
	c.cfg.Log.LogAttrs(ctx, slog.LevelInfo, "no agent, the plan on disk is in force", slog.String("position", c.config.Position.String()))
	c.offer(ctx)
}
