// Command bench-server measures the servers of meshd: writes beside etcd, what
// becomes of them when a server dies beside bare Raft, and what a large mesh
// costs. See docs/benchmarks-server.md.
//
// It prints figures and what they were to be, and never fails by them.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/meshd/meshd/tests/bench/server/bareraft"
	"github.com/meshd/meshd/tests/bench/server/drive"
)

// The program is also what loads the servers, and the members of bare Raft: each
// is a process of its own, and reads what it is to do from its standard input.
const (
	driveCommand = "drive"
	raftCommand  = "bare-raft"
	busyCommand  = "busy"
)

func main() { os.Exit(realMain()) }

func realMain() int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	var err error
	switch args := os.Args[1:]; {
	case len(args) == 1 && args[0] == driveCommand:
		err = carryOut(ctx, os.Stdin, os.Stdout)
	case len(args) == 2 && args[0] == raftCommand:
		err = serveRaft(ctx, args[1])
	case len(args) == 1 && args[0] == busyCommand:
		spin(ctx)
	default:
		var o options
		if o, err = parse(args, os.Stderr); err == nil {
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
		fmt.Fprintln(os.Stderr, "bench-server:", err)
		return 1
	}
	return 0
}

// carryOut does a job and writes its result.
func carryOut(ctx context.Context, in io.Reader, out io.Writer) error {
	var job drive.Job
	if err := json.NewDecoder(in).Decode(&job); err != nil {
		return err
	}
	result, err := job.Do(ctx)
	if err != nil {
		return err
	}
	return json.NewEncoder(out).Encode(result)
}

// serveRaft is a member of bare Raft, whose configuration is in a file.
func serveRaft(ctx context.Context, path string) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	var cfg bareraft.Config
	if err := json.Unmarshal(data, &cfg); err != nil {
		return err
	}
	return bareraft.Run(ctx, cfg)
}

// spin keeps one CPU busy.
func spin(ctx context.Context) {
	for n := 0; ctx.Err() == nil; {
		for range 1 << 20 {
			n++
		}
	}
}
