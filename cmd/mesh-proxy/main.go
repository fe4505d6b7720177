// Command mesh-proxy is the data plane of one host: it carries the bytes between applications and the mesh, as the plan says
// that the host's agent feeds it. Without an agent it runs the last plan, from its own disk. It can start its program anew and hand
// over to it without losing a connection.
package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
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
	case cfg.restart:
		err = askRestart(cfg.state, os.Stdout)
	default:
		var code int
		if code, err = run(cfg); err == nil {
			return code
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "mesh-proxy:", err)
		return exitError
	}
	return 0
}
