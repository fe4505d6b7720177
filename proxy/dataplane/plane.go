package dataplane

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/proxy"
	"github.com/meshd/meshd/proxy/http2"
)

// sweepInterval is how often live connections are looked at for what no plan announces: expiry of intentions and certificates,
// and idleness.
const sweepInterval = time.Second

// ErrStopped is returned by Apply once Run has ended.
var ErrStopped = errors.New("the data plane has stopped")

// Plane is the data plane of one process. Its methods are safe for concurrent use.
type Plane struct {
	log     *slog.Logger
	limits  Limits
	metrics *metrics
	access  *accessLog
	watch   *watch
	session string // names this process to those who watch
	health  *healthMetrics
	names   *names

	snap       atomic.Pointer[snapshot]
	appliedAt  atomic.Int64 // unix nanoseconds, 0 before the first plan
	links      table
	dialed     dialedSet
	serverTLS  *tls.Config
	handshakes chan struct{}
	sweeps     int
	attempts   sync.Pool
	http2      http2.Counters
	http1      *prometheus.CounterVec // what limits of HTTP/1 refused

	// mu is held by Apply, Drain, and the start and end of Run; never on the path of a connection.
	mu        sync.Mutex
	listeners map[string]*listener
	spawn     func(*listener) // accepts from it; nil while Run does not run
	stopped   bool
	draining  atomic.Bool // nothing new is accepted
	impatient atomic.Bool // nobody waits for a request any more
	ended     atomic.Bool // what was accepted is not served any more
	accepting sync.WaitGroup
	tasks     sync.WaitGroup
}

// Applied tells what a plan did.
type Applied struct {
	// Closed is how many live connections and streams it cut.
	Closed int
	// Open is how many connections are open.
	Open int
}

// New returns a Plane without a plan: it listens nowhere and lets nothing in. An error means that metrics of these names are
// registered already.
func New(cfg Config) (*Plane, error) {
	p := &Plane{
		log: cfg.Log, limits: cfg.Limits.withDefaults(), listeners: map[string]*listener{}, watch: newWatch(), session: rand.Text(),
	}
	p.names = &names{log: cfg.Log, lookup: lookupHost, tasks: &p.tasks, known: map[string]*name{}}
	m, err := newMetrics(cfg.Registerer, p.planAge)
	if err != nil {
		return nil, err
	}
	p.metrics = m
	if p.health, err = newHealthMetrics(cfg.Registerer, p.current); err != nil {
		return nil, err
	}
	if p.access, err = newAccessLog(p.log, cfg.Registerer); err != nil {
		return nil, fmt.Errorf("register metrics: %w", err)
	}
	if err := p.limitMetrics(cfg.Registerer); err != nil {
		return nil, fmt.Errorf("register metrics: %w", err)
	}
	p.handshakes = make(chan struct{}, p.limits.Handshakes)
	p.links.init(m.open.WithLabelValues(string(inbound)), m.open.WithLabelValues(string(outbound)))
	p.snap.Store(p.newSnapshot(proxy.Config{}, nil))
	p.serverTLS = ca.ServerConfig(ca.ServerOptions{
		Leaf:   p.inboundCertificate,
		Bundle: p.bundle,
		// Who may call what is for the intentions to say, after the connection is in the table.
		Accept: ca.AcceptAny,
		ALPN:   []string{alpnHTTP2, alpnHTTP1, alpnTCP}, // in the order of our preference
	})
	// Short records at first would cost a system call for each 1,208 bytes.
	p.serverTLS.DynamicRecordSizingDisabled = true
	return p, nil
}

// ReopenAccessLog makes the access log open its file anew before the next line, for whoever has moved it away. Without the call
// that takes up to a second more.
func (p *Plane) ReopenAccessLog() { p.access.again() }

func (p *Plane) current() *snapshot { return p.snap.Load() }

func (p *Plane) bundle() ca.Bundle { return p.current().config.Bundle }

// inboundCertificate picks the certificate of a handshake on a mesh listener.
func (p *Plane) inboundCertificate(serverName string) (*tls.Certificate, error) {
	s := p.current()
	in := s.inbounds[serverName]
	if in == nil {
		return nil, errUnknownName
	}
	return s.certificate(in.Service)
}

func (p *Plane) planAge() float64 {
	at := p.appliedAt.Load()
	if at == 0 {
		return 0
	}
	return time.Since(time.Unix(0, at)).Seconds()
}

// Apply puts a plan in force, whole, or refuses it with an error and changes nothing. keys are all identities that the process
// can prove; sockets are the listening sockets at hand by listener name, which it duplicates. When it returns, new connections
// and requests are decided by the plan, and live ones that it denies are cut. A listener without a socket waits for one; a
// listener that the plan lost is closed, and its connections go on unless they are denied.
func (p *Plane) Apply(ctx context.Context, plan proxy.Config, keys []*ca.Leaf, sockets map[string]*os.File) (Applied, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stopped {
		return Applied{}, ErrStopped
	}
	before := p.current()
	next, err := p.compile(plan, keys, before) //nolint:contextcheck // what new servers do outlives the call
	if err != nil {
		return Applied{}, err
	}
	now := time.Now()
	p.snap.Store(next)
	p.appliedAt.Store(now.UnixNano())
	p.access.configure(plan.AccessLog)
	p.metrics.planApplied(plan.Position.Revision, now, next.leaves)
	closed := p.review(ctx, now, next, !before.config.Bundle.Equal(plan.Bundle))
	before.retire(next)
	p.listen(ctx, plan.Listeners, sockets)
	open := p.links.len()
	level := slog.LevelDebug
	if closed > 0 {
		level = slog.LevelInfo
	}
	p.log.LogAttrs(ctx, level, "plan applied", slog.String("position", plan.Position.String()),
		slog.Int("closed", closed), slog.Int("open", open))
	return Applied{Closed: closed, Open: open}, nil
}

// Run serves what Apply puts in force, before or after. It blocks until ctx ends, then closes what is left, waits for its
// goroutines, and returns nil. Call it once.
func (p *Plane) Run(ctx context.Context) error {
	p.mu.Lock()
	p.spawn = func(l *listener) { p.accepting.Go(func() { p.accept(ctx, l) }) }
	for _, l := range p.listeners {
		p.spawn(l)
	}
	p.mu.Unlock()

	stopLog := p.access.start()
	defer stopLog() // after the last connection
	ticker := time.NewTicker(sweepInterval)
	defer ticker.Stop()
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case now := <-ticker.C:
			p.sweep(ctx, now)
		}
	}
	p.mu.Lock()
	p.stopped, p.spawn = true, nil
	p.draining.Store(true)
	p.ended.Store(true)
	p.closeListeners()
	p.mu.Unlock()
	for l := range p.links.all() {
		l.abort(ctx, ReasonDraining)
	}
	p.dialed.closeAll()
	p.accepting.Wait()
	p.tasks.Wait()
	p.current().retire(&snapshot{})
	p.dialed.closeAll()
	return nil
}

// sweep does what no plan announces. It waits for Apply, which would count less than it cut if a sweep came between its plan
// and its review.
func (p *Plane) sweep(ctx context.Context, now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.review(ctx, now, p.current(), false)
	if p.sweeps++; p.sweeps%lostEvery == 0 {
		p.cutLost(ctx)
	}
	if p.current().stale(now) {
		p.renew(ctx, now)
	}
}

const (
	// lostAfter is how long a peer may acknowledge nothing of what it must; see sock.Conn.Unanswered. It is looked at every
	// lostEvery sweeps. Silent connections are watched by keep-alive, which takes as long.
	lostAfter = 20 * time.Second
	lostEvery = 5
)

// unanswered is what a connection over TCP can tell.
type unanswered interface{ Unanswered() time.Duration }

// cutLost resets connections whose peer has gone without a word while bytes were on their way to it. p.mu is held.
func (p *Plane) cutLost(ctx context.Context) {
	for l := range p.links.all() {
		if l.lost() {
			l.abort(ctx, ReasonLost)
		}
	}
	for _, d := range p.dialed.all() {
		if d.Unanswered() > lostAfter {
			reset(d)
		}
	}
}

// renew replaces the pools whose peers' certificates end soon, under the same plan. p.mu is held.
func (p *Plane) renew(ctx context.Context, now time.Time) {
	before := p.current()
	next, err := p.compile(before.config, slices.Collect(maps.Values(before.leaves)), before) //nolint:contextcheck // as in Apply; and it was compiled before
	if err != nil {
		p.log.LogAttrs(ctx, slog.LevelError, "connections could not be renewed", slog.Any("error", err))
		return
	}
	p.snap.Store(next)
	p.review(ctx, now, next, false)
	before.retire(next)
}

// Drained tells how a drain ended.
type Drained struct {
	// Begun is how many connections were open when it began, Cut how many were when it ended.
	Begun, Cut int
}

// Drain stops accepting, and waits until every connection that was accepted is gone or ctx ends; then it cuts the rest. HTTP is
// asked to end after the response that runs; a connection that waits for a request gets one more, and is closed if none came
// before patient is done. Plans are enforced all the while. Afterwards end the context of Run. What waits in the queue of a socket to be
// accepted stays there as long as anybody holds the socket.
func (p *Plane) Drain(ctx, patient context.Context) Drained {
	p.mu.Lock()
	p.draining.Store(true)
	p.closeListeners()
	p.mu.Unlock()
	p.accepting.Wait() // what accept returned is counted by now
	for l := range p.links.all() {
		l.retire()
	}
	out := Drained{Begun: p.links.left()}
	gone := p.links.empty()
	impatient := patient.Done()
	for waiting := true; waiting; {
		select {
		case <-gone:
			p.metrics.drained.Add(float64(out.Begun))
			return out
		case <-impatient:
			impatient = nil
			p.impatient.Store(true)
			for l := range p.links.all() {
				l.drain()
			}
		case <-ctx.Done():
			waiting = false
		}
	}
	for l := range p.links.all() {
		if l.abort(ctx, ReasonDraining) {
			out.Cut++
		}
	}
	p.metrics.drained.Add(float64(max(out.Begun-out.Cut, 0)))
	if out.Cut > 0 {
		p.log.LogAttrs(ctx, slog.LevelWarn, "drain ended, connections were cut", slog.Int("cut", out.Cut))
	}
	return out
}

// Left returns how many connections are not over, from when they are accepted.
func (p *Plane) Left() int { return p.links.left() }

// review looks at every live connection under a snapshot and returns how many it cut.
func (p *Plane) review(ctx context.Context, now time.Time, s *snapshot, bundleChanged bool) int {
	cut := 0
	verdicts := map[string]error{}
	for l := range p.links.all() {
		reason, streams := l.review(now, s)
		cut += streams
		if reason == "" && bundleChanged {
			reason = l.peer.review(now, s, verdicts)
		}
		if reason != "" && l.abort(ctx, reason) {
			cut++
		}
	}
	p.dialed.review(now, s, bundleChanged, verdicts)
	return cut
}

// firstConnect is how long the first try to connect waits for an answer. The kernel sends a lost SYN again after 1 s (RFC 6298,
// section 2.1), which is all the time there is: without a second try one lost packet would be a failed connection.
const firstConnect = 300 * time.Millisecond

// maxConnects is how often one address is tried when the first try was too short, or this process was not running.
const maxConnects = 4

// dialTCP connects to a local application or to another proxy.
func (p *Plane) dialTCP(ctx context.Context, address string) (*net.TCPConn, error) {
	if host, port, named := hostName(address); named {
		return p.dialName(ctx, host, port)
	}
	return p.dialAddress(ctx, address)
}

// dialAddress opens a connection to IP:port.
func (p *Plane) dialAddress(ctx context.Context, address string) (*net.TCPConn, error) {
	d := net.Dialer{Timeout: p.limits.ConnectTimeout, KeepAliveConfig: keepAlive()}
	var rest time.Duration // for a second try
	if d.Timeout > 2*firstConnect {
		d.Timeout, rest = firstConnect, d.Timeout-firstConnect
	}
	var nc net.Conn
	var err error
	for range maxConnects {
		began := time.Now()
		nc, err = d.DialContext(ctx, "tcp", address)
		if timeout, ok := errors.AsType[net.Error](err); !ok || !timeout.Timeout() || ctx.Err() != nil {
			break
		}
		// One that comes back late was not waiting all that time: this process did not get the CPU, and the peer may have answered.
		starved := time.Since(began) > d.Timeout+firstConnect/2
		switch {
		case rest > 0:
			d.Timeout, rest = rest, 0
		case !starved:
			return nil, err
		}
	}
	if err != nil {
		return nil, err
	}
	tc, ok := nc.(*net.TCPConn)
	if !ok {
		_ = nc.Close()
		return nil, errors.New("connect to " + address + ": not TCP")
	}
	return tc, nil
}

// keepAlive finds a dead peer within 25 s (a half-open connection must be gone after 30 s).
func keepAlive() net.KeepAliveConfig {
	return net.KeepAliveConfig{Enable: true, Idle: 10 * time.Second, Interval: 5 * time.Second, Count: 3}
}
