// Command bench measures mesh-proxy beside HAProxy, Envoy and nginx in one
// run, on one machine, with the same work for each.
//
// It prints figures and never judges them. See docs/benchmarks.md.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"syscall"

	"github.com/meshd/meshd/tests/bench/load"
)

// The program is also both ends of what it measures, and what no product
// sells: each is a process of its own.
const (
	backendCommand = "end-backend"
	loadCommand    = "end-client"
	hopCommand     = "plain-hop"
	goHopCommand   = "net-http-hop"
)

func main() { os.Exit(realMain()) }

func realMain() int {
	var err error
	switch args := os.Args[1:]; {
	case len(args) == 1 && args[0] == backendCommand:
		err = load.Serve(os.NewFile(3, "http"), os.NewFile(4, "stream"), os.NewFile(5, "h2"))
	case len(args) == 1 && args[0] == loadCommand:
		err = carryOut()
	case len(args) == 3 && args[0] == hopCommand:
		err = serveHop(args[1], args[2])
	case len(args) == 2 && args[0] == goHopCommand:
		err = serveGoHop(args[1])
	default:
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGPIPE)
		defer stop()
		var o options
		if o, err = parse(ctx, args, os.Stderr); err == nil {
			err = run(ctx, o)
		}
		if err != nil && ctx.Err() != nil {
			err = errors.New("interrupted") // whatever else failed, failed by that
		}
	}
	switch {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case errors.Is(err, errUsage):
		return 2
	case err != nil:
		fmt.Fprintln(os.Stderr, "bench:", err)
		return 1
	}
	return 0
}

// carryOut reads a job from standard input, does it, and writes the result.
func carryOut() error {
	var job load.Job
	if err := json.NewDecoder(os.Stdin).Decode(&job); err != nil {
		return err
	}
	runtime.LockOSThread()
	out, err := job.Do(context.Background())
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(out)
}
