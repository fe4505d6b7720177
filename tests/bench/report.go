package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/meshd/meshd/tests/bench/figure"
	"github.com/meshd/meshd/tests/bench/load"
	"github.com/meshd/meshd/tests/conformance/rig"
)

// report is everything that was measured, as it is written as JSON.
type report struct {
	options options
	trials  []trial // in the order of their first sample

	Date     string         `json:"date"`
	Took     time.Duration  `json:"took"`
	Machine  string         `json:"machine"`
	Versions []string       `json:"versions"`
	Absent   []string       `json:"absent,omitempty"`
	Setup    string         `json:"setup"`
	Others   []others       `json:"others,omitempty"`
	Failed   []string       `json:"failed,omitempty"`
	Stalled  map[string]int `json:"stalled,omitempty"`
	Samples  []sample       `json:"samples"`
	Plans    []memory       `json:"private_with_plan,omitempty"`
	Idle     []memory       `json:"per_idle_connection,omitempty"`
	Mallocs  []allocations  `json:"mallocs,omitempty"`
	Configs  []config       `json:"configs"`
	roles    map[key]string // "near + far"
}

// others is what was taken of the machine's CPUs by what does not belong to
// the benchmark: shares of all there is.
type others struct {
	Setting   setting `json:"setting"`
	Processes float64 `json:"processes"`
	Stolen    float64 `json:"stolen"`
}

// key is one contender in one trial.
type key struct {
	trial trial
	name  string
}

// sample is one measurement.
type sample struct {
	trial
	Round int    `json:"round"`
	Name  string `json:"name"`
	load.Result
}

// memory is what a process holds.
type memory struct {
	Scenario scenario `json:"scenario"`
	Name     string   `json:"name"`
	Role     string   `json:"role"`
	Bytes    float64  `json:"bytes"`
	File     float64  `json:"file,omitempty"`
}

// allocations are those of a process over some requests; Scrape of them are
// those of asking for the count.
type allocations struct {
	Name     string  `json:"name"`
	Role     string  `json:"role"`
	HTTP2    bool    `json:"http2,omitempty"`
	Requests int     `json:"requests"`
	Count    float64 `json:"count"`
	Scrape   float64 `json:"scrape"`
}

func newReport(ctx context.Context, o options) *report {
	r := &report{options: o, Date: time.Now().UTC().Format(time.DateOnly), Absent: o.absent, roles: map[key]string{}, Stalled: map[string]int{}}
	cpu := "unknown CPU"
	if data, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(data)) {
			if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
				cpu = strings.TrimSpace(value)
				break
			}
		}
	}
	r.Machine = fmt.Sprintf("%d × %s, %s", runtime.NumCPU(), cpu, firstLine(ctx, "uname", "-sr"))
	r.Versions = []string{firstLine(ctx, o.mesh, "--version") + ", " + runtime.Version()}
	if o.versus != "" && o.takes(versusName) {
		r.Versions = append(r.Versions, "versus: "+firstLine(ctx, o.versus, "--version")+", "+o.versus)
	}
	if o.versusHop != "" && o.takes(versusName) {
		r.Versions = append(r.Versions, "versus on the plain hop: "+o.versusHop)
	}
	for _, p := range []struct{ name, program, flag string }{
		{haproxyName, "haproxy", "-v"}, {envoyName, o.envoy, "--version"}, {nginxName, "nginx", "-v"}, {nghttpxName, "nghttpx", "--version"},
	} {
		if o.takes(p.name) {
			line := firstLine(ctx, p.program, p.flag)
			r.Versions = append(r.Versions, strings.TrimSpace(strings.Replace(line, p.program+"  version", "Envoy", 1)))
		}
	}
	r.Setup = fmt.Sprintf("%d rounds; windows of %s, at the constant rate of %d/s %s (two hops, 100 B: %s); %d connections, for TCP %d, for HTTP/2 %d of %d streams each.",
		o.rounds, o.window, o.rate, o.paired, 2*o.paired, o.connections, streams, connections2, streams2)
	return r
}

const unknown = "unknown"

// firstLine runs a program and returns the first line of what it prints, or
// unknown if it can't.
func firstLine(ctx context.Context, name string, args ...string) string {
	path, err := rig.Find(name)
	if err != nil {
		return unknown
	}
	out, err := exec.CommandContext(ctx, path, args...).CombinedOutput()
	if err != nil {
		return unknown
	}
	line, _, _ := bytes.Cut(bytes.TrimSpace(out), []byte("\n"))
	return strings.TrimSpace(string(line))
}

// fail takes note of a measurement that could not be made.
func (r *report) fail(what string) {
	fmt.Fprintln(os.Stderr, "bench: failed:", what)
	r.Failed = append(r.Failed, what)
}

// stall takes note of a contender whose other streams end beside a slow one.
func (r *report) stall(t trial, name string) {
	if !slices.Contains(r.trials, t) {
		r.trials = append(r.trials, t)
	}
	r.Stalled[name+", "+t.title()]++
}

// add takes one measurement.
func (r *report) add(round int, t trial, l lane, result load.Result) {
	if !slices.Contains(r.trials, t) {
		r.trials = append(r.trials, t)
	}
	roles := []string{}
	for _, p := range l.parts {
		roles = append(roles, p.role)
	}
	r.roles[key{t, l.name}] = strings.Join(roles, " + ")
	r.Samples = append(r.Samples, sample{t, round, l.name, result})
}

// values are one figure of a contender, by round.
func (r *report) values(t trial, name string, of func(load.Result) float64) []float64 {
	var out []float64
	for _, s := range r.Samples {
		if s.trial == t && s.Name == name {
			out = append(out, of(s.Result))
		}
	}
	return out
}

// pairs are one figure of two contenders, of those rounds that have both.
func (r *report) pairs(t trial, a, b string, of func(load.Result) float64) (x, y []float64) {
	for _, s := range r.Samples {
		if s.trial != t || s.Name != a {
			continue
		}
		for _, other := range r.Samples {
			if other.trial == t && other.Name == b && other.Round == s.Round {
				x, y = append(x, of(s.Result)), append(y, of(other.Result))
			}
		}
	}
	return x, y
}

// both are one figure of a contender in two trials, of those rounds that have
// both.
func (r *report) both(a, b trial, name string, of func(load.Result) float64) (x, y []float64) {
	for _, s := range r.Samples {
		if s.trial != a || s.Name != name {
			continue
		}
		for _, other := range r.Samples {
			if other.trial == b && other.Name == name && other.Round == s.Round {
				x, y = append(x, of(s.Result)), append(y, of(other.Result))
			}
		}
	}
	return x, y
}

// names are the contenders of a trial.
func (r *report) names(t trial) []string {
	var out []string
	for _, s := range r.Samples {
		if s.trial == t && !slices.Contains(out, s.Name) {
			out = append(out, s.Name)
		}
	}
	slices.SortFunc(out, func(a, b string) int { return slices.Index(r.order(), a) - slices.Index(r.order(), b) })
	return out
}

func (r *report) order() []string {
	return []string{meshName, versusName, haproxyName, envoyName, nginxName, nghttpxName, goName}
}

// Figures of one measurement.

// cpuPerUnit is microseconds per request, or seconds per GB of a stream.
func cpuPerUnit(t trial) func(load.Result) float64 {
	if t.Scenario == stream {
		return func(r load.Result) float64 {
			r.Requests = 1
			return r.PerRequest().Seconds() / (float64(r.Bytes) / 1e9)
		}
	}
	return func(r load.Result) float64 { return float64(r.PerRequest()) / float64(time.Microsecond) }
}

func perSecond(r load.Result) float64 { return float64(r.Requests) / r.Window.Seconds() }
func gigabytes(r load.Result) float64 { return float64(r.Bytes) / 1e9 / r.Window.Seconds() }
func p50(r load.Result) float64       { return r.P50.Seconds() * 1000 }
func p99(r load.Result) float64       { return r.P99.Seconds() * 1000 }

// write prints the report, and writes the files that were asked for.
func (r *report) write(w io.Writer) error {
	sections := r.sections()
	if err := asText(w, r, sections); err != nil {
		return err
	}
	var errs []error
	if r.options.json != "" {
		data, err := json.MarshalIndent(r, "", " ")
		errs = append(errs, err, os.WriteFile(r.options.json, append(data, '\n'), 0o644))
	}
	if r.options.markdown != "" {
		errs = append(errs, os.WriteFile(r.options.markdown, asPage(r, sections), 0o644))
	}
	return errors.Join(errs...)
}

// section is a part of the report: words and tables.
type section struct {
	title, intro string
	columns      []string
	rows         [][]string
}

func (r *report) sections() []section {
	out := []section{
		r.compared("Side by side", []string{haproxyName, envoyName}, func(t trial) bool { return !t.Scenario.http2() }),
		r.compared("Side by side, HTTP/2 and gRPC", []string{nghttpxName, haproxyName, envoyName, goName}, func(t trial) bool { return t.Scenario.http2() }),
		r.slowed(),
	}
	for _, s := range []setting{unpinned, pinned} {
		for _, sc := range []scenario{plain, mutual, stream, plain2, mutual2} {
			if sec, ok := r.measured(s, sc); ok {
				out = append(out, sec)
			}
		}
	}
	return append(out, r.memory())
}

// compared is the figures that matter, as ratios of neighbours, of some trials.
func (r *report) compared(title string, others []string, of func(trial) bool) section {
	out := section{
		title: title,
		intro: "CPU of mesh-proxy divided by that of the other, of measurements in the same round: the median, and the interval that " +
			"holds the true median with at least 95 % (see below). Below 1 mesh-proxy is cheaper. p99 is mesh-proxy's less HAProxy's.",
		columns: []string{"what"},
	}
	for _, name := range others {
		out.columns = append(out.columns, "÷ "+name)
	}
	out.columns = append(out.columns, "p99 − HAProxy, ms")
	versus := r.options.takes(versusName)
	if versus {
		out.columns = append(out.columns, "÷ versus", "p99 − versus, ms")
	}
	for _, t := range r.trials {
		if !of(t) || !slices.Contains(r.names(t), meshName) {
			continue
		}
		ratio := func(name string) string {
			return estimate(figure.Of(figure.Ratios(r.pairs(t, meshName, name, cpuPerUnit(t)))), "%.2f")
		}
		tail := func(name string) string {
			if t.Scenario == stream {
				return ""
			}
			return estimate(figure.Of(figure.Differences(r.pairs(t, meshName, name, p99))), "%+.2f")
		}
		row := []string{t.title()}
		for _, name := range others {
			row = append(row, ratio(name))
		}
		row = append(row, tail(haproxyName))
		if versus {
			row = append(row, ratio(versusName), tail(versusName))
		}
		out.rows = append(out.rows, row)
	}
	return out
}

// slowed is what slow streams cost their neighbours.
func (r *report) slowed() section {
	out := section{
		title: "Beside slow streams",
		intro: fmt.Sprintf("GET of 100 B at the constant rate, with %d stream per connection whose endless answer its client does not take: "+
			"p99 of the others less p99 without it in the same round, ms; and CPU with it divided by CPU without.", slow2),
		columns: []string{"what", "proxy", "p99 − p99 without, ms", "CPU ÷ CPU without"},
	}
	for _, t := range r.trials {
		if !t.Slow {
			continue
		}
		without := t
		without.Slow = false
		for _, name := range r.order() {
			if n := r.Stalled[name+", "+t.title()]; n > 0 {
				out.rows = append(out.rows, []string{without.title(), name, fmt.Sprintf("stalls in %d of %d rounds", n, r.options.rounds), ""})
			}
		}
		for _, name := range r.names(t) {
			out.rows = append(out.rows, []string{
				without.title(), name,
				estimate(figure.Of(figure.Differences(r.both(t, without, name, p99))), "%+.2f"),
				estimate(figure.Of(figure.Ratios(r.both(t, without, name, cpuPerUnit(t)))), "%.2f"),
			})
		}
	}
	return out
}

func (t trial) title() string {
	name := map[scenario]string{
		plain: "one plain hop", mutual: "two hops, mutual TLS", stream: "TCP over mutual TLS",
		plain2: "one h2c hop", mutual2: "two hops, h2, mutual TLS",
	}[t.Scenario]
	if t.Call != "" {
		name += ", " + callTitle(t.Call)
	}
	if t.Body != "" {
		name += ", " + bodyTitle(t.Body)
	}
	if t.Load == steady {
		name += ", constant rate"
	} else {
		name += ", saturation"
	}
	if t.Slow {
		name += ", beside slow streams"
	}
	return name + ", " + string(t.Setting)
}

// callTitle names what is called over HTTP/2.
func callTitle(call string) string {
	return map[string]string{load.CallGet: "GET", load.CallUnary: "gRPC unary", load.CallStreaming: "gRPC streaming"}[call]
}

func bodyTitle(body string) string {
	return map[string]string{"100": "100 B", "10k": "10 KiB"}[body]
}

func estimate(e figure.Estimate, format string) string {
	if e.N == 0 {
		return "–"
	}
	return fmt.Sprintf(format+" ("+format+" to "+format+")", e.Median, e.Low, e.High)
}

// measured is one scenario's table.
func (r *report) measured(s setting, sc scenario) (section, bool) {
	titles := map[scenario]string{
		plain: "One plain hop", mutual: "Two hops with mutual TLS between them",
		stream: "TCP over mutual TLS, two hops",
		plain2: "HTTP/2 and gRPC, one hop", mutual2: "HTTP/2 and gRPC, two hops with mutual TLS between them",
	}
	out := section{title: titles[sc] + ", " + string(s)}
	if sc == plain || sc == plain2 {
		out.intro = "mesh-proxy has no plain hop: in its place stands a program made of its HTTP engine, policy, balancer and counters (see below)."
	}
	if sc == stream {
		out.columns = []string{"proxy", "GB/s", "CPU s/GB", "near + far", "private MiB"}
	} else {
		out.columns = []string{"load", "response", "proxy", "CPU µs/request", "near + far", "requests/s", "p50 ms", "p99 ms", "private MiB"}
	}
	for _, t := range r.trials {
		if t.Setting != s || t.Scenario != sc {
			continue
		}
		for _, name := range r.names(t) {
			cpu := estimate(figure.Of(r.values(t, name, cpuPerUnit(t))), map[bool]string{true: "%.3f", false: "%.1f"}[sc == stream])
			median := func(of func(load.Result) float64, format string) string {
				return fmt.Sprintf(format, figure.Of(r.values(t, name, of)).Median)
			}
			each, private := r.each(t, name)
			if sc == stream {
				out.rows = append(out.rows, []string{name, median(gigabytes, "%.2f"), cpu, each, private})
				continue
			}
			what := map[string]string{saturation: "saturation", steady: fmt.Sprintf("%d/s", r.options.rate)}[t.Load]
			if t.Call != "" {
				what = callTitle(t.Call) + ", " + what
			}
			if t.Slow {
				what += ", beside slow streams"
			}
			out.rows = append(out.rows, []string{
				what, bodyTitle(t.Body), name, cpu, each, median(perSecond, "%.0f"), median(p50, "%.2f"), median(p99, "%.2f"), private,
			})
		}
	}
	return out, len(out.rows) > 0
}

// each is the medians by process.
func (r *report) each(t trial, name string) (cpu, private string) {
	var cpus, privates []string
	for i := range strings.Split(r.roles[key{t, name}], " + ") {
		format := "%.1f"
		if t.Scenario == stream {
			format = "%.3f"
		}
		cpus = append(cpus, fmt.Sprintf(format, figure.Of(r.values(t, name, func(x load.Result) float64 {
			x.CPU = x.CPU[i : i+1]
			return cpuPerUnit(t)(x)
		})).Median))
		privates = append(privates, fmt.Sprintf("%.1f", figure.Of(r.values(t, name, func(x load.Result) float64 {
			return float64(x.Private[i]) / (1 << 20)
		})).Median))
	}
	return strings.Join(cpus, " + "), strings.Join(privates, " + ")
}

// memory is what is held and allocated.
func (r *report) memory() section {
	out := section{title: "Memory", columns: []string{"what", "proxy", "process", "figure"}}
	for _, m := range r.Plans {
		where := fmt.Sprintf("with its plan, %s after one scrape, before any load", settle)
		if m.Scenario == plain {
			where += " (one plain hop)"
		}
		out.rows = append(out.rows, []string{
			"private memory " + where, m.Name, m.Role,
			fmt.Sprintf("%.1f MiB (%.1f MB); besides %.1f MiB of files", m.Bytes/(1<<20), m.Bytes/1e6, m.File/(1<<20)),
		})
	}
	for _, m := range r.Idle {
		out.rows = append(out.rows, []string{
			fmt.Sprintf("per idle mutual TLS connection, of %d, %s after the last byte", r.options.idleConns, r.options.idleFor),
			m.Name, m.Role, fmt.Sprintf("%.1f KiB", m.Bytes/(1<<10)),
		})
	}
	for _, a := range r.Mallocs {
		out.rows = append(out.rows, []string{
			fmt.Sprintf("allocations per request over %d requests%s", a.Requests, map[bool]string{true: " over HTTP/2"}[a.HTTP2]), a.Name, a.Role,
			fmt.Sprintf("%.3f, of these %.3f for reading the counter", a.Count/float64(a.Requests), a.Scrape/float64(a.Requests)),
		})
	}
	return out
}
