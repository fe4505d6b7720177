package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/meshd/meshd/tests/bench/load"
	"github.com/meshd/meshd/tests/conformance/rig"
)

// errUsage is that help was asked for, and given.
var errUsage = errors.New("usage")

// What -only can name besides the scenarios.
const (
	idle    = "idle"
	mallocs = "mallocs"
)

// options are what the flags say.
type options struct {
	mesh, versus, envoy string
	versusHop, self     string
	only, peers         []string
	loads               []string
	bodies, calls       []string
	settings            []string
	rounds, connections int
	rate, idleConns     int
	window, paired      time.Duration
	warmup, idleFor     time.Duration
	markdown, json      string
	verbose, quick      bool
	absent              []string // peers that can't be had, with the reason
}

// The loads.
const (
	saturation = "saturation"
	steady     = "rate"
)

// list is a flag that chooses some of all.
func list(into *[]string, fs *flag.FlagSet, name, usage string, all ...string) {
	*into = all
	fs.Func(name, usage+": "+strings.Join(all, ",")+" (default all)", func(s string) error {
		*into = nil
		for v := range strings.SplitSeq(s, ",") {
			i := slices.IndexFunc(all, func(a string) bool { return strings.EqualFold(a, v) })
			if i < 0 {
				return fmt.Errorf("%q is none of %s", v, strings.Join(all, ", "))
			}
			*into = append(*into, all[i])
		}
		return nil
	})
}

// parse reads the flags. An error wraps errUsage if it was told already.
func parse(ctx context.Context, args []string, out io.Writer) (options, error) {
	var o options
	fs := flag.NewFlagSet("bench", flag.ContinueOnError)
	fs.SetOutput(out)
	fs.StringVar(&o.mesh, "mesh-proxy", "bin/mesh-proxy", "`path` of mesh-proxy")
	fs.StringVar(&o.versus, "versus", "", "`path` of another build of mesh-proxy, to compare with: it takes part as \"versus\"")
	fs.StringVar(&o.versusHop, "versus-hop", "", "`path` of another build of this benchmark: its plain hop takes part as \"versus\"")
	fs.StringVar(&o.envoy, "envoy", "", "`path` of Envoy (default the one in PATH, or that of make bench)")
	list(&o.only, fs, "only", "what to measure", string(plain), string(mutual), string(stream), string(plain2), string(mutual2), idle, mallocs)
	list(&o.peers, fs, "peers", "who takes part", meshName, versusName, haproxyName, envoyName, nginxName, nghttpxName, goName)
	list(&o.calls, fs, "call", "what is called over HTTP/2", load.CallGet, load.CallUnary, load.CallStreaming)
	list(&o.loads, fs, "load", "which loads", saturation, steady)
	list(&o.bodies, fs, "body", "which responses", "100", "10k")
	list(&o.settings, fs, "cpus", "which CPUs: each process all, or the proxies one and the ends another", string(unpinned), string(pinned))
	fs.IntVar(&o.rounds, "rounds", 10, "how often each is measured, in turn")
	fs.IntVar(&o.connections, "connections", 64, "keep-alive connections")
	fs.IntVar(&o.rate, "rps", 1000, "requests per second of the constant rate")
	fs.IntVar(&o.idleConns, "idle-connections", 1000, "connections whose memory is measured")
	fs.DurationVar(&o.window, "window", 1500*time.Millisecond, "length of one measurement")
	fs.DurationVar(&o.paired, "rate-window", 2500*time.Millisecond, "length of one measurement at the constant rate; that of two hops and 100 B is twice as long")
	fs.DurationVar(&o.warmup, "warmup", 300*time.Millisecond, "before each measurement")
	fs.DurationVar(&o.idleFor, "idle-for", time.Minute, "how long idle connections are idle before their memory is measured")
	fs.StringVar(&o.markdown, "write", "", "`file` to write the report to as well: docs/benchmarks.md")
	fs.StringVar(&o.json, "json", "bin/bench.json", "`file` for every single measurement; empty writes none")
	fs.BoolVar(&o.quick, "quick", false, "about five minutes: fewer and shorter rounds of what matters most; other flags win")
	fs.BoolVar(&o.verbose, "v", false, "print the configurations too")
	if err := fs.Parse(args); err != nil {
		return o, errors.Join(errUsage, err)
	}
	if o.quick {
		o.hurry(fs)
	}
	if fs.NArg() > 0 || o.rounds < 1 || o.connections < 1 || o.rate < 1 || o.idleConns < 1 || min(o.window, o.paired, o.warmup+1, o.idleFor) <= 0 {
		return o, errors.New("there are no arguments, and counts and lengths are positive; see -help")
	}
	return o, o.find(ctx)
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
	set("rounds", func() { o.rounds = 6 })
	set("window", func() { o.window = time.Second })
	set("rate-window", func() { o.paired = time.Second })
	set("warmup", func() { o.warmup = 200 * time.Millisecond })
	set("cpus", func() { o.settings = []string{string(unpinned)} })
	set("only", func() {
		o.only = []string{string(plain), string(mutual), string(stream), string(plain2), string(mutual2), mallocs}
	})
	set("call", func() { o.calls = []string{load.CallGet, load.CallUnary} })
	set("peers", func() { o.peers = []string{meshName, versusName, haproxyName, envoyName, nghttpxName} })
}

// find finds the programs, or notes who is absent.
func (o *options) find(ctx context.Context) error {
	var err error
	if o.self, err = os.Executable(); err != nil {
		return err
	}
	for _, path := range []*string{&o.mesh, &o.versus, &o.versusHop} {
		if *path == "" {
			continue
		}
		if *path, err = filepath.Abs(*path); err != nil {
			return err
		}
		if _, err := os.Stat(*path); err != nil {
			return fmt.Errorf("find what is to be measured: %w; run: make build", err)
		}
	}
	if runtime.NumCPU() < 2 && slices.Contains(o.settings, string(pinned)) {
		o.settings = slices.DeleteFunc(slices.Clone(o.settings), func(s string) bool { return s == string(pinned) })
		o.absent = append(o.absent, "pinned is missing: it takes two CPUs")
	}
	leave := func(name string, reason error) {
		if !slices.Contains(o.peers, name) {
			return
		}
		o.peers = slices.DeleteFunc(slices.Clone(o.peers), func(p string) bool { return p == name })
		o.absent = append(o.absent, fmt.Sprintf("%s is missing: %v", name, reason))
	}
	if o.versus == "" && o.versusHop == "" {
		o.peers = slices.DeleteFunc(slices.Clone(o.peers), func(p string) bool { return p == versusName })
	}
	for name, program := range map[string]string{haproxyName: "haproxy", nginxName: "nginx", nghttpxName: "nghttpx"} {
		if _, err := rig.Find(program); err != nil {
			leave(name, err)
		}
	}
	if o.envoy == "" {
		if o.envoy, err = rig.Find("envoy"); err != nil {
			found, _ := filepath.Glob("bin/tools/envoy-*") // the pattern is right
			if len(found) == 0 {
				leave(envoyName, errors.New("it is neither in PATH nor in bin/tools; run: make bench, or name it with -envoy"))
				return nil
			}
			o.envoy = found[len(found)-1]
		}
	}
	if o.envoy, err = filepath.Abs(o.envoy); err != nil {
		return err
	}
	if firstLine(ctx, o.envoy, "--version") == unknown {
		leave(envoyName, fmt.Errorf("%s does not run here", o.envoy))
	}
	return nil
}

// has tells whether a scenario is measured.
func (o options) has(s scenario) bool {
	return slices.Contains(o.only, string(s)) || s == mutual && (slices.Contains(o.only, idle) || slices.Contains(o.only, mallocs))
}

// takes tells whether a peer takes part.
func (o options) takes(peer string) bool { return slices.Contains(o.peers, peer) }
