package main

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/meshd/meshd/tests/conformance/rig"
)

// key names one row.
type key struct{ scenario, contender, size string }

// report is everything that was measured.
type report struct {
	options options
	machine machine
	results map[key][]sample
}

// machine is what it was measured on.
type machine struct {
	cpu, kernel, date string
	cpus              int
	versions          []string
}

// describe asks every program for its version.
func describe(ctx context.Context, f *field) machine {
	m := machine{cpu: "unknown", cpus: runtime.NumCPU(), date: time.Now().UTC().Format(time.DateOnly)}
	if data, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(data)) {
			if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
				m.cpu = strings.TrimSpace(value)
				break
			}
		}
	}
	m.kernel = firstLine(ctx, "uname", "-sr")
	m.versions = []string{
		firstLine(ctx, f.proxy, "--version") + ", " + runtime.Version(), firstLine(ctx, "haproxy", "-v"), firstLine(ctx, "nginx", "-v"),
	}
	return m
}

// firstLine runs a program and returns the first line of what it prints.
func firstLine(ctx context.Context, name string, args ...string) string {
	path, err := rig.Find(name)
	if err != nil {
		return "unknown"
	}
	out, err := exec.CommandContext(ctx, path, args...).CombinedOutput()
	if err != nil {
		return "unknown"
	}
	line, _, _ := bytes.Cut(out, []byte("\n"))
	return strings.TrimSpace(string(line))
}

// row is the medians of one contender and size.
type row struct {
	key
	cpu      time.Duration // of all processes, per request
	low, top time.Duration // of cpu, over the rounds
	each     []time.Duration
	private  []uint64
	rps      float64
	p50, p99 time.Duration
}

func (r *report) row(c contender, s size) row {
	k := key{c.scenario, c.name, s.name}
	samples := r.results[k]
	out := row{
		key: k, rps: median(samples, func(s sample) float64 { return s.rps }),
		p50: median(samples, func(s sample) time.Duration { return s.p50 }),
		p99: median(samples, func(s sample) time.Duration { return s.p99 }),
		cpu: median(samples, sample.cpu),
	}
	out.low, out.top = samples[0].cpu(), samples[0].cpu()
	for _, s := range samples {
		out.low, out.top = min(out.low, s.cpu()), max(out.top, s.cpu())
	}
	for i := range c.processes {
		out.each = append(out.each, median(samples, func(s sample) time.Duration { return s.cost[i].CPU }))
		out.private = append(out.private, median(samples, func(s sample) uint64 { return s.cost[i].Private }))
	}
	return out
}

func median[T cmp.Ordered](samples []sample, of func(sample) T) T {
	values := make([]T, 0, len(samples))
	for _, s := range samples {
		values = append(values, of(s))
	}
	slices.Sort(values)
	return values[len(values)/2]
}

// cpu is of all processes, per request.
func (s sample) cpu() time.Duration {
	var sum time.Duration
	for _, c := range s.cost {
		sum += c.CPU
	}
	return sum
}

// cells are a row's columns.
func (r row) cells() []string {
	each, private := []string{}, []string{}
	for i := range r.each {
		each = append(each, micros(r.each[i]))
		private = append(private, fmt.Sprintf("%.1f", float64(r.private[i])/(1<<20)))
	}
	return []string{
		r.contender, r.size, micros(r.cpu), micros(r.low) + " to " + micros(r.top), strings.Join(each, " + "), fmt.Sprintf("%.0f", r.rps),
		fmt.Sprintf("%.2f", r.p50.Seconds()*1000), fmt.Sprintf("%.2f", r.p99.Seconds()*1000), strings.Join(private, " + "),
	}
}

func micros(d time.Duration) string { return fmt.Sprintf("%.1f", float64(d)/float64(time.Microsecond)) }

func columns() []string {
	return []string{"proxy", "response", "CPU µs/request", "of rounds", "near + far", "requests/s", "p50 ms", "p99 ms", "private MiB"}
}

// notes say how to read the figures.
func notes() []string {
	return []string{
		"CPU is user and system time of the proxy processes, children included, over the measurement, divided by the requests answered in it. The load generator and the backend are not in it, but share the machine: requests per second and latencies depend on how much is left for them. CPU per request depends on it less, but caches and turbo are shared too: the lowest and the highest of the rounds stand beside the median, and differences within that range mean nothing.",
		"One plain hop: mesh-proxy has none. Whatever leaves it for the mesh is mutual TLS, and a plan cannot say otherwise. What can be compared is its HTTP engine: \"proxy/l7 alone\" is a small program that serves and forwards with it between two plain sockets, without identity, policy, metrics or balancing.",
		"Two hops: client, plain, near proxy, mutual TLS 1.3 with " + cipherSuite + " and P-256 certificates, far proxy, plain, backend. \"near + far\" tells the halves apart: near has a plain client side and a TLS upstream side, far the reverse. mesh-proxy also decides each request by an intention with two HTTP rules, sets the caller's identity, balances, and counts; HAProxy and nginx do none of it, and write no log.",
		"All proxies may use every CPU, keep connections on both sides, and run side by side; those that are not measured are idle. Handshakes are not measured: connections are kept.",
		"Private memory is Private_Clean and Private_Dirty of /proc/PID/smaps_rollup at the end of a measurement, with the connections open. Pages that processes share are not in it.",
	}
}

// write prints the report, and puts it into the file for the documentation if
// one was asked for.
func (r *report) write(w io.Writer, f *field, create func(string, func(io.Writer) error) error) error {
	if err := r.text(w, f); err != nil {
		return err
	}
	if r.options.markdown == "" {
		return nil
	}
	return create(r.options.markdown, func(w io.Writer) error { return r.page(w, f) })
}

// setting says what was done.
func (r *report) setting() string {
	return fmt.Sprintf("HTTP/1.1 with keep-alive on %d connections; medians of %d interleaved rounds of %s each.",
		r.options.connections, r.options.rounds, r.options.duration)
}

func (r *report) text(w io.Writer, f *field) error {
	out := &bytes.Buffer{}
	for _, scenario := range []string{plain, mutual} {
		fmt.Fprintf(out, "\n%s\n%s\n", title(scenario), strings.Join(columns(), "\t"))
		for _, s := range sizes() {
			for _, c := range f.contenders {
				if c.scenario == scenario {
					fmt.Fprintln(out, strings.Join(r.row(c, s).cells(), "\t"))
				}
			}
		}
	}
	fmt.Fprintf(out, "\n%s\n\n", r.setting())
	for _, note := range notes() {
		fmt.Fprintf(out, "- %s\n", note)
	}
	fmt.Fprintf(out, "\n%d × %s, %s\n", r.machine.cpus, r.machine.cpu, r.machine.kernel)
	for _, v := range r.machine.versions {
		fmt.Fprintln(out, v)
	}
	if r.options.verbose {
		for _, c := range f.configs {
			fmt.Fprintf(out, "\n# %s\n%s\n", c.name, c.text)
		}
	}
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	if _, err := out.WriteTo(table); err != nil {
		return err
	}
	return table.Flush()
}

// title is a scenario as a heading.
func title(s string) string { return strings.ToUpper(s[:1]) + s[1:] }

// page writes the report as documentation.
func (r *report) page(w io.Writer, f *field) error {
	out := &bytes.Buffer{}
	fmt.Fprintf(out, "# Benchmarks\n\nMeasured on %s by `make bench`, which measures your machine:\nfigures of different machines, or of different runs, say little about each\nother. %s\n",
		r.machine.date, r.setting())
	fmt.Fprintf(out, "\n- %d × %s, %s\n", r.machine.cpus, r.machine.cpu, r.machine.kernel)
	for _, v := range r.machine.versions {
		fmt.Fprintf(out, "- %s\n", v)
	}
	for _, scenario := range []string{plain, mutual} {
		fmt.Fprintf(out, "\n## %s\n\n", title(scenario))
		fmt.Fprintf(out, "| %s |\n|%s\n", strings.Join(columns(), " | "), strings.Repeat("---|", len(columns())))
		for _, s := range sizes() {
			for _, c := range f.contenders {
				if c.scenario == scenario {
					fmt.Fprintf(out, "| %s |\n", strings.Join(r.row(c, s).cells(), " | "))
				}
			}
		}
	}
	fmt.Fprint(out, "\n## How to read them\n\n")
	for _, note := range notes() {
		fmt.Fprintf(out, "- %s\n", note)
	}
	fmt.Fprint(out, "\nThis page is written by `go run ./tests/bench -markdown docs/benchmarks.md`;\nwith `-v` it prints the configurations of HAProxy and nginx too.\n")
	_, err := w.Write(out.Bytes())
	return err
}
