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
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/meshd/meshd/tests/bench/figure"
	"github.com/meshd/meshd/tests/bench/server/drive"
)

// report is everything that was measured, as it is written as JSON.
type report struct {
	options options

	Date     string        `json:"date"`
	Took     time.Duration `json:"took"`
	Machine  []string      `json:"machine"`
	Versions []string      `json:"versions"`
	Failed   []string      `json:"failed,omitempty"`
	Writes   []writes      `json:"writes,omitempty"`
	Kills    []recovery    `json:"kills,omitempty"`
	Stops    []recovery    `json:"stops,omitempty"`
	Busy     []overload    `json:"busy,omitempty"`
	Load     *loaded       `json:"load,omitempty"`
}

// writes is one measurement of writes.
type writes struct {
	Name    string `json:"name"`
	Round   int    `json:"round"`
	Clients int    `json:"clients"`
	drive.Result
}

func newReport(ctx context.Context, o options) *report {
	r := &report{options: o, Date: time.Now().UTC().Format(time.DateOnly)}
	cpu := lineOf("/proc/cpuinfo", "model name")
	r.Machine = []string{fmt.Sprintf("%d × %s, %s of memory, %s", runtime.NumCPU(), cpu, gibibytes(lineOf("/proc/meminfo", "MemTotal")), firstLine(ctx, "uname", "-sr"))}
	if load, err := os.ReadFile("/proc/loadavg"); err == nil {
		minutes := strings.Fields(string(load))
		r.Machine = append(r.Machine, "load average before the run, of 1, 5 and 15 minutes: "+strings.Join(minutes[:min(3, len(minutes))], ", "))
	}
	if out := firstLine(ctx, "findmnt", "-n", "-o", "FSTYPE,OPTIONS", "-T", o.dir); out != "" {
		r.Machine = append(r.Machine, "disk of all stores: "+strings.Join(strings.Fields(out), " "))
	}
	r.Versions = []string{firstLine(ctx, o.meshd, "--version") + ", " + runtime.Version()}
	if slices.Contains(o.stores, versusName) {
		r.Versions = append(r.Versions, "versus: "+firstLine(ctx, o.versus, "--version")+", "+o.versus)
	}
	if o.has(partWrites) && slices.Contains(o.stores, etcdName) {
		r.Versions = append(r.Versions, firstLine(ctx, o.etcd, "--version"))
	}
	return r
}

// lineOf is a line of a file of /proc, without its name; "unknown" if there is none.
func lineOf(path, name string) string {
	data, err := os.ReadFile(path)
	if err == nil {
		for line := range strings.Lines(string(data)) {
			if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == name {
				return strings.TrimSpace(value)
			}
		}
	}
	return "unknown"
}

// gibibytes turns "24684100 kB" into "23.5 GiB".
func gibibytes(text string) string {
	number, _, _ := strings.Cut(text, " ")
	kib, err := strconv.ParseFloat(number, 64)
	if err != nil {
		return text
	}
	return fmt.Sprintf("%.1f GiB", kib/(1<<20))
}

// firstLine is that of what a program prints; "" if it fails.
func firstLine(ctx context.Context, name string, args ...string) string {
	out, err := exec.CommandContext(ctx, name, args...).Output()
	if err != nil {
		return ""
	}
	line, _, _ := bytes.Cut(bytes.TrimSpace(out), []byte("\n"))
	return strings.TrimSpace(string(line))
}

// fail takes note of a measurement that could not be made.
func (r *report) fail(what string) {
	fmt.Fprintln(os.Stderr, "bench-server: failed:", what)
	r.Failed = append(r.Failed, what)
}

// write prints the report, and writes the files that were asked for.
func (r *report) write(w io.Writer) error {
	errs := []error{r.text(w)}
	if r.options.json != "" {
		data, err := json.MarshalIndent(r, "", " ")
		errs = append(errs, err, os.MkdirAll(filepath.Dir(r.options.json), 0o755), os.WriteFile(r.options.json, append(data, '\n'), 0o644))
	}
	if r.options.markdown != "" {
		errs = append(errs, os.WriteFile(r.options.markdown, r.page(), 0o644))
	}
	return errors.Join(errs...)
}

// text prints the tables for a terminal.
func (r *report) text(w io.Writer) error {
	var out bytes.Buffer
	for _, line := range r.head() {
		fmt.Fprintln(&out, line)
	}
	for _, s := range r.sections() {
		fmt.Fprintf(&out, "\n%s\n%s\n", s.title, strings.Join(s.columns, "\t"))
		for _, row := range s.rows {
			fmt.Fprintln(&out, strings.Join(row, "\t"))
		}
	}
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	if _, err := out.WriteTo(table); err != nil {
		return err
	}
	return table.Flush()
}

// maxFailure bounds what is shown of a failure, in bytes.
const maxFailure = 300

func (r *report) head() []string {
	out := slices.Concat(r.Machine, r.Versions)
	for _, what := range r.Failed {
		line := "failed: " + strings.Join(strings.Fields(what), " ")
		out = append(out, line[:min(len(line), maxFailure)]) // the rest was told at once
	}
	return append(out, fmt.Sprintf("took %s", r.Took))
}

// section is a table.
type section struct {
	title, intro string
	columns      []string
	rows         [][]string
}

func (r *report) sections() []section {
	verdicts := section{title: "Bars", columns: []string{"what", "measured", "bar", "verdict"}}
	for _, b := range r.bars() {
		verdicts.rows = append(verdicts.rows, []string{b.what, b.figure(), b.bar(), string(b.verdict())})
	}
	out := []section{verdicts}
	for _, s := range []section{
		r.writesTable(),
		r.recoveryTable("Leader killed (SIGKILL): to the next acknowledged write", r.Kills),
		r.recoveryTable("Leader stopped (SIGSTOP): to the next acknowledged write", r.Stops),
		r.busyTable(),
		r.loadTable(),
	} {
		if len(s.rows) > 0 {
			out = append(out, s)
		}
	}
	return out
}

// values are one figure of a store's writes, by round.
func (r *report) values(name string, clients int, of func(drive.Result) float64) []float64 {
	var out []float64
	for _, w := range r.Writes {
		if w.Name == name && w.Clients == clients {
			out = append(out, of(w.Result))
		}
	}
	return out
}

// ratios are those of two stores in the same round.
func (r *report) ratios(a, b string, clients int, of func(drive.Result) float64) []float64 {
	var x, y []float64
	for _, w := range r.Writes {
		for _, other := range r.Writes {
			if w.Name == a && other.Name == b && w.Round == other.Round && w.Clients == clients && other.Clients == clients {
				x, y = append(x, of(w.Result)), append(y, of(other.Result))
			}
		}
	}
	return figure.Ratios(x, y)
}

func perSecond(r drive.Result) float64 { return r.PerSecond() }
func p50(r drive.Result) float64       { return millis(r.P50) }
func p99(r drive.Result) float64       { return millis(r.P99) }
func serverCPU(r drive.Result) float64 { return perWrite(r.ServerCPU, r) }
func clientCPU(r drive.Result) float64 { return perWrite(r.ClientCPU, r) }
func failures(r drive.Result) float64  { return float64(r.Failed) }

func millis(d time.Duration) float64 { return d.Seconds() * 1e3 }

// perWrite is in microseconds.
func perWrite(cpu time.Duration, r drive.Result) float64 {
	return cpu.Seconds() * 1e6 / float64(max(1, r.Acked))
}

func estimate(values []float64, format string) string {
	e := figure.Of(values)
	if e.N == 0 {
		return "–"
	}
	return fmt.Sprintf(format+" ("+format+" to "+format+")", e.Median, e.Low, e.High)
}

func (r *report) writesTable() section {
	o := r.options
	out := section{
		title: "Writes",
		intro: fmt.Sprintf("One-key compare-and-set of %d B, %d rounds of %s (%d clients) and %s (one for each server), in turn. The median, and in brackets the interval that holds the true median (see below).",
			o.bytes, o.rounds, o.window, o.clients, o.lightWindow),
		columns: []string{"clients", "store", "acknowledged/s", "p50 ms", "p99 ms", "CPU µs/write, servers", "CPU µs/write, client", "failed"},
	}
	for _, clients := range []int{o.clients, o.servers} {
		for _, name := range []string{meshName, versusName, etcdName, bareName} {
			of := func(figure func(drive.Result) float64) []float64 { return r.values(name, clients, figure) }
			if len(of(perSecond)) == 0 {
				continue
			}
			out.rows = append(out.rows, []string{
				fmt.Sprint(clients), title(name), estimate(of(perSecond), "%.0f"), estimate(of(p50), "%.1f"), estimate(of(p99), "%.1f"),
				estimate(of(serverCPU), "%.0f"), estimate(of(clientCPU), "%.0f"), fmt.Sprintf("%.0f", sumOf(of(failures))),
			})
		}
	}
	return out
}

func title(name string) string {
	return map[string]string{meshName: "meshd", versusName: "meshd, versus", etcdName: "etcd", bareName: "bare hashicorp/raft"}[name]
}

func sumOf(values []float64) float64 {
	sum := 0.0
	for _, v := range values {
		sum += v
	}
	return sum
}

// took are the times of one store's recoveries, sorted, in milliseconds.
func took(all []recovery, name string) []float64 {
	var out []float64
	for _, one := range all {
		if one.Name == name {
			out = append(out, millis(one.Took))
		}
	}
	slices.Sort(out)
	return out
}

func (r *report) recoveryTable(what string, all []recovery) section {
	out := section{title: what, columns: []string{"store", "runs", "min ms", "p50 ms", "p90 ms", "max ms"}}
	for _, name := range []string{meshName, bareName} {
		times := took(all, name)
		if len(times) == 0 {
			continue
		}
		row := []string{title(name), fmt.Sprint(len(times))}
		for _, q := range []float64{0, 0.5, 0.9, 1} {
			row = append(row, fmt.Sprintf("%.0f", drive.Quantile(times, q)))
		}
		out.rows = append(out.rows, row)
	}
	return out
}

func (r *report) busyTable() section {
	out := section{
		title:   fmt.Sprintf("%d busy loops for %s", r.options.busyLoops, r.options.busyFor),
		columns: []string{"store", "elections", "acknowledged writes", "slowest write ms"},
	}
	for _, b := range r.Busy {
		out.rows = append(out.rows, []string{title(b.Name), fmt.Sprint(b.Elections), fmt.Sprint(b.Acked), fmt.Sprintf("%.0f", millis(b.Slowest))})
	}
	return out
}

func (r *report) loadTable() section {
	l := r.Load
	if l == nil {
		return section{}
	}
	out := section{
		title: "A large mesh",
		intro: fmt.Sprintf("%d services, %d instances on %d nodes, %d intentions; each agent follows %d topics.",
			l.Config.Services, l.Config.Instances, l.Config.Agents, l.Config.Intentions, l.Config.Topics()),
		columns: []string{"what", "figure"},
	}
	add := func(what, format string, values ...any) {
		out.rows = append(out.rows, []string{what, fmt.Sprintf(format, values...)})
	}
	add("joined, registered, intentions written after", "%.0f s", l.Fill.Seconds())
	for i, bytes := range l.Memory {
		add(fmt.Sprintf("private memory of server %d", i+1), "%.0f MiB", float64(bytes)/(1<<20))
	}
	for i, took := range l.Restarts {
		add(fmt.Sprintf("server %d killed and started: serves after", i+1), "%.2f s", took.Seconds())
	}
	if l.All > 0 {
		add("all killed and started: all serve after", "%.2f s", l.All.Seconds())
	}
	for _, one := range []struct {
		what  string
		times []time.Duration
	}{{"its acknowledgement", l.Acked}, {"the first agent", l.First}, {"the last agent", l.Last}} {
		if sorted := slices.Sorted(slices.Values(one.times)); len(sorted) > 0 {
			add("from a change to "+one.what+", p50, p99, max", "%.0f, %.0f, %.0f ms",
				millis(drive.Quantile(sorted, 0.5)), millis(drive.Quantile(sorted, 0.99)), millis(drive.Quantile(sorted, 1)))
		}
	}
	return out
}
