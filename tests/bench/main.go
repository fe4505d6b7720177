// Command bench measures mesh-proxy beside HAProxy and nginx on this machine,
// in one run: CPU per request, throughput, latency and memory. It prints
// figures and judges none. Everything listens on loopback and ends with it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"
)

// options are what the flags say.
type options struct {
	proxy, markdown  string
	rounds           int
	connections      int
	duration, warmup time.Duration
	verbose          bool
}

func main() {
	// The benchmark is a program of its own for what no product sells: the
	// proxy's HTTP engine between two plain sockets.
	if len(os.Args) == 3 && os.Args[1] == hopCommand {
		exit(hop(os.Args[2]))
	}
	var o options
	flag.StringVar(&o.proxy, "proxy", "bin/mesh-proxy", "`path` of mesh-proxy")
	flag.StringVar(&o.markdown, "markdown", "", "`file` to write the report to as well, such as docs/benchmarks.md")
	flag.IntVar(&o.rounds, "rounds", 3, "how often each is measured, in turn; figures are medians over rounds")
	flag.IntVar(&o.connections, "connections", 64, "keep-alive connections")
	flag.DurationVar(&o.duration, "duration", 4*time.Second, "of one measurement")
	flag.DurationVar(&o.warmup, "warmup", 500*time.Millisecond, "before each measurement")
	flag.BoolVar(&o.verbose, "v", false, "print the configurations too")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, o)
	stop()
	exit(err)
}

func exit(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

func run(ctx context.Context, o options) (err error) {
	if o.rounds < 1 || o.connections < 1 || o.duration <= 0 || o.warmup < 0 || flag.NArg() > 0 {
		return errors.New("rounds, connections and duration must be positive, and there are no arguments; see -help")
	}
	if o.proxy, err = filepath.Abs(o.proxy); err != nil {
		return err
	}
	if _, err := os.Stat(o.proxy); err != nil {
		return fmt.Errorf("find mesh-proxy: %w; run: make build", err)
	}
	dir, err := os.MkdirTemp("", "mesh-b-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	f := &field{dir: dir, proxy: o.proxy}
	defer func() { err = errors.Join(err, f.close()) }()
	if err := f.start(ctx); err != nil {
		return err
	}
	rep := report{options: o, machine: describe(ctx, f), results: map[key][]sample{}}
	total := time.Duration(o.rounds*len(f.contenders)*len(sizes())) * (o.duration + o.warmup)
	fmt.Fprintf(os.Stderr, "bench: %d rounds, about %s\n", o.rounds, total.Round(time.Second))
	for round := range o.rounds {
		for _, size := range sizes() {
			for i := range f.contenders {
				// Each round begins with another one.
				c := f.contenders[(i+round)%len(f.contenders)]
				s, err := measure(ctx, c, size, o)
				if err != nil {
					return fmt.Errorf("%s: %s, %s: %w", c.scenario, c.name, size.name, err)
				}
				k := key{c.scenario, c.name, size.name}
				rep.results[k] = append(rep.results[k], s)
			}
		}
		fmt.Fprintf(os.Stderr, "bench: round %d of %d is done\n", round+1, o.rounds)
	}
	return rep.write(os.Stdout, f, func(path string, write func(io.Writer) error) error {
		file, err := os.Create(path)
		if err != nil {
			return err
		}
		return errors.Join(write(file), file.Close())
	})
}
