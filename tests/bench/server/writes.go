package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"github.com/meshd/meshd/tests/bench/server/drive"
)

var errNoLeader = errors.New("no member leads")

// measure runs one job of writes in a process of its own.
func (o options) measure(ctx context.Context, c *cluster, clients int, warmup, window time.Duration) (out drive.Result, err error) {
	if err := c.alive(); err != nil {
		return out, err
	}
	if c.to, err = c.target(ctx); err != nil {
		return out, err
	}
	job := drive.Job{
		Target: c.to, Clients: clients, Keys: o.keys, Bytes: o.bytes, Prefix: c.prefix(),
		Warmup: warmup, Window: window, Processes: c.pids(),
	}
	input, err := json.Marshal(job)
	if err != nil {
		return out, err
	}
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, o.self, driveCommand)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(input), &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return out, fmt.Errorf("%w: %s", err, strings.TrimSpace(stderr.String()))
	}
	return out, json.Unmarshal(stdout.Bytes(), &out)
}

// writes measures the stores in turn, with all clients and with one for each
// server. Each round begins with another store.
func (o options) writes(ctx context.Context, r *report, clusters []*cluster) error {
	for round := range o.rounds {
		for clients, windows := range map[int][2]time.Duration{
			o.clients: {o.warmup, o.window},
			o.servers: {o.lightWindow / 4, o.lightWindow},
		} {
			for i := range clusters {
				c := clusters[(i+round)%len(clusters)]
				out, err := o.measure(ctx, c, clients, windows[0], windows[1])
				switch {
				case ctx.Err() != nil:
					return ctx.Err()
				case err != nil: // the others go on
					r.fail(fmt.Sprintf("writes of %d clients to %s, round %d: %v", clients, c.name, round+1, err))
				default:
					r.Writes = append(r.Writes, writes{Name: c.name, Round: round, Clients: clients, Result: out})
					fmt.Fprintf(os.Stderr, "bench-server: round %d of %d: %s, %d clients: %.0f/s, p50 %.1f ms, p99 %.1f ms, CPU per write: servers %.0f µs, client %.0f µs, failed %d\n",
						round+1, o.rounds, c.name, clients, out.PerSecond(), p50(out), p99(out), serverCPU(out), clientCPU(out), out.Failed)
				}
			}
		}
	}
	return nil
}
