// Package agent is what runs on every host of the mesh: it joins, registers the
// services of the host and checks their health, keeps their certificates
// fresh, makes the plan of the host's proxy, opens the proxy's listening
// sockets and feeds it.
//
// Nothing that is in force depends on a server being there. What the servers
// told last is on disk, and so are keys, certificates and the last good version
// of every definition. The end of the agent deregisters nothing and touches no
// connection: it may be an upgrade.
package agent

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/meshd/meshd/agent/check"
	"github.com/meshd/meshd/agent/join"
	"github.com/meshd/meshd/agent/leaf"
	"github.com/meshd/meshd/agent/plan"
	"github.com/meshd/meshd/agent/registry"
	"github.com/meshd/meshd/agent/statedir"
	"github.com/meshd/meshd/agent/view"
	"github.com/meshd/meshd/ca"
	"github.com/meshd/meshd/ca/spiffe"
	"github.com/meshd/meshd/catalog"
	"github.com/meshd/meshd/proxy"
	"github.com/meshd/meshd/proxy/feed"
	"github.com/meshd/meshd/server/meshpb"
)

var (
	// ErrRunning is wrapped when another agent uses the data directory.
	ErrRunning = errors.New("another agent runs with this data directory")
	// ErrNode is wrapped when this host has joined under another name.
	ErrNode = errors.New("this host has joined under another name")
	// ErrNotConnected is wrapped when a call needs a server and there is none.
	ErrNotConnected = errors.New("not connected to a server")
	// errLeft ends Run after Leave.
	errLeft = errors.New("the node has left")
)

// Agent is one host's agent. It is safe for concurrent use.
type Agent struct {
	cfg     Config
	log     *slog.Logger
	session string
	started time.Time
	bound   chan struct{}
	running atomic.Pointer[host]
}

// New returns an agent that does nothing yet. The configuration is completed
// with defaults; an error tells its problems.
func New(cfg Config, log *slog.Logger) (*Agent, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("configure the agent: %w", err)
	}
	return &Agent{cfg: cfg.WithDefaults(), log: log, session: rand.Text(), started: time.Now(), bound: make(chan struct{})}, nil
}

// Bound returns a channel that is closed when the agent has its sockets and its
// state. It may still have to join then.
func (a *Agent) Bound() <-chan struct{} { return a.bound }

// Socket returns the path of the local API.
func (a *Agent) Socket() string { return a.cfg.Socket }

// host is what a running agent is made of.
type host struct {
	cfg     Config
	log     *slog.Logger
	session string
	dir     statedir.Dir
	leave   context.CancelCauseFunc

	view     *view.View
	registry *registry.Registry
	checks   *check.Group
	leaves   *leaf.Manager
	syncer   *registry.Syncer
	feed     *feed.Server

	identity atomic.Pointer[join.Identity] // nil until joined
	bundle   atomic.Pointer[ca.Bundle]     // the newest roots

	leaving sync.Mutex  // one Leave at a time
	away    atomic.Bool // the node leaves, or has left: no server is connected to anew

	mu        sync.Mutex
	address   string // of the mesh port, for other hosts
	joinError string
	planned   planned
	holders   map[string]string // listener → why it waits
}

// planned is what came of the last plan, for status.
type planned struct {
	config    proxy.Config // the newest good plan; never modified
	position  catalog.Position
	problems  []plan.Problem
	refused   string // why the newest plan was not passed on
	listeners []ListenerStatus
}

// Run runs the agent until ctx ends, and then returns nil without having taken
// anything out of service. It returns an error if the host can't run an agent,
// or can't join. SIGHUP, which it takes over, makes it read the service
// definitions at once. Call it once.
func (a *Agent) Run(ctx context.Context) error {
	ctx, leave := context.WithCancelCause(ctx)
	defer leave(nil)
	h, unlock, err := a.open(leave)
	if err != nil {
		return err
	}
	defer unlock()
	allowed, err := newAccess(a.cfg)
	if err != nil {
		return err
	}
	feedListener, err := listenUnix(ctx, a.cfg.Proxy.Socket, allowed.gid)
	if err != nil {
		return fmt.Errorf("open the proxy's feed: %w", err)
	}
	apiListener, err := listenUnix(ctx, a.cfg.Socket, allowed.gid)
	if err != nil {
		_ = feedListener.Close()
		return fmt.Errorf("open the local API: %w", err)
	}
	h.feed = feed.NewServer(feed.ServerConfig{Log: a.log, AllowUID: allowed.proxy})
	defer func() { _ = h.feed.Close() }()
	a.running.Store(h)
	defer a.running.Store(nil)
	close(a.bound)

	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return h.feed.Run(ctx, feedListener) })
	g.Go(func() error { return a.serve(ctx, apiListener, allowed) })
	g.Go(func() error { return h.registry.Run(ctx) })
	g.Go(func() error { return h.checks.Run(ctx) })
	g.Go(func() error { return h.keepChecks(ctx) })
	g.Go(func() error { return h.followHangup(ctx) })
	g.Go(func() error { return h.serveMetrics(ctx) })
	if a.cfg.Proxy.Supervise {
		g.Go(func() error { return supervise(ctx, a.cfg.Proxy, a.log) })
	}
	g.Go(func() error { return h.run(ctx, g) })
	err = g.Wait()
	if errors.Is(context.Cause(ctx), errLeft) {
		return nil
	}
	return err
}

// run joins, and then starts what needs an identity.
func (h *host) run(ctx context.Context, g *errgroup.Group) error {
	h.defineChecks()
	if err := h.identify(ctx); err != nil {
		if ctx.Err() != nil {
			return nil //nolint:nilerr // told to end while joining
		}
		return err
	}
	// Before the first plan: a proxy that serves would lose the keys that nobody
	// seems to want.
	h.wantLeaves()
	g.Go(func() error { return h.view.Run(ctx) })
	g.Go(func() error { return h.leaves.Run(ctx) })
	g.Go(func() error { return h.syncer.Run(ctx) })
	g.Go(func() error { return h.followPlan(ctx) })
	g.Go(func() error { return h.followHolders(ctx) })
	g.Go(func() error { return h.followProxies(ctx) })
	g.Go(func() error { return h.followServers(ctx) })
	g.Go(func() error { return h.followRefusal(ctx) })
	g.Go(func() error { return h.followQueries(ctx) })
	return h.followDefinitions(ctx)
}

// open takes the data directory and reads all that is kept.
func (a *Agent) open(leave context.CancelCauseFunc) (h *host, unlock func(), err error) {
	dir, err := statedir.Open(a.cfg.DataDir)
	if err != nil {
		return nil, nil, err
	}
	unlock, err = lock(dir)
	if err != nil {
		return nil, nil, err
	}
	defer func() {
		if err != nil {
			unlock()
		}
	}()
	leaves, err := dir.Sub("leaves")
	if err != nil {
		return nil, nil, err
	}
	h = &host{cfg: a.cfg, log: a.log, session: a.session, dir: dir, leave: leave}
	h.registry = registry.New(registry.Config{Log: a.log, Folder: a.cfg.ServicesDir, Dir: dir})
	h.checks = check.New(check.Config{Log: a.log, Earlier: h.loadChecks()})
	h.view = view.New(view.Config{
		Log: a.log, Dir: dir, Dial: h.dial, Servers: h.servers,
		Hello: func() view.Hello {
			return view.Hello{Session: a.session, Version: a.cfg.Version, FeatureLevel: catalog.FeatureLevel, Address: h.meshAddress()}
		},
	})
	h.leaves = leaf.New(leaf.Config{Log: a.log, Dir: leaves, Link: h.link, Bundle: h.roots})
	h.syncer = registry.NewSyncer(registry.SyncConfig{Log: a.log, Session: a.session, Link: h.link})
	for _, load := range []func() error{h.registry.Load, h.view.Load, h.leaves.Load} {
		if err := load(); err != nil {
			return nil, nil, err
		}
	}
	return h, unlock, nil
}

// lock keeps a second agent out of the data directory; the kernel ends the
// lock with the process.
func lock(dir statedir.Dir) (unlock func(), err error) {
	path := dir.Path("agent.lock")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600) //nolint:gosec // the agent's own state
	if err != nil {
		return nil, fmt.Errorf("lock the data directory: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("lock %s: %w", path, ErrRunning)
		}
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return func() { _ = f.Close() }, nil
}

// dial returns a connection to a server, which must prove to be one of ours.
func (h *host) dial(server string) (*grpc.ClientConn, error) {
	identity := h.identity.Load()
	if identity == nil {
		return nil, fmt.Errorf("dial %s: this host has not joined", server)
	}
	if h.away.Load() {
		return nil, fmt.Errorf("dial %s: %w", server, errLeft)
	}
	config := ca.ClientConfig(ca.ClientOptions{
		Leaf: func() (*tls.Certificate, error) {
			l := h.leaves.Leaf(h.nodeID())
			if l == nil {
				return nil, ca.ErrNoLeaf
			}
			return l.TLS(), nil
		},
		Bundle: h.roots, ServerName: meshpb.ServerName, ALPN: []string{"h2"},
		Accept: ca.ExpectKind(identity.TrustDomain, spiffe.KindServer),
	})
	return grpc.NewClient("passthrough:///"+server, grpc.WithTransportCredentials(credentials.NewTLS(config)),
		grpc.WithContextDialer(dialTCP), grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(meshpb.MaxMessage)))
}

// tcpTimeout is how long a host has to answer at all: its kernel does, however busy the
// server is.
const tcpTimeout = 3 * time.Second

func dialTCP(ctx context.Context, address string) (net.Conn, error) {
	d := net.Dialer{Timeout: tcpTimeout}
	return d.DialContext(ctx, "tcp", address)
}

// servers returns where to find the servers.
func (h *host) servers() []string {
	all := slices.Clone(h.cfg.Servers)
	if identity := h.identity.Load(); identity != nil {
		for _, s := range identity.Servers {
			if !slices.Contains(all, s) {
				all = append(all, s)
			}
		}
	}
	return all
}

func (h *host) nodeID() spiffe.ID {
	return spiffe.Node(h.identity.Load().TrustDomain, h.cfg.NodeName)
}

// roots returns the newest roots, none before the host has joined.
func (h *host) roots() ca.Bundle {
	if b := h.bundle.Load(); b != nil {
		return *b
	}
	return ca.Bundle{}
}

// link is the connection of the view, for calls.
func (h *host) link() (meshpb.MeshClient, <-chan struct{}) {
	l, changed := h.view.Link()
	if l == nil {
		return nil, changed
	}
	return l.Client, changed
}

func (h *host) meshAddress() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.address
}

// identify loads the host's identity, or joins to get one.
func (h *host) identify(ctx context.Context) error {
	identity, err := h.known()
	if err != nil {
		return err
	}
	if identity == nil {
		if identity, err = h.join(ctx); err != nil {
			return err
		}
	}
	if err := h.adopt(identity); err != nil {
		return err
	}
	ip, err := advertised(ctx, h.cfg.Advertise, h.servers())
	if err != nil {
		return fmt.Errorf("%w; set advertise", err)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.address = net.JoinHostPort(ip.String(), strconv.Itoa(int(h.cfg.Proxy.MeshPort)))
	return nil
}

// join trades the join token for an identity.
func (h *host) join(ctx context.Context) (*join.Identity, error) {
	identity, err := join.Join(ctx, join.Config{
		Log: h.log, Dir: h.dir, TokenFile: h.cfg.Join.TokenFile, Node: h.cfg.NodeName, Servers: h.cfg.Servers,
		Version: h.cfg.Version, FeatureLevel: catalog.FeatureLevel,
	})
	h.mu.Lock()
	defer h.mu.Unlock()
	h.joinError = ""
	if err != nil {
		h.joinError = err.Error()
	}
	return identity, err
}

// adopt makes an identity the host's.
func (h *host) adopt(identity *join.Identity) error {
	if err := h.leaves.Adopt(identity.Leaf); err != nil {
		return err
	}
	h.bundle.Store(&identity.Bundle)
	h.identity.Store(identity)
	h.followRoots()
	return nil
}

// known returns the identity on disk, nil if there is none that is still good.
func (h *host) known() (*join.Identity, error) {
	identity, err := join.Load(h.dir)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil, nil //nolint:nilnil // none, and no error
	case errors.Is(err, statedir.ErrCorrupt):
		h.log.Error("the kept identity is damaged: a new join token is needed", slog.Any("error", err))
		return nil, nil //nolint:nilnil // none, and no error
	case err != nil:
		return nil, err
	case identity.Node != h.cfg.NodeName:
		return nil, fmt.Errorf("%w: %s, node_name is %s: set it back, or remove %s to join anew", ErrNode, identity.Node, h.cfg.NodeName, h.cfg.DataDir)
	}
	newest := identity.Leaf
	if l := h.leaves.Leaf(newest.ID()); l != nil {
		newest = l
	}
	if over := time.Since(newest.NotAfter()); over > 0 {
		h.log.Error("the node's certificate is over: a new join token is needed, of meshctl token join --replace",
			slog.String("node", h.cfg.NodeName), slog.Time("not_after", newest.NotAfter()))
		return nil, nil //nolint:nilnil // none, and no error
	}
	return identity, nil
}

// Reload reads the service definitions now; the folder is followed anyway.
func (a *Agent) Reload() {
	if h := a.running.Load(); h != nil {
		h.registry.Reload()
	}
}

// Leave takes the node's instances out of the catalog, ends its lease, and
// makes Run return nil. Errors wrap ErrNotConnected if no server is there; then
// nothing has changed.
func (a *Agent) Leave(ctx context.Context) error {
	h := a.running.Load()
	if h == nil {
		return fmt.Errorf("leave: %w: the agent does not run", ErrNotConnected)
	}
	h.leaving.Lock()
	defer h.leaving.Unlock()
	if client, _ := h.link(); client == nil {
		return fmt.Errorf("leave: %w", ErrNotConnected)
	}
	// What is registered after the server took the instances away would be there for
	// ever.
	if err := h.syncer.Pause(ctx); err != nil {
		return fmt.Errorf("leave: %w", err)
	}
	if err := h.sendLeave(ctx); err != nil {
		h.syncer.Resume()
		return fmt.Errorf("leave: %w", err)
	}
	h.leave(errLeft)
	return nil
}

// sendLeave tells the server that the node leaves, over a connection of its own: the
// server ends the stream before it answers, and what the stream's connection carries
// ends with it. Unless it fails there is no new stream: that would give the node a
// lease again, which nobody keeps.
func (h *host) sendLeave(ctx context.Context) error {
	link, _ := h.view.Link()
	if link == nil {
		return ErrNotConnected
	}
	conn, err := h.dial(link.Server)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	h.away.Store(true)
	if _, err = meshpb.NewMeshClient(conn).Leave(ctx, &meshpb.LeaveRequest{}); err != nil {
		h.away.Store(false)
	}
	return err
}
