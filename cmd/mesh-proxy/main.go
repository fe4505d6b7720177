// Command mesh-proxy is the data plane of one host: it carries the bytes between applications and the mesh, as the plan says
// that the host's agent feeds it. Without an agent it runs the last plan, from its own disk.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

// version is set by the build.
var version = "devel" //nolint:gochecknoglobals // the linker sets it

// Exit codes.
const (
	exitError = 1
	exitUsage = 2
)

func main() { os.Exit(realMain()) }

func realMain() int {
	cfg, err := parse(os.Args[1:], os.Stderr)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case err != nil:
		fmt.Fprintln(os.Stderr, "mesh-proxy:", err)
		return exitUsage
	case cfg.version:
		fmt.Println("mesh-proxy", version)
		return 0
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if err := run(ctx, stop, cfg); err != nil {
		fmt.Fprintln(os.Stderr, "mesh-proxy:", err)
		return exitError
	}
	return 0
}
