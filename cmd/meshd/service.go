package main

import (
	"cmp"
	"context"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sync/errgroup"

	"github.com/meshd/meshd/agent"
	"github.com/meshd/meshd/cmd/internal/notify"
	"github.com/meshd/meshd/server"
)

// service is a server or an agent.
type service[C any] interface {
	Run(context.Context) error
	// Bound is closed when it has its sockets, Started when it does what it is for.
	Bound() <-chan struct{}
	Started() <-chan struct{}
	// Apply changes what can be changed while it runs.
	Apply(C)
	// Alive asks it whether it answers.
	Alive(context.Context) error
}

// ballastSize is how much memory a server claims and never touches, so that it
// takes up address space and nothing else. Go lets the heap grow to twice what
// lives before it collects: the few MiB of a small mesh would be collected several
// times a second while it is written to. With this to count from, three servers
// that share two CPUs take less CPU per write; a large mesh takes at most as much
// more memory.
const ballastSize = 32 << 20

// serverService is a server with what steadies its collector.
type serverService struct {
	*server.Server

	ballast []byte
}

func newServerService(s *server.Server) serverService {
	return serverService{Server: s, ballast: make([]byte, ballastSize)}
}

// Run implements service.
func (s serverService) Run(ctx context.Context) error {
	defer runtime.KeepAlive(s.ballast)
	return s.Server.Run(ctx) //nolint:wrapcheck // the server's own words
}

// Alive implements service.
func (s serverService) Alive(ctx context.Context) error {
	select {
	case <-s.Started():
		return ask(ctx, s.AdminSocket(), "/v1/healthz")
	default: // it may wait for others for as long as that takes
		return nil
	}
}

type agentService struct{ *agent.Agent }

// Started implements service.
func (a agentService) Started() <-chan struct{} { return a.Bound() }

// Apply implements service. Nothing but the log's level can change.
func (a agentService) Apply(agent.Config) {}

// Alive implements service.
func (a agentService) Alive(ctx context.Context) error {
	select {
	case <-a.Bound():
		return ask(ctx, a.Socket(), "/v1/agent/status")
	default:
		return nil
	}
}

// ask expects any answer from a unix socket.
func ask(ctx context.Context, socket, path string) error {
	transport := &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		},
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://local"+path, nil)
	if err != nil {
		return err
	}
	resp, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		return err
	}
	return resp.Body.Close()
}

// daemon runs a service as service managers expect it: it tells when it is ready
// and that it lives, and reads its file again on SIGHUP.
type daemon[C any] struct {
	start func(C, *slog.Logger) (service[C], error)
	level func(C) string // in the configuration
	// live are the keys that Apply changes; atStart those that matter only then.
	live, atStart []string

	path, flag string // of --config and --log-level
}

func (d daemon[C]) run(ctx context.Context, config C) error {
	var level slog.LevelVar
	if err := d.setLevel(&level, config); err != nil {
		return err
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: &level}))
	s, err := d.start(config, log)
	if err != nil {
		return err
	}
	manager := notify.New(os.Getenv)
	tell := func(states ...string) {
		if err := manager.Send(states...); err != nil {
			log.WarnContext(ctx, "the service manager can't be told", slog.Any("error", err))
		}
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	defer context.AfterFunc(ctx, func() { tell(notify.Stopping) })()
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		defer stop()
		return s.Run(ctx)
	})
	group.Go(func() error {
		select {
		case <-s.Bound():
			tell(notify.Ready, notify.Status("waiting for the other servers"))
		case <-ctx.Done():
			return nil
		}
		select {
		case <-s.Started():
			tell(notify.Status("serving"))
		case <-ctx.Done():
		}
		return nil
	})
	group.Go(func() error { return manager.Watch(ctx, s.Alive) })
	group.Go(func() error {
		hangups := make(chan os.Signal, 1)
		signal.Notify(hangups, syscall.SIGHUP)
		defer signal.Stop(hangups)
		for last := config; ; {
			select {
			case <-ctx.Done():
				return nil
			case <-hangups:
				tell(notify.Reloading())
				last = d.reload(ctx, s, config, last, &level, log)
				tell(notify.Ready)
			}
		}
	})
	return group.Wait()
}

// setLevel takes the flag before the file, and info without either.
func (d daemon[C]) setLevel(level *slog.LevelVar, config C) error {
	l, err := parseLevel(cmp.Or(d.flag, d.level(config), "info"))
	if err == nil {
		level.Set(l)
	}
	return err
}

// reload reads the file again and returns what is in it. A bad file changes
// nothing. First is what the service was started with, last what was read before.
func (d daemon[C]) reload(ctx context.Context, s service[C], first, last C, level *slog.LevelVar, log *slog.Logger) C {
	var next C
	err := readConfig(d.path, &next)
	if err == nil {
		err = d.setLevel(level, next)
	}
	if err != nil {
		log.ErrorContext(ctx, "the configuration could not be read again; nothing was changed", slog.Any("error", err))
		return last
	}
	s.Apply(next)
	fixed := func(key string) bool { return !slices.Contains(d.live, key) && !slices.Contains(d.atStart, key) }
	applied := slices.DeleteFunc(differences(last, next), fixed)
	log.InfoContext(ctx, "the configuration was read again", slog.Any("changed", applied))
	waiting := slices.DeleteFunc(differences(first, next), func(key string) bool { return !fixed(key) })
	if len(waiting) > 0 {
		log.WarnContext(ctx, "some changes need a restart", slog.String("keys", strings.Join(waiting, ", ")))
	}
	return next
}

// differences names the keys of a file whose values differ, such as ca.leaf_ttl.
func differences(a, b any) []string {
	var out []string
	compare(reflect.ValueOf(a), reflect.ValueOf(b), "", &out)
	return out
}

func compare(a, b reflect.Value, path string, out *[]string) {
	if a.Kind() != reflect.Struct {
		if !reflect.DeepEqual(a.Interface(), b.Interface()) {
			*out = append(*out, path)
		}
		return
	}
	for _, f := range reflect.VisibleFields(a.Type()) {
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		if name == "" || name == "-" {
			continue
		}
		key := name
		if path != "" {
			key = path + "." + name
		}
		compare(a.FieldByIndex(f.Index), b.FieldByIndex(f.Index), key, out)
	}
}
