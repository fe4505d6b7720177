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
	c := daemonCommand("server", "run a server: catalog, intentions and CA", serverFile,
		func(ctx context.Context, config server.Config, log *slog.Logger) error {
			config.Version = version
			s, err := server.New(config, log)
			if err != nil {
				return err
			}
			return s.Run(ctx)
		})
	c.AddCommand(fingerprintCommand())
	return c
}

func agentCommand() *cobra.Command {
	return daemonCommand("agent", "run the agent of this host", "/etc/meshd/agent.hcl", runAgent)
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
func daemonCommand[C any](use, short, file string, run func(context.Context, C, *slog.Logger) error) *cobra.Command {
	var path, level string
	var check bool
	c := &cobra.Command{
		Use: use, Short: short, Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			log, err := newLogger(level)
			if err != nil {
				return err
			}
			var config C
			if err := readConfig(path, &config); err != nil {
				return err
			}
			if check {
				_, err := fmt.Fprintln(cmd.OutOrStdout(), path+" is valid")
				return err
			}
			return run(cmd.Context(), config, log)
		},
	}
	f := c.Flags()
	f.StringVar(&path, "config", file, "configuration file (.hcl, .yaml or .json)")
	f.BoolVar(&check, "check-config", false, "check the configuration file and exit")
	f.StringVar(&level, "log-level", "info", "debug, info, warn or error")
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
	var l slog.Level
	if err := l.UnmarshalText([]byte(level)); err != nil {
		return nil, usageError{fmt.Errorf("--log-level %q: use debug, info, warn or error", level)}
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: l})), nil
}

func noArgs(c *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usageError{fmt.Errorf("%s takes no arguments, got %q; see %s --help", c.Name(), args[0], c.CommandPath())}
	}
	return nil
}
