package main

import (
	"cmp"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"time"
)

// config is what the flags say.
type config struct {
	feed, id, state, metrics string
	drain, handover          time.Duration
	heir, restart            bool
	level                    slog.Level
	version                  bool
}

// parse reads the command line. Help goes to out; errors are one line.
func parse(args []string, out io.Writer) (config, error) {
	var cfg config
	fs := flag.NewFlagSet("mesh-proxy", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.StringVar(&cfg.feed, "feed", "/run/meshd/proxy.sock", "`path` of the agent's feed socket")
	fs.StringVar(&cfg.id, "id", "", "`name` of this proxy at the agent (default the host name)")
	fs.StringVar(&cfg.state, "state", "/var/lib/mesh-proxy", "`directory` for the last plan and keys, mode 0700")
	fs.StringVar(&cfg.metrics, "metrics", "127.0.0.1:7491", "loopback `address` for Prometheus; empty serves none")
	fs.DurationVar(&cfg.drain, "drain-timeout", 30*time.Second, "how long open connections may go on after SIGTERM")
	fs.DurationVar(&cfg.handover, "restart-drain-timeout", 10*time.Minute, "how long open connections may go on after another process took over; 0 is as long as they want")
	fs.BoolVar(&cfg.restart, "restart", false, "have the process that runs with --state start its program anew, hand over to it, and drain; return when that serves")
	fs.BoolVar(&cfg.heir, "heir", false, "take over from the process that starts this one; only mesh-proxy itself sets it")
	fs.TextVar(&cfg.level, "log-level", slog.LevelInfo, "`level`: debug, info, warn or error; debug tells every decision")
	fs.BoolVar(&cfg.version, "version", false, "print the version and exit")
	err := fs.Parse(args)
	if err == flag.ErrHelp { //nolint:errorlint // Parse returns it as it is
		fs.SetOutput(out)
		_, _ = io.WriteString(out, "Usage: mesh-proxy [flags]\n\nFlags:\n")
		fs.PrintDefaults()
		return config{}, err
	}
	if err != nil {
		return config{}, fmt.Errorf("%w; see mesh-proxy --help", err)
	}
	return cfg, cfg.check(fs.Args())
}

func (c *config) check(rest []string) error {
	switch {
	case len(rest) > 0:
		return fmt.Errorf("unexpected argument %q; see mesh-proxy --help", rest[0])
	case c.feed == "":
		return fmt.Errorf("--feed: a path is needed")
	case c.state == "":
		return fmt.Errorf("--state: a directory is needed")
	case c.drain < 0:
		return fmt.Errorf("--drain-timeout %s: it can't be negative", c.drain)
	case c.handover < 0:
		return fmt.Errorf("--restart-drain-timeout %s: it can't be negative", c.handover)
	}
	if c.id == "" {
		name, _ := os.Hostname() // without one the proxy still has a name
		c.id = cmp.Or(name, "host")
	}
	if c.metrics == "" {
		return nil
	}
	host, _, err := net.SplitHostPort(c.metrics)
	if err != nil {
		return fmt.Errorf("--metrics %q: write HOST:PORT", c.metrics)
	}
	if ip, err := netip.ParseAddr(host); err != nil || !ip.IsLoopback() {
		return fmt.Errorf("--metrics %q: the host must be a loopback address such as 127.0.0.1: metrics are not authenticated", c.metrics)
	}
	return nil
}
