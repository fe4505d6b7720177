package main

import (
	"bytes"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"
)

// notes say how to read the figures.
func notes() []string {
	return []string{
		"**CPU** is user and system time of the proxy processes within a window, from their CPU clocks, divided by the requests answered (or by the bytes that arrived) in it. Client and backend are not in it: each is one thread that waits in epoll, the same for all. But they share the machine, so that requests per second and latencies tell what is left for them, too.",
		"**Interleaved:** in each round every contender is measured once per case, in an order that rotates. All run side by side; those that are not measured are idle. A figure is the median over the rounds; a ratio or difference is taken within each round first, so that what disturbs a while disturbs both.",
		"**Intervals** are order statistics of the rounds: of ten, the second smallest to the second largest, which covers the true median with 97.9 % whatever the distribution. With fewer than nine rounds it is the whole range.",
		"**Saturation:** every connection asks again as soon as it is answered. **Constant rate:** requests are due at fixed times whatever became of those before, and a latency counts from when the request was due: one that stood in line behind a stall has waited (coordinated omission).",
		"**Unpinned:** every process may use every CPU, and has as many threads as is its default. **Pinned:** the proxies have one CPU, client and backend the other.",
		fmt.Sprintf("**The same work:** every contender is configured for %d clusters of %d endpoints, chooses the less loaded of two, reuses connections, enforces %d access rules (each a caller, for GET, HEAD and POST, but not under /admin/), adds x-forwarded-client-cert, counts for Prometheus and is scraped once before; none writes an access log. The benchmark checks before it measures that the header arrives and that /admin/ is refused. Two hops prove both sides with P-256 certificates over TLS 1.3, %s. HAProxy can't look at the URI in a certificate, so it compares the subject's common name, which has the same text.",
			clusters, endpoints, rules, cipherSuite),
		"**One plain hop:** mesh-proxy has none. Whatever leaves it for the mesh is mutual TLS, and no plan says otherwise. What stands here as mesh-proxy is a program of the benchmark with the mesh's own HTTP engine, policy, balancer and counters around it, which does per request what the data plane does, without its table of live connections. Rules go by source address there for the others.",
		fmt.Sprintf("**HTTP/2 and gRPC:** both ends speak HTTP/2, with prior knowledge where it is plain; %d connections of %d requests at once. A unary call has a message of 100 B and is answered with one of the size that is told; in streaming each stream sends the next message once the last is answered, and a request is such a turn. nghttpx knows neither access rules nor metrics nor more than the one cluster, and net/http is a proxy of a few lines: they do less. Envoy's windows are 64 KiB and 1 MiB, as its makers advise for an edge. A slow stream is one whose answer never ends and is never given more room than a stream has at first.",
			connections2, streams2),
		"**Private memory** is what a process has written: anonymous pages and shared memory, Pss_Anon and Pss_Shmem of /proc/PID/smaps_rollup. Pages of the program's file and of libraries are apart: the kernel may drop them, and processes of one program share them.",
	}
}

func (r *report) head() []string {
	out := append([]string{r.Machine}, r.Versions...)
	out = append(out, r.Absent...)
	for _, o := range r.Others {
		out = append(out, fmt.Sprintf("%s: meanwhile other processes took %.0f %% of the CPUs, and the hypervisor %.0f %%",
			o.Setting, 100*o.Processes, 100*o.Stolen))
	}
	for _, what := range r.Failed {
		out = append(out, "failed: "+strings.ReplaceAll(what, "\n", " "))
	}
	return out
}

// asText prints the report for a terminal.
func asText(w io.Writer, r *report, sections []section) error {
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	var out bytes.Buffer
	for _, line := range r.head() {
		fmt.Fprintln(&out, line)
	}
	fmt.Fprintln(&out, r.Setup, "Took", r.Took.Round(time.Second))
	for _, s := range sections {
		if len(s.rows) == 0 {
			continue
		}
		fmt.Fprintf(&out, "\n%s\n", s.title)
		if s.intro != "" {
			fmt.Fprintln(&out, s.intro)
		}
		fmt.Fprintln(&out, strings.Join(s.columns, "\t"))
		for _, row := range s.rows {
			fmt.Fprintln(&out, strings.Join(row, "\t"))
		}
	}
	if r.options.verbose {
		for _, c := range r.Configs {
			fmt.Fprintf(&out, "\n# %s\n%s\n", c.Name, c.Text)
		}
	}
	if _, err := out.WriteTo(table); err != nil {
		return err
	}
	return table.Flush()
}

// asPage writes the report as documentation.
func asPage(r *report, sections []section) []byte {
	var out bytes.Buffer
	fmt.Fprintf(&out, "# Benchmarks\n\nMeasured on %s by `make bench`, which measures your machine: figures of\ndifferent machines, or of different runs, say little about each other. How to\nread them stands below.\n\n", r.Date)
	for _, line := range r.head() {
		fmt.Fprintf(&out, "- %s\n", line)
	}
	fmt.Fprintf(&out, "- %s\n", r.Setup)
	for _, s := range sections {
		if len(s.rows) == 0 {
			continue
		}
		fmt.Fprintf(&out, "\n## %s\n\n", s.title)
		if s.intro != "" {
			fmt.Fprintf(&out, "%s\n\n", s.intro)
		}
		fmt.Fprintf(&out, "| %s |\n|%s\n", strings.Join(s.columns, " | "), strings.Repeat("---|", len(s.columns)))
		for _, row := range s.rows {
			fmt.Fprintf(&out, "| %s |\n", strings.Join(row, " | "))
		}
	}
	fmt.Fprint(&out, "\n## How to read them\n\n")
	for _, note := range notes() {
		fmt.Fprintf(&out, "- %s\n", note)
	}
	if len(r.Configs) > 0 {
		fmt.Fprintf(&out, "\n## Configurations\n\nShortened; DIR/hosts and DIR/callers have %d lines. Envoy's, which does the same with\nits RBAC filter, forward_client_cert_details and LEAST_REQUEST, and without request\nids, headers of its own and route timeouts, is in `bin/bench.json` with all others.\n", rules)
	}
	for _, c := range r.Configs {
		if c.short() == "" {
			continue
		}
		fmt.Fprintf(&out, "\n### %s\n\n```text\n%s\n```\n", c.Name, c.short())
	}
	fmt.Fprint(&out, "\n## Measure yourself\n\n```sh\nmake bench                              # about an hour; writes this page\nmake bench BENCH=-quick                 # about five minutes\nmake bench BENCH='-only two-hops -v'    # and print every configuration\nmake bench BENCH='-only h2 -call unary -body 100 -load saturation -cpus unpinned'  # one row, two minutes\n```\n\nEvery single measurement and every configuration is in `bin/bench.json`\nafterwards. `-mesh-proxy` and `-versus` compare two builds in one run; `-help`\nlists the rest.\n")
	return out.Bytes()
}
