// Package raftstore is a store.Engine that keeps its state on the disks of one
// or more servers, in agreement by Raft.
//
// Each member holds the whole state in memory as a store.Space. The log on disk
// holds what the last snapshot does not; a write is acknowledged when a majority
// has synced it. Writes that wait at the same time share a sync. All members take
// writes and linearizable reads: a follower hands them to the leader and answers
// when its own state has caught up.
//
// DESIGN.md in server/store has the reasons.
package raftstore

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"

	"github.com/meshd/meshd/server/fault"
	"github.com/meshd/meshd/server/store"
)

// drainPatience bounds how long Run waits for Raft to answer what was asked.
// failPatience bounds everything that Run does after a fatal error: the disk may
// hang for ever, and the process has to end.
const (
	drainPatience = 2 * time.Second
	failPatience  = 500 * time.Millisecond
)

// handOverPatience bounds how long a leader that ends waits for its successor,
// which goes on without it.
const handOverPatience = 250 * time.Millisecond

// ErrRunning says that Run was called twice.
var ErrRunning = errors.New("engine runs already")

// ErrRemoved says that this member was removed from its cluster. It can't return
// under its ID: its state directory has to be moved away first.
var ErrRemoved = errors.New("this server was removed from its cluster")

// Engine is a member of the cluster. It serves while Run runs; calls that come
// before it serves wait. It serves when it has seen a leader and has caught up
// with it.
//
// All calls work on every member: Commit, Barrier, Stage and the methods of a
// Stage go to the leader. While there is none they wait for two elections, then
// they return store.ErrNoLeader.
type Engine struct {
	cfg    Config
	log    *slog.Logger
	space  *store.Space
	writes watchdog
	counts counters

	started atomic.Bool
	life    context.Context //nolint:containedctx // ends with closing, for calls that take a context
	stop    context.CancelFunc
	once    sync.Once     // closes closing
	closing chan struct{} // no call is served any more
	stopped chan struct{} // Run has returned
	ready   chan struct{} // the state is loaded and a leader was seen
	readied sync.Once
	fatal   chan error // the first fatal error; buffered

	leading  atomic.Bool   // a call of Lead is at work
	belonged atomic.Bool   // this member was on a committed list of servers
	epoch    atomic.Uint64 // of the claim under which Lead's function runs now, or 0
	logs     raft.LogStore // set before raft
	applied  atomic.Uint64 // index of the newest entry that this process has made part of the state
	reads    rounds        // of Barrier

	mu        sync.Mutex
	raft      *raft.Raft // set before ready
	wire      *wire      // set with raft
	files     *files     // set with raft
	shunned   shunned    // the leadership of a full disk
	lines     map[raft.ServerID]chan struct{}
	spreading map[raft.ServerID]bool // who is being told what is committed
	term      *term                  // not nil while this member leads and its state is complete
	turn      chan struct{}          // closed when term changes
	news      chan struct{}          // closed when the leader or the servers change
	led       time.Time              // when this member led last, or started
	hold      *tenure                // not nil while Lead's function runs
	requests  sync.WaitGroup         // goroutines that wait for Raft
	drained   bool                   // there will be no further ones
	reach     reach                  // who waits for a revision
	marks     marks                  // hashes of the state
}

// term is one uninterrupted leadership of Raft.
type term struct {
	number uint64 // Raft's
	begun  time.Time
	floor  uint64        // entries up to this one were applied when the term began
	over   chan struct{} // closed when this member has learnt that it is over
}

var _ store.Engine = (*Engine)(nil)

// New returns an engine for a valid cfg. It does nothing until Run.
func New(cfg Config, log *slog.Logger) (*Engine, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("configure the store: %w", err)
	}
	life, stop := context.WithCancel(context.Background())
	return &Engine{
		cfg:       cfg.withDefaults(),
		log:       log,
		space:     store.NewSpace(),
		life:      life,
		stop:      stop,
		closing:   make(chan struct{}),
		stopped:   make(chan struct{}),
		ready:     make(chan struct{}),
		fatal:     make(chan error, 1),
		lines:     make(map[raft.ServerID]chan struct{}),
		spreading: make(map[raft.ServerID]bool),
		turn:      make(chan struct{}),
		news:      make(chan struct{}),
	}, nil
}

// Run opens the state directory, joins the cluster and serves until ctx ends or
// Close, when it returns nil, or until the first error that this process must
// not go on after: a failed write or sync, damaged data, or ErrRemoved. The caller
// must then end the process; whether the last writes are on the disk is only
// known after a restart. A leader whose ctx ends hands the leadership over first.
// Run may be called once.
func (e *Engine) Run(ctx context.Context) error {
	if !e.started.CompareAndSwap(false, true) {
		return fmt.Errorf("run the store: %w", ErrRunning)
	}
	defer close(e.stopped)
	defer e.shut()
	if err := fault.Check(); err != nil {
		return fmt.Errorf("run the store: %w", err)
	}
	logger := newLogger(e.log)
	d, err := openDisk(e.cfg, logger, e.fail, &e.writes)
	if err != nil {
		return fmt.Errorf("open the store: %w", err)
	}
	transport := e.cfg.Transport
	if transport == nil {
		_, transport = raft.NewInmemTransport(loneAddress)
	}
	w := newWire(transport, e.writes.stalled)
	r, err := e.start(d, w, logger)
	if err != nil {
		return errors.Join(fmt.Errorf("start the store: %w", err), w.close(), d.close())
	}
	e.nominate(r)

	err = e.serve(ctx, r)
	e.shut()
	stop := func() error {
		e.drain()
		shutdown := r.Shutdown()
		closed := w.close() // what waits for another member need not wait longer
		return errors.Join(shutdown.Error(), closed, d.close())
	}
	if err == nil {
		return stop()
	}
	done := make(chan error, 1)
	go func() { done <- stop() }()
	timer := time.NewTimer(failPatience)
	defer timer.Stop()
	select {
	case <-done: //nolint:errcheck // what follows the fatal error says nothing new
	case <-timer.C:
	}
	return fmt.Errorf("the store must stop: %w", err)
}

// fail makes Run return err, if it is the first.
func (e *Engine) fail(err error) {
	select {
	case e.fatal <- err:
	default:
	}
}

// shut wakes every waiter with store.ErrClosed.
func (e *Engine) shut() {
	e.once.Do(func() {
		close(e.closing)
		e.stop()
	})
}

// Close implements store.Engine: it ends Run and waits for it.
func (e *Engine) Close() error {
	e.shut()
	if e.started.Load() {
		<-e.stopped
	}
	return nil
}

func (e *Engine) raftConfig(logger hclog.Logger) *raft.Config {
	cfg := raft.DefaultConfig()
	cfg.LocalID = raft.ServerID(e.cfg.ID)
	cfg.Logger = logger
	cfg.HeartbeatTimeout = e.cfg.HeartbeatTimeout
	cfg.ElectionTimeout = e.cfg.ElectionTimeout
	cfg.LeaderLeaseTimeout = e.cfg.LeaderLease
	cfg.CommitTimeout = e.cfg.CommitInterval
	cfg.SnapshotThreshold = e.cfg.SnapshotEntries
	cfg.SnapshotInterval = e.cfg.SnapshotInterval
	cfg.TrailingLogs = e.cfg.TrailingEntries
	// No BatchApplyCh: writes that wait during a sync share the next one without
	// it too (measured: not slower), and what waits in its buffer at the shutdown
	// is never answered.

	cfg.NoLegacyTelemetry = true
	return cfg
}

func (e *Engine) start(d *disk, w *wire, logger hclog.Logger) (*raft.Raft, error) {
	logs, err := raft.NewLogCache(512, d.log)
	if err != nil {
		return nil, err
	}
	e.logs = logs
	cfg := e.raftConfig(logger)
	if e.cfg.Transport == nil {
		known, err := raft.HasExistingState(logs, d.log, d.snapshots)
		if err != nil {
			return nil, fmt.Errorf("look for an existing state: %w", err)
		}
		alone := configuration([]Member{{ID: e.cfg.ID, Address: string(w.LocalAddr())}})
		if !known {
			if err := raft.BootstrapCluster(cfg, logs, d.log, d.snapshots, w, alone); err != nil {
				return nil, fmt.Errorf("begin a new cluster: %w", err)
			}
		}
	}
	r, err := raft.NewRaft(cfg, e.newMachine(), logs, d.log, d.snapshots, w)
	if err != nil {
		return nil, err
	}
	e.belonged.Store(e.on(servers(r)))
	e.counts.installed.Store(0) // the one from the own disk
	e.mu.Lock()
	e.raft, e.wire, e.files, e.led = r, w, d.files, time.Now()
	e.tellLocked()
	e.mu.Unlock()
	return r, nil
}

// nominate lets a server that is alone in its cluster stand for election at
// once, instead of after a heartbeat time-out: there is nobody to wait for.
func (e *Engine) nominate(r *raft.Raft) {
	servers := servers(r)
	if len(servers) == 1 && servers[0].ID == raft.ServerID(e.cfg.ID) && r.State() == raft.Follower {
		e.stand()
	}
}

// stand makes this member stand for election at once. If it fails, the heartbeat
// time-out does the same.
func (e *Engine) stand() {
	if err := e.wire.standNow(e.header(e.wire), e.cfg.HeartbeatTimeout); err != nil {
		e.log.Debug("server waits for its election time-out", slog.Any("error", err))
	}
}

// serve follows the leadership until the engine is to stop.
func (e *Engine) serve(ctx context.Context, r *raft.Raft) error {
	leaders := make(chan raft.Observation, 1)
	observer := raft.NewObserver(leaders, false, func(o *raft.Observation) bool {
		_, ok := o.Data.(raft.LeaderObservation)
		return ok
	})
	r.RegisterObserver(observer)
	defer r.DeregisterObserver(observer)
	defer e.setTerm(nil)
	defer e.writes.watch(e.life, e.fail)() //nolint:contextcheck // as long as the engine, which may outlive ctx
	e.spawn(func() { e.files.watch(e.life) })
	tick := time.NewTicker(stallLimit / 15)
	defer tick.Stop()
	e.catchUp(r) //nolint:contextcheck // as above
	for {
		select {
		case leads := <-r.LeaderCh():
			e.setTerm(nil)
			if leads {
				e.establish(r)
			}
		case <-leaders:
			e.tell()
			e.catchUp(r) //nolint:contextcheck // as above
		case <-tick.C:
			e.checkDisk(r)
			e.checkRoom() //nolint:contextcheck // as above
		case err := <-e.fatal:
			return err
		case <-e.closing:
			e.handOver(r) //nolint:contextcheck // ctx has ended
			return nil
		case <-ctx.Done():
			e.handOver(r) //nolint:contextcheck // ctx has ended
			return nil
		}
	}
}

// establish makes the state of a new leader complete: everything that an earlier
// leader acknowledged is applied when the barrier is.
func (e *Engine) establish(r *raft.Raft) {
	number, floor := r.CurrentTerm(), r.LastIndex()
	err := e.wait(func() error { return r.Barrier(0).Error() })
	if err == nil && e.space.Position().IsZero() {
		begin := command{Kind: commandBegin, Generation: store.NewGeneration()}
		err = e.wait(func() error { return r.Apply(begin.encode(), 0).Error() })
	}
	if err != nil {
		// Raft reports the loss of the leadership on its channel; if it was not
		// lost, this member is useless as a leader.
		e.log.Warn("leadership not taken up", slog.Any("error", err))
		return
	}
	if r.CurrentTerm() != number {
		return // the barrier may be of another term; the channel will tell
	}
	e.setTerm(&term{number: number, begun: time.Now(), floor: floor, over: make(chan struct{})})
	e.readied.Do(func() { close(e.ready) })
	e.log.Info("store leads", slog.String("generation", e.space.Position().Generation),
		slog.Uint64("revision", e.space.Position().Revision))
	e.spawn(func() { e.correctAddress(r) })
}

// catchUp makes a follower ready when its state is as new as the leader's was
// when it first heard of one.
func (e *Engine) catchUp(r *raft.Raft) {
	select {
	case <-e.ready:
		return
	default:
	}
	if _, id := r.LeaderWithID(); id == "" || id == raft.ServerID(e.cfg.ID) {
		return
	}
	e.spawn(func() {
		ctx, stop := context.WithCancel(e.life)
		defer stop()
		if e.cfg.Forward == nil {
			if err := e.await(ctx, 1); err != nil {
				return // closed
			}
		} else if _, err := e.barrier(ctx); err != nil {
			return // the next leader is asked again
		}
		e.readied.Do(func() { close(e.ready) })
	})
}

// handOver gives the leadership to another member, if this one has it, so that
// nobody has to notice its absence.
func (e *Engine) handOver(r *raft.Raft) {
	if r.State() != raft.Leader || e.writes.stalled() != nil {
		return
	}
	ctx, stop := context.WithTimeout(context.Background(), handOverPatience)
	defer stop()
	if err := e.Transfer(ctx, ""); err != nil && !errors.Is(err, ErrAlone) {
		e.log.Info("leadership not handed over", slog.Any("error", err))
	}
}

// wait runs a call that may block until Raft has shut down, and gives up on it
// when the engine closes, or when the disk hangs.
func (e *Engine) wait(call func() error) error {
	done := make(chan error, 1)
	if !e.spawn(func() { done <- call() }) {
		return store.ErrClosed
	}
	tick := time.NewTicker(stallLimit / 15)
	defer tick.Stop()
	for {
		select {
		case err := <-done:
			return err
		case <-e.closing:
			return store.ErrClosed
		case <-tick.C:
			if err := e.writes.stalled(); err != nil {
				return err
			}
		}
	}
}

// spawn runs f in a goroutine that Run waits for. It reports false, and does
// not run f, when Run waits already.
func (e *Engine) spawn(f func()) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.drained {
		return false
	}
	e.requests.Go(f)
	return true
}

// drain waits until Raft has answered all requests. It must still run: at its
// shutdown it forgets requests that wait in its queues. If it does not answer,
// because a disk hangs, the goroutines that wait for it are given up.
func (e *Engine) drain() {
	e.mu.Lock()
	e.drained = true
	e.mu.Unlock()
	answered := make(chan struct{})
	go func() {
		e.requests.Wait()
		close(answered)
	}()
	timer := time.NewTimer(drainPatience)
	defer timer.Stop()
	select {
	case <-answered:
	case <-timer.C:
	}
}

// setTerm ends the current term, if any, and begins t, if any.
func (e *Engine) setTerm(t *term) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.term == t {
		return
	}
	if e.term != nil {
		close(e.term.over)
		e.led = time.Now()
	}
	e.term = t
	close(e.turn)
	e.turn = make(chan struct{})
	e.tellLocked()
}

// current returns the term, nil if this member does not lead, and a channel that
// is closed when that changes.
func (e *Engine) current() (*raft.Raft, *term, <-chan struct{}) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.raft, e.term, e.turn
}

// enter waits until calls are served.
func (e *Engine) enter(ctx context.Context) error {
	select {
	case <-e.closing:
		return store.ErrClosed
	default:
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	select {
	case <-e.ready:
		return nil
	case <-e.closing:
		return store.ErrClosed
	case <-ctx.Done():
		return ctx.Err()
	}
}
