package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/meshd/meshd/agent"
	"github.com/meshd/meshd/server"
	"github.com/meshd/meshd/server/client"
)

const (
	devTrustDomain = "dev.mesh"
	devNode        = "dev"
)

// dev is a mesh of one host: server, agent and proxy in one command.
type dev struct {
	data, services, level string
	demo                  bool
	out                   io.Writer
	log                   *slog.Logger
	socket                string // where meshctl finds the server
}

func devCommand() *cobra.Command {
	var d dev
	c := &cobra.Command{
		Use: "dev", Short: "run server, agent and proxy on this machine, for development", Args: noArgs,
		Long: `dev runs a mesh of one host: server, agent and mesh-proxy, all on the loopback
address. meshctl finds it with no setting. Put service definitions into the
services folder; what they may do is up to you.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			d.out = cmd.OutOrStdout()
			var err error
			if d.log, err = newLogger(d.level); err != nil {
				return err
			}
			return d.run(cmd.Context())
		},
	}
	f := c.Flags()
	f.StringVar(&d.data, "data", "", "folder for all state; a temporary one, deleted at the end, if not given")
	f.StringVar(&d.services, "services", "", "folder of service definitions; services.d in the data folder if not given")
	f.BoolVar(&d.demo, "demo", false, "add two small applications and show what passes between them")
	f.StringVar(&d.level, "log-level", "error", "debug, info, warn or error")
	return c
}

func (d *dev) run(ctx context.Context) (err error) {
	cleanup, err := d.folders()
	if err != nil {
		return errors.Join(err, cleanup())
	}
	defer func() { err = errors.Join(err, cleanup()) }()
	api, err := listenLoopback(ctx, server.DefaultPort)
	if err != nil {
		return err
	}
	s, err := server.New(server.Config{
		TrustDomain: devTrustDomain, Name: devNode, DataDir: filepath.Join(d.data, "server"), AdminSocket: d.socket,
		Advertise: api.Addr().String(), Listener: api, Version: version,
	}, d.log)
	if err != nil {
		return errors.Join(err, api.Close())
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return s.Run(ctx) })
	g.Go(func() error {
		select {
		case <-s.Started():
			return d.join(ctx, s.Address())
		case <-ctx.Done():
			return nil
		}
	})
	return g.Wait()
}

// folders makes the folders, and returns what removes the temporary ones, after an error too.
func (d *dev) folders() (cleanup func() error, err error) {
	cleanup = func() error { return nil }
	if d.data == "" {
		if d.data, err = os.MkdirTemp("", "meshd-dev-"); err != nil {
			return cleanup, err
		}
		temporary := d.data
		cleanup = func() error { return os.RemoveAll(temporary) }
	}
	if d.data, err = filepath.Abs(d.data); err != nil {
		return cleanup, err
	}
	if d.services == "" {
		d.services = filepath.Join(d.data, "services.d")
	}
	if d.services, err = filepath.Abs(d.services); err != nil {
		return cleanup, err
	}
	if err = os.MkdirAll(d.services, 0o700); err != nil {
		return cleanup, err
	}
	if d.demo {
		if err = writeDemo(d.services); err != nil {
			return cleanup, err
		}
	}
	d.socket, err = socketPath()
	return cleanup, err
}

// socketPath is a place where meshctl looks. The socket itself lets in only this
// user and root; root's folder is where other daemons have theirs, too.
func socketPath() (string, error) {
	dir, mode := filepath.Join(os.TempDir(), "meshd-"+strconv.Itoa(os.Getuid())), fs.FileMode(0o700)
	if os.Getuid() == 0 {
		dir, mode = "/run/meshd", 0o755
	} else if run := os.Getenv("XDG_RUNTIME_DIR"); run != "" {
		dir = filepath.Join(run, "meshd")
	}
	if err := os.MkdirAll(dir, mode); err != nil { //nolint:gosec // TMPDIR and XDG_RUNTIME_DIR are the user's own
		return "", err
	}
	path := filepath.Join(dir, "server.sock")
	if c, err := (&net.Dialer{Timeout: time.Second}).Dial("unix", path); err == nil {
		return "", errors.Join(fmt.Errorf("%s: a server runs on this machine already; stop it first", path), c.Close())
	}
	return path, nil
}

// listenLoopback listens on a port, or on any free one if it is taken.
func listenLoopback(ctx context.Context, port int) (net.Listener, error) {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		l, err = lc.Listen(ctx, "tcp", "127.0.0.1:0")
	}
	return l, err
}

// freePort is port, or a free one if it is taken: whoever comes first has it.
func freePort(ctx context.Context, port int) (uint16, error) {
	l, err := listenLoopback(ctx, port)
	if err != nil {
		return 0, err
	}
	addr, ok := l.Addr().(*net.TCPAddr)
	if !ok {
		return 0, errors.Join(fmt.Errorf("%s is no TCP address", l.Addr()), l.Close())
	}
	return uint16(addr.Port), l.Close() //nolint:gosec // a port
}

// join lets this host join the server, and runs its agent.
func (d *dev) join(ctx context.Context, address string) error {
	api, err := client.New(client.Config{Address: "unix://" + d.socket})
	if err != nil {
		return err
	}
	tokenFile := filepath.Join(d.data, "join.token")
	if err := d.writeToken(ctx, api, tokenFile); err != nil {
		return err
	}
	mesh, err := freePort(ctx, agent.DefaultMeshPort)
	if err != nil {
		return err
	}
	metrics, err := freeAddress(ctx, agent.DefaultMetrics)
	if err != nil {
		return err
	}
	proxyMetrics, err := freeAddress(ctx, agent.DefaultProxyMetrics)
	if err != nil {
		return err
	}
	config := agent.Config{
		Servers: []string{address}, NodeName: devNode, Advertise: "127.0.0.1", Version: version,
		DataDir: filepath.Join(d.data, "agent"), ServicesDir: d.services, Socket: filepath.Join(d.data, "agent.sock"),
		Join: agent.Join{TokenFile: tokenFile},
		Proxy: agent.Proxy{
			Socket: filepath.Join(d.data, "proxy.sock"), ID: devNode, MeshAddress: "127.0.0.1", MeshPort: mesh, Supervise: true,
			StateDir: filepath.Join(d.data, "proxy"), Metrics: proxyMetrics,
		},
		Metrics: agent.Metrics{Address: metrics},
	}
	_, _ = fmt.Fprintf(d.out, "A mesh of one host is up: server %s, mesh port 127.0.0.1:%d, metrics http://%s/metrics.\n"+
		"Services are defined in %s. In another terminal, try:\n"+
		"  meshctl services · meshctl intention list · meshctl explain web api · meshctl check\nCtrl-C ends it.\n\n", address, mesh, metrics, d.services)
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return runAgent(ctx, config, d.log) })
	if d.demo {
		g.Go(func() error { return (&demo{out: d.out, api: api}).run(ctx) })
	}
	return g.Wait()
}

// freeAddress returns an address with a port that nobody listens on now: the wanted one, if it can be.
func freeAddress(ctx context.Context, wanted string) (string, error) {
	host, text, err := net.SplitHostPort(wanted)
	if err != nil {
		return "", err
	}
	port, err := strconv.Atoi(text)
	if err != nil {
		return "", err
	}
	free, err := freePort(ctx, port)
	if err != nil {
		return "", err
	}
	return net.JoinHostPort(host, strconv.Itoa(int(free))), nil
}

// writeToken makes a token that lets this host in, whatever became of the one
// before.
func (d *dev) writeToken(ctx context.Context, api *client.Client, path string) error {
	_, err := os.Stat(filepath.Join(d.data, "agent"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err == nil {
		ref := client.Ref{Kind: client.KindNode, Parts: []string{devNode}}
		if _, err := api.Get(ctx, ref); client.CodeOf(err) != client.CodeNotFound {
			return err // it has joined, and nobody has deleted it since
		}
	}
	token, err := api.JoinToken(ctx, client.JoinTokenRequest{Node: devNode, Services: []string{"*"}, Replace: true})
	if err != nil {
		return err
	}
	return os.WriteFile(path, []byte(token.Token+"\n"), 0o600)
}
