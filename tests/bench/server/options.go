package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/meshd/meshd/tests/bench/agents"
)

// errUsage is that help was asked for, and given.
var errUsage = errors.New("usage")

// The parts of a run.
const (
	partWrites   = "writes"
	partFailover = "failover"
	partStop     = "stop"
	partBusy     = "busy"
	partLoad     = "load"
)

func allParts() []string { return []string{partWrites, partFailover, partStop, partBusy, partLoad} }

// options are what the flags say.
type options struct {
	meshd, versus string
	etcd, self    string
	dir           string
	only, stores  []string
	servers       int

	rounds, clients int
	keys, bytes     int
	warmup, window  time.Duration
	lightWindow     time.Duration
	killRuns        int
	stopRuns        int
	busyFor         time.Duration
	busyLoops       int

	fleet   agents.Size
	changes int

	markdown, json string
	quick, keep    bool
}

// parse reads the flags. An error wraps errUsage if it was told already.
func parse(args []string, out io.Writer) (options, error) {
	var o options
	fs := flag.NewFlagSet("bench-server", flag.ContinueOnError)
	fs.SetOutput(out)
	fs.StringVar(&o.meshd, "meshd", "bin/meshd", "`path` of meshd")
	fs.StringVar(&o.versus, "versus", "", "`path` of another build of meshd, whose writes are compared: it takes part as \"versus\"")
	fs.StringVar(&o.etcd, "etcd", "bin/tools/etcd", "`path` of etcd, 3.5 or newer")
	fs.StringVar(&o.dir, "dir", "bin", "`directory` on the disk to measure on; what is made in it is removed, unless -keep says otherwise")
	choose(fs, &o.only, "only", "what to measure", allParts())
	choose(fs, &o.stores, "stores", "which stores take part", []string{etcdName, meshName, versusName, bareName})
	fs.IntVar(&o.servers, "servers", 3, "how many servers each store has")
	fs.IntVar(&o.rounds, "rounds", 9, "how often writes are measured, each store in turn")
	fs.IntVar(&o.clients, "clients", 16, "clients that write at the same time")
	fs.IntVar(&o.keys, "keys", 64, "keys of each client, to which it writes in turn")
	fs.IntVar(&o.bytes, "bytes", 500, "length of a value")
	fs.DurationVar(&o.warmup, "warmup", time.Second, "before each measurement of writes")
	fs.DurationVar(&o.window, "window", 4*time.Second, "length of one measurement of writes")
	fs.DurationVar(&o.lightWindow, "light-window", 1500*time.Millisecond, "length of one measurement of writes with one client for each server")
	fs.IntVar(&o.killRuns, "kills", 50, "how often the leader is killed")
	fs.IntVar(&o.stopRuns, "stops", 10, "how often the leader is stopped (SIGSTOP)")
	fs.DurationVar(&o.busyFor, "busy-for", 45*time.Second, "how long busy loops take the CPUs")
	fs.IntVar(&o.busyLoops, "busy-loops", 8, "how many busy loops")
	fs.IntVar(&o.fleet.Agents, "agents", 1000, "agents of the large mesh")
	fs.IntVar(&o.fleet.Services, "services", 5000, "its services")
	fs.IntVar(&o.fleet.Instances, "instances", 20_000, "its instances")
	fs.IntVar(&o.fleet.Intentions, "intentions", 10_000, "its intentions")
	fs.IntVar(&o.fleet.Upstreams, "upstreams", 10, "services that each of its agents follows, besides one that all do")
	fs.IntVar(&o.changes, "changes", 100, "changes whose way to the agents is measured")
	fs.StringVar(&o.markdown, "write", "", "`file` to write the report to as well: docs/benchmarks-server.md")
	fs.StringVar(&o.json, "json", "bin/bench-server.json", "`file` for every single measurement; empty writes none")
	fs.BoolVar(&o.keep, "keep", false, "keep what is made in -dir: the stores with their logs")
	fs.BoolVar(&o.quick, "quick", false, "about four minutes: fewer and shorter rounds; other flags win")
	if err := fs.Parse(args); err != nil {
		return o, errors.Join(errUsage, err)
	}
	if o.quick {
		o.hurry(fs)
	}
	if fs.NArg() > 0 || min(o.servers, o.rounds, o.clients, o.keys, o.killRuns, o.stopRuns, o.busyLoops, o.changes, o.fleet.Agents, o.fleet.Services, o.fleet.Upstreams) < 1 ||
		o.fleet.Instances < o.fleet.Agents || o.bytes < minBytes || o.bytes > maxBytes ||
		min(o.window, o.lightWindow, o.warmup, o.busyFor) <= 0 {
		return o, fmt.Errorf("there are no arguments, counts and lengths are positive, and values have %d to %d bytes; see -help", minBytes, maxBytes)
	}
	return o, o.find()
}

// The values are valid records of nodes, whose labels are bounded.
const (
	minBytes = 150
	maxBytes = 3000
)

// choose is a flag that takes some of all.
func choose(fs *flag.FlagSet, into *[]string, name, usage string, all []string) {
	*into = all
	fs.Func(name, usage+": "+strings.Join(all, ",")+" (default all)", func(s string) error {
		*into = strings.Split(s, ",")
		for _, one := range *into {
			if !slices.Contains(all, one) {
				return fmt.Errorf("%q is none of %s", one, strings.Join(all, ", "))
			}
		}
		return nil
	})
}

// hurry sets what -quick means and was not said otherwise.
func (o *options) hurry(fs *flag.FlagSet) {
	said := map[string]bool{}
	fs.Visit(func(f *flag.Flag) { said[f.Name] = true })
	set := func(name string, to func()) {
		if !said[name] {
			to()
		}
	}
	set("rounds", func() { o.rounds = 3 })
	set("light-window", func() { o.lightWindow = time.Second })
	set("window", func() { o.window = 2 * time.Second })
	set("kills", func() { o.killRuns = 8 })
	set("stops", func() { o.stopRuns = 3 })
	set("changes", func() { o.changes = 30 })
	set("busy-for", func() { o.busyFor = 15 * time.Second })
}

// find finds the programs.
func (o *options) find() error {
	var err error
	if o.self, err = os.Executable(); err != nil {
		return err
	}
	if o.versus == "" {
		o.stores = slices.DeleteFunc(slices.Clone(o.stores), func(s string) bool { return s == versusName })
	}
	for _, path := range []*string{&o.meshd, &o.versus, &o.etcd, &o.dir} {
		if *path == "" {
			continue
		}
		if *path, err = filepath.Abs(*path); err != nil {
			return err
		}
	}
	for _, path := range []string{o.meshd, o.dir} {
		if _, err := os.Stat(path); err != nil {
			return fmt.Errorf("find what is to be measured: %w; run: make build", err)
		}
	}
	if o.has(partWrites) && slices.Contains(o.stores, etcdName) {
		if _, err := os.Stat(o.etcd); err != nil {
			return fmt.Errorf("find etcd: %w; run: make bin/tools/etcd, name it with -etcd, or leave it out with -stores", err)
		}
	}
	return nil
}

// has tells whether a part is measured.
func (o options) has(part string) bool { return slices.Contains(o.only, part) }
