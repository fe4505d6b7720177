package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"

	"github.com/spf13/cobra"

	"github.com/meshd/meshd/agent"
	"github.com/meshd/meshd/server"
)

// daemon is what server and agent have in common: a file, a check of it, a
// log, a Run.
type daemon struct {
	config string
	check  bool
	level  string
}

func (d *daemon) flags(c *cobra.Command, file string) {
	f := c.Flags()
	f.StringVar(&d.config, "config", file, "configuration file (.hcl, .yaml or .json)")
	f.BoolVar(&d.check, "check-config", false, "check the configuration file and exit")
	f.StringVar(&d.level, "log-level", "info", "debug, info, warn or error")
	_ = c.MarkFlagFilename("config", "hcl", "yaml", "json") // the flag was just defined
}

func (d *daemon) logger() (*slog.Logger, error) { return newLogger(d.level) }

func newLogger(level string) (*slog.Logger, error) {
	var l slog.Level
	if err := l.UnmarshalText([]byte(level)); err != nil {
		return nil, usageError{fmt.Errorf("--log-level %q: use debug, info, warn or error", level)}
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: l})), nil
}

// load reads the file and, with --check-config, says that it is good.
func load[C any](d *daemon, c *cobra.Command, read func(string) (C, error)) (config C, done bool, err error) {
	config, err = read(d.config)
	if errors.Is(err, fs.ErrNotExist) {
		return config, false, usageError{fmt.Errorf("%w; name another file with --config", err)}
	}
	if err != nil || !d.check {
		return config, false, err
	}
	_, err = fmt.Fprintln(c.OutOrStdout(), d.config+" is valid")
	return config, true, err
}

func noArgs(c *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usageError{fmt.Errorf("%s takes no arguments, got %q; see %s --help", c.CommandPath(), args[0], c.CommandPath())}
	}
	return nil
}

func serverCommand() *cobra.Command {
	var d daemon
	c := &cobra.Command{
		Use: "server", Short: "run a server: catalog, intentions and CA", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			config, done, err := load(&d, cmd, server.ReadConfig)
			if err != nil || done {
				return err
			}
			config.Version = version
			log, err := d.logger()
			if err != nil {
				return err
			}
			s, err := server.New(config, log)
			if err != nil {
				return err
			}
			return s.Run(cmd.Context())
		},
	}
	d.flags(c, "/etc/meshd/server.hcl")
	return c
}

func agentCommand() *cobra.Command {
	var d daemon
	c := &cobra.Command{
		Use: "agent", Short: "run the agent of this host", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			config, done, err := load(&d, cmd, agent.ReadConfig)
			if err != nil || done {
				return err
			}
			config.Version = version
			log, err := d.logger()
			if err != nil {
				return err
			}
			return runAgent(cmd.Context(), config, log)
		},
	}
	d.flags(c, "/etc/meshd/agent.hcl")
	return c
}

func runAgent(ctx context.Context, config agent.Config, log *slog.Logger) error {
	a, err := agent.New(config, log)
	if err != nil {
		return err
	}
	return a.Run(ctx)
}
