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
	"github.com/meshd/meshd/catalog/manifest"
	"github.com/meshd/meshd/server"
)

const serverFile = "/etc/meshd/server.hcl"

func serverCommand() *cobra.Command {
	c := daemonCommand("server", "run a server: catalog, intentions and CA", serverFile, daemon[server.Config]{
		start: func(config server.Config, log *slog.Logger) (service[server.Config], error) {
			config.Version = version
			s, err := server.New(config, log)
			return newServerService(s), err
		},
		level: func(c server.Config) string { return c.LogLevel },
		live:  server.LiveKeys(), atStart: server.StartKeys(),
	})
	c.AddCommand(fingerprintCommand(), recoverCommand())
	return c
}

func agentCommand() *cobra.Command {
	return daemonCommand("agent", "run the agent of this host", "/etc/meshd/agent.hcl", daemon[agent.Config]{
		start: func(config agent.Config, log *slog.Logger) (service[agent.Config], error) {
			config.Version = version
			a, err := agent.New(config, log)
			return agentService{a}, err
		},
		level: func(c agent.Config) string { return c.LogLevel },
		live:  []string{"log_level"},
	})
}

func runAgent(ctx context.Context, config agent.Config, log *slog.Logger) error {
	config.Version = version
	a, err := agent.New(config, log)
	if err != nil {
		return err
	}
	return a.Run(ctx)
}

// daemonCommand is what server and agent have in common: a configuration file,
// a check of it, a log, and running to the end.
func daemonCommand[C any](use, short, file string, d daemon[C]) *cobra.Command {
	var check bool
	c := &cobra.Command{
		Use: use, Short: short, Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if d.flag != "" {
				if _, err := parseLevel(d.flag); err != nil {
					return err
				}
			}
			var config C
			if err := readConfig(d.path, &config); err != nil {
				return err
			}
			if check {
				_, err := fmt.Fprintln(cmd.OutOrStdout(), d.path+" is valid")
				return err
			}
			return d.run(cmd.Context(), config)
		},
	}
	f := c.Flags()
	f.StringVar(&d.path, "config", file, "configuration file (.hcl, .yaml or .json)")
	f.BoolVar(&check, "check-config", false, "check the configuration file and exit")
	f.StringVar(&d.flag, "log-level", "", "debug, info, warn or error (default: log_level of the file, or info)")
	_ = c.MarkFlagFilename("config", "hcl", "yaml", "json") // the flag was just defined
	return c
}

// readConfig reads a configuration file, which must be valid.
func readConfig(path string, into any) error {
	data, err := os.ReadFile(path) //nolint:gosec // the operator names it
	if errors.Is(err, fs.ErrNotExist) {
		return usageError{fmt.Errorf("read the configuration: %w; name another file with --config", err)}
	}
	if err != nil {
		return fmt.Errorf("read the configuration: %w", err)
	}
	if err := manifest.DecodeConfig(path, data, into); err != nil {
		return fmt.Errorf("read the configuration: %w", err)
	}
	return nil
}

func newLogger(level string) (*slog.Logger, error) {
	l, err := parseLevel(level)
	if err != nil {
		return nil, err
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: l})), nil
}

func parseLevel(level string) (slog.Level, error) {
	var l slog.Level
	if err := l.UnmarshalText([]byte(level)); err != nil {
		return l, usageError{fmt.Errorf("--log-level %q: use debug, info, warn or error", level)}
	}
	return l, nil
}

func noArgs(c *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usageError{fmt.Errorf("%s takes no arguments, got %q; see %s --help", c.Name(), args[0], c.CommandPath())}
	}
	return nil
}
