// Command meshd runs a server of the mesh, the agent of a host, or both with a
// proxy for development.
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/meshd/meshd/catalog/manifest"
)

// version is set by the build.
var version = "devel" //nolint:gochecknoglobals // the linker sets it

// Exit codes: those of meshctl, as far as they apply.
const (
	exitError = 1
	exitUsage = 2
)

// usageError is a mistake in the command line or in a file.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	os.Exit(run(ctx, os.Args[1:]))
}

func run(ctx context.Context, args []string) int {
	root := &cobra.Command{
		Use: "meshd", Short: "a service mesh for VMs, Nomad jobs and containers",
		SilenceErrors: true, SilenceUsage: true, Version: version, Args: cobra.ArbitraryArgs,
		RunE: func(c *cobra.Command, args []string) error {
			if len(args) == 0 {
				return c.Help()
			}
			c.SuggestionsMinimumDistance = 2
			near := strings.Join(c.SuggestionsFor(args[0]), " or ")
			if near != "" {
				near = "; did you mean " + near + "?"
			}
			return usageError{fmt.Errorf("%q is no command%s See meshd --help", args[0], cmp.Or(near, "."))}
		},
	}
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return usageError{fmt.Errorf("%w; see %s --help", err, c.CommandPath())}
	})
	root.AddCommand(serverCommand(), agentCommand(), devCommand()) //nolint:contextcheck // each command gets ctx from ExecuteContext below
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	fmt.Fprintln(os.Stderr, "meshd: "+err.Error())
	if _, ok := errors.AsType[usageError](err); ok || errors.Is(err, manifest.ErrInvalid) {
		return exitUsage
	}
	return exitError
}
