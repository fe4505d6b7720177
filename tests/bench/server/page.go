package main

import (
	"bytes"
	"fmt"
	"strings"
)

// notes say how to read the figures.
func (r *report) notes() []string {
	o := r.options
	return []string{
		fmt.Sprintf("**Everything runs on one machine:** %d servers of each store on loopback addresses of their own, all on one disk, with the settings that they come with, and the clients. So the figures are those of a machine that is busy: with a machine for each server all stores are faster.", o.servers),
		fmt.Sprintf("**Writes:** %d clients, spread evenly over the servers, each with one connection, write to %d keys of their own in turn: a compare-and-set of one key, which fails if the key has another revision than the client saw last. The value is the same JSON for all, of %d B. A client asks again as soon as it is answered. A write counts when it is acknowledged, which each store does once a majority has synced it to the disk.", o.clients, o.keys, o.bytes),
		"**meshd** is written to by its HTTPS API, `PUT /v1/nodes/NAME?revision=N` with a token: authentication, authorization, strict decoding, validation and the chained audit log are in it. **etcd** is written to by its gRPC API, a transaction of one comparison and one put, with TLS between its members and to clients, and without authentication of users. Its client here is leaner than its own. **Bare hashicorp/raft** has nothing around it: plain TCP, no authentication, a map, and clients that know the leader. It tells what Raft and the disk take.",
		"**In turn:** in each round every store is measured once, in an order that rotates; the others run and are idle. A figure is the median over the rounds; a ratio is taken within each round first, so that what disturbs a while disturbs both. Intervals are order statistics of the rounds, which cover the true median with at least 95 % from six rounds on, and are the whole range with fewer than nine.",
		"**CPU** is user and system time from the processes' CPU clocks within the window, divided by the acknowledged writes in it.",
		fmt.Sprintf("**Leader killed or stopped:** one client for each of the other servers, which is connected already, writes new keys: again %s after a refusal, and again after %s without an answer, the same for both stores. The time is from the signal to the first acknowledgement. The stores take turns, and the server that was hit is back before the next turn. Both have the same timers: %s, %s and %s.",
			tryPause, tryTimeout, raftHeartbeat, raftElection, raftLease),
		"**Elections** are counted by the term, which grows with each.",
		"**A large mesh** is filled as it would be: every agent joins with a token and registers its instances over the connection that holds its lease; intentions are applied by the API. The agents are the connection, the view and the way of coming back of a real one, each with its own certificate and TLS connection, in one process on the same machine; they have no proxies. **Memory** is anonymous and shared pages that a server has written, with all agents connected, 15 s after the last change. **Restart** is from the start of the killed server's process until it answers a linearizable read, with its whole state on disk. **A change** is written by the API, concerns every agent, and counts from before it is asked for. **In step:** all agents are at one server that does not lead; it is killed; a change is written at once, and the time ends when the last agent has that, over its new connection.",
	}
}

// page writes the report as documentation.
func (r *report) page() []byte {
	var out bytes.Buffer
	fmt.Fprintf(&out, "# Benchmarks of the servers\n\nMeasured on %s by `make bench-server`, which measures your machine: figures of\ndifferent machines, or of different runs, say little about each other. How to\nread them stands below.\n\n", r.Date)
	for _, line := range r.head() {
		fmt.Fprintf(&out, "- %s\n", line)
	}
	for _, s := range r.sections() {
		fmt.Fprintf(&out, "\n## %s\n\n", s.title)
		if s.intro != "" {
			fmt.Fprintf(&out, "%s\n\n", s.intro)
		}
		fmt.Fprintf(&out, "| %s |\n|%s\n", strings.Join(s.columns, " | "), strings.Repeat("---|", len(s.columns)))
		for _, row := range s.rows {
			fmt.Fprintf(&out, "| %s |\n", strings.Join(row, " | "))
		}
	}
	out.WriteString("\n## How to read them\n\n")
	for _, note := range r.notes() {
		fmt.Fprintf(&out, "- %s\n", note)
	}
	out.WriteString("\n## Measure yourself\n\n```sh\nmake bench-server                                       # about ten minutes; writes this page\nmake bench-server BENCH_SERVER=-quick                   # about four minutes, and writes nothing\nmake bench-server BENCH_SERVER='-only writes -rounds 3' # one part of it\n```\n\nEvery single measurement is in `bin/bench-server.json` afterwards; `-help` lists\nthe rest.\n")
	return out.Bytes()
}
